"""Decode with FFmpeg, through PyAV. Every function here blocks: `feeds` runs them in a worker thread."""

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
from aiotrt.video.frames import Array, Picture
from aiotrt.video.reports import Kind, SourceError

__all__ = ["Decoded", "Decoder", "Opening", "camera", "import_av"]

DAMAGED_IN_A_ROW: Final = 256  # the number of damaged packets in succession after which a source fails
LATE: Final = 0.05  # seconds: a first picture that is later than `start` by more shows that a seek went too far
MISSING: Final = 0.5  # seconds that the last frame of a complete file may last: an earlier end means that it is truncated


def import_av() -> Any:
    """Import PyAV.

    Raises:
        MissingDependencyError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(f"aiotrt.video needs PyAV to decode and encode; {install_hint('video')}") from error
    return av


@dataclass(frozen=True)
class Opening:
    """Options for opening a source.

    Attributes:
        location: a path, URL or device, including secrets.
        title: its name in messages, without secrets.
        format: of the container; None if FFmpeg can detect it.
        options: passed to FFmpeg, such as ``{"rtsp_transport": "tcp"}``.
        hardware: a kind of hardware decoder, such as "cuda" or "vaapi"; if it cannot be used, software decodes.
        timeout: seconds for opening, and for each read.
        start: seconds from the beginning, where reading begins.
        threads: the number that the codec may use.
        low_delay: whether the codec must not delay frames in order to decode several in parallel.
        stream: the index among its video streams; None for FFmpeg's choice, which is never cover art.
        max_pixels: the largest picture for which FFmpeg may allocate memory.
        decode: "cpu", "gpu" or "auto"; see `aiotrt.video.open`.
        device: of the decoder, such as "cuda:1"; None for the current one.
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
    decode: str = "cpu"
    device: str | int | None = None


@dataclass(frozen=True)
class Orientation:
    """The transformation of a stored picture for display: transposed first, then flipped.

    Attributes:
        is_transposed: whether rows become columns.
        flips_rows: whether the order of rows is reversed.
        flips_columns: whether the order of columns is reversed.
    """

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """Read the display matrix, which phones write. Rotations by other than multiples of 90 degrees are ignored."""
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
        """Return the pixels as displayed: a copy, unless they are stored upright."""
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
        frame: the frame of PyAV.
        aspect: the ratio of a stored pixel's width to its height.
    """

    is_on_device = False
    tensor = None
    _local: Final = threading.local()  # one reformatter per thread, since creating it takes longer than using it

    def __init__(self, frame: Any, aspect: float = 1.0) -> None:
        self._frame = frame
        self._orientation = Orientation.of(frame)
        self.pixel_aspect = 1 / aspect if self._orientation.is_transposed else aspect

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3) of the picture as displayed."""
        height, width = self._frame.height, self._frame.width
        return (width, height, 3) if self._orientation.is_transposed else (height, width, 3)

    def array(self) -> Array:
        """Convert to RGB. Returns a view with padded rows, or a copy if the picture is not stored upright."""
        reformatter = getattr(self._local, "reformatter", None)
        if reformatter is None:
            reformatter = self._local.reformatter = import_av().video.reformatter.VideoReformatter()
        # By default FFmpeg would start one thread per CPU core, for every frame.
        plane = reformatter.reformat(self._frame, format="rgb24", threads=1).planes[0]
        height, width = self._frame.height, self._frame.width
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : width * 3]
        pixels = self._orientation.show(rows.reshape(height, width, 3))
        pixels.flags.writeable = False
        return pixels


