"""Decoding by FFmpeg, through PyAV. All of it blocks: `feeds` runs it in a worker thread."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np

from aiotrt.errors import MissingDependencyError
from aiotrt.video.frames import Array
from aiotrt.video.reports import Kind, SourceError

__all__ = ["Decoded", "Decoder", "Opening", "camera", "import_av"]

DAMAGED_IN_A_ROW: Final = 256  # packets, before a source is given up
MISSING: Final = 0.5  # seconds at the end of a file that is as long as it says; its last frame may stand for a while


def import_av() -> Any:
    """PyAV.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("aiotrt.video needs PyAV to decode and encode; pip install 'aiotrt[video]'") from error
    return av


@dataclass(frozen=True)
class Opening:
    """How to open a source.

    Attributes:
        location: a path, URL or device, with what is secret in it.
        title: what messages call it, without that.
        format: of the container, where FFmpeg must be told.
        options: FFmpeg's own, such as ``{"rtsp_transport": "tcp"}``.
        hardware: a kind of hardware decoder, such as "cuda" or "vaapi"; software takes over where it cannot be used.
        timeout: seconds to open, and for each read.
        start: seconds from the beginning where reading begins.
        threads: that the codec may use.
        low_delay: no frames held back for threads to work on.
    """

    location: str
    title: str
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    hardware: str | None = None
    timeout: float = 10.0
    start: float = 0.0
    threads: int = 2
    low_delay: bool = False


