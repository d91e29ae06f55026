"""BYTES, the protocol's strings, as tensors of their bytes.

No tensor holds strings, but one of UINT8 holds those of one length: of shape (2, 3) and 5 bytes each they are (2, 3, 5). So
a model that takes a file, or text, has an input of UINT8, and its clients may send either. In the binary extension four
bytes before each string say its length. Nothing is believed here either.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aiotrt.serving.errors import BodyError

__all__ = ["NAME", "of_bytes", "of_json"]

#: The datatype's.
NAME: Final = "BYTES"
_PREFIX: Final = 4  # bytes


def of_bytes(what: str, body: memoryview, start: int, size: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The strings in `size` bytes of `body`.

    Raises:
        BodyError: they are not as many as the shape says, or not of one length.
    """
    count = math.prod(shape)
    length = int.from_bytes(body[start : start + _PREFIX], "little") if count else 0
    wanted = count * (_PREFIX + length)
    if wanted != size:
        raise BodyError(
            f"{what}: BYTES of shape {list(shape)}, the first of {length:,} bytes, have {wanted:,} bytes with their "
            f"lengths, not {size:,}; strings must be of one length"
        )
    if not count:
        return np.empty((*shape, 0), np.uint8)
    rows = np.frombuffer(body, np.uint8, size, start).reshape(count, _PREFIX + length)
    if (rows[:, :_PREFIX] != rows[0, :_PREFIX]).any():
        raise BodyError(f"{what}: strings must be of one length, since a tensor holds no others")
    return rows[:, _PREFIX:].reshape(*shape, length).copy()


def of_json(what: str, data: object, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The strings in lists, nested or flat: JSON's, which become UTF-8, or bytes.

    Raises:
        BodyError: they are not strings, not as many as the shape says, or not of one length.
    """
    strings: list[Any] = data if isinstance(data, list) else [data]
    found: tuple[int, ...] = (len(strings),)
    while len(found) < len(shape) and strings and all(_is_like(strings[0], one) for one in strings):
        found = (*found, len(strings[0]))
        strings = list(chain.from_iterable(strings))
    if not all(isinstance(string, (str, bytes)) for string in strings):
        raise BodyError(f"{what}: expected lists of strings, of the same lengths")
    if found not in (shape, (math.prod(shape),)):
        raise BodyError(f"{what}: expected data of shape {list(shape)}, flat or nested, got shape {list(found)}")
    encoded = [string.encode() if isinstance(string, str) else string for string in strings]
    length = len(encoded[0]) if encoded else 0
    if any(len(string) != length for string in encoded):
        raise BodyError(f"{what}: strings must be of one length, since a tensor holds no others")
    return np.frombuffer(bytearray().join(encoded), np.uint8).reshape(*shape, length)


def _is_like(first: object, other: object) -> bool:
    return isinstance(first, list) and isinstance(other, list) and len(first) == len(other)
