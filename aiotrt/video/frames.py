"""A frame: its source, its time, and its pixels, which are converted to RGB at the first access."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np

__all__ = ["Array", "Frame", "Held", "Picture"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Picture(Protocol):
    """Pixels in the form in which the source gives them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3). Reading it converts nothing."""
        ...

    @property
    def pixel_aspect(self) -> float:
        """The ratio of a displayed pixel's width to its height."""
        ...

    def array(self) -> Array:
        """Return the pixels, RGB. May convert, which takes some milliseconds for a large picture."""
        ...


class Held:
    """A picture from an array, with square pixels."""

    pixel_aspect = 1.0

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self._array.shape)

    def array(self) -> Array:
        """Return the array itself, not a copy."""
        return self._array


class Frame:
    """One frame of one source.

    Attributes:
        source: the source's name.
        index: its number among the source's frames, from 0; frames that a policy drops leave gaps.
        time: seconds since the beginning for a file, else by the source's own clock (its presentation timestamp); None if
            the source has no time.
        received: when it was decoded, in seconds by the pipeline's clock.
        decode_seconds: the duration of reading and decoding.
    """

    __slots__ = ("_image", "_picture", "decode_seconds", "index", "received", "source", "time")

    def __init__(
        self,
        source: str,
        index: int,
        picture: Picture,
        *,
        time: float | None = None,
        received: float = 0.0,
        decode_seconds: float = 0.0,
    ) -> None:
        self.source = source
        self.index = index
        self.time = time
        self.received = received
        self.decode_seconds = decode_seconds
        self._picture = picture
        self._image: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3). Reading it converts nothing."""
        return self._picture.shape

    @property
    def pixel_aspect(self) -> float:
        """The ratio of a pixel's width to its height. If it is not 1.0, display the picture wider or narrower."""
        return self._picture.pixel_aspect

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `image`; uint8 for decoded pictures. Reading it converts nothing."""
        return self.image.dtype if self.is_converted else np.dtype(np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return `image`, for NumPy, torch.as_tensor and models; a copy for another dtype or ``copy=True``.

        Raises:
            ValueError: ``copy=False``, and another dtype is requested.
        """
        image = self.image
        if dtype is not None and image.dtype != dtype:
            if copy is False:
                raise ValueError(f"a frame of dtype {image.dtype} cannot be converted to {np.dtype(dtype)} without a copy")
            return image.astype(dtype)
        return image.copy() if copy else image

    def __dlpack__(self, **arguments: Any) -> Any:
        """Export `image`, for torch.from_dlpack and others; see `numpy.ndarray.__dlpack__`."""
        return self.image.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's device: host memory."""
        return self.image.__dlpack_device__()

    @property
    def image(self) -> Array:
        """(height, width, 3) bytes, RGB. All readers share it, so do not write to it.

        The first access converts a decoded picture, which takes some milliseconds for a large one: do not do it on the event
        loop's thread, except for frames from ``async for``, which are converted already.
        """
        if self._image is None:
            self._image = self._picture.array()
        return self._image

    @property
    def is_converted(self) -> bool:
        """Whether `image` is available without conversion."""
        return self._image is not None or isinstance(self._picture, Held)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"<Frame {self.index} of {self.source}: {size}{f', {self.time:.3f} s' if self.time is not None else ''}>"
