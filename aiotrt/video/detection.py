"""Pre- and postprocessing for a detector such as RF-DETR, captured in the graph together with the network.

Both work on device tensors, create no tensor in host memory and do not synchronize, and their shapes do not depend on the
content of a frame, so they can be captured. `Detections` holds the results in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from aiotrt.errors import InputError

__all__ = ["Detections", "Postprocess", "Preprocess", "detections"]

Array = np.ndarray[Any, np.dtype[Any]]

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION: Final = (0.229, 0.224, 0.225)


class Preprocess:
    """Convert a frame (height, width, 3) of bytes, RGB, to a network's input (1, 3, size, size): resized and normalised.

    For ``load(preprocess=...)``. The aspect ratio is not kept. Bilinear without antialiasing, as in RF-DETR's own `predict`.
    Frames may have any size; each size has its own graph.

    Args:
        size: height and width of the network's input, in pixels.
        dtype: of the network's input.
        mean: of each channel, for values from 0 to 1.
        deviation: the standard deviation of each channel, for values from 0 to 1.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_DEVIATION,
    ) -> None:
        self.size = size
        self.dtype = dtype
        # Python numbers, because a tensor would have to be copied to the device during capture.
        self._scales = [1 / (255 * d) for d in deviation]
        self._shifts = [-m / d for m, d in zip(mean, deviation, strict=True)]

    def __call__(self, frame: torch.Tensor) -> torch.Tensor:
        """Convert a frame (height, width, 3) to the network's input (1, 3, size, size)."""
        image = frame.permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image, (self.size, self.size), mode="bilinear", align_corners=False)
        channels = [image[:, i] * a + b for i, (a, b) in enumerate(zip(self._scales, self._shifts, strict=True))]
        found: torch.Tensor = torch.stack(channels, dim=1).to(self.dtype)
        return found


class Postprocess:
    """Select the best detections from a DETR's boxes, logits and optional masks, which the network may give in any order.

    For ``load(postprocess=...)``. Takes the sigmoid and the best `top` of all queries and classes (equal scores in their
    order, as in RF-DETR), converts boxes from centre and size to corners in pixels, and resizes masks and thresholds them
    at zero. Masks are copied from the device with eight pixels in a byte, an eighth of the size; `detections` unpacks them.

    Args:
        height: of the frames, in pixels; boxes and masks are scaled to it.
        width: of the frames, in pixels.
        top: the number of detections, whatever their scores.

    Raises:
        InputError: an argument is less than 1.
    """

    def __init__(self, height: int, width: int, *, top: int = 32) -> None:
        if min(height, width, top) < 1:
            raise InputError(f"height, width and top must be at least 1, got {height}, {width}, {top}")
        self.height = height
        self.width = width
        self.top = top

    def __call__(self, *outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``boxes``, ``scores``, ``classes`` and, for a network that segments, ``masks``.

        Raises:
            InputError: the outputs do not have the shapes of a DETR's.
        """
        boxes, logits, masks = _identify(outputs)
        classes = logits.shape[2]
        scores = logits[0].float().sigmoid().flatten()
        ordered, order = scores.sort(descending=True, stable=True)
        best, index = ordered[: self.top], order[: self.top]
        query = index // classes
        x, y, width, height = boxes[0].float().index_select(0, query).unbind(1)
        left, right = ((x + sign * width / 2).clamp(0, 1) * self.width for sign in (-1, 1))
        upper, lower = ((y + sign * height / 2).clamp(0, 1) * self.height for sign in (-1, 1))
        found = {"boxes": torch.stack([left, upper, right, lower], 1), "scores": best, "classes": (index % classes).int()}
        if masks is not None:
            found["masks"] = self._packed(masks[0].float().index_select(0, query))
        return found

    def _packed(self, masks: torch.Tensor) -> torch.Tensor:
        size = (self.height, self.width)
        inside = torch.nn.functional.interpolate(masks[:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0
        inside = torch.nn.functional.pad(inside, (0, -self.width % 8)).unflatten(2, (-1, 8))
        packed: torch.Tensor = inside[..., 0].to(torch.uint8) * 128
        for bit in range(1, 8):  # the first pixel is the highest bit, as in numpy.unpackbits
            packed = packed + inside[..., bit].to(torch.uint8) * (128 >> bit)
        return packed


def _identify(outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return boxes (1, n, 4), logits (1, n, classes) and masks (1, n, height, width), identified by shape."""
    flat = [output for output in outputs if output.ndim == 3]
    masks = [output for output in outputs if output.ndim == 4]
    if len(flat) != 2 or len(masks) > 1 or 4 not in (flat[0].shape[2], flat[1].shape[2]):
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise InputError(f"expected boxes (1, n, 4), logits (1, n, classes) and perhaps masks (1, n, h, w), got {shapes}")
    boxes, logits = flat if flat[0].shape[2] == 4 else (flat[1], flat[0])
    return boxes, logits, masks[0] if masks else None


@dataclass(frozen=True)
class Detections:
    """The detections on one frame, highest score first.

    Attributes:
        boxes: (n, 4): left, upper, right, lower, in pixels of a frame of `size`.
        scores: (n,), from 0 to 1.
        classes: (n,) class numbers.
        masks: (n, height, width) booleans; None for a detector without masks.
        size: height and width of the frames that boxes and masks refer to.
    """

    boxes: Array
    scores: Array
    classes: Array
    masks: Array | None
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


def detections(results: Mapping[str, Any], size: tuple[int, int], *, threshold: float = 0.5) -> Detections:
    """Convert the results of `Postprocess` to `Detections` with a score of at least `threshold`, and unpack the masks.

    Args:
        results: of a model with `Postprocess`, by name; arrays or host tensors.
        size: the height and width that `Postprocess` was created with.
        threshold: the minimum score.
    """
    scores = np.asarray(results["scores"])
    keep = scores >= threshold
    masks = results.get("masks")
    if masks is not None:
        masks = np.unpackbits(np.asarray(masks)[keep], axis=2, count=size[1]).astype(bool)
    return Detections(np.asarray(results["boxes"])[keep], scores[keep], np.asarray(results["classes"])[keep], masks, size)
