"""Facts about an ONNX file that ONNX Runtime does not report, parsed from the file without the package onnx."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

__all__ = ["external_locations", "unranked"]

# Field numbers of onnx.proto.
_GRAPH: Final = 7  # of ModelProto
_NODE: Final = 1  # of GraphProto
_INITIALIZER: Final = 5
_INPUT_AND_OUTPUT: Final = (11, 12)
_ATTRIBUTE: Final = 5  # of NodeProto
_TENSORS: Final = (5, 10)  # of AttributeProto
_GRAPHS: Final = (6, 11)
_EXTERNAL: Final = 13  # of TensorProto
_KEY: Final = 1  # of StringStringEntryProto
_VALUE: Final = 2
_NAME: Final = 1  # of ValueInfoProto
_TYPE: Final = 2
_TENSOR: Final = 1  # of TypeProto
_SHAPE: Final = 2  # of TypeProto.Tensor

Span: TypeAlias = tuple[int, int]


def unranked(path: Path) -> set[str]:
    """Return the names of the inputs and outputs of any rank: their type has no shape. ONNX Runtime reports them as scalars.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an ONNX model.
    """
    with _content(path) as data:
        return {
            _text(data, value, _NAME)
            for graph in _fields(data, (0, len(data)), _GRAPH)
            for value in _fields(data, graph, *_INPUT_AND_OUTPUT)
            for kind in _fields(data, value, _TYPE)
            for tensor in _fields(data, kind, _TENSOR)
            if not any(_fields(data, tensor, _SHAPE))
        }


def external_locations(path: Path) -> set[str]:
    """Return the paths of the files with external tensors, as the model spells them. Raises the errors of `unranked`."""
    with _content(path) as data:
        return {
            _text(data, entry, _VALUE)
            for graph in _fields(data, (0, len(data)), _GRAPH)
            for tensor in _tensors(data, graph)
            for entry in _fields(data, tensor, _EXTERNAL)
            if _text(data, entry, _KEY) == "location"
        }


def _tensors(data: memoryview, graph: Span) -> Iterator[Span]:
    """Yield every constant of a graph: initializers, and constants inside nodes and their subgraphs."""
    yield from _fields(data, graph, _INITIALIZER)
    for node in _fields(data, graph, _NODE):
        for attribute in _fields(data, node, _ATTRIBUTE):
            yield from _fields(data, attribute, *_TENSORS)
            for subgraph in _fields(data, attribute, *_GRAPHS):
                yield from _tensors(data, subgraph)


@contextlib.contextmanager
def _content(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        yield view


def _text(data: memoryview, message: Span, number: int) -> str:
    return bytes(data[slice(*next(_fields(data, message, number), (0, 0)))]).decode()


def _fields(data: memoryview, message: Span, *wanted: int) -> Iterator[Span]:
    """Yield the byte ranges of a message's fields with the wanted numbers. Only length-delimited fields are found."""
    at, end = message
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            size, at = _varint(data, at)
            if number in wanted:
                yield at, at + size
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a protocol buffer: wire type {kind} at byte {at}")
    if at > end:
        raise ValueError("not a protocol buffer: a field ends after its message")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("not a protocol buffer: unterminated number")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