class Decoder:
    """An opened source that gives its pictures in order. Not thread-safe.

    Raises:
        SourceError: the source is missing, is not a video, or contains no video stream.
        MissingDependencyError: PyAV is not installed.

    Attributes:
        notes: problems that did not end the source; the reader removes them.
        rate: average frames a second, None if unknown.
    """

    def __init__(self, opening: Opening) -> None:
        av = self._av = import_av()
        self._opening = opening
        self.notes: deque[tuple[Kind, str]] = deque()
        self._ready: deque[Any] = deque()
        self._damaged_in_a_row = 0
        self._count = 0
        self._last = 0.0  # time of the last picture, in seconds
        self._is_sought = False  # a seek was made, and nothing has been decoded since
        if opening.hardware is not None and opening.hardware not in (known := av.codec.hwaccel.hwdevices_available()):
            raise SourceError(
                f"hardware={opening.hardware!r}: PyAV has no such decoder; it has {', '.join(known) or 'none'}"
            )
        container = self._container = self._open()
        try:
            stream = self._stream = self._select_stream()
            stream.thread_type = "SLICE" if opening.low_delay else "AUTO"
            stream.thread_count = opening.threads
            self._expected = stream.frames if not opening.start else 0
            #: The container's time at the beginning of a file, in seconds; it need not be 0.
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

    def _select_stream(self) -> Any:
        opening, videos = self._opening, self._container.streams.video
        if not videos:
            raise SourceError(f"{opening.title}: it contains no video stream")
        if opening.stream is None:
            return self._container.streams.best("video") or videos[0]
        if opening.stream >= len(videos):
            raise SourceError(f"{opening.title}: stream={opening.stream}, but it has only {len(videos)} video streams")
        return videos[opening.stream]

    def _open(self) -> Any:
        """Open the container, for decoding in hardware if that was requested and is possible."""
        av, opening = self._av, self._opening
        options = dict(opening.options)
        if opening.max_pixels is not None:  # opening decodes a picture, of any size, to detect the format
            options.setdefault("max_pixels", str(opening.max_pixels))
        arguments = {"format": opening.format, "options": options, "timeout": opening.timeout}
        try:
            if opening.hardware is not None:
                try:
                    device = av.codec.hwaccel.HWAccel(opening.hardware, allow_software_fallback=True)
                    return av.open(opening.location, hwaccel=device, **arguments)
                except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
                    self.notes.append(
                        (Kind.HARDWARE, f"{opening.hardware} cannot be used ({self._message(error)}): software decodes")
                    )
            return av.open(opening.location, **arguments)
        except (av.FFmpegError, OSError, ValueError) as error:
            self._fail(error)

    @property
    def frames(self) -> int | None:
        """The number of frames that the container declares; None if it declares none."""
        return self._stream.frames or None

    @property
    def is_finite(self) -> bool:
        """Whether the container declares its length, as a video file does and a camera does not."""
        return bool(self._stream.frames or self._container.duration)

    def size(self) -> tuple[int, int]:
        """Height and width of the pictures as declared, before any is decoded."""
        context = self._stream.codec_context
        return context.height, context.width

    def read(self) -> tuple[Picture, float | None] | None:
        """Return the next picture and its time in seconds, or None at the end. A file's time starts at its beginning.

        Raises:
            SourceError: reading failed, or `DAMAGED_IN_A_ROW` packets or pictures in succession were damaged.
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
                # Without `start` skip nothing: live streams may begin before 0. The origin is rounded to microseconds.
                elif time is None or not self._opening.start or time >= self._opening.start - 1e-3:
                    self._count += 1
                    self._damaged_in_a_row = 0
                    self._last = max(self._last, time or 0.0)
                    return self._picture(frame), time
            if not self._decode():
                self._ended()
                return None

    def _decode(self) -> bool:
        """Decode the next packet; false at the end."""
        av = self._av
        try:
            packet = next(self._packets, None)
        except av.error.InvalidDataError as error:
            self._damaged(self._message(error))
            self._packets = self._container.demux(self._stream)
            return True
        except (av.FFmpegError, OSError) as error:
            self._fail(error)
        if packet is None:
            return False
        try:
            self._ready.extend(self._pictures(packet))
        except av.error.EOFError:  # the decoder has reached its end already
            return False
        except av.FFmpegError as error:
            self._damaged(self._message(error))
        else:
            if packet.is_corrupt:  # the pictures that could be decoded are used
                self.notes.append((Kind.CORRUPT, "a packet arrived damaged"))
        return True

    def _pictures(self, packet: Any) -> list[Any]:
        """Decode a packet. Returns frames of PyAV, or objects with their `time` and `is_corrupt`."""
        frames: list[Any] = packet.decode()
        return frames

    def _picture(self, frame: Any) -> Picture:
        return Decoded(frame, self._aspect)

    def _damaged(self, what: str) -> None:
        self.notes.append((Kind.CORRUPT, what))
        self._damaged_in_a_row += 1
        if self._damaged_in_a_row >= DAMAGED_IN_A_ROW:
            raise SourceError(f"{self._opening.title}: {DAMAGED_IN_A_ROW} damaged packets in a row")

    def _ended(self) -> None:
        if self._count < self._expected:
            self.notes.append((Kind.TRUNCATED, f"ended after {self._count} of {self._expected} frames"))
            self._expected = 0  # reported once
        elif not self.frames and self._until is not None and self._last < self._until - MISSING:
            self.notes.append((Kind.TRUNCATED, f"ended at {self._last:.1f} s of {self._until:.1f} s"))
            self._until = None

    def _fail(self, error: Exception) -> NoReturn:
        opening = self._opening
        # FFmpeg's error contains the whole URL; as the cause, it would show secrets in every traceback.
        cause = error if opening.title == opening.location else None
        raise SourceError(f"{opening.title}: {self._message(error)}") from cause

    def _message(self, error: Exception) -> str:
        message = str(getattr(error, "strerror", None) or error) or type(error).__name__
        return message.replace(self._opening.location, self._opening.title)

    def _seek(self) -> None:
        try:
            self._container.seek(round((self._opening.start + self._origin) * 1_000_000))
            self._is_sought = True
        except (self._av.FFmpegError, OSError) as error:
            self.notes.append((Kind.SEEK, f"cannot begin at {self._opening.start} s: {self._message(error)}"))

    def _rewind(self) -> bool:
        """Return to the beginning after a seek that went too far, as in transport streams; `read` skips earlier frames."""
        try:
            self._container.seek(round(self._origin * 1_000_000))
        except (self._av.FFmpegError, OSError):
            return False
        self._ready.clear()
        self._packets = self._container.demux(self._stream)
        return True

    def close(self) -> None:
        """Close the container."""
        self._container.close()


def _end(container: Any) -> float | None:
    """The declared duration in seconds; None if there is none, or if it may be that of the sound."""
    if container.duration is None or len(container.streams) > 1:
        return None
    return float(container.duration) / 1e6


def camera(device: int | str) -> tuple[str, str]:
    """Return FFmpeg's location and format for a camera, given its number or the system's name for it."""
    if sys.platform == "darwin":
        return str(device), "avfoundation"
    if sys.platform == "win32":
        return f"video={device}", "dshow"
    return f"/dev/video{device}" if isinstance(device, int) else device, "v4l2"
