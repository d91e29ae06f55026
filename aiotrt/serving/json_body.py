"""JSON in request bodies, read without holding up the event loop.

orjson holds the interpreter lock while it parses, in whatever thread. So a text's values are bounded before it is parsed,
long arrays of numbers are parsed in pieces, and so is all that follows; between pieces other threads run.

NaN, Infinity and -Infinity are read and written as numbers, as Triton does, though JSON has no such numbers.
"""

from __future__ import annotations

import binascii
import json
import math
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from aiotrt.serving.errors import BodyError, BodyTooLargeError

__all__ = ["LongArray", "dumped", "from_base64", "loads", "numbers", "said"]

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
#: Bytes of a long array that are parsed by one call; and from how many on an array is long.
_TEXT_PIECE: Final = 1 << 16
#: Bytes of JSON that Python's own parser, which is slower and knows NaN, may parse in one call.
_MAX_NAN: Final = 1 << 18
#: Dimensions of an array.
_MAX_DEPTH: Final = 32
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[],"))
_BLANK_BRACKETS: Final = bytes.maketrans(b"[]", b"  ")
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
    text = memoryview(data)[:end]
    # Each long array gives way to a string that no client can guess.
    token = secrets.token_hex(16)
    arrays: list[LongArray] = []
    parts: list[bytes | memoryview] = []
    at = quotes = 0
    for start, stop in _long_arrays(text):
        quotes += bytes(text[at:start]).replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"')
        parts.append(text[at:start])
        if quotes % 2:  # it is inside of a string
            parts.append(text[start:stop])
        else:
            parts.append(b'"%s%d"' % (token.encode(), len(arrays)))
            arrays.append(_long_array(bytes(text[start:stop])))
        at = stop
    if not arrays:
        return _parsed(what, text)
    root = [_parsed(what, b"".join([*parts, text[at:]]))]
    containers: list[Any] = [root]
    while containers:
        container = containers.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, (dict, list)):
                containers.append(value)
            elif isinstance(value, str) and value.startswith(token):
                container[key] = arrays[int(value[len(token) :])]
    return root[0]


@dataclass(frozen=True, repr=False)
class LongArray:
    """An array of JSON that is not parsed yet, since that takes a while; `numbers` parses it.

    Attributes:
        text: its items, separated by commas.
        shape: its dimensions; None if its lists differ in length.
    """

    text: bytes
    shape: tuple[int, ...] | None

    def __repr__(self) -> str:
        return f"an array of {len(self.text):,} bytes"

    def pieces(self, what: str) -> Iterator[list[Any]]:
        """Its items.

        Raises:
            BodyError: it is not JSON.
        """
        start, end = 0, -1
        while start <= len(self.text):
            end = self.text.find(b",", start + _TEXT_PIECE)
            end = len(self.text) if end < 0 else end
            yield _parsed(what, b"[" + self.text[start:end] + b"]")
            start = end + 1


