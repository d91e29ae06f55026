"""Sources of frames: files, URLs, cameras and iterables, with times, looping, pacing and reconnection."""

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
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from aiotrt.completion.hub import check_asyncio
from aiotrt.errors import InputError, UsageError
from aiotrt.video.cancellation import own_cancellation_only
from aiotrt.video.decoding import Opening, camera
from aiotrt.video.feeds import AsyncFeed, DecoderFeed, Feed, Item, IteratorFeed, SequenceFeed
from aiotrt.video.frames import Frame
from aiotrt.video.reports import Kind, Listener, Report, SourceError, UnsupportedError

__all__ = ["Backoff", "Source", "SourceLike", "SourceState", "open"]

#: A path, a URL, a camera's number, an iterable of frames, or a function that returns a new iterable.
SourceLike: TypeAlias = (
    "str | os.PathLike[str] | int | Iterable[Any] | AsyncIterable[Any] | Callable[[], Iterable[Any] | AsyncIterable[Any]] "
    "| Source"
)


@dataclass(frozen=True)
class Backoff:
    """The delays before attempts to open a lost source again.

    Args:
        first: the delay before the first attempt, in seconds.
        factor: by which the delay grows from one attempt to the next.
        longest: the maximum delay, in seconds.
        attempts: the number of attempts without success after which the source fails; None for no limit.

    Raises:
        InputError: an argument is out of range.
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
        """Return the seconds before an attempt, counted from 0; None if there are no more attempts."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        return float(min(self.longest, self.first * self.factor ** min(attempt, 64)))


class SourceState(Enum):
    """The state of a source."""

    CLOSED = "closed"
    RUNNING = "running"
    RECONNECTING = "reconnecting"
    ENDED = "ended"
    FAILED = "failed"


