"""Finding lines of text with PP-OCR's detector: pixels to its input, its output to boxes, and boxes drawn on the page.

The detector takes an RGB image of any size that is a multiple of 32, and returns for every pixel the probability that it
belongs to the *core* of a line of text: a strip along its middle, thinner than the letters, so that lines that nearly touch
stay apart. Finding the lines is therefore: threshold, connected strips, and let each grow to the size of its letters.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import skimage.data
import skimage.measure
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Line", "detector_file", "direct_session", "draw", "find_lines", "normalise", "scanned_page"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

# ImageNet's mean and deviation. Measured against (x - 0.5) / 0.5 on the scanned page: both find every line, and with these
# the strips come out whole.
MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)

THRESHOLD: Final = 0.3  # a pixel at least this probable is part of a strip
LEAST_SCORE: Final = 0.6  # mean probability of a strip that counts
LEAST_PIXELS: Final = 40
GROWTH: Final = 1.8  # how far a strip grows on each side, as a multiple of its area over its circumference

COLOURS: Final = ((16, 90, 190), (200, 70, 20), (30, 130, 60))
GUTTER: Final = 100  # pixels to the right of the page, for the scores


@dataclass(frozen=True)
class Line:
    """One line of text.

    Attributes:
        corners: of a rectangle, tilted with the line: four (x, y), clockwise from its upper left.
        score: how sure the detector is, 0 to 1.
    """

    corners: tuple[tuple[float, float], ...]
    score: float


def detector_file() -> Path:
    """The pretrained PP-OCRv4 text detector, an ONNX file inside the rapidocr-onnxruntime package (never imported).

    Raises:
        FileNotFoundError: the package is not installed, or lays out its files differently.
    """
    inside = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
    try:
        path = Path(str(importlib.metadata.distribution("rapidocr-onnxruntime").locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "the text detector's model file is missing; it comes with a package of which only the files are used: "
            "python -m pip install --no-deps --ignore-requires-python rapidocr-onnxruntime==1.4.4"
        )
    return path


def direct_session(file: Path) -> Callable[[Floats], Any]:
    """The engine itself, called directly, with the same settings as aiotrt gives it: a function that blocks."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def scanned_page(scale: int = 1) -> Pixels:
    """A photographed page of a book, from scikit-image: RGB, 192 by 384 pixels times `scale`."""
    page = Image.fromarray(skimage.data.page()).convert("RGB")
    # It is 191 pixels high; the detector wants multiples of 32.
    return np.asarray(page.resize((384 * scale, 192 * scale), Image.Resampling.BICUBIC))


def normalise(pixels: Pixels) -> Floats:
    """Pixels (height, width, 3) to the detector's input (1, 3, height, width)."""
    scaled = (pixels.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def find_lines(output: Floats) -> list[Line]:
    """The detector's output (1, 1, height, width) to lines of text, from top to bottom."""
    probability = output[0, 0]
    strips: Any = skimage.measure.label(probability > THRESHOLD)
    lines = []
    for strip in skimage.measure.regionprops(strips, intensity_image=probability):
        score = float(strip.intensity_mean)
        if strip.num_pixels >= LEAST_PIXELS and score >= LEAST_SCORE:
            lines.append(Line(_grown_rectangle(strip.coords), score))
    return sorted(lines, key=lambda line: line.corners[0][1])


def draw(pixels: Pixels, lines: list[Line], path: Path) -> None:
    """Write a PNG: the page with its lines marked, and beside it what each line's number and score are."""
    scan = Image.fromarray(pixels).convert("RGBA")
    page = Image.new("RGBA", (scan.width + GUTTER, scan.height), "white")
    page.paste(scan)
    marks = Image.new("RGBA", page.size)
    pen = ImageDraw.Draw(marks)
    font = ImageFont.load_default(size=18)
    for number, line in enumerate(lines, start=1):
        colour = COLOURS[number % len(COLOURS)]
        pen.polygon(line.corners, fill=(*colour, 56), outline=(*colour, 255), width=2)
        right = [line.corners[1], line.corners[2]]
        middle = (sum(x for x, _ in right) / 2, sum(y for _, y in right) / 2)
        pen.line([middle, (scan.width, middle[1])], fill=(*colour, 255), width=2)
        pen.text((scan.width + 10, middle[1]), f"{number}   {line.score:.0%}", fill=(*colour, 255), font=font, anchor="lm")
    Image.alpha_composite(page, marks).convert("RGB").save(path)


def _grown_rectangle(coordinates: npt.NDArray[np.intp]) -> tuple[tuple[float, float], ...]:
    """The rectangle around these (row, column) pixels, tilted as they are, grown to the size of the letters."""
    points = coordinates[:, ::-1].astype(np.float64)
    centre = points.mean(axis=0)
    _, _, axes = np.linalg.svd(points - centre, full_matrices=False)
    axes *= np.sign(axes[[0, 1], [0, 1]])[:, None]  # the first points right, the second down
    along = (points - centre) @ axes.T
    low, high = along.min(axis=0), along.max(axis=0)
    length, height = high - low + 1
    growth = GROWTH * len(points) / (2 * (length + height))
    (left, top), (right, bottom) = low - growth, high + growth
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)]) @ axes + centre
    return tuple((float(x), float(y)) for x, y in corners)
