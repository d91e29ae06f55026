"""Videos whose frames say which they are, sinks that remember, and a loop in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np

from aiotrt.testing import Scripted, SimulatedDevice, run
from aiotrt.video import Frame, Result

__all__ = ["Remember", "in_virtual_time", "number_of", "picture", "write_video"]

T = TypeVar("T")

STEP = 8  # of brightness, from one frame's number to the next


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A grey picture that says a number below 32."""
    return np.full((height, width, 3), STEP * number, np.uint8)


def number_of(image: np.ndarray[Any, Any]) -> int:
    """The number that a picture says, after a codec as well."""
    return round(float(image.mean()) / STEP)


def write_video(
    path: Path,
    numbers: Iterable[int],
    *,
    size: tuple[int, int] = (64, 48),
    times: Sequence[float] | None = None,
    rate: int = 25,
    codec: str = "libx264",
) -> Path:
    """A video of such pictures, at these times in seconds."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as file:
        stream: Any = file.add_stream(codec, rate=rate, options={"g": "5", "tune": "zerolatency"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        file.start_encoding()  # else a file without frames is not even made
        for i, number in enumerate(numbers):
            frame: Any = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts = round(1000 * (i / rate if times is None else times[i]))
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


class Remember:
    """A sink that keeps what it got, by source."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def __call__(self, result: Result) -> None:
        self.results.append(result)

    def indices(self, source: str) -> list[int]:
        return [result.frame.index for result in self.results if result.frame.source == source]

    def frames(self, source: str) -> list[Frame]:
        return [result.frame for result in self.results if result.frame.source == source]


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop whose time passes only when nothing else is left to do. All sleeps are exact, and take no time."""
    return run(main, SimulatedDevice(Scripted()))


def clock() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()