class Source:
    """Frames of one source: ``async with`` opens and closes it, ``async for`` reads it. Created by `open`.

    Attributes:
        name: in status, results and messages.
        is_live: whether it produces frames independently of the reader.
        state: the present state.
        counts: the number of reports, by kind.
        count: the number of frames given so far.
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
        self._offset = 0.0  # seconds that a looping source adds to the times of this pass
        self._resumes: float | None = None  # seconds: the time for the first frame of a new pass, which sets the offset
        self._last = 0.0  # time of the last frame, in seconds
        self._interval = 0.0  # seconds between the last two frames
        self._pass_count = 0  # frames in this pass
        self._begin: float | None = None  # clock time at which the frame of time 0 is due

    @property
    def frames(self) -> int | None:
        """The number of frames that a file declares; None if it declares none, or if the source loops."""
        return self._feed.decoder.frames if isinstance(self._feed, DecoderFeed) and not self._loops else None

    async def __aenter__(self) -> Self:
        if self.state is not SourceState.CLOSED:
            raise UsageError(f"source {self.name!r} can be opened only once; create another one with video.open")
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
        if not frame.is_on_device:
            await asyncio.to_thread(lambda: frame.image)
        return frame

    async def start(self) -> None:
        """Open the source, with further attempts if it has a `Backoff`.

        Raises:
            SourceError: the source cannot be opened, and there are no more attempts.
        """
        while self._feed is None:
            try:
                with own_cancellation_only():
                    self._feed = await self._connect()
            except Exception as error:
                await self._lost(error)
        if self.state is SourceState.CLOSED:
            self.state = SourceState.RUNNING  # a reconnecting source becomes running with its first frame

    async def take(self) -> Frame | None:
        """Return the next frame, not converted yet; None at the end. If cancelled, no frame is counted.

        Raises:
            SourceError: the source failed, and there are no more attempts.
        """
        if self._limit is not None and self.count >= self._limit:
            self.state = SourceState.ENDED
        if self.state in (SourceState.ENDED, SourceState.FAILED):
            return None
        while True:
            if (feed := self._feed) is None:
                await self.start()
                continue
            try:
                with own_cancellation_only():
                    item = await feed.read()
                self._report_notes(feed)
                frame = None if item is None else self._frame(item)
            except Exception as error:
                self._report_notes(feed)
                await self._drop()
                await self._lost(error)
                continue
            if item is None:
                if await self._begins_again():
                    continue
                self.state = SourceState.ENDED
                return None
            if frame is not None:
                if self._realtime:
                    await self._pace(frame)
                self.count += 1  # after pacing: a frame cancelled there was never given
                return frame

    async def aclose(self) -> None:
        """Close the source. Idempotent."""
        if self.state is not SourceState.FAILED:
            self.state = SourceState.ENDED
        await self._drop()

    def report(self, kind: Kind, detail: str, error: BaseException | None = None) -> None:
        """Count a problem, and pass a report to the listener."""
        self.counts[kind] += 1
        if self.listener is not None:
            self.listener(Report(kind, self.name, detail, error))

    async def _drop(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            with contextlib.suppress(Exception):  # the source is not used any more, or has failed already
                with own_cancellation_only():
                    await feed.aclose()

    def _report_notes(self, feed: Feed) -> None:
        for kind, detail in feed.notes():
            self.report(kind, detail)

    async def _lost(self, error: Exception) -> None:
        """Wait before the next attempt to open the source, or raise if there are no more attempts."""
        backoff = None if isinstance(error, UnsupportedError) else self._backoff
        delay = None if backoff is None else backoff.delay(self._attempt)
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

    async def _begins_again(self) -> bool:
        """Handle the end of the feed. Returns whether a new feed follows, for another pass or after a lost connection."""
        if self._loops and self._pass_count:
            self._resumes = self._last + self._interval
            self._pass_count = 0
            await self._drop()
            return True
        if not self._ends and self._backoff is not None and not self._is_finite():
            await self._drop()
            await self._lost(SourceError(f"{self.name}: the stream ended"))
            return True
        return False

    def _is_finite(self) -> bool:
        """Return whether the feed declares its length: then it is a video file, even at a URL, and its end is final."""
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
            at = self._pass_count / self._fps
        if at is not None:
            if self._resumes is not None:  # the first time of a pass need not be 0, for instance with `start`
                self._offset, self._resumes = self._resumes - at, None
            at += self._offset
            self._interval = max(0.0, at - self._last) if self._pass_count else self._interval
            self._last = at
        frame = Frame(self.name, self.count, item.picture, time=at, received=self.clock(), decode_seconds=item.seconds)
        self._pass_count += 1
        return frame

    async def _pace(self, frame: Frame) -> None:
        """Wait until a frame's time, as a camera would."""
        if frame.time is None:
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
    decode: Literal["cpu", "gpu", "auto"] = "cpu",
    device: str | int | None = None,
) -> Source:
    """Create a source of frames: ``async with video.open(...) as frames``, then ``async for frame in frames``.

    Nothing is opened before the block is entered. Decoding runs in its own worker thread.

    Args:
        source: a path; a URL, such as ``rtsp://...``; a camera's number or device file; an iterable or asynchronous iterable
            of (height, width, 3) byte arrays, RGB, each alone or in a pair (seconds, array), where None or a time that is
            not finite means no time; or a function that returns such an iterable, called whenever the source begins again. A
            list, tuple or array is read on the event loop's thread, any other synchronous iterable in a worker thread.
        name: in status and results; by default the file's name, or the URL without secrets.
        live: whether the source produces frames independently of the reader; by default true for URLs and cameras. It
            determines a pipeline's default policy, and whether the source is opened again when it ends or is lost. Pass
            False for a video file at a URL.
        loop: start again at the end; times continue.
        realtime: give a file's frames at their times, as a camera would, rather than as fast as they are read.
        fps: frames a second of an iterable whose frames have no time.
        reconnect: the delays before attempts to open a lost source again; by default ``Backoff()`` for live URLs and
            cameras. A URL of a video file that declares its length ends at its end.
        start: seconds from the beginning of a file where reading begins, whatever the file's own clock.
        limit: the number of frames after which the source ends.
        timeout: seconds for opening, and for one read, after which a URL or camera counts as lost.
        hardware: decode with this kind of device ("cuda", "vaapi", ...) where PyAV and the codec can, else in software.
        threads: the number that the decoder may use; 0 for FFmpeg's choice.
        container: the format, if FFmpeg cannot detect it.
        options: passed to FFmpeg.
        max_pixels: larger pictures are skipped and counted.
        stream: the index among a file's video streams, from 0; by default FFmpeg's choice, which is never cover art.
        decode: "cpu" decodes with FFmpeg. "gpu" decodes with NVDEC into device memory (`Frame.device_image`), and raises if
            it cannot. "auto" uses the GPU if it can, else the CPU; a report of kind "decoder" says which, and why.
        device: the GPU, such as "cuda:1" or 1; by default the current one.

    NVDEC decodes H.264 and HEVC with 8 bits, 4:2:0 and progressive pictures. Opening, reading, times and reconnection are
    FFmpeg's for every `decode`. If a packet is damaged as far as its flags, units and slice headers show, or NVDEC leaves a
    picture out, FFmpeg decodes from the last keyframe to the next one, and reports as for "cpu". NVDEC conceals damage in
    the coded data of a slice and reports nothing: such a picture is given as a good one.

    Pictures are rotated and mirrored as the file's display matrix says, which phones write.

    Raises:
        InputError: an option is out of range.
        SourceError: on entering: the source is missing, is not a video, or contains no video stream; with
            ``decode="gpu"`` also if PyNvVideoCodec is not installed or the GPU cannot decode the source.
        MissingDependencyError: on entering: PyAV is not installed.
    """
    if isinstance(source, Source):
        return source
    if not (start >= 0 and math.isfinite(start)):
        raise InputError(f"start must be a finite number of seconds, at least 0, got {start!r}")
    for option, number in (("timeout", timeout), ("fps", fps), ("max_pixels", max_pixels)):
        if number is not None and not number > 0:
            raise InputError(f"{option} must be positive, got {number!r}")
    for option, number in (
        ("limit", limit),
        ("threads", threads),
        ("stream", stream),
    ):  # 0 threads: FFmpeg chooses
        if number is not None and number < 0:
            raise InputError(f"{option} must be at least 0, got {number!r}")
    if decode not in ("cpu", "gpu", "auto"):
        raise InputError(f"decode must be 'cpu', 'gpu' or 'auto', got {decode!r}")
    if decode != "cpu" and hardware is not None:
        raise InputError(f"decode={decode!r} and hardware={hardware!r} exclude each other: leave one out")
    connect: Callable[[], Awaitable[Feed]]
    is_remote, ends = False, True
    if isinstance(source, (str, int, os.PathLike)) and not isinstance(source, bool):
        text = source if isinstance(source, int) else os.fspath(source)
        is_camera = isinstance(text, int) or text.startswith("/dev/video")
        is_url = isinstance(text, str) and "://" in text and not text.startswith("file:")
        is_remote = is_camera or is_url
        ends = not is_remote or live is False
        location, found = camera(text) if is_camera else (str(text), None)
        # FFmpeg takes text before a colon for a protocol. A text that names no file may mean one, such as pipe:0.
        has_colon = ":" in location and not is_remote and not location.startswith("file:")
        if has_colon and (isinstance(source, os.PathLike) or Path(location).exists()):
            location = f"file:{location}"
        shown = _without_secrets(location) if is_url else str(text)
        title = name = name or (f"camera {text}" if isinstance(text, int) else shown if is_url else Path(shown).name)
        opening = Opening(
            location, shown, container or found, options or {}, hardware, timeout, start, threads, low_delay=is_remote,
            stream=stream, max_pixels=max_pixels, decode=decode, device=device,
        )  # fmt: skip
        most = max_pixels

        async def connect_decoder() -> Feed:
            feed = await DecoderFeed.open(opening, title)
            height, width = feed.decoder.size()
            wrong = None
            if height * width > most:  # checked before memory for a picture is allocated
                wrong = f"pictures of {width} by {height} are over max_pixels={most:,}"
            elif not (height and width) and not is_remote:
                wrong = f"the size of its pictures cannot be read: they are damaged, or over max_pixels={most:,}"
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


def _feed_of(frames: object, name: str, timeout: float) -> Feed:
    if isinstance(frames, AsyncIterable):
        return AsyncFeed(aiter(frames))
    if isinstance(frames, Sequence):
        return SequenceFeed(frames)
    if isinstance(frames, np.ndarray):
        return SequenceFeed(list(frames))
    if isinstance(frames, Iterable):
        return IteratorFeed(iter(frames), name, timeout)
    raise InputError(
        f"source {name!r}: expected a path, a URL, a camera's number or an iterable, got {type(frames).__name__}"
    )


def _without_secrets(url: str) -> str:
    """Return a URL without user, password, query and fragment, for logs."""
    # Split as urlsplit and FFmpeg do. urlsplit itself rejects some URLs with messages that contain the secrets.
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    # An unescaped password may be split in two, and part of it left in the path or host: then show only the scheme.
    is_cut = "@" in path or not re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host)
    return f"{scheme}://..." if is_cut else f"{scheme}://{host}{slash}{path}"
