"""Errors of image data."""

from __future__ import annotations

from aiotrt.errors import InputError

__all__ = ["ImageError", "ImageTooLargeError"]


class ImageError(InputError):
    """The data is not an image that can be decoded: it is damaged, truncated, or of another format."""


class ImageTooLargeError(ImageError):
    """An image has more bytes or pixels, or a longer side, than is accepted."""
