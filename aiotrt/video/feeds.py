"""Feeds give pictures one at a time, from a decoder or an iterator in a thread, a sequence or an async iterator."""

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

from aiotrt.video.decoding import Decoder, Opening
from aiotrt.video.frames import Frame, Held, Picture
from aiotrt.video.loop_workers import LoopWorkers
from aiotrt.video.nvdec import GpuDecoder
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
        time: seconds, by the source's clock; None if it has none.
        seconds: the duration of reading and decoding.
    """

    picture: Picture
    time: float | None
    seconds: float


class Feed(Protocol):
    """An opened source."""

    async def read(self) -> Item | None:
        """Return the next picture, or None at the end. After an error or a cancellation the feed can only be closed."""
        ...

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """Return the problems since the last call that did not end the source."""
        ...

    async def aclose(self) -> None:
        """Close the feed after the operation in its thread has ended."""
        ...


class _Worker:
    """One thread that runs blocking calls in order.

    Args:
        name: of the source.
        timeout: seconds that closing waits for a call that does not return.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        self._pool = LoopWorkers(1, f"aiotrt-{name}")

    async def call(self, function: Callable[[], T]) -> T:
        """Call `function` in the thread. If this is cancelled, the function continues to run."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def close(self, function: Callable[[], object]) -> None:
        """Call `function` after all earlier calls, and end the thread."""
        last = asyncio.get_running_loop().run_in_executor(self._pool, function)
        done, _ = await asyncio.wait([last], timeout=self._timeout)
        self._pool.shutdown(wait=bool(done))  # an idle thread ends at once
        if not done:
            log.warning("%s: a read has not returned after %g s; its thread ends when it does", self._name, self._timeout)
        elif (error := last.exception()) is not None:
            log.warning("%s: closing it failed: %s", self._name, error)


class DecoderFeed:
    """A feed that decodes a file, URL or camera in its own thread."""

    def __init__(self, worker: _Worker, decoder: Decoder) -> None:
        self._worker = worker
        self._decoder = decoder

    @classmethod
    async def open(cls, opening: Opening, name: str) -> DecoderFeed:
        """Open a decoder in its thread. If this is cancelled, the thread closes the decoder."""
        worker = _Worker(name, opening.timeout)
        opened: list[Decoder] = []

        def close() -> None:
            for decoder in opened:
                decoder.close()

        def make() -> Decoder:
            opened.append(Decoder(opening) if opening.decode == "cpu" else GpuDecoder(opening))
            return opened[0]

        try:
            return cls(worker, await worker.call(make))
        except BaseException:
            await worker.close(close)
            raise

    @property
    def decoder(self) -> Decoder:
        """The decoder that it reads."""
        return self._decoder

    async def read(self) -> Item | None:
        """Return the next picture; see `Feed.read`."""
        return await self._worker.call(self._read)

    def _read(self) -> Item | None:
        started = time.perf_counter()
        found = self._decoder.read()
        return None if found is None else Item(*found, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """Return the decoder's notes; see `Feed.notes`."""
        notes = self._decoder.notes
        while notes:
            yield notes.popleft()

    async def aclose(self) -> None:
        """Close the decoder and end the thread."""
        await self._worker.close(self._decoder.close)


class SequenceFeed:
    """A feed from a sequence, read on the event loop's thread because that takes no time."""

    def __init__(self, frames: Sequence[Any]) -> None:
        self._frames = iter(frames)

    async def read(self) -> Item | None:
        """Return the next picture; see `Feed.read`."""
        await asyncio.sleep(0)  # otherwise a source without backpressure would block the event loop
        value = next(self._frames, _END)
        return None if value is _END else item_of(value, 0.0)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """Return nothing: iterables report no problems."""
        return ()

    async def aclose(self) -> None:
        """Do nothing: there is nothing to close."""
        return


class IteratorFeed:
    """A feed from an iterator, called in its own thread."""

    def __init__(self, frames: Iterator[Any], name: str, timeout: float) -> None:
        self._frames = frames
        self._worker = _Worker(name, timeout)

    async def read(self) -> Item | None:
        """Return the next picture; see `Feed.read`."""
        return await self._worker.call(self._read)

    def _read(self) -> Item | None:
        started = time.perf_counter()
        value = next(self._frames, _END)
        return None if value is _END else item_of(value, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """Return nothing: iterables report no problems."""
        return ()

    async def aclose(self) -> None:
        """Close the iterator, if it has `close`, and end the thread."""
        close: Callable[[], object] = getattr(self._frames, "close", lambda: None)
        await self._worker.close(close)


class AsyncFeed:
    """A feed from an asynchronous iterator."""

    def __init__(self, frames: AsyncIterator[Any]) -> None:
        self._frames = frames

    async def read(self) -> Item | None:
        """Return the next picture; see `Feed.read`."""
        started = time.perf_counter()
        try:
            value = await anext(self._frames)
        except StopAsyncIteration:
            return None
        return item_of(value, time.perf_counter() - started)

    def notes(self) -> Iterable[tuple[Kind, str]]:
        """Return nothing: iterables report no problems."""
        return ()

    async def aclose(self) -> None:
        """Close the iterator, if it is a generator."""
        if inspect.isasyncgen(self._frames):
            await self._frames.aclose()


def item_of(value: Any, seconds: float) -> Item:
    """Convert a value of an iterable: a frame, an array, or a pair of a time in seconds and one of these.

    Raises:
        ValueError: the value is a tuple of another form.
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
    # NaN would spread to all times computed from it: of loops, of pacing and in written files.
    return Item(picture, time_ if time_ is not None and math.isfinite(time_) else None, seconds)
