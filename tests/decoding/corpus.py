"""Photographs as files, and what damage and malice make of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from aiotrt.decoding import ImageError, pillow

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
MAX_PIXELS = 4_000_000


def photograph(name: str, size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)())
    return image if size is None else image.resize(size)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG file with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph("coffee", (75, 50)), exif=exif)


def on_cpu(data: bytes) -> pillow.Pixels | str:
    """The pixels that Pillow finds, or the text of the error."""
    try:
        return pillow.decode(data, MAX_PIXELS)
    except ImageError as error:
        return f"{type(error).__name__}: {error}"


def damaged(count: int, seed: int = 0) -> Iterator[bytes]:
    """Files that were truncated, altered, reordered or made up, the same ones for each seed."""
    random = np.random.default_rng(seed)
    image = photograph("chelsea", (90, 60))
    options: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"restart_marker_blocks": 3},
        {"progressive": True, "restart_marker_rows": 1},
        {"optimize": True},
        {"quality": 20},
    ]
    files = [encoded(one, **option) for one in (image, image.convert("L")) for option in options]
    for number in range(count):
        data = bytearray(files[int(random.integers(len(files)))])
        where = int(random.integers(2, len(data)))
        head = data.index(b"\xff\xda")
        match number % 10:
            case 0:
                del data[where:]
            case 1:  # truncated, and ended all the same
                data[where:] = b"\xff\xd9"
            case 2:
                data[int(random.integers(2, head))] = int(random.integers(256))
            case 3:
                data[where] = int(random.integers(256))
            case 4:
                data[where : where + 20] = bytes(20)
            case 5:
                del data[where : where + int(random.integers(1, 40))]
            case 6:
                data[where:where] = random.bytes(int(random.integers(1, 40)))
            case 7:  # a segment twice, or somewhere else
                start = int(random.integers(2, head))
                data[where:where] = data[start : start + int(random.integers(2, 200))]
            case 8:  # the size in the frame's header
                frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
                data[frame + 5 + int(random.integers(4))] = int(random.integers(256))
            case _:
                data[int(random.integers(2, 20)) :] = random.bytes(200)
        yield bytes(data)