class Decoded:
    """A decoded picture, in the codec's own memory and format."""

    _local: Final = threading.local()  # a reformatter for each thread: making one takes longer than using it

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3)."""
        return self._frame.height, self._frame.width, 3

    def array(self) -> Array:
        """A view of what FFmpeg converted to RGB; rows may be padded."""
        reformatter = getattr(self._local, "reformatter", None)
        if reformatter is None:
            reformatter = self._local.reformatter = import_av().video.reformatter.VideoReformatter()
        # One thread: FFmpeg would otherwise start one for each processor, for every frame.
        plane = reformatter.reformat(self._frame, format="rgb24", threads=1).planes[0]
        height, width, channels = self.shape
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : width * channels]
        pixels = rows.reshape(height, width, channels)
        pixels.flags.writeable = False
        return pixels


class Decoder:
    """An opened source: its pictures one after the other. For one thread at a time.

    Raises:
        SourceError: it is missing, is no video, or has no video in it.
        MissingDependencyError: PyAV is not installed.

    Attributes:
        notes: what went wrong without ending it, for whoever reads.
        is_damaged: whether anything did.
    """

    def __init__(self, opening: Opening) -> None:
        av = self._av = import_av()
        self._opening = opening
        self.notes: deque[tuple[Kind, str]] = deque()
        self._ready: deque[Any] = deque()
        self._damaged_in_a_row = 0
        self._count = 0
        self._last = 0.0  # seconds: the last picture's time
        if opening.hardware is not None and opening.hardware not in (known := av.codec.hwaccel.hwdevices_available()):
            raise SourceError(
                f"hardware={opening.hardware!r}: PyAV has no such decoder; it has {', '.join(known) or 'none'}"
            )
        container = self._container = self._opened()
        try:
            if not container.streams.video:
                raise SourceError(f"{opening.title}: there is no video in it")
            stream = self._stream = container.streams.video[0]
            stream.thread_type = "SLICE" if opening.low_delay else "AUTO"
            stream.thread_count = opening.threads
            self._expected = stream.frames if not opening.start else 0
            self._until = _end(container)
            self.rate = float(stream.average_rate) if stream.average_rate else None
            if opening.start:
                self._seek()
            self._packets: Iterator[Any] = container.demux(stream)
        except BaseException:
            container.close()
            raise

    def _opened(self) -> Any:
        """The container, decoding in hardware if that was asked for and can be."""
        av, opening = self._av, self._opening
        arguments = {"format": opening.format, "options": dict(opening.options), "timeout": opening.timeout}
        try:
            if opening.hardware is not None:
                try:
                    device = av.codec.hwaccel.HWAccel(opening.hardware, allow_software_fallback=True)
                    return av.open(opening.location, hwaccel=device, **arguments)
                except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
                    self.notes.append(
                        (Kind.HARDWARE, f"{opening.hardware} cannot be used ({self._words(error)}): software decodes")
                    )
            return av.open(opening.location, **arguments)
        except (av.FFmpegError, OSError, ValueError) as error:
            self._fail(error)

    @property
    def frames(self) -> int | None:
        """How many frames the source says it has."""
        return self._stream.frames or None

    @property
    def is_finite(self) -> bool:
        """Whether it says how long it is, as a film does and a camera does not."""
        return bool(self._stream.frames or self._container.duration)

    def size(self) -> tuple[int, int]:
        """Height and width that the source says its pictures have, before any is decoded."""
        context = self._stream.codec_context
        return context.height, context.width

    def read(self) -> tuple[Decoded, float | None] | None:
        """The next picture, and its time in seconds; None at the end.

        Raises:
            SourceError: the source went away, or so much of it is damaged that it is given up.
        """
        while True:
            while self._ready:
                frame = self._ready.popleft()
                if frame.is_corrupt:
                    self._damaged("a picture is damaged")
                # Without a start, all: live streams begin before 0.
                elif frame.time is None or not self._opening.start or frame.time >= self._opening.start:
                    self._count += 1
                    self._damaged_in_a_row = 0
                    self._last = max(self._last, frame.time or 0.0)
                    return Decoded(frame), frame.time
            if not self._decode():
                self._ended()
                return None

    def _decode(self) -> bool:
        """Decode the next packet; false at the end."""
        av = self._av
        try:
            packet = next(self._packets, None)
        except av.error.InvalidDataError as error:
            self._damaged(self._words(error))
            self._packets = self._container.demux(self._stream)
            return True
        except (av.FFmpegError, OSError) as error:
            self._fail(error)
        if packet is None:
            return False
        try:
            self._ready.extend(packet.decode())
        except av.error.EOFError:  # the decoder was told of the end already
            return False
        except av.FFmpegError as error:
            self._damaged(self._words(error))
        else:
            if packet.is_corrupt:  # what could be decoded of it comes all the same
                self.notes.append((Kind.CORRUPT, "a packet arrived damaged"))
        return True

    def _damaged(self, what: str) -> None:
        self.notes.append((Kind.CORRUPT, what))
        self._damaged_in_a_row += 1
        if self._damaged_in_a_row >= DAMAGED_IN_A_ROW:
            raise SourceError(f"{self._opening.title}: {DAMAGED_IN_A_ROW} damaged packets in a row")

    def _ended(self) -> None:
        if self._count < self._expected:
            self.notes.append((Kind.TRUNCATED, f"ended after {self._count} of {self._expected} frames"))
            self._expected = 0  # said once
        elif not self.frames and self._until is not None and self._last < self._until - MISSING:
            self.notes.append((Kind.TRUNCATED, f"ended at {self._last:.1f} s of {self._until:.1f} s"))
            self._until = None

    def _fail(self, error: Exception) -> NoReturn:
        opening = self._opening
        # FFmpeg's error says the whole URL: as the cause, it would show what is secret in it in every traceback.
        cause = error if opening.title == opening.location else None
        raise SourceError(f"{opening.title}: {self._words(error)}") from cause

    def _words(self, error: Exception) -> str:
        words = str(getattr(error, "strerror", None) or error) or type(error).__name__
        return words.replace(self._opening.location, self._opening.title)

    def _seek(self) -> None:
        try:
            self._container.seek(round(self._opening.start * 1_000_000))
        except (self._av.FFmpegError, OSError) as error:
            self.notes.append((Kind.SEEK, f"cannot begin at {self._opening.start} s: {self._words(error)}"))

    def close(self) -> None:
        """Let it go."""
        self._container.close()


def _end(container: Any) -> float | None:
    """Seconds, where a file says that it ends; None if it does not, or if that may be its sound's end."""
    if container.duration is None or len(container.streams) > 1:
        return None
    return float((container.start_time or 0) + container.duration) / 1e6


def camera(device: int | str) -> tuple[str, str]:
    """FFmpeg's location and format of a camera, by its number or by the system's name for it."""
    if sys.platform == "darwin":
        return str(device), "avfoundation"
    if sys.platform == "win32":
        return f"video={device}", "dshow"
    return f"/dev/video{device}" if isinstance(device, int) else device, "v4l2"
