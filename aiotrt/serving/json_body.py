"""JSON in request bodies, read without holding up the event loop.

orjson holds the interpreter lock while it parses, in whatever thread. So a text's values are bounded before it is parsed,
and the steps that follow work in pieces, between which other threads run.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from aiotrt.serving.errors import BodyError, BodyTooLargeError

__all__ = ["dumped", "from_base64", "loads", "numbers", "said"]

Array = npt.NDArray[Any]

#: What a text may contain: with as much of one of these, orjson holds the interpreter lock for some 40 ms. A million empty
#: arrays took half a second, because the garbage collector traverses them again and again.
_LIMITS: Final = (
    ((b"[", b"{"), 1 << 16, "arrays and objects"),
    ((b'"',), 1 << 18, "quotation marks"),
    ((b",",), 1 << 20, "commas"),
)
#: Numbers that are converted by one call, which takes less than a millisecond.
_PIECE: Final = 1 << 15
#: Characters of base64 that are decoded by one call; a multiple of 4.
_BASE64_PIECE: Final = 1 << 18


def loads(what: str, data: bytes | bytearray, end: int | None = None) -> Any:
    """Parse JSON.

    Args:
        what: its name, for messages.
        data: the text in UTF-8, and perhaps more after it.
        end: where the text ends; None for all of `data`.

    Raises:
        BodyTooLargeError: it contains more arrays, objects, strings or numbers than are taken.
        BodyError: it is not JSON, or nested deeper than 1,024 levels.
    """
    end = len(data) if end is None else end
    for marks, most, name in _LIMITS:
        if end > most and (found := sum(data.count(mark, 0, end) for mark in marks)) > most:
            raise BodyTooLargeError(f"{what} has JSON with {found:,} {name}, at most {most:,} are taken: send bytes instead")
    try:
        return orjson.loads(memoryview(data)[:end])
    except orjson.JSONDecodeError as error:
        raise BodyError(f"{what} is not JSON: {error}") from error


def numbers(name: str, data: object, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> Array:
    """An array of JSON's numbers or booleans, nested or (where `shape` is known) flat.

    Args:
        name: for messages.
        data: as JSON has it.
        dtype: what to make of it; nothing is rounded but to the precision of a floating-point type.
        shape: its dimensions, which flat data cannot say.

    Raises:
        BodyError: it is ragged, of other types, out of range, or does not have that shape.
    """
    if not isinstance(data, list):
        raise BodyError(f"{name}: expected a list of numbers, got {said(data)}")
    sizes = [len(data)]
    types = _types(data)
    while types == {list}:
        lengths = set(map(len, data))
        if len(lengths) > 1 or len(sizes) >= 32:
            raise BodyError(f"{name}: the lists differ in length, or are nested too deep")
        sizes.append(lengths.pop())
        data = _joined(data, sizes[-1])
        types = _types(data)
    found = tuple(sizes)
    if shape is not None and found not in (shape, (math.prod(shape),)):
        raise BodyError(f"{name}: expected data of shape {list(shape)}, flat or nested, got shape {list(found)}")
    flat = _leaves(name, data, types, dtype)
    return flat.reshape(found if shape is None else shape)


def dumped(array: Array) -> bytes:
    """The numbers of a flat array as JSON's array."""
    pieces = (array[start : start + _PIECE] for start in range(0, array.size, _PIECE))
    return b"[" + b",".join(orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for piece in pieces) + b"]"


def from_base64(text: str) -> bytearray:
    """The bytes that base64 stands for.

    Raises:
        ValueError: it is not base64.
    """
    data = bytearray()
    for start in range(0, len(text), _BASE64_PIECE):
        piece = text[start : start + _BASE64_PIECE]
        data += binascii.a2b_base64(piece, strict_mode=True)
        if piece.endswith("=") and start + _BASE64_PIECE < len(text):
            raise ValueError("Excess data after padding")
    return data


def said(value: object) -> str:
    """A value in a message, cut if it is long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _pieces(data: list[Any]) -> Iterator[list[Any]]:
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def _types(data: list[Any]) -> set[type]:
    return set().union(*(set(map(type, piece)) for piece in _pieces(data)))


def _joined(lists: list[list[Any]], length: int) -> list[Any]:
    joined: list[Any] = []
    step = max(_PIECE // max(length, 1), 1)
    for start in range(0, len(lists), step):
        joined.extend(chain.from_iterable(lists[start : start + step]))
    return joined


def _leaves(name: str, data: list[Any], types: set[type], dtype: np.dtype[Any]) -> Array:
    allowed: set[type]
    if dtype.kind == "b":
        allowed = {bool}
    elif dtype.kind in "iu":
        allowed = {int}
    else:
        allowed = {int, float}
    if not types <= allowed:
        wrong = next(item for item in data if type(item) not in allowed)
        kind = {"b": "true and false", "i": "integers", "u": "integers"}.get(dtype.kind, "numbers")
        raise BodyError(f"{name}: expected only {kind}, got {said(wrong)}")
    array = np.empty(len(data), dtype)
    for i, piece in enumerate(_pieces(data)):
        array[i * _PIECE : i * _PIECE + len(piece)] = _converted(name, piece, dtype)
    return array


def _converted(name: str, data: list[Any], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = min(data), max(data)
        if low < limits.min or high > limits.max:
            raise BodyError(f"{name}: {low if low < limits.min else high} does not fit into {dtype}")
    if dtype.kind != "f":
        return np.array(data, dtype)
    with np.errstate(over="ignore"):
        array = np.array(data, np.float64).astype(dtype)
    if not np.isfinite(array).all():
        raise BodyError(f"{name}: a number does not fit into {dtype}")
    return array
