"""Which inputs and outputs of an ONNX file have no rank, read from the file itself: ONNX Runtime calls them scalars."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["unranked"]

# Field numbers of onnx.proto.
_GRAPH: Final = 7  # of ModelProto
_INPUT_AND_OUTPUT: Final = (11, 12)  # of GraphProto
_NAME: Final = 1  # of ValueInfoProto
_TYPE: Final = 2
_TENSOR: Final = 1  # of TypeProto
_SHAPE: Final = 2  # of TypeProto.Tensor


def unranked(path: Path) -> set[str]:
    """The names of inputs and outputs whose type has no shape.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ONNX file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        return {
            bytes(view[slice(*_only(view, value, _NAME))]).decode()
            for graph in _fields(view, (0, len(view)), _GRAPH)
            for number in _INPUT_AND_OUTPUT
            for value in _fields(view, graph, number)
            for kind in _fields(view, value, _TYPE)
            for tensor in _fields(view, kind, _TENSOR)
            if not any(_fields(view, tensor, _SHAPE))
        }


def _only(data: memoryview, message: tuple[int, int], number: int) -> tuple[int, int]:
    return next(_fields(data, message, number), (0, 0))


def _fields(data: memoryview, message: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Where the values of a field are in a message; of the kind that has a length. Others are skipped."""
    at, end = message
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            size, at = _varint(data, at)
            if number == wanted:
                yield at, at + size
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protocol buffer: wire type {kind} at byte {at}")
    if at > end:
        raise ValueError("no protocol buffer: a field ends after its message")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("no protocol buffer: a number does not end")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
