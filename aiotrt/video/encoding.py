"""Write video files, with PyAV."""

from __future__ import annotations

import contextlib
import math
import os
from fractions import Fraction
from typing import Any, Final

import numpy as np

from aiotrt.video.decoding import import_av
from aiotrt.video.sinks import Draw, Result, Threaded

__all__ = ["VideoFile"]

LONGEST: Final = 3600.0  # seconds that a frame may last; a longer gap means that the source's clock was set
TIME_BASE: Final = Fraction(1, 90_000)  # seconds; common rates are whole numbers of it


class VideoFile(Threaded):
    """A sink that writes a video file for each source, with each frame at its own time: a variable frame rate is kept.

    Args:
        path: of the file; ``{source}`` is replaced by the source's name, and is required if there are several sources. If
            two sources would have the same file, the results of the second are rejected; see `path_of`.
        draw: a function that draws on the frame, such as `Annotator`; None shows the frame unchanged.
        codec: FFmpeg's name of the encoder.
        rate: frames a second for frames without a time. Also used where time goes back, or jumps by an hour or more,
            because a clock was set or a source reconnected: that frame follows the last one after one such interval, and
            later frames keep their distance from it.
        options: passed to FFmpeg's encoder.

    Frames are encoded at the size of the first; a frame of another size is scaled to it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        draw: Draw | None = None,
        *,
        codec: str = "libx264",
        rate: float = 30.0,
        options: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._draw = draw
        self._codec = codec
        self._rate = rate
        self._options = options or {}
        self._encoders: dict[str, _Encoder] = {}

    def path_of(self, source: str) -> str:
        """Return the file for a source. In its name, characters other than letters, digits and ``-_.`` become ``_``."""
        return self._path.replace("{source}", "".join(c if c.isalnum() or c in "-_." else "_" for c in source))

    def begin(self) -> None:
        """Check that PyAV is installed."""
        import_av()

    def take(self, result: Result) -> None:
        """Encode a result's frame."""
        frame = result.frame
        encoder = self._encoders.get(frame.source)
        if encoder is None:
            path = self.path_of(frame.source)
            for other in self._encoders:
                if self.path_of(other) == path:
                    raise ValueError(
                        f"{path} belongs to source {other!r}: put {{source}} into the path for several sources, and give "
                        "them names that differ in letters and digits"
                    )
            height, width = frame.shape[:2]
            encoder = self._encoders[frame.source] = _Encoder(path, self._codec, width, height, self._rate, self._options)
        image = frame.image if self._draw is None else self._draw(frame.image, result.output)
        encoder.write(image, frame.time)

    def end(self) -> None:
        """Complete and close all files."""
        failures = []
        for encoder in self._encoders.values():
            try:
                encoder.close()
            except Exception as error:  # close the others before raising
                failures.append(error)
        if failures:
            raise failures[0]


_PROTOCOLS: Final = ("file:", "pipe:", "fd:", "tee:")  # FFmpeg's protocols that are written without slashes


class _Encoder:
    def __init__(self, path: str, codec: str, width: int, height: int, rate: float, options: dict[str, str]) -> None:
        av = self._av = import_av()
        self._rate = rate
        self._last = -1  # time of the last frame in the file, in TIME_BASE
        self._at: float | None = None  # time of the last frame in its source, in seconds
        self._zero = 0.0  # source time, in seconds, that corresponds to the beginning of the file
        if ":" in path and "://" not in path and not path.startswith(_PROTOCOLS):
            path = f"file:{path}"  # otherwise FFmpeg takes the text before the colon for a protocol
        self._file = av.open(path, "w")
        try:
            self._stream = self._file.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
            # Chroma has half the resolution, so both dimensions must be even: one row or column is cut off.
            self._stream.width, self._stream.height = max(2, width - width % 2), max(2, height - height % 2)
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = TIME_BASE
            self._stream.codec_context.time_base = TIME_BASE
            self._file.start_encoding()  # opens the file, so that a file that cannot be written fails at the first frame
        except BaseException:
            with contextlib.suppress(Exception):  # the file may not be open
                self._file.close()
            raise

    def write(self, image: Any, at: float | None) -> None:
        ticks = self._last + round(1 / self._rate / TIME_BASE) if self._last >= 0 else 0
        if at is not None and math.isfinite(at):
            # The source reconnected, or its clock was set. A frame in an MP4 file cannot last for 13 hours.
            if self._at is None or not 0 <= at - self._at < LONGEST:
                self._zero = at - float(ticks * TIME_BASE)
            else:
                ticks = max(round((at - self._zero) / TIME_BASE), self._last + 1)
            self._at = at
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if (frame.width, frame.height) != (self._stream.width, self._stream.height):
            if abs(frame.width - self._stream.width) <= 1 and abs(frame.height - self._stream.height) <= 1:
                cut = np.ascontiguousarray(image[: self._stream.height, : self._stream.width])
                frame = self._av.VideoFrame.from_ndarray(cut, format="rgb24")
            else:
                frame = frame.reformat(self._stream.width, self._stream.height)
        frame.pts = ticks
        self._last = ticks  # after the conversion: a frame that cannot be encoded must not move the following ones
        frame.time_base = TIME_BASE
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            self._file.mux(self._stream.encode(None))  # frames that the encoder has buffered
        finally:
            self._file.close()