def numbers(name: str, data: object, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> Array:
    """An array of JSON's numbers or booleans, nested or (where `shape` is known) flat.

    Args:
        name: for messages.
        data: as `loads` gives it.
        dtype: what to make of it; nothing is rounded but to the precision of a floating-point type.
        shape: its dimensions, which flat data cannot say.

    Raises:
        BodyError: it is ragged, of other types, out of range, or does not have that shape.
    """
    if isinstance(data, LongArray):
        if data.shape is None:
            raise BodyError(f"{name}: the lists differ in length, or are nested too deep")
        found, pieces = data.shape, data.pieces(name)
    elif isinstance(data, list):
        sizes = [len(data)]
        types = _types(data)
        while types == {list}:
            lengths = set(map(len, data))
            if len(lengths) > 1 or len(sizes) >= _MAX_DEPTH:
                raise BodyError(f"{name}: the lists differ in length, or are nested too deep")
            sizes.append(lengths.pop())
            data = _joined(data, sizes[-1])
            types = _types(data)
        found, pieces = tuple(sizes), _pieces(data)
    else:
        raise BodyError(f"{name}: expected a list of numbers, got {said(data)}")
    if shape is not None and found not in (shape, (math.prod(shape),)):
        raise BodyError(f"{name}: expected data of shape {list(shape)}, flat or nested, got shape {list(found)}")
    flat = _leaves(name, pieces, math.prod(found), dtype)
    return flat.reshape(found if shape is None else shape)


def dumped(array: Array) -> bytes:
    """The numbers of a flat array as JSON's array."""
    pieces = (array[start : start + _PIECE] for start in range(0, array.size, _PIECE))
    return b"[" + b",".join(map(_dumped, pieces)) + b"]"


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


def _parsed(what: str, text: bytes | memoryview) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if len(text) <= _MAX_NAN and (b"NaN" in bytes(text) or b"Inf" in bytes(text)):
            try:
                found = json.loads(str(text, "utf-8"))
                orjson.dumps(found)  # refuses what orjson would not have parsed: broken strings, numbers of any length
            except (ValueError, RecursionError, TypeError):
                pass
            else:
                return found
        raise BodyError(f"{what} is not JSON: {error}") from error


def _long_arrays(text: memoryview) -> Iterator[tuple[int, int]]:
    """Where long arrays begin and end: without strings and objects, and a field's value or all of `text`."""
    if len(text) < _TEXT_PIECE:
        return
    characters = np.frombuffer(text, np.uint8)  # as arrays, since numpy releases the interpreter lock
    marks = characters == ord(":")
    for mark in b'"{}':
        marks |= characters == mark
    edges = np.concatenate([[-1], np.flatnonzero(marks), [len(text)]])
    for i in np.flatnonzero(np.diff(edges) > _TEXT_PIECE):
        before, after = int(edges[i]), int(edges[i + 1])
        inside = bytes(text[before + 1 : after])
        start = after - len(inside.lstrip())
        stop = before + 1 + inside.rfind(b"]") + 1
        if text[start] == ord("[") and stop > start and (before < 0 or text[before] == ord(":")):
            yield start, stop


def _long_array(text: bytes) -> LongArray:
    """An array whose shape its brackets and commas say."""
    skeleton = text.translate(None, _NO_BRACKETS)
    items = text.translate(_BLANK_BRACKETS)
    depth = len(skeleton) - len(skeleton.lstrip(b"["))
    if depth > _MAX_DEPTH:
        return LongArray(items, None)
    shape: list[int] = []
    one = b""  # the first array of each depth, from inside to outside
    for level in range(1, depth + 1):
        end = skeleton.find(b"]" * level) + level
        count = (end - (depth - level) - 1) // (len(one) + 1)
        if count < 1:
            return LongArray(items, None)
        shape.insert(0, count)
        one = b"[" + (one + b",") * (count - 1) + one + b"]"
    return LongArray(items, tuple(shape) if one == skeleton else None)


def _dumped(piece: Array) -> bytes:
    if piece.dtype.kind == "f" and not np.isfinite(piece).all():
        return json.dumps(piece.tolist(), separators=(",", ":"))[1:-1].encode()
    return orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def _leaves(name: str, pieces: Iterable[list[Any]], count: int, dtype: np.dtype[Any]) -> Array:
    allowed: set[type]
    if dtype.kind == "b":
        allowed = {bool}
    elif dtype.kind in "iu":
        allowed = {int}
    else:
        allowed = {int, float}
    array = np.empty(count, dtype)
    at = 0
    for piece in pieces:
        if not set(map(type, piece)) <= allowed:
            wrong = next(item for item in piece if type(item) not in allowed)
            kind = {"b": "true and false", "i": "integers", "u": "integers"}.get(dtype.kind, "numbers")
            raise BodyError(f"{name}: expected only {kind}, got {said(wrong)}")
        if at + len(piece) <= count and piece:
            array[at : at + len(piece)] = _converted(name, piece, dtype)
        at += len(piece)
    if at != count:
        raise BodyError(f"{name}: the lists differ in length")
    return array


def _converted(name: str, data: list[Any], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = min(data), max(data)
        if low < limits.min or high > limits.max:
            raise BodyError(f"{name}: {low if low < limits.min else high} does not fit into {dtype}")
    if dtype.kind != "f":
        return np.array(data, dtype)
    exact = np.array(data, np.float64)
    with np.errstate(over="ignore"):
        array = exact.astype(dtype)
    if (np.isinf(array) & np.isfinite(exact)).any():
        raise BodyError(f"{name}: a number does not fit into {dtype}")
    return array
