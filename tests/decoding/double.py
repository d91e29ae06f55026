"""A stand-in for ``nvidia.nvimgcodec``, on the CPU: its API as far as aiotrt uses it, and strict about it.

`Library` makes a decoder of it in place of the real one. Names, keywords and errors are those of version 0.9.
"""

from __future__ import annotations

import enum
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from aiotrt.decoding import decoder
from aiotrt.decoding.library import Library
from aiotrt.devices import Device


class ColorSpec(enum.Enum):
    SRGB = 1


class SampleFormat(enum.Enum):
    I_RGB = 4


class BackendKind(enum.Enum):
    CPU_ONLY = 1
    GPU_ONLY = 2
    HYBRID_CPU_GPU = 3
    HW_GPU_ONLY = 4


class Backend:
    def __init__(self, backend_kind: BackendKind, load_hint: float = 1.0) -> None:
        assert isinstance(backend_kind, BackendKind)


class DecodeParams:
    def __init__(
        self, *, apply_exif_orientation: bool, color_spec: ColorSpec, allow_any_depth: bool, sample_format: SampleFormat
    ) -> None:
        assert color_spec is ColorSpec.SRGB
        assert sample_format is SampleFormat.I_RGB
        assert not apply_exif_orientation
        assert not allow_any_depth


class CodeStream:
    def __init__(self, data: bytes) -> None:
        if type(data) is not bytes:
            raise TypeError("__init__(): incompatible constructor arguments")
        try:
            with PillowImage.open(io.BytesIO(data)) as image:
                self.width, self.height = image.size
        except Exception as error:
            raise RuntimeError("Failed to get image info") from error
        self.data = data


class Image:
    """Pixels of the library's own. They are overwritten when it is freed, as device memory may be."""

    def __init__(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._pixels = pixels

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, stream: object = None) -> Any:
        assert stream is None
        return self._pixels.__dlpack__()

    def __del__(self) -> None:
        self._pixels[:] = 99


class Module:
    """The module, and what a test sets and reads of it.

    Attributes:
        gate: decoding waits for it.
        believes: whether damaged data gives pixels and no failure, as decoders on a GPU may.
        refuses: files that cannot be decoded.
        error: raised by the next call of `decode`.
        batches: the sizes of all batches.
        closed: how many decoders were closed.
    """

    __version__ = "0.9.0"
    ColorSpec, SampleFormat, BackendKind = ColorSpec, SampleFormat, BackendKind
    Backend, DecodeParams, CodeStream = Backend, DecodeParams, CodeStream

    def __init__(self, *, believes: bool = False) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.believes = believes
        self.refuses: set[bytes] = set()
        self.error: Exception | None = None
        self.batches: list[int] = []
        self.closed = 0
        self.loop_thread = threading.get_ident()
        self.in_use = threading.Lock()

    def Decoder(  # noqa: N802  # the library's name
        self, *, device_id: int, max_num_cpu_threads: int, backends: Sequence[object], options: str
    ) -> Decoder:
        assert isinstance(device_id, int)
        assert max_num_cpu_threads >= 1
        assert all(isinstance(backend, Backend) for backend in backends)
        assert options == ":fancy_upsampling=1"
        return Decoder(self)


class Decoder:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._is_open = True

    def decode(
        self, srcs: Sequence[CodeStream], *, params: DecodeParams | None = None, cuda_stream: int = 0
    ) -> list[Image | None]:
        module = self._module
        assert self._is_open, "used after it was closed"
        assert threading.get_ident() != module.loop_thread, "blocks the event loop"
        assert isinstance(srcs, list)
        assert srcs
        assert isinstance(params, DecodeParams)
        assert isinstance(cuda_stream, int)
        assert cuda_stream, "the default stream"
        assert module.in_use.acquire(blocking=False), "used by two threads at once"
        try:
            module.batches.append(len(srcs))
            assert module.gate.wait(30)
            error, module.error = module.error, None
            if error is not None:
                raise error
            return [self._decoded(source) for source in srcs]
        finally:
            module.in_use.release()

    def _decoded(self, source: CodeStream) -> Image | None:
        module = self._module
        if source.data in module.refuses:
            return None
        try:
            with PillowImage.open(io.BytesIO(source.data)) as image:
                return Image(np.array(image.convert("RGB")))
        except Exception:
            return Image(np.full((source.height, source.width, 3), 128, np.uint8)) if module.believes else None

    def __exit__(self, *error: object) -> None:
        assert self._is_open
        self._is_open = False
        self._module.closed += 1


def install(monkeypatch: pytest.MonkeyPatch, *, believes: bool = False) -> Module:
    """Let decoders for the host decode JPEG files with a double of the library."""
    module = Module(believes=believes)

    def opened(device: Device, *, hardware: bool) -> tuple[Library | None, str]:
        return Library(device, module, ["GPU_ONLY", "HYBRID_CPU_GPU"], 0), ""

    monkeypatch.setattr(decoder, "open_library", opened)
    return module
