"""Frames out again: video files by PyAV."""

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

LONGEST: Final = 3600.0  # seconds that a frame may stand: a longer gap is a clock that was set
TIME_BASE: Final = Fraction(1, 90_000)  # seconds; common rates are whole numbers of it


class VideoFile(Threaded):
    """A video file for each source, each frame at its own time, so that a variable frame rate stays one.

    Args:
        path: of the file; ``{source}`` in it stands for the source's name, and must be there if there are several. Of two
            sources whose files would be one, the second one's results are refused; see `path_of`.
        draw: what to show; by default the frame as it is. `Annotator` draws boxes, masks and labels.
        codec: FFmpeg's name of the encoder.
        rate: frames a second where frames bear no time, and where their time goes back, or ahead by an hour, as that of a
            clock that was set, or of a source that came again: such a frame follows the last one at once, and the next ones
            at their distance from it.
        options: FFmpeg's own, of the encoder.

    Frames are encoded at the first one's size; a frame of another size is scaled to it.
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
        """The file of a source, by its name; in it is ``_`` for what is no letter, digit, ``-``, ``_`` or ``.``."""
        return self._path.replace("{source}", "".join(c if c.isalnum() or c in "-_." else "_" for c in source))

    def begin(self) -> None:
        """Get ready."""
        import_av()

    def take(self, result: Result) -> None:
        """See `Threaded`."""
        frame = result.frame
        encoder = self._encoders.get(frame.source)
        if encoder is None:
            path = self.path_of(frame.source)
            for other in self._encoders:
                if self.path_of(other) == path:
                    raise ValueError(
                        f"{path} is of source {other!r}: put {{source}} into the path for several sources, and give them "
                        "names that differ in letters and digits"
                    )
            height, width = frame.shape[:2]
            encoder = self._encoders[frame.source] = _Encoder(path, self._codec, width, height, self._rate, self._options)
        image = frame.image if self._draw is None else self._draw(frame.image, result.output)
        encoder.write(image, frame.time)

    def end(self) -> None:
        """See `Threaded`."""
        failures = []
        for encoder in self._encoders.values():
            try:
                encoder.close()
            except Exception as error:  # the others are closed all the same
                failures.append(error)
        if failures:
            raise failures[0]


_PROTOCOLS: Final = ("file:", "pipe:", "fd:", "tee:")  # of FFmpeg's, those that are written without slashes


class _Encoder:
    def __init__(self, path: str, codec: str, width: int, height: int, rate: float, options: dict[str, str]) -> None:
        av = self._av = import_av()
        self._rate = rate
        self._last = -1  # where the last frame stands in the film, in TIME_BASE
        self._at: float | None = None  # its source's last time, and the one that the film's beginning would be
        self._zero = 0.0
        if ":" in path and "://" not in path and not path.startswith(_PROTOCOLS):
            path = f"file:{path}"  # else FFmpeg takes what is before the colon for a protocol
        self._file = av.open(path, "w")
        try:
            self._stream = self._file.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
            # Chroma at half the resolution takes even extents: one row or column is cut off.
            self._stream.width, self._stream.height = max(2, width - width % 2), max(2, height - height % 2)
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = TIME_BASE
            self._stream.codec_context.time_base = TIME_BASE
            self._file.start_encoding()  # which opens the file: one that cannot be written fails at its first frame
        except BaseException:
            with contextlib.suppress(Exception):  # of a file that was never opened
                self._file.close()
            raise

    def write(self, image: Any, at: float | None) -> None:
        ticks = self._last + round(1 / self._rate / TIME_BASE) if self._last >= 0 else 0
        if at is not None and math.isfinite(at):
            # Of a source that came back, or whose clock was set. An MP4 cannot have a frame that lasts for 13 hours.
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
        self._last = ticks  # only now: one that no film can have must not be what the next ones come after
        frame.time_base = TIME_BASE
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            self._file.mux(self._stream.encode(None))  # what the encoder holds back
        finally:
            self._file.close()
