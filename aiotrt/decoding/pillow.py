"""Image files decoded by Pillow, within limits on sides, pixels, and the memory of all images decoded at once."""

from __future__ import annotations

import io
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features

from aiotrt.decoding.errors import ImageError, ImageTooLargeError
from aiotrt.decoding.threads import memory, off_loop

__all__ = ["FORMATS", "Data", "Pixels", "decode", "decode_off_loop", "needed", "opened", "pixels"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Data: TypeAlias = bytes | bytearray | memoryview

#: Formats that people send, and whose decoders are fuzzed by many. AVIF where Pillow was built with it.
FORMATS: Final = ("JPEG", "PNG", "WEBP", *(["AVIF"] if features.check("avif") else []), "BMP", "GIF", "TIFF")
#: Pixels of one side; JPEG's own limit. Pillow allocates row by row: fifty million rows of one pixel cost a gigabyte.
_MAX_SIDE: Final = 65_535
#: Pixels that are converted by one call, which takes some milliseconds.
_PIECE: Final = 1 << 20


def decode(data: Data, max_pixels: int, mode: str = "RGB") -> Pixels:
    """Decode an image file to pixels (height, width, channels). Takes a while; for a thread.

    Raises:
        ImageError: it is not an image, or damaged, or of 32 bits, whose range is unknown.
        ImageTooLargeError: it has more than `max_pixels`, or than Pillow takes, or a side of more than 65,535.
    """
    with opened(data, max_pixels) as image:
        return pixels(image, len(data), mode)


async def decode_off_loop(data: Data, max_pixels: int, mode: str) -> Pixels:
    """Decode an image file in a thread, once there is room for it beside the images that are being decoded.

    Raises:
        ImageError: as `decode` does.
        ImageTooLargeError: as `decode` does.
    """
    with await off_loop(partial(opened, data, max_pixels), len(data)) as image:
        async with memory(needed(image, mode)):
            return await off_loop(partial(pixels, image, len(data), mode))


def opened(data: Data, max_pixels: int) -> Image.Image:
    """Open an image and check its size. Only its header is read.

    Raises:
        ImageError, ImageTooLargeError: as `decode` does.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"the image has too many pixels; at most {max_pixels:,} are taken: {error}") from error
    except Exception as error:
        raise _unreadable(len(data), error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLargeError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are taken")
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLargeError(f"the image has {width} x {height} pixels; at most {_MAX_SIDE:,} are taken on one side")
    if image.mode in ("I", "F"):
        raise ImageError(f"the image has pixels of 32 bits (Pillow's mode {image.mode!r}); send 8 or 16 bits")
    return image


def needed(image: Image.Image, mode: str) -> int:
    """Bytes that decoding takes at most."""
    stored = 4 if len(image.getbands()) > 1 else 2  # Pillow's own; of 16 bits two, and less otherwise
    # The decoders of WebP and AVIF have two canvases, and give a copy; other images may be turned, which makes a second one.
    copies = 4 if image.format in ("WEBP", "AVIF") else 2
    width, height = image.size
    return width * height * (copies * stored + Image.getmodebands(mode))


def pixels(image: Image.Image, size: int, mode: str) -> Pixels:
    """Decode an opened image, apply its EXIF orientation, and convert it. Takes a while; for a thread.

    Raises:
        ImageError: it is damaged or truncated.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        found = np.empty((height, width, Image.getmodebands(mode)), np.uint8)
        rows = max(_PIECE // width, 1)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            piece = image.crop((0, top, width, bottom))
            if image.mode.startswith("I;16"):  # Pillow would make white of all that is over 255
                piece = Image.fromarray((np.asarray(piece) >> 8).astype(np.uint8))
            found[top:bottom] = np.asarray(piece.convert(mode)).reshape(bottom - top, width, -1)
        return found
    except Exception as error:
        raise _unreadable(size, error) from error


def _unreadable(size: int, error: Exception) -> ImageError:
    """Return the error for a bad file, for which Pillow raises many unrelated classes."""
    reason = f"its format is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)
    return ImageError(f"the data is not an image that can be read ({size:,} bytes): {reason}")
