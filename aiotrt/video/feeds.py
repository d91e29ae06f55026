"""Where pictures come from, one at a time: a decoder or an iterator in its thread, a sequence, an async iterator."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import numbers
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from aiotrt._workers import Workers
from aiotrt.video.decoding import Decoder, Opening
from aiotrt.video.frames import Frame, Held, Picture
from aiotrt.video.reports import Kind

__all__ = ["AsyncFeed", "DecoderFeed", "Feed", "Item", "IteratorFeed", "SequenceFeed"]

T = TypeVar("T")
log = logging.getLogger("aiotrt.video")

_END = object()


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        picture: its pixels.
        time: seconds, by the source's clock; None if it says none.
        seconds: what it took to read and decode.
    """

    picture: Picture
    time: float | None
    seconds: float


class Feed(Protocol):
    """An opened source."""

    async def read(self) -> Item | None:
        """The next picture, None at the end; raises what ends the source. Cancelled, the feed can only be closed."""
        ...

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """What went wrong since the last time without ending it."""
        ...

    async def aclose(self) -> None:
        """Let it go, when what runs in a thread for it has ended."""
        ...


class _Worker:
    """One thread for what blocks, in order.

    Args:
        patience: seconds that closing waits for a call that does not return.
    """

    def __init__(self, name: str, patience: float) -> None:
        self._name = name
        self._patience = patience
        self._pool = Workers(1, f"aiotrt-{name}")

    async def call(self, function: Callable[[], T]) -> T:
        """Call it in the thread. Cancelled, it runs on alone."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def close(self, function: Callable[[], object]) -> None:
        """Call it after all that was called before, and end the thread."""
        last = asyncio.get_running_loop().run_in_executor(self._pool, function)
        done, _ = await asyncio.wait([last], timeout=self._patience)
        self._pool.shutdown(wait=bool(done))  # the thread has nothing left to do then, and ends at once
        if not done:
            log.warning("%s: a read has not returned after %g s; its thread ends when it does", self._name, self._patience)
        elif (error := last.exception()) is not None:
            log.warning("%s: closing it failed: %s", self._name, error)


class DecoderFeed:
    """A file, URL or camera, decoded in a thread of its own."""

    def __init__(self, worker: _Worker, decoder: Decoder) -> None:
        self._worker = worker
        self._decoder = decoder

    @classmethod
    async def open(cls, opening: Opening, name: str) -> DecoderFeed:
        """Open it, in its thread. Cancelled, the thread closes what it opened."""
        worker = _Worker(name, opening.timeout)
        opened: list[Decoder] = []

        def close() -> None:
            for decoder in opened:
                decoder.close()

        def make() -> Decoder:
            opened.append(Decoder(opening))
            return opened[0]

        try:
            return cls(worker, await worker.call(make))
        except BaseException:
            await worker.close(close)
            raise

    @property
    def decoder(self) -> Decoder:
        """What it reads from."""
        return self._decoder

    async def read(self) -> Item | None:
        """See `Feed`."""
        return await self._worker.call(self._read)

    def _read(self) -> Item | None:
        started = time.perf_counter()
        found = self._decoder.read()
        return None if found is None else Item(*found, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """See `Feed`."""
        notes = self._decoder.notes
        while notes:
            yield notes.popleft()

    async def aclose(self) -> None:
        """See `Feed`."""
        await self._worker.close(self._decoder.close)


class SequenceFeed:
    """Frames that are all there: taken on the loop's thread, since that takes no time."""

    def __init__(self, frames: Sequence[Any]) -> None:
        self._frames = iter(frames)

    async def read(self) -> Item | None:
        """See `Feed`."""
        await asyncio.sleep(0)  # else a source that nobody holds back would keep the loop for itself
        value = next(self._frames, _END)
        return None if value is _END else item_of(value, 0.0)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """None."""
        return ()

    async def aclose(self) -> None:
        """There is nothing to let go."""
        return


class IteratorFeed:
    """Any iterator, called in a thread of its own."""

    def __init__(self, frames: Iterator[Any], name: str, patience: float) -> None:
        self._frames = frames
        self._worker = _Worker(name, patience)

    async def read(self) -> Item | None:
        """See `Feed`."""
        return await self._worker.call(self._read)

    def _read(self) -> Item | None:
        started = time.perf_counter()
        value = next(self._frames, _END)
        return None if value is _END else item_of(value, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """None."""
        return ()

    async def aclose(self) -> None:
        """See `Feed`."""
        close: Callable[[], object] = getattr(self._frames, "close", lambda: None)
        await self._worker.close(close)


class AsyncFeed:
    """Any asynchronous iterator."""

    def __init__(self, frames: AsyncIterator[Any]) -> None:
        self._frames = frames

    async def read(self) -> Item | None:
        """See `Feed`."""
        started = time.perf_counter()
        try:
            value = await anext(self._frames)
        except StopAsyncIteration:
            return None
        return item_of(value, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """None."""
        return ()

    async def aclose(self) -> None:
        """See `Feed`."""
        if inspect.isasyncgen(self._frames):
            await self._frames.aclose()


def item_of(value: Any, seconds: float) -> Item:
    """What an iterable gave: a frame, an array, or a pair of a time in seconds and one of these.

    Raises:
        ValueError: it is a tuple of another form.
    """
    time_: float | None = None
    if isinstance(value, tuple):
        if len(value) != 2 or not (value[0] is None or isinstance(value[0], numbers.Real)):
            given = ", ".join(type(part).__name__ for part in value)
            raise ValueError(f"expected a frame, or a pair (seconds, frame), the time first; got a tuple ({given})")
        time_, value = value
    picture: Picture
    if isinstance(value, Frame):
        picture, time_ = value._picture, value.time if time_ is None else time_
    else:
        picture = Held(np.asarray(value))
    # Not a number would be the time of all that is reckoned from it: loops, pace, films.
    return Item(picture, time_ if time_ is not None and math.isfinite(time_) else None, seconds)
