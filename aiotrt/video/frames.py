"""A frame: its source, its time, and its pixels, which are converted to RGB at the first access."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

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

    @property
    def is_on_device(self) -> bool:
        """Whether the pixels are in device memory."""
        ...

    @property
    def tensor(self) -> torch.Tensor | None:
        """The pixels in device memory, RGB, ordered for the current stream; None if they are in host memory."""
        ...

    def array(self) -> Array:
        """Return the pixels, RGB. May convert, which takes some milliseconds for a large picture."""
        ...


class Held:
    """A picture from an array, with square pixels."""

    pixel_aspect = 1.0
    is_on_device = False
    tensor = None

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
        return np.dtype(np.uint8) if self.is_on_device or not self.is_converted else self.image.dtype

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
        """Export `device_image` or `image`, for torch.from_dlpack and others; see `numpy.ndarray.__dlpack__`."""
        tensor = self.device_image
        return self.image.__dlpack__(**arguments) if tensor is None else tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's device: of `device_image`, else host memory."""
        tensor = self.device_image
        found: Any = self.image.__dlpack_device__() if tensor is None else tensor.__dlpack_device__()
        return int(found[0]), int(found[1])

    @property
    def device_image(self) -> torch.Tensor | None:
        """(height, width, 3) bytes in device memory, RGB, of a frame that the GPU decoded; else None.

        The device's current stream waits for the decoder, so work that is submitted to it later reads complete pixels. All
        readers share the tensor, so do not write to it.
        """
        return self._picture.tensor

    @property
    def image(self) -> Array:
        """(height, width, 3) bytes, RGB. All readers share it, so do not write to it.

        The first access converts a decoded picture, which takes some milliseconds for a large one: do not do it on the event
        loop's thread, except for frames from ``async for``, which are converted already. For a frame in device memory it
        waits for the device and copies the pixels to the host.
        """
        if self._image is None:
            self._image = self._picture.array()
        return self._image

    @property
    def is_converted(self) -> bool:
        """Whether `image` or `device_image` is available without conversion."""
        return self._image is not None or isinstance(self._picture, Held) or self.is_on_device

    @property
    def is_on_device(self) -> bool:
        """Whether the pixels are in device memory."""
        return self._picture.is_on_device

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"<Frame {self.index} of {self.source}: {size}{f', {self.time:.3f} s' if self.time is not None else ''}>"
