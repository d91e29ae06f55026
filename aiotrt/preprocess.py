"""Ready-made functions for ``load(preprocess=...)``: from an image to the input of a detector or classifier.

::

    model = aiotrt.load(network, preprocess=Letterbox(640))
    boxes = await model(image)  # one graph for each size of image
    boxes = await model(*padded(image))  # one graph for each bucket of sizes

Each takes an image (height, width, 3) of uint8, RGB, and gives float (1, 3, size, size). They work on device tensors, create
no tensor from host memory and do not synchronize, so they can be captured in a graph.

Images of many sizes need no graph of their own each: `padded` copies an image into a larger canvas, and the function gets
the size of the image as a second input, from which the device computes where to sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from aiotrt.errors import InputError

__all__ = ["CentreCrop", "Letterbox", "Resize", "padded"]

_MEAN: Final = (0.485, 0.456, 0.406)
_DEVIATION: Final = (0.229, 0.224, 0.225)


def padded(image: torch.Tensor, step: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy an image into a canvas whose sides are multiples of `step`, and return the canvas and the image's size.

    What is outside the image is undefined; the functions of this module do not read it.

    Args:
        image: (height, width, channels), on any device.
        step: a larger one needs fewer graphs, and more memory for each.

    Returns:
        The canvas, on the image's device, and the height and width, a host tensor of int64.
    """
    height, width, channels = image.shape
    canvas = image.new_empty((-(-height // step) * step, -(-width // step) * step, channels))
    canvas[:height, :width] = image
    return canvas, torch.tensor([height, width])


class Letterbox:
    """Resize so that the image fits, keep its aspect ratio, centre it, and fill the borders, as YOLO networks expect.

    Values are from 0 to 1. The sizes, positions and interpolation are those of Ultralytics' ``LetterBox`` and OpenCV's
    ``INTER_LINEAR``, whose values are rounded to 8 bits; these are not.

    Args:
        size: height and width of the result.
        fill: value of the borders, from 0 to 255.
        dtype: of the result.
    """

    def __init__(self, size: int = 640, *, fill: int = 114, dtype: torch.dtype = torch.float32) -> None:
        _check(size=size)
        self.size = size
        self.fill = fill
        self.dtype = dtype

    def __call__(self, image: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Convert an image; `size` is its height and width where it is part of a larger canvas."""
        rows, columns = (self._axis(image, axis, _sizes(image, size)) for axis in (0, 1))
        resized = _sampled(image, rows[0], columns[0])
        inside = rows[1][:, None, None] & columns[1][None, :, None]
        return _planar(torch.where(inside, resized, float(self.fill)) / 255, self.dtype)

    def _axis(self, image: torch.Tensor, axis: int, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each position of the result where it is in the image, and whether it is inside."""
        length = sizes[axis]
        resized, start = self._fit(sizes)
        index = torch.arange(self.size, device=image.device) - start[axis]
        inside = (index >= 0) & (index < resized[axis])
        return ((index + 0.5) * (length / resized[axis]) - 0.5).clamp(torch.zeros_like(length), length - 1), inside

    def _fit(self, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the size of the image in the result, and where it begins."""
        resized = (sizes * (self.size / sizes).min()).round().clamp(min=1)
        return resized, ((self.size - resized) / 2 - 0.1).round()

    def boxes(self, boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Convert boxes (..., 4), as left, upper, right, lower, from the result's pixels to the image's.

        Args:
            boxes: on any device.
            size: height and width of the image, on the same device.
        """
        sizes = size.double()
        _, start = self._fit(sizes)
        scale = (self.size / sizes).min()
        limits = sizes.flip(0).repeat(2)
        found = ((boxes - start.flip(0).repeat(2)) / scale).clamp(torch.zeros_like(limits), limits)
        return found.to(boxes.dtype)


class Resize:
    """Resize to a square, whatever the aspect ratio, and normalise, as RF-DETR does.

    Bilinear without antialiasing: torch's ``interpolate``.

    Args:
        size: height and width of the result; a multiple of what the network requires.
        mean: of each channel, for values from 0 to 1.
        deviation: the standard deviation of each channel, for values from 0 to 1.
        dtype: of the result.
    """

    def __init__(
        self,
        size: int = 560,
        *,
        mean: Sequence[float] = _MEAN,
        deviation: Sequence[float] = _DEVIATION,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(size=size)
        self.size = size
        self.dtype = dtype
        self._normalised = _Normalise(mean, deviation)

    def __call__(self, image: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Convert an image; `size` is its height and width where it is part of a larger canvas."""
        lengths = _sizes(image, size)
        index = torch.arange(self.size, device=image.device) + 0.5
        rows, columns = ((index * (length / self.size) - 0.5).clamp(min=0) for length in lengths)
        rows, columns = torch.minimum(rows, lengths[0] - 1), torch.minimum(columns, lengths[1] - 1)
        return _planar(self._normalised(_sampled(image, rows, columns)), self.dtype)


class CentreCrop:
    """Resize the shorter side, crop the centre and normalise, as torchvision's classifiers for ImageNet expect.

    Bilinear with antialiasing, and rounded to 8 bits before the normalisation, as in ``ImageClassification`` of torchvision.

    Args:
        resize: length of the shorter side.
        crop: height and width of the result.
        mean: of each channel, for values from 0 to 1.
        deviation: the standard deviation of each channel, for values from 0 to 1.
        dtype: of the result.

    Raises:
        InputError: `crop` is larger than `resize`.
    """

    def __init__(
        self,
        resize: int = 256,
        crop: int = 224,
        *,
        mean: Sequence[float] = _MEAN,
        deviation: Sequence[float] = _DEVIATION,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(resize=resize, crop=crop)
        if crop > resize:
            raise InputError(f"crop={crop} must be at most resize={resize}")
        self.resize = resize
        self.crop = crop
        self.dtype = dtype
        self._normalised = _Normalise(mean, deviation)

    def __call__(self, image: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Convert an image; `size` is its height and width where it is part of a larger canvas."""
        sizes = _sizes(image, size)
        resized = (self.resize * sizes / sizes.min()).floor()
        starts = ((resized - self.crop) / 2).round()
        rows, columns = (self._weights(image, axis, sizes[axis], resized[axis], starts[axis]) for axis in (0, 1))
        lines = torch.matmul(rows, image.float().flatten(1)).unflatten(1, image.shape[1:])  # (crop, width, 3)
        pixels = torch.matmul(columns, lines)
        return _planar(self._normalised(pixels.round().clamp(0, 255)), self.dtype)

    def _weights(
        self, image: torch.Tensor, axis: int, length: torch.Tensor, resized: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Return the share of each of the image's lines in each line of the result: (crop, lines of the canvas)."""
        scale = length / resized
        centres = (torch.arange(self.crop, device=image.device) + start + 0.5) * scale
        lines = torch.arange(image.shape[axis], device=image.device) + 0.5
        shares = 1 - ((lines - centres[:, None]) / scale.clamp(min=1)).abs()
        shares = torch.where(lines < length, shares.clamp(min=0), 0.0)
        return (shares / shares.sum(1, keepdim=True)).float()


class _Normalise:
    """Normalise values from 0 to 255 in the last dimension, which is the channels."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        # Python numbers, because a tensor would have to be copied to the device during capture.
        self._scales = [1 / (255 * d) for d in deviation]
        self._shifts = [-m / d for m, d in zip(mean, deviation, strict=True)]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        channels = zip(pixels.unbind(-1), self._scales, self._shifts, strict=True)
        return torch.stack([channel * scale + shift for channel, scale, shift in channels], -1)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, got {size}")


def _sizes(image: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    """Return height and width as float64 on the image's device, without a copy from host memory."""
    if size is not None:
        return size.to(torch.float64)
    return torch.stack(
        [torch.full((), float(length), dtype=torch.float64, device=image.device) for length in image.shape[:2]]
    )


def _sampled(image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Interpolate an image linearly at these rows and columns, which are inside it; (rows, columns, channels) of float32."""
    for axis, positions in ((0, rows), (1, columns)):
        before = positions.floor()
        share = (positions - before).float()
        share = share[:, None, None] if axis == 0 else share[:, None]
        first = before.long()
        second = torch.minimum(first + 1, positions.max().ceil().long())
        image = torch.lerp(image.index_select(axis, first).float(), image.index_select(axis, second).float(), share)
    return image


def _planar(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert (height, width, channels) to (1, channels, height, width)."""
    return pixels.permute(2, 0, 1)[None].to(dtype, memory_format=torch.contiguous_format)
