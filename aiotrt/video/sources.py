"""Sources of frames: files, URLs, cameras and iterables, with their own time, loops, pace and reconnection."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from aiotrt.completion.hub import check_asyncio
from aiotrt.errors import InputError, UsageError
from aiotrt.video.cancellation import only_own
from aiotrt.video.decoding import Opening, camera
from aiotrt.video.feeds import AsyncFeed, DecoderFeed, Feed, Item, IteratorFeed, SequenceFeed
from aiotrt.video.frames import Frame
from aiotrt.video.reports import Kind, Listener, Report, SourceError

__all__ = ["Backoff", "Source", "SourceLike", "SourceState", "open"]

#: A path, a URL, a camera's number, an iterable of frames, or a function that makes one anew.
SourceLike: TypeAlias = (
    "str | os.PathLike[str] | int | Iterable[Any] | AsyncIterable[Any] | Callable[[], Iterable[Any] | AsyncIterable[Any]] "
    "| Source"
)


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a source that went away is tried again.

    Args:
        first: seconds before the first attempt.
        factor: from one attempt to the next.
        longest: seconds, at most.
        attempts: in a row, before it is given up; None for ever.

    Raises:
        InputError: one of them is out of range.
    """

    first: float = 0.5
    factor: float = 2.0
    longest: float = 30.0
    attempts: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("factor", self.factor), ("longest", self.longest)):
            if not value >= 0:
                raise InputError(f"{name} must be at least 0, got {value!r}")
        if self.attempts is not None and self.attempts < 0:
            raise InputError(f"attempts must be at least 0 or None, got {self.attempts!r}")

    def delay(self, attempt: int) -> float | None:
        """Seconds before this attempt, counted from 0; None if it is given up."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        return float(min(self.longest, self.first * self.factor ** min(attempt, 64)))


class SourceState(Enum):
    """How a source is."""

    CLOSED = "closed"
    RUNNING = "running"
    RECONNECTING = "reconnecting"
    ENDED = "ended"
    FAILED = "failed"


class Source:
    """Frames of one source: ``async with`` opens and closes it, ``async for`` reads it. Made by `open`.

    Attributes:
        name: what it is called.
        is_live: whether it goes on whether or not anybody reads.
        state: how it is.
        counts: reports, by kind.
        count: frames given so far.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Feed]],
        name: str,
        *,
        live: bool,
        ends: bool,
        loop: bool,
        realtime: bool,
        fps: float | None,
        reconnect: Backoff | None,
        limit: int | None,
        max_pixels: int,
    ) -> None:
        self.name = name
        self.is_live = live
        self.state = SourceState.CLOSED
        self.counts: Counter[Kind] = Counter()
        self.count = 0
        self.clock: Callable[[], float] = time.perf_counter
        self.listener: Listener | None = None
        self._connect = connect
        self._ends = ends
        self._loops = loop
        self._realtime = realtime
        self._fps = fps
        self._backoff = reconnect
        self._limit = limit
        self._max_pixels = max_pixels
        self._feed: Feed | None = None
        self._attempt = 0
        self._size: tuple[int, ...] | None = None
        self._offset = 0.0  # seconds: what this turn's times are behind, of a source that loops
        self._resumes: float | None = None  # seconds: when a turn's first frame follows, which says the offset
        self._last = 0.0  # seconds: the last frame's time, and how long it stood
        self._interval = 0.0
        self._turn = 0  # frames in this turn
        self._begin: float | None = None  # by the clock, when the frame of time 0 is due

    @property
    def frames(self) -> int | None:
        """How many frames it says it has, if it says so."""
        return self._feed.decoder.frames if isinstance(self._feed, DecoderFeed) and not self._loops else None

    async def __aenter__(self) -> Self:
        if self.state is not SourceState.CLOSED:
            raise UsageError(f"source {self.name!r} can be opened once; make another one with video.open")
        check_asyncio(f"source {self.name!r}")
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        frame = await self.take()
        if frame is None:
            raise StopAsyncIteration
        await asyncio.to_thread(lambda: frame.image)
        return frame

    async def start(self) -> None:
        """Open it.

        Raises:
            SourceError: it cannot be opened, and is not tried again.
        """
        while self._feed is None:
            try:
                with only_own():
                    self._feed = await self._connect()
            except Exception as error:
                await self._lost(error)
        if self.state is SourceState.CLOSED:
            self.state = SourceState.RUNNING  # one that comes back does so with its first frame

    async def take(self) -> Frame | None:
        """The next frame, not converted yet; None at the end.

        Raises:
            SourceError: it broke, and is not tried again.
        """
        if self._limit is not None and self.count >= self._limit:
            self.state = SourceState.ENDED
        if self.state in (SourceState.ENDED, SourceState.FAILED):
            return None
        while True:
            await self.start()
            feed = self._feed
            assert feed is not None
            try:
                with only_own():
                    item = await feed.read()
                self._tell(feed)
                frame = None if item is None else self._frame(item)
            except Exception as error:
                self._tell(feed)
                await self._drop()
                await self._lost(error)
                continue
            if item is None:
                if await self._turned():
                    continue
                self.state = SourceState.ENDED
                return None
            if frame is not None:
                await self._pace(frame)
                self.count += 1  # only now: cancelled while it was held back, it was never given
                return frame

    async def aclose(self) -> None:
        """Close it. Idempotent."""
        if self.state is not SourceState.FAILED:
            self.state = SourceState.ENDED
        await self._drop()

    def report(self, kind: Kind, detail: str, error: BaseException | None = None) -> None:
        """Count, and tell whoever listens."""
        self.counts[kind] += 1
        if self.listener is not None:
            self.listener(Report(kind, self.name, detail, error))

    async def _drop(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            with contextlib.suppress(Exception):  # of a source that is given up, or broken already
                with only_own():
                    await feed.aclose()

    def _tell(self, feed: Feed) -> None:
        for kind, detail in feed.notes():
            self.report(kind, detail)

    async def _lost(self, error: Exception) -> None:
        """Wait before the next attempt, or raise if there is none."""
        delay = None if self._backoff is None else self._backoff.delay(self._attempt)
        if delay is None:
            self.state = SourceState.FAILED
            if isinstance(error, (SourceError, InputError, ImportError)):
                raise error
            raise SourceError(f"{self.name}: {type(error).__name__}: {error}") from error
        self._attempt += 1
        if self.state is not SourceState.RECONNECTING:
            self.report(Kind.LOST, f"{error}; next attempt in {delay:g} s", error)
        self.state = SourceState.RECONNECTING
        await asyncio.sleep(delay)

    async def _turned(self) -> bool:
        """The feed has ended: whether another one follows it."""
        if self._loops and self._turn:
            self._resumes = self._last + self._interval
            self._turn = 0
            await self._drop()
            return True
        if not self._ends and self._backoff is not None and not self._is_film():
            await self._drop()
            await self._lost(SourceError(f"{self.name}: the stream ended"))
            return True
        return False

    def _is_film(self) -> bool:
        """Whether what is read says how long it is: a film, though it comes over a network, and its end is the end."""
        return isinstance(self._feed, DecoderFeed) and self._feed.decoder.is_finite

    def _frame(self, item: Item) -> Frame | None:
        shape = item.picture.shape
        if self._attempt:
            self._attempt = 0
            self._begin = None
            self.report(Kind.RECONNECTED, "frames come again")
            self.state = SourceState.RUNNING
        pixels = shape[0] * shape[1] if len(shape) > 1 else 0
        if pixels > self._max_pixels:
            self.report(Kind.HUGE, f"a picture of {shape[1]} by {shape[0]} is over max_pixels={self._max_pixels:,}")
            return None
        if self._size is not None and shape != self._size:
            self.report(Kind.RESOLUTION, f"from {self._size[1]} by {self._size[0]} to {shape[1]} by {shape[0]}")
        self._size = shape
        if (at := item.time) is None and self._fps is not None:
            at = self._turn / self._fps
        if at is not None:
            if self._resumes is not None:  # its own first time need not be 0: a part is read, or that is how it counts
                self._offset, self._resumes = self._resumes - at, None
            at += self._offset
            self._interval = max(0.0, at - self._last) if self._turn else self._interval
            self._last = at
        frame = Frame(self.name, self.count, item.picture, time=at, received=self.clock(), decode_seconds=item.seconds)
        self._turn += 1
        return frame

    async def _pace(self, frame: Frame) -> None:
        """Hold a frame back until its time has come, as a camera would."""
        if not self._realtime or frame.time is None:
            return
        now = self.clock()
        if self._begin is None:
            self._begin = now - frame.time
        delay = self._begin + frame.time - now
        if delay > 0:
            await asyncio.sleep(delay)
        frame.received = self.clock()

    def __repr__(self) -> str:
        return f"<Source {self.name}: {self.state.value}, {self.count} frames>"


def open(  # noqa: A001  # as in `video.open`
    source: SourceLike,
    *,
    name: str | None = None,
    live: bool | None = None,
    loop: bool = False,
    realtime: bool = False,
    fps: float | None = None,
    reconnect: Backoff | None = None,
    start: float = 0.0,
    limit: int | None = None,
    timeout: float = 10.0,
    hardware: str | None = None,
    threads: int = 2,
    container: str | None = None,
    options: Mapping[str, str] | None = None,
    max_pixels: int = 1 << 26,
    stream: int | None = None,
) -> Source:
    """A source of frames: ``async with video.open(...) as frames``, then ``async for frame in frames``.

    Nothing happens before it is entered. Decoding runs in a worker thread of its own.

    Args:
        source: a path; a URL, such as ``rtsp://...``; a camera's number, or its device file; an iterable or asynchronous
            iterable of (height, width, 3) byte arrays, RGB, each alone or in a pair (seconds, array), where a
            time that is not finite, or None, is none; or a function
            that returns such an iterable, called again whenever the source is begun again. A list, tuple or array is read
            on the loop's thread, any other synchronous iterable in a thread.
        name: what it is called in status and results; by default the file's name or the URL without what is secret in it.
        live: whether frames come whether or not anybody takes them; by default URLs and cameras do. What a pipeline's
            policy for it is by default depends on this, and whether it is tried again. A film at a URL is not live.
        loop: begin again at the end; times go on.
        realtime: hand out a file's frames at their times, as a camera would, rather than as fast as they are taken.
        fps: of an iterable whose frames bear no time.
        reconnect: try again when it breaks, with growing delays; by default live URLs and cameras are, for ever. One that
            says how long it is ends at its end.
        start: seconds from the beginning of a file, whatever its clock says there.
        limit: end after so many frames.
        timeout: seconds to open, and for one read, before a URL or camera counts as broken.
        hardware: decode with such a device ("cuda", "vaapi", ...) where PyAV and the codec can, else in software.
        threads: that the decoder may use.
        container: its format, where FFmpeg must be told.
        options: FFmpeg's own.
        max_pixels: larger pictures are left out and counted.
        stream: which of a file's videos, from 0; by default the one that FFmpeg takes for the best, never cover art.

    Pictures are turned upright and mirrored as the file says, as phones store them.

    Raises:
        InputError: an option is out of range.

    Entering raises:
        SourceError: it is missing, is no video, or has no video in it.
        MissingDependencyError: PyAV is not installed.
    """
    if isinstance(source, Source):
        return source
    if not (start >= 0 and math.isfinite(start)):
        raise InputError(f"start must be a number of seconds from 0 on, got {start!r}")
    for option, number in (("timeout", timeout), ("fps", fps), ("max_pixels", max_pixels)):
        if number is not None and not number > 0:
            raise InputError(f"{option} must be positive, got {number!r}")
    for option, number in (
        ("limit", limit),
        ("threads", threads),
        ("stream", stream),
    ):  # 0 threads: as many as FFmpeg thinks best
        if number is not None and number < 0:
            raise InputError(f"{option} must be at least 0, got {number!r}")
    connect: Callable[[], Awaitable[Feed]]
    is_remote, ends = False, True
    if isinstance(source, (str, int, os.PathLike)) and not isinstance(source, bool):
        text = source if isinstance(source, int) else os.fspath(source)
        is_camera = isinstance(text, int) or text.startswith("/dev/video")
        is_url = isinstance(text, str) and "://" in text and not text.startswith("file:")
        is_remote = is_camera or is_url
        ends = not is_remote or live is False
        location, found = camera(text) if is_camera else (str(text), None)
        # FFmpeg takes what is before a colon for a protocol. Text that names no file may mean one, as pipe:0 does.
        has_colon = ":" in location and not is_remote and not location.startswith("file:")
        if has_colon and (isinstance(source, os.PathLike) or Path(location).exists()):
            location = f"file:{location}"
        shown = _without_secrets(location) if is_url else str(text)
        title = name = name or (f"camera {text}" if isinstance(text, int) else shown if is_url else Path(shown).name)
        opening = Opening(
            location, shown, container or found, options or {}, hardware, timeout, start, threads, low_delay=is_remote,
            stream=stream, max_pixels=max_pixels,
        )  # fmt: skip
        most = max_pixels

        async def connect_decoder() -> Feed:
            feed = await DecoderFeed.open(opening, title)
            height, width = feed.decoder.size()
            wrong = None
            if height * width > most:  # before the memory for it is taken
                wrong = f"pictures of {width} by {height} are over max_pixels={most:,}"
            elif not (height and width) and not is_remote:
                wrong = f"its pictures have no size that can be read: they are damaged, or over max_pixels={most:,}"
            if wrong is not None:
                await feed.aclose()
                raise SourceError(f"{title}: {wrong}")
            return feed

        connect = connect_decoder
        if not ends and reconnect is None:
            reconnect = Backoff()
    else:
        name = name or "frames"
        label = name

        async def connect_iterable() -> Feed:
            return _feed_of(source() if callable(source) else source, label, timeout)

        connect = connect_iterable
    return Source(
        connect,
        name,
        live=is_remote or realtime if live is None else live,
        ends=ends,
        loop=loop,
        realtime=realtime,
        fps=fps,
        reconnect=reconnect,
        limit=limit,
        max_pixels=max_pixels,
    )


def _feed_of(frames: object, name: str, patience: float) -> Feed:
    if isinstance(frames, AsyncIterable):
        return AsyncFeed(aiter(frames))
    if isinstance(frames, Sequence):
        return SequenceFeed(frames)
    if isinstance(frames, np.ndarray):
        return SequenceFeed(list(frames))
    if isinstance(frames, Iterable):
        return IteratorFeed(iter(frames), name, patience)
    raise InputError(
        f"source {name!r}: expected a path, a URL, a camera's number or an iterable, got {type(frames).__name__}"
    )


def _without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment, fit for logs."""
    # As urlsplit and FFmpeg split it; urlsplit itself refuses some, in words that repeat what is secret.
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    # A password that was not escaped cuts itself in two: where that may be so, nothing after the scheme is shown.
    is_cut = "@" in path or not re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host)
    return f"{scheme}://..." if is_cut else f"{scheme}://{host}{slash}{path}"
