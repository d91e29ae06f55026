"""BYTES, the protocol's strings, as tensors of their bytes, or as files.

A tensor cannot hold strings, but a tensor of UINT8 can hold their bytes. Strings of shape (2, 3), of which the longest has 5
bytes, become a tensor of shape (2, 3, 5); shorter strings are padded with zeros, as in numpy. So a model that takes files or
text has an input of UINT8, and its clients may send either BYTES or UINT8. In the binary extension, four bytes before each
string contain its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aiotrt.serving.errors import BodyError
from aiotrt.serving.json_body import from_base64

__all__ = ["NAME", "files_of_bytes", "files_of_json", "of_bytes", "of_json", "to_bytes"]

#: The datatype's name.
NAME: Final = "BYTES"
_PREFIX: Final = 4  # bytes
#: The maximum number of strings in an input that are processed one by one.
_MOST: Final = 1 << 17
#: Strings of different lengths may take this many bytes as a tensor, or this many times the bytes sent if that is more.
_PADDED: Final = 1 << 20
_MOST_PADDING: Final = 8


def of_bytes(what: str, body: memoryview, start: int, size: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the strings in `size` bytes of `body`, as a tensor's bytes.

    Raises:
        BodyError: their number does not match the shape, or they differ too much in length.
    """
    count = math.prod(shape)
    length = int.from_bytes(body[start : start + _PREFIX], "little") if count else 0
    if count and count * (_PREFIX + length) == size:
        rows = np.frombuffer(body, np.uint8, size, start).reshape(count, _PREFIX + length)
        if (rows[:, :_PREFIX] == rows[0, :_PREFIX]).all():
            return rows[:, _PREFIX:].reshape(*shape, length).copy()
    return _padded(what, files_of_bytes(what, body, start, size, shape), shape)


def files_of_bytes(what: str, body: memoryview, start: int, size: int, shape: tuple[int, ...]) -> list[memoryview]:
    """Return a list of the strings in `size` bytes of `body`, as views of it.

    Raises:
        BodyError: their number does not match the shape, or there are too many.
    """
    count, at, end = math.prod(shape), start, start + size
    if count > _MOST:
        raise BodyError(f"{what}: strings of different lengths must be at most {_MOST:,}, got {count:,}")
    if count * _PREFIX <= size:
        files: list[memoryview] = []
        while at + _PREFIX <= end and len(files) < count:
            begin = at + _PREFIX
            at = begin + int.from_bytes(body[at:begin], "little")
            files.append(body[begin:at])
        if len(files) == count and at == end:
            return files
    raise BodyError(
        f"{what}: {size:,} bytes are not BYTES of shape {list(shape)}, each with its length in four bytes before it"
    )


def of_json(what: str, data: object, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the strings in nested or flat lists, as a tensor's bytes. JSON strings are encoded as UTF-8.

    Raises:
        BodyError: they are not strings, their number does not match the shape, or they differ too much in length.
    """
    found = _strings(what, data, shape)
    return _padded(what, [string.encode() if isinstance(string, str) else string for string in found], shape)


def files_of_json(what: str, data: object, shape: tuple[int, ...]) -> list[bytes | bytearray]:
    """Return the files in nested or flat lists: JSON strings in base64, or bytes.

    Raises:
        BodyError: they are not strings in base64, or their number does not match the shape.
    """
    try:
        return [from_base64(one) if isinstance(one, str) else one for one in _strings(what, data, shape)]
    except ValueError as error:
        raise BodyError(f"{what}: expected files in base64: {error}") from error


def to_bytes(strings: npt.NDArray[Any]) -> bytes:
    """Return strings in the format of the binary extension, encoded as UTF-8."""
    encoded = [string.encode() for string in strings.flat]
    return b"".join(chain.from_iterable((len(one).to_bytes(_PREFIX, "little"), one) for one in encoded))


def _strings(what: str, data: object, shape: tuple[int, ...]) -> list[str | bytes]:
    strings: list[Any] = data if isinstance(data, list) else [data]
    found: tuple[int, ...] = (len(strings),)
    while len(found) < len(shape) and strings and all(_is_like(strings[0], one) for one in strings):
        found = (*found, len(strings[0]))
        strings = list(chain.from_iterable(strings))
    if not all(isinstance(string, (str, bytes)) for string in strings):
        raise BodyError(f"{what}: expected lists of strings, of the same lengths")
    if found not in (shape, (math.prod(shape),)):
        raise BodyError(f"{what}: expected data of shape {list(shape)}, flat or nested, got shape {list(found)}")
    return strings


def _padded(what: str, strings: Sequence[bytes | memoryview], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    length = max(map(len, strings), default=0)
    size, sent = length * len(strings), sum(map(len, strings)) + _PREFIX * len(strings)
    if size > max(_PADDED, _MOST_PADDING * sent):
        raise BodyError(
            f"{what}: {len(strings):,} strings, the longest of {length:,} bytes, would be {size:,} bytes as a tensor, and "
            f"{sent:,} were sent: send strings of more equal lengths"
        )
    rows = np.zeros((len(strings), length), np.uint8)
    for row, string in zip(rows, strings, strict=True):
        row[: len(string)] = np.frombuffer(string, np.uint8)
    return rows.reshape(*shape, length)


def _is_like(first: object, other: object) -> bool:
    return isinstance(first, list) and isinstance(other, list) and len(first) == len(other)
