"""Find the inputs that take image files, and decode the files to the form of an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from aiotrt.decoding.decoder import decode_image
from aiotrt.errors import InputError
from aiotrt.serving.errors import BodyError, BodyTooLargeError
from aiotrt.serving.images import body_errors, decode_off_loop
from aiotrt.tensors import TensorSpec

__all__ = ["ImageInput", "image_inputs"]

#: The maximum number of pixels of all images of one input together.
_MAX_PIXELS: Final = 50_000_000
#: Pillow's modes by number of channels.
_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ImageInput:
    """An input of pixels.

    Attributes:
        name: the input's name.
        mode: Pillow's mode of its pixels: "L", "RGB" or "RGBA".
        is_planar: whether its dimensions are (channels, height, width), and not (height, width, channels).
        is_many: whether a dimension for several images precedes these.
        device: the device to decode RGB images for; None to decode them in host memory.
    """

    name: str
    mode: str
    is_planar: bool
    is_many: bool
    device: str | None = None

    async def decoded(self, files: Sequence[bytes | bytearray | memoryview], *, has_axis: bool) -> torch.Tensor:
        """Return the pixels of image files. Several images must have the same size.

        Args:
            files: at least one image file.
            has_axis: whether the images are items of a batch.

        Raises:
            BodyError: a file is not an image, the images differ in size, or there are more than the input takes.
            BodyTooLargeError: the images have more than 50 million pixels together.
        """
        has_axis = has_axis or self.is_many
        if len(files) > 1 and not has_axis:
            raise BodyError(f"input {self.name!r} takes one image, got {len(files)}")
        left, images = _MAX_PIXELS, list[torch.Tensor]()
        for file in files:
            if left <= 0:
                raise BodyTooLargeError(f"the images have too many pixels; at most {_MAX_PIXELS:,} are taken together")
            pixels = await self._pixels(file, left)
            left -= pixels.shape[0] * pixels.shape[1]
            images.append(pixels.permute(2, 0, 1).contiguous() if self.is_planar else pixels)
            if images[0].shape != images[-1].shape:
                raise BodyError(f"input {self.name!r}: images of one request must have the same size")
        if not has_axis:
            return images[0]
        return images[0][None] if len(images) == 1 else torch.stack(images)

    async def _pixels(self, file: bytes | bytearray | memoryview, most: int) -> torch.Tensor:
        if self.device is None or self.mode != "RGB":
            return torch.from_numpy(await decode_off_loop(file, most, self.mode))
        with body_errors():
            return await decode_image(file, self.device, max_bytes=memoryview(file).nbytes, max_pixels=most)


def image_inputs(model: str, specs: Sequence[TensorSpec], device: str | None = None) -> Mapping[str, ImageInput]:
    """Return the inputs of UINT8 with 1, 3 or 4 channels, by name.

    Args:
        model: its name.
        specs: its inputs.
        device: where to decode images; None for host memory.

    Raises:
        InputError: the model has no such input.
    """
    found = {}
    for spec in specs:
        shape = spec.shape or ()
        if spec.dtype is torch.uint8 and len(shape) in (3, 4):
            is_planar = shape[-1] not in _MODES
            mode = _MODES.get(shape[-3 if is_planar else -1] or 0)
            if mode is not None:
                found[spec.name] = ImageInput(spec.name, mode, is_planar, len(shape) == 4, device)
    if not found:
        raise InputError(
            f"model {model!r}: images = true is for models with an input of UINT8 of shape (height, width, channels), "
            "(channels, height, width) or one dimension more, with 1, 3 or 4 channels"
        )
    return found
