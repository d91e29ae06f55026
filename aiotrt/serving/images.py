"""Image files in request bodies: `aiotrt.decoding.pillow`, with the errors of bodies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiotrt.decoding import pillow
from aiotrt.decoding.errors import ImageError, ImageTooLargeError
from aiotrt.decoding.pillow import FORMATS, Data, Pixels
from aiotrt.serving.errors import BodyError, BodyTooLargeError

__all__ = ["FORMATS", "Pixels", "body_errors", "decode_image", "decode_off_loop"]


def decode_image(data: Data, max_pixels: int, mode: str = "RGB") -> Pixels:
    """Decode an image file to pixels (height, width, channels). Takes a while; for a thread.

    Raises:
        BodyError: it is not an image, or damaged, or of 32 bits, whose range is unknown.
        BodyTooLargeError: it has more than `max_pixels`, or than Pillow takes, or a side of more than 65,535.
    """
    with body_errors():
        return pillow.decode(data, max_pixels, mode)


async def decode_off_loop(data: Data, max_pixels: int, mode: str) -> Pixels:
    """Decode an image file in a thread, once there is room for it beside the images that are being decoded.

    Raises:
        BodyError: as `decode_image` does.
        BodyTooLargeError: as `decode_image` does.
    """
    with body_errors():
        return await pillow.decode_off_loop(data, max_pixels, mode)


@contextmanager
def body_errors() -> Iterator[None]:
    """Inside, errors of images are raised as errors of the body that they came in."""
    try:
        yield
    except ImageTooLargeError as error:
        raise BodyTooLargeError(str(error)) from error
    except ImageError as error:
        raise BodyError(str(error)) from error
