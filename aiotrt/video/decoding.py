"""Decoding by FFmpeg, through PyAV. All of it blocks: `feeds` runs it in a worker thread."""

from __future__ import annotations

import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError
from aiotrt.video.frames import Array
from aiotrt.video.reports import Kind, SourceError

__all__ = ["Decoded", "Decoder", "Opening", "camera", "import_av"]

DAMAGED_IN_A_ROW: Final = 256  # packets, before a source is given up
LATE: Final = 0.05  # seconds after the start at which the first picture after a seek shows that it went too far
MISSING: Final = 0.5  # seconds at the end of a file that is as long as it says; its last frame may stand for a while


def import_av() -> Any:
    """PyAV.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(f"aiotrt.video needs PyAV to decode and encode; {install_hint('video')}") from error
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
        stream: which of its videos, from 0; None for the one that FFmpeg takes for the best, which is never cover art.
        max_pixels: that a picture may have for FFmpeg to take memory for it.
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
    stream: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is to be shown: transposed first, then flipped.

    Attributes:
        is_transposed: whether rows become columns.
        flips_rows: whether the first row becomes the last.
        flips_columns: likewise.
    """

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """As the frame's display matrix says, which phones write; a turn that is no quarter turn is not made."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return UPRIGHT
        # A point (x, y) is shown at (a x + c y, b x + d y); see FFmpeg's libavutil/display.h.
        a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
        if a and d and not (b or c):
            return cls(flips_rows=d < 0, flips_columns=a < 0)
        if b and c and not (a or d):
            return cls(is_transposed=True, flips_rows=b < 0, flips_columns=c < 0)
        return UPRIGHT

    def show(self, pixels: Array) -> Array:
        """Return the pixels as they are to be shown: a copy, unless they are stored so."""
        if self == UPRIGHT:
            return pixels
        shown = pixels.transpose(1, 0, 2) if self.is_transposed else pixels
        if self.flips_rows:
            shown = shown[::-1]
        if self.flips_columns:
            shown = shown[:, ::-1]
        return np.ascontiguousarray(shown)


UPRIGHT: Final = Orientation()


class Decoded:
    """A decoded picture, in the codec's own memory and format.

    Args:
        frame: PyAV's.
        aspect: the width of a stored pixel by its height.
    """

    _local: Final = threading.local()  # a reformatter for each thread: making one takes longer than using it

    def __init__(self, frame: Any, aspect: float = 1.0) -> None:
        self._frame = frame
        self._orientation = Orientation.of(frame)
        self.pixel_aspect = 1 / aspect if self._orientation.is_transposed else aspect

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3), as it is to be shown."""
        height, width = self._frame.height, self._frame.width
        return (width, height, 3) if self._orientation.is_transposed else (height, width, 3)

    def array(self) -> Array:
        """A view of what FFmpeg converted to RGB, with padded rows, or a copy, if the picture was not stored upright."""
        reformatter = getattr(self._local, "reformatter", None)
        if reformatter is None:
            reformatter = self._local.reformatter = import_av().video.reformatter.VideoReformatter()
        # One thread: FFmpeg would otherwise start one for each processor, for every frame.
        plane = reformatter.reformat(self._frame, format="rgb24", threads=1).planes[0]
        height, width = self._frame.height, self._frame.width
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : width * 3]
        pixels = self._orientation.show(rows.reshape(height, width, 3))
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
        self._is_sought = False  # and nothing has been decoded since
        if opening.hardware is not None and opening.hardware not in (known := av.codec.hwaccel.hwdevices_available()):
            raise SourceError(
                f"hardware={opening.hardware!r}: PyAV has no such decoder; it has {', '.join(known) or 'none'}"
            )
        container = self._container = self._opened()
        try:
            stream = self._stream = self._chosen()
            stream.thread_type = "SLICE" if opening.low_delay else "AUTO"
            stream.thread_count = opening.threads
            self._expected = stream.frames if not opening.start else 0
            #: Seconds, by the container's clock, at which a file begins: a recording's clock need not begin at 0.
            self._origin = (container.start_time or 0) / 1e6 if self.is_finite else 0.0
            self._until = _end(container)
            self._aspect = float(stream.sample_aspect_ratio or 1.0)
            self.rate = float(stream.average_rate) if stream.average_rate else None
            if opening.start:
                self._seek()
            self._packets: Iterator[Any] = container.demux(stream)
        except BaseException:
            container.close()
            raise

    def _chosen(self) -> Any:
        """The stream to decode."""
        opening, videos = self._opening, self._container.streams.video
        if not videos:
            raise SourceError(f"{opening.title}: there is no video in it")
        if opening.stream is None:
            return self._container.streams.best("video") or videos[0]
        if opening.stream >= len(videos):
            raise SourceError(f"{opening.title}: it has {len(videos)} video streams, and no stream={opening.stream}")
        return videos[opening.stream]

    def _opened(self) -> Any:
        """The container, decoding in hardware if that was asked for and can be."""
        av, opening = self._av, self._opening
        options = dict(opening.options)
        if opening.max_pixels is not None:  # opening decodes a picture to learn of it, as large as that may be
            options.setdefault("max_pixels", str(opening.max_pixels))
        arguments = {"format": opening.format, "options": options, "timeout": opening.timeout}
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
        """The next picture, and its time in seconds, in a file since its beginning; None at the end.

        Raises:
            SourceError: the source went away, or so much of it is damaged that it is given up.
        """
        while True:
            while self._ready:
                frame = self._ready.popleft()
                time = None if frame.time is None else frame.time - self._origin
                if self._is_sought and time is not None:
                    self._is_sought = False
                    if time > self._opening.start + LATE and self._rewind():
                        continue
                if frame.is_corrupt:
                    self._damaged("a picture is damaged")
                # Without a start, all: live streams begin before 0. The origin is rounded to microseconds.
                elif time is None or not self._opening.start or time >= self._opening.start - 1e-3:
                    self._count += 1
                    self._damaged_in_a_row = 0
                    self._last = max(self._last, time or 0.0)
                    return Decoded(frame, self._aspect), time
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
            self._container.seek(round((self._opening.start + self._origin) * 1_000_000))
            self._is_sought = True
        except (self._av.FFmpegError, OSError) as error:
            self.notes.append((Kind.SEEK, f"cannot begin at {self._opening.start} s: {self._words(error)}"))

    def _rewind(self) -> bool:
        """Begin at the beginning, since a seek went too far, as in transport streams; what is too early is skipped."""
        try:
            self._container.seek(round(self._origin * 1_000_000))
        except (self._av.FFmpegError, OSError):
            return False
        self._ready.clear()
        self._packets = self._container.demux(self._stream)
        return True

    def close(self) -> None:
        """Let it go."""
        self._container.close()


def _end(container: Any) -> float | None:
    """Seconds that a file says it lasts; None if it does not say, or if that may be its sound's end."""
    if container.duration is None or len(container.streams) > 1:
        return None
    return float(container.duration) / 1e6


def camera(device: int | str) -> tuple[str, str]:
    """FFmpeg's location and format of a camera, by its number or by the system's name for it."""
    if sys.platform == "darwin":
        return str(device), "avfoundation"
    if sys.platform == "win32":
        return f"video={device}", "dshow"
    return f"/dev/video{device}" if isinstance(device, int) else device, "v4l2"
