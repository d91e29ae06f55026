"""Draw boxes, masks and labels on frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError
from aiotrt.video.detection import Detections
from aiotrt.video.frames import Array

__all__ = ["Annotator"]

COLOURS: Final = (
    (230, 80, 60), (60, 140, 230), (70, 180, 90), (240, 180, 40), (160, 90, 210), (40, 190, 190), (240, 120, 180),
    (140, 140, 60),
)  # fmt: skip


class Annotator:
    """A function that draws detections; for `VideoFile`, `Mjpeg` and `WebSockets`.

    Args:
        convert: a function from the model's output to `Detections`; None if the output is a `Detections`.
        labels: names of the classes, by number.
        opacity: of masks, from 0 to 1.
        width: of lines, in pixels.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(
        self,
        convert: Callable[[Any], Detections] | None = None,
        *,
        labels: Sequence[str] | Mapping[int, str] = (),
        opacity: float = 0.4,
        width: int = 2,
    ) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise MissingDependencyError(f"drawing needs Pillow; {install_hint('video')}") from error
        self._image, self._draw = Image, ImageDraw
        self._font = ImageFont.load_default(size=13)
        self._convert = convert
        self._labels = dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels))
        self._opacity = opacity
        self._width = width

    def __call__(self, image: Array, output: Any) -> Array:
        """Return a copy of the frame (height, width, 3) with the detections drawn on it."""
        found: Detections = self._convert(output) if self._convert is not None else output
        shown = np.array(image)
        height, width = shown.shape[:2]
        down, right = height / found.size[0], width / found.size[1]
        for i in range(len(found)):
            if found.masks is not None:
                self._blend(shown, found.masks[i], self._colour(found, i))
        picture = self._image.fromarray(shown)
        pen = self._draw.Draw(picture)
        for i in range(len(found)):
            left, upper, end, lower = (float(v) for v in found.boxes[i] * (right, down, right, down))
            colour = self._colour(found, i)
            pen.rectangle((left, upper, max(left, end), max(upper, lower)), outline=colour, width=self._width)
            text = f"{self._label(int(found.classes[i]))} {found.scores[i]:.0%}"
            box = pen.textbbox((left + 2, max(0.0, upper - 16)), text, font=self._font)
            pen.rectangle(box, fill=colour)
            pen.text((left + 2, max(0.0, upper - 16)), text, fill="white", font=self._font)
        return np.asarray(picture)

    def _blend(self, shown: Array, mask: Array, colour: tuple[int, int, int]) -> None:
        if mask.shape != shown.shape[:2]:
            rows = np.arange(shown.shape[0]) * mask.shape[0] // shown.shape[0]
            columns = np.arange(shown.shape[1]) * mask.shape[1] // shown.shape[1]
            mask = mask[rows[:, None], columns]
        shown[mask] = (shown[mask] * (1 - self._opacity) + np.array(colour) * self._opacity).astype(np.uint8)

    def _colour(self, found: Detections, i: int) -> tuple[int, int, int]:
        return COLOURS[int(found.classes[i]) % len(COLOURS)]

    def _label(self, number: int) -> str:
        return self._labels.get(number, str(number))
