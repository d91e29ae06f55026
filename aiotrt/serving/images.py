"""Image files, decoded within bounds on their sides, their pixels, and the memory of all that are decoded at once."""

from __future__ import annotations

import io
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features

from aiotrt.serving.errors import BodyError, BodyTooLargeError
from aiotrt.serving.threads import memory, off_loop

__all__ = ["FORMATS", "Pixels", "decode_image", "decode_off_loop"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Data: TypeAlias = bytes | bytearray | memoryview

#: Formats that people send, and whose decoders are fuzzed by many. AVIF where Pillow was built with it.
FORMATS: Final = ("JPEG", "PNG", "WEBP", *(["AVIF"] if features.check("avif") else []), "BMP", "GIF", "TIFF")
#: Pixels of one side; JPEG's own limit. Pillow allocates row by row: fifty million rows of one pixel cost a gigabyte.
_MAX_SIDE: Final = 65_535
#: Pixels that are converted by one call, which takes some milliseconds.
_PIECE: Final = 1 << 20


def decode_image(data: Data, max_pixels: int, mode: str = "RGB") -> Pixels:
    """Decode an image file to pixels (height, width, channels). Takes a while; for a thread.

    Raises:
        BodyError: it is not an image, or damaged, or of 32 bits, whose range is unknown.
        BodyTooLargeError: it has more than `max_pixels`, or than Pillow takes, or a side of more than 65,535.
    """
    with _opened(data, max_pixels) as image:
        return _pixels(image, len(data), mode)


async def decode_off_loop(data: Data, max_pixels: int, mode: str) -> Pixels:
    """Decode an image file in a thread, once there is room for it beside the images that are being decoded.

    Raises:
        BodyError: as `decode_image` does.
        BodyTooLargeError: as `decode_image` does.
    """
    with await off_loop(partial(_opened, data, max_pixels), len(data)) as image:
        async with memory(_needed(image, mode)):
            return await off_loop(partial(_pixels, image, len(data), mode))


def _opened(data: Data, max_pixels: int) -> Image.Image:
    """The image, of which only the head was read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BodyTooLargeError(f"the image has too many pixels; at most {max_pixels:,} are taken: {error}") from error
    except Exception as error:
        raise _unreadable(len(data), error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BodyTooLargeError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are taken")
    if max(width, height) > _MAX_SIDE:
        raise BodyTooLargeError(f"the image has {width} x {height} pixels; at most {_MAX_SIDE:,} are taken on one side")
    if image.mode in ("I", "F"):
        raise BodyError(f"the image has pixels of 32 bits (Pillow's mode {image.mode!r}); send 8 or 16 bits")
    return image


def _needed(image: Image.Image, mode: str) -> int:
    """Bytes that decoding takes at most."""
    stored = 4 if len(image.getbands()) > 1 else 2  # Pillow's own; of 16 bits two, and less otherwise
    # The decoders of WebP and AVIF have two canvases, and give a copy; other images may be turned, which makes a second one.
    copies = 4 if image.format in ("WEBP", "AVIF") else 2
    width, height = image.size
    return width * height * (copies * stored + Image.getmodebands(mode))


def _pixels(image: Image.Image, size: int, mode: str) -> Pixels:
    try:
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        pixels = np.empty((height, width, Image.getmodebands(mode)), np.uint8)
        rows = max(_PIECE // width, 1)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            piece = image.crop((0, top, width, bottom))
            if image.mode.startswith("I;16"):  # Pillow would make white of all that is over 255
                piece = Image.fromarray((np.asarray(piece) >> 8).astype(np.uint8))
            pixels[top:bottom] = np.asarray(piece.convert(mode)).reshape(bottom - top, width, -1)
        return pixels
    except Exception as error:
        raise _unreadable(size, error) from error


def _unreadable(size: int, error: Exception) -> BodyError:
    """What to say of whatever Pillow raised: its decoders raise many unrelated classes for one and the same, a bad file."""
    reason = f"its format is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)
    return BodyError(f"the body is not an image that can be read ({size:,} bytes): {reason}")
