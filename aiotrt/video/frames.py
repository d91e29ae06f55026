"""A frame: where it comes from, when it was, and its pixels, which are converted when somebody wants them."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np

__all__ = ["Array", "Frame", "Held", "Picture"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Picture(Protocol):
    """Pixels, as they came."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3), without converting anything."""
        ...

    @property
    def pixel_aspect(self) -> float:
        """The width of a pixel by its height, as it is to be shown."""
        ...

    def array(self) -> Array:
        """The pixels, RGB; may convert, which takes a while."""
        ...


class Held:
    """Pixels that are an array already, and square."""

    pixel_aspect = 1.0

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return tuple(self._array.shape)

    def array(self) -> Array:
        """The array itself, no copy."""
        return self._array


class Frame:
    """One frame of one source.

    Attributes:
        source: the source's name.
        index: which one it is of those that the source gave, from 0; what a policy dropped leaves gaps.
        time: seconds, of a file since its beginning, else by the source's own clock (its presentation timestamp); None if it
            says none.
        received: seconds by the pipeline's clock, when it was decoded.
        decode_seconds: what reading and decoding it took.
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
        """(height, width, 3), without converting anything."""
        return self._picture.shape

    @property
    def pixel_aspect(self) -> float:
        """The width of a pixel by its height. Where it is not 1.0, the picture is to be shown wider or narrower."""
        return self._picture.pixel_aspect

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of `image`, without converting anything: decoded pictures are bytes."""
        return self.image.dtype if self.is_converted else np.dtype(np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """`image`, for NumPy, torch.as_tensor and models: no copy unless another dtype, or a copy, is asked for."""
        image = self.image
        if dtype is not None and image.dtype != dtype:
            if copy is False:
                raise ValueError(f"a frame is {image.dtype}, and cannot be {np.dtype(dtype)} without a copy")
            return image.astype(dtype)
        return image.copy() if copy else image

    def __dlpack__(self, **arguments: Any) -> Any:
        """`image`, for torch.from_dlpack and others; see `numpy.ndarray.__dlpack__`."""
        return self.image.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Host memory."""
        return self.image.__dlpack_device__()

    @property
    def image(self) -> Array:
        """(height, width, 3) bytes, RGB. All readers share it, so do not write to it.

        The first access converts a decoded picture, some milliseconds for a large one: not for the loop's thread, unless the
        frame came out of ``async for``, which has converted it already.
        """
        if self._image is None:
            self._image = self._picture.array()
        return self._image

    @property
    def is_converted(self) -> bool:
        """Whether `image` takes no time."""
        return self._image is not None or isinstance(self._picture, Held)

    def write(self, out: Array) -> None:
        """Convert, and copy the pixels into `out`: such as a slot's page-locked staging. For worker threads."""
        np.copyto(out, self._picture.array() if self._image is None else self._image, casting="no")

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"<Frame {self.index} of {self.source}: {size}{f', {self.time:.3f} s' if self.time is not None else ''}>"
