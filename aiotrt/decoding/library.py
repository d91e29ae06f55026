"""JPEG decoding on the GPU by nvImageCodec, in batches, on a worker thread."""

from __future__ import annotations

import io
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image

from aiotrt._install import install_hint
from aiotrt._workers import processors
from aiotrt.devices import Device, Event
from aiotrt.errors import DeviceError, ResourceError
from aiotrt.runtime.memory import keep

__all__ = ["Jpeg", "Library", "open_library", "out_of_memory", "turned"]

_log: Final = logging.getLogger("aiotrt")
#: Threads of the library that decode what the GPU cannot, such as the entropy coding of small images.
_MAX_THREADS: Final = 16
_COLOUR: Final = (200, 60, 30)  # of the image that tells whether the library works


@dataclass(frozen=True)
class Jpeg:
    """A file whose structure was checked.

    Attributes:
        data: the file up to its end-of-image marker.
        width: in pixels, as stored.
        height: in pixels, as stored.
        orientation: the EXIF orientation, 1 to 8; any other number stands for 1.
    """

    data: bytes
    width: int
    height: int
    orientation: int


class Library:
    """A decoder of nvImageCodec, used by one thread at a time. Creating it blocks.

    Args:
        device: where the pixels go.
        module: ``nvidia.nvimgcodec``.
        kinds: names of the backends that may decode, in the library's `BackendKind`.
        device_id: the library's number of the device.
    """

    def __init__(self, device: Device, module: Any, kinds: Sequence[str], device_id: int) -> None:
        self.name = f"nvimgcodec {module.__version__}"
        self._device = device
        self._module = module
        self._stream = device.stream()
        # The orientation is applied here and not by the library, so that it is read from the file as on the CPU.
        self._params = module.DecodeParams(
            apply_exif_orientation=False,
            color_spec=module.ColorSpec.SRGB,
            allow_any_depth=False,
            sample_format=module.SampleFormat.I_RGB,
        )
        self._decoder = module.Decoder(
            device_id=device_id,
            max_num_cpu_threads=min(max(processors() - 1, 1), _MAX_THREADS),  # the library warns of one for each processor
            backends=[module.Backend(getattr(module.BackendKind, kind)) for kind in kinds],
            options=":fancy_upsampling=1",  # interpolate chroma, as libjpeg does
        )
        #: Memory of the library that the device may still use, until the event is complete.
        self._used: deque[tuple[Event, list[object]]] = deque()

    def decode(self, images: Sequence[Jpeg]) -> tuple[list[torch.Tensor | ResourceError | None], Event]:
        """Submit the decoding of a batch. Blocks for as long as the CPU has work to do for it.

        Returns:
            For each image its pixels, or None where the library failed, or an error where the device has no memory for the
            pixels; and the event after which the pixels are there.

        Raises:
            DeviceError: the device broke.
            Exception: the library failed for the whole batch.
        """
        self.release()
        used: list[object] = [*images]
        try:
            tensors = self._device.call(self._stream, lambda: self._decode(images, used))
        except DeviceError:
            raise
        except Exception:
            self._used.append((self._stream.record(), used))
            raise
        event = self._stream.record()
        self._used.append((event, used))
        return tensors, event

    def _decode(self, images: Sequence[Jpeg], used: list[object]) -> list[torch.Tensor | ResourceError | None]:
        results: list[torch.Tensor | ResourceError | None] = [None] * len(images)
        streams: dict[int, Any] = {}
        for index, image in enumerate(images):
            try:
                streams[index] = self._module.CodeStream(image.data)
            except Exception as error:
                _log.debug("nvImageCodec does not open an image: %s", error)
        if not streams:
            return results
        used.append(streams)
        decoded = self._decoder.decode(list(streams.values()), params=self._params, cuda_stream=self._stream.handle)
        used.append(decoded)
        for index, pixels in zip(streams, decoded, strict=True):
            if pixels is not None:
                results[index] = self._copied(images[index], pixels)
        return results

    def _copied(self, image: Jpeg, pixels: Any) -> torch.Tensor | ResourceError | None:
        """Copy the pixels to memory of torch's allocator, which is safe to free while other streams use it."""
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(pixels)
        if tensor.shape != (image.height, image.width, 3) or tensor.dtype is not torch.uint8:
            return None
        try:
            return turned(tensor, image.orientation).clone(memory_format=torch.contiguous_format)
        except torch.OutOfMemoryError as error:
            return out_of_memory(image.width, image.height, error)

    def defect(self) -> str:
        """Decode a small image, and return the defect, or "". A missing part of the library shows only then. Blocks.

        Raises:
            DeviceError: the device broke.
        """
        file = io.BytesIO()
        Image.new("RGB", (64, 64), _COLOUR).save(file, "JPEG")
        try:
            (tensor,), event = self.decode([Jpeg(file.getvalue(), 64, 64, 1)])
            event.synchronize()
            if isinstance(tensor, torch.Tensor) and ((tensor.cpu().int() - torch.tensor(_COLOUR)).abs() < 8).all():
                return ""
        except DeviceError:
            raise
        except Exception as error:
            return f"nvidia.nvimgcodec fails for a small JPEG file: {error}"
        return "nvidia.nvimgcodec fails for a small JPEG file; is nvJPEG installed (nvidia-nvjpeg), for the same CUDA?"

    def release(self) -> None:
        """Free the library's memory that the device no longer uses."""
        while self._used and self._device.query(self._used[0][0]):
            self._used.popleft()

    def close(self) -> None:
        """Wait for the device, and free everything. Nothing may be decoded after this."""
        try:
            self._stream.synchronize()
        except DeviceError:
            keep(self)  # the device may still write to its memory
            return
        with self._device.exclusive():  # freeing memory may wait for the device
            self._used.clear()
            self._decoder.__exit__(None, None, None)
        self._stream.close()


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Apply an EXIF orientation to pixels (height, width, channels). The result may be a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)
    flipped: dict[int, tuple[int, ...]] = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return pixels.flip(flipped[orientation]) if orientation in flipped else pixels


def out_of_memory(width: int, height: int, error: Exception) -> ResourceError:
    """Return the error for an image that the device has no memory for."""
    found = ResourceError(f"the device has no memory for the pixels of an image of {width} x {height}: {error}")
    found.__cause__ = error
    return found


_warned: Final[set[str]] = set()
_lock: Final = threading.Lock()


def open_library(device: Device, *, hardware: bool) -> tuple[Library | None, str]:
    """Open the library for a GPU. Blocks. Without it, return None and the reason, which is logged once."""
    if device.torch_device.type != "cuda":
        return None, f"{device.name} is no GPU"
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        reason = f"nvidia.nvimgcodec cannot be imported ({error}); {install_hint('decode')}"
    else:
        kinds = (["HW_GPU_ONLY"] if hardware else []) + ["GPU_ONLY", "HYBRID_CPU_GPU"]
        try:
            with device.exclusive():  # it allocates pinned memory, which a capture may not survive
                library = Library(device, nvimgcodec, kinds, device.torch_device.index)
                reason = library.defect()
                if not reason:
                    return library, ""
                library.close()
        except DeviceError:
            raise
        except Exception as error:
            reason = f"nvidia.nvimgcodec cannot be used: {error}"
    with _lock:
        is_new = reason not in _warned
        _warned.add(reason)
    if is_new:
        _log.warning("JPEG files are decoded on the CPU: %s", reason)
    return None, reason
