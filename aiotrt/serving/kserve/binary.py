"""Requests and answers of the Open Inference Protocol, from bytes and to bytes: JSON tensors, and the binary extension.

A body of the binary extension is JSON, as long as the header ``Inference-Header-Content-Length`` says, and then the bytes of
those tensors whose JSON has ``binary_data_size`` instead of ``data``, one after the other, without padding, little-endian.
Pure functions. Nothing is believed: names, types, extents, products, lengths and numbers are checked before memory is
allocated for them, with Python's integers, which do not overflow, and every answer to nonsense is an `BodyError`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
import torch

from aiotrt.serving.bodies import is_possible
from aiotrt.serving.errors import BodyError
from aiotrt.serving.json_body import dumped, loads, numbers, said
from aiotrt.serving.kserve import strings
from aiotrt.serving.kserve.datatypes import DATATYPES, Datatype, of_torch
from aiotrt.tensors import TensorSpec

__all__ = [
    "MOST_TENSORS",
    "InferRequest",
    "Input",
    "Placed",
    "Requested",
    "Rest",
    "Result",
    "bytes_of",
    "described",
    "encode",
    "from_bytes",
    "header_length",
    "parse",
    "raw",
    "read_fields",
    "result_tensor",
]

#: A model's result, or an array of strings: the classes in it.
Result: TypeAlias = torch.Tensor | npt.NDArray[Any]

_NOTHING: Final = torch.empty(0, dtype=torch.uint8)
#: Inputs, or outputs, of one request.
MOST_TENSORS: Final = 256
_MOST_DIMENSIONS: Final = 32
_LONGEST_NAME: Final = 1024
#: Parameters that ask for what is not done here. To ignore them would be to give another answer than was asked for.
_REFUSED: Final = {
    "sequence_id": "sequences of requests",
    "sequence_start": "sequences of requests",
    "sequence_end": "sequences of requests",
}


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in shared memory.

    Attributes:
        region: the name under which it was registered.
        offset: in the region, in bytes.
        size: in bytes; of an output, the most.
        shape: of an input.
        are_strings: whether an input is BYTES.
    """

    region: str
    offset: int
    size: int
    shape: tuple[int, ...] = ()
    are_strings: bool = False


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: the model's name for it.
        datatype: what the client says it is; UINT8 for strings.
        tensor: it, on the host. Where it came as bytes it is a view of the request's body, if that is aligned. Without
            elements where there are `files`, or where it is `placed`.
        files: the strings of an input that takes image files.
        placed: where it lies, if that is not in the request.
    """

    name: str
    datatype: Datatype
    tensor: torch.Tensor
    files: Sequence[bytes | bytearray | memoryview] = ()
    placed: Placed | None = None


@dataclass(frozen=True)
class Requested:
    """One output that was asked for.

    Attributes:
        name: the model's name for it.
        is_binary: whether as bytes.
        classes: how many of its largest elements instead of all; 0 for all.
        placed: where to write it, if it is not to be in the answer.
    """

    name: str
    is_binary: bool
    classes: int = 0
    placed: Placed | None = None


@dataclass(frozen=True)
class InferRequest:
    """One request.

    Attributes:
        id: the client's own name for the request, which the answer repeats; None for none.
        inputs: at least one, with different names.
        outputs: those that were asked for; empty for all.
        is_binary: whether outputs that nobody asked for by name come as bytes.
        deadline: seconds that the client is ready to wait, if it says in ``deadline_ms``.
        timeout: seconds that it is ready to wait, if it says in ``timeout``, Triton's parameter.
        priority: the class, 0 for the most urgent; None for the model's usual one. In requests, as in Triton's, these are 1
            and 0.
    """

    id: str | None
    inputs: tuple[Input, ...]
    outputs: tuple[Requested, ...]
    is_binary: bool
    deadline: float | None
    timeout: float | None
    priority: int | None


def header_length(header: str | None, length: int) -> int:
    """How many bytes of a body of `length` are JSON.

    Args:
        header: what ``Inference-Header-Content-Length`` says, if it is there; without it, all are.
        length: of the body.

    Raises:
        BodyError: it is not a number, or more than the body has.
    """
    if header is None:
        return length
    if not (header.isascii() and header.isdecimal() and len(header) < 20):
        raise BodyError(f"Inference-Header-Content-Length must be a number of bytes, got {header[:40]!r}")
    if int(header) > length:
        raise BodyError(f"Inference-Header-Content-Length is {int(header):,}, and the whole body has {length:,} bytes")
    return int(header)


def parse(body: bytes | bytearray, json_length: int | None = None, images: Collection[str] = ()) -> InferRequest:
    """A request's body.

    Args:
        body: all of it. Tensors are views of it where they can be, so it must not change as long as they are in use.
        json_length: how many bytes at its front are JSON; None for all.
        images: names of inputs whose strings are image files.

    Raises:
        BodyTooLargeError: its JSON contains more than is taken.
        BodyError: anything else about it is wrong; the message says what.
    """
    json_length = len(body) if json_length is None else json_length
    fields = _mapping("the request", loads("the request", body, json_length))
    rest = _Rest(memoryview(body), json_length)
    called = read_fields(fields, rest, images)
    rest.check_empty()
    return called


def read_fields(fields: Mapping[str, Any], rest: Rest, images: Collection[str] = ()) -> InferRequest:
    """A request's fields.

    Args:
        fields: as JSON has them. The data of a tensor may also be a flat array.
        rest: has the bytes of inputs that have no data.
        images: names of inputs whose strings are image files.

    Raises:
        BodyError: something about them is wrong; the message says what.
    """
    parameters = _parameters("the request", fields)
    name = fields.get("id")
    if name is not None and (not isinstance(name, str) or len(name) > _LONGEST_NAME):
        raise BodyError(f"the request's id must be a string of at most {_LONGEST_NAME} characters")
    inputs = tuple(_input(entry, rest, images) for entry in _list("inputs", fields.get("inputs"), least=1))
    binary_by_default = _flag("the request", parameters, "binary_data_output", default=False)
    outputs = tuple(_requested(entry, binary_by_default) for entry in _list("outputs", _given(fields, "outputs", [])))
    for what, names in (("input", [i.name for i in inputs]), ("output", [o.name for o in outputs])):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BodyError(f"{what} {twice!r} is there twice")
    return InferRequest(
        name,
        inputs,
        outputs,
        binary_by_default,
        _seconds(parameters, "deadline_ms", 1e-3),
        _seconds(parameters, "timeout", 1e-6),
        _priority(parameters),
    )


def encode(
    head: Mapping[str, object], outputs: Sequence[tuple[str, bool, Result]], placed: Collection[str] = ()
) -> tuple[bytes, list[memoryview]]:
    """An answer's body: its JSON, and the bytes that follow it. Without such, it is no binary answer.

    Args:
        head: the answer but for its outputs.
        outputs: name, whether as bytes, and a tensor on the host, or an array of strings. Not copied where it is contiguous.
        placed: names of those that lie in shared memory, of which there is no more to say; Triton's client in C++ takes
            parameters for a sign that bytes follow.

    Raises:
        BodyError: a tensor cannot be sent in this way.
    """
    entries: list[bytes] = []
    chunks: list[memoryview] = []
    for name, is_binary, tensor in outputs:
        entry = described(name, tensor)
        if name in placed:
            entries.append(orjson.dumps(entry))
        elif is_binary:
            data = bytes_of(tensor)
            chunks.append(data)
            entry["parameters"] = {"binary_data_size": len(data)}
            entries.append(orjson.dumps(entry))
        else:
            entries.append(orjson.dumps(entry)[:-1] + b',"data":' + _json(tensor) + b"}")
    return orjson.dumps({**head, "outputs": []})[:-2] + b",".join(entries) + b"]}", chunks


def described(name: str, tensor: Result) -> dict[str, Any]:
    """Name, datatype and shape of an output.

    Raises:
        BodyError: the protocol has no such datatype.
    """
    if isinstance(tensor, np.ndarray):
        return {"name": name, "datatype": strings.NAME, "shape": list(tensor.shape)}
    datatype = of_torch(tensor.dtype)
    if datatype is None:
        raise BodyError(f"output {name!r} is {tensor.dtype}, for which the protocol has no datatype")
    return {"name": name, "datatype": datatype.name, "shape": list(tensor.shape)}


def result_tensor(result: object) -> torch.Tensor:
    """A model's result as a tensor, whatever kind it is, where it is."""
    return result if isinstance(result, torch.Tensor) else torch.from_numpy(np.asarray(result))


def bytes_of(tensor: Result) -> memoryview:
    """The bytes of a tensor on the host, little-endian, not copied where it is contiguous; or of an array of strings."""
    if isinstance(tensor, np.ndarray):
        return memoryview(strings.to_bytes(tensor))
    flat = tensor.contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return memoryview(array)


class Rest(Protocol):
    """Has the bytes of inputs, in their order."""

    def take(self, name: str, size: int) -> tuple[memoryview, int]:
        """The next input's bytes: what they are in, and where."""


class _Rest(Rest):
    """The bytes after the JSON, taken from the front."""

    def __init__(self, body: memoryview, start: int) -> None:
        self._body = body
        self._at = start

    def take(self, name: str, size: int) -> tuple[memoryview, int]:
        left = len(self._body) - self._at
        if size > left:
            raise BodyError(f"input {name!r} has binary_data_size {size:,}, and {left:,} bytes of the body are left for it")
        self._at += size
        return self._body, self._at - size

    def check_empty(self) -> None:
        left = len(self._body) - self._at
        if left:
            raise BodyError(f"{left:,} bytes at the end of the body belong to no input")


def _input(entry: object, rest: Rest, images: Collection[str]) -> Input:
    fields = _mapping("an input", entry)
    name = _name("input", fields)
    what = f"input {name!r}"
    are_strings = fields.get("datatype") == strings.NAME
    datatype = DATATYPES["UINT8"] if are_strings else _datatype(what, fields.get("datatype"))
    shape = _shape(what, fields.get("shape"))
    parameters = _parameters(what, fields)
    if (placed := _placed(what, parameters)) is not None:
        if fields.get("data") is not None or parameters.get("binary_data_size") is not None:
            raise BodyError(f"{what} has both data and the parameter shared_memory_region")
        if not are_strings:
            _check_size(what, "shared_memory_byte_size", datatype, shape, placed.size)
        return Input(name, datatype, _NOTHING, placed=replace(placed, shape=shape, are_strings=are_strings))
    if parameters.get("binary_data_size") is None:
        if fields.get("data") is None:
            raise BodyError(f"{what} has neither data nor the parameter binary_data_size")
        if are_strings and name in images:
            return _of_files(name, strings.files_of_json(what, fields["data"], shape))
        if are_strings:
            return Input(name, datatype, torch.from_numpy(strings.of_json(what, fields["data"], shape)))
        array = _numbers(what, fields["data"], datatype, shape)
        tensor = torch.from_numpy(array)
        return Input(name, datatype, tensor.to(datatype.torch) if tensor.dtype is not datatype.torch else tensor)
    if fields.get("data") is not None:
        raise BodyError(f"{what} has both data and the parameter binary_data_size")
    announced = parameters["binary_data_size"]
    if not _is_count(announced):
        raise BodyError(f"{what}: binary_data_size must be a number of bytes, got {_said(announced)}")
    assert isinstance(announced, int)
    if are_strings:
        body, start = rest.take(name, announced)
        if name in images:
            return _of_files(name, strings.files_of_bytes(what, body, start, announced, shape))
        return Input(name, datatype, torch.from_numpy(strings.of_bytes(what, body, start, announced, shape)))
    _check_size(what, "binary_data_size", datatype, shape, announced)
    return Input(name, datatype, _tensor(what, datatype, shape, *rest.take(name, announced)))


def from_bytes(given: Input, placed: Placed, data: torch.Tensor, images: Collection[str] = ()) -> Input:
    """An input with what was read of it.

    Args:
        given: the input.
        placed: where it lies.
        data: UINT8, as many as it has bytes, on any device.
        images: names of inputs whose strings are image files.

    Raises:
        BodyError: strings are not as many as the shape says, or a BOOL is neither 0 nor 1.
    """
    what, datatype = f"input {given.name!r}", given.datatype
    if data.is_cuda and not placed.are_strings:
        if datatype.torch is torch.bool:
            return replace(given, tensor=data.ne(0).reshape(placed.shape), placed=None)
        if data.data_ptr() % datatype.stored.itemsize:
            data = data.clone()  # torch views no elements that stand between two of their places
        return replace(given, tensor=data.view(datatype.torch).reshape(placed.shape), placed=None)
    array: Any = data.cpu().numpy()
    view = memoryview(array)
    if not placed.are_strings:
        return replace(given, tensor=_tensor(what, datatype, placed.shape, view, 0), placed=None)
    if given.name in images:
        return _of_files(given.name, strings.files_of_bytes(what, view, 0, len(view), placed.shape))
    array = strings.of_bytes(what, view, 0, len(view), placed.shape)
    return replace(given, tensor=torch.from_numpy(array), placed=None)


def raw(body: bytearray, spec: TensorSpec, *, has_axis: bool, is_image: bool) -> InferRequest:
    """A request that is nothing but the bytes of a model's only input.

    Args:
        body: all of it.
        spec: the input. One of its dimensions may be of any size, which the length of the body decides.
        has_axis: whether a batch axis, of 1, goes before its dimensions.
        is_image: whether it is an image file.

    Raises:
        BodyError: the body has not so many bytes as the input, or cannot say its shape.
    """
    what, datatype = f"input {spec.name!r}", of_torch(spec.dtype)
    view = memoryview(body)
    if is_image:
        given = _of_files(spec.name, [view])
        return InferRequest(None, (given,), (), True, None, None, None)
    unknown = 1 if spec.shape is None else sum(size is None for size in spec.shape)
    if datatype is None or spec.shape is None or unknown > 1:
        raise BodyError(f"{what} has a shape that a raw request cannot say: send JSON before the bytes")
    known = math.prod(size for size in spec.shape if size is not None) * datatype.stored.itemsize
    shape = tuple(len(body) // max(known, 1) if size is None else size for size in spec.shape)
    size = math.prod(shape) * datatype.stored.itemsize
    if size != len(body):
        dims = [-1 if size is None else size for size in spec.shape]
        raise BodyError(f"{what} is {datatype.name} of shape {dims}, where -1 is any size; {len(body):,} bytes do not fit")
    tensor = _tensor(what, datatype, (1, *shape) if has_axis else shape, view, 0)
    return InferRequest(None, (Input(spec.name, datatype, tensor),), (), True, None, None, None)


def _of_files(name: str, files: Sequence[bytes | bytearray | memoryview]) -> Input:
    return Input(name, DATATYPES["UINT8"], _NOTHING, files)


def _tensor(what: str, datatype: Datatype, shape: tuple[int, ...], body: memoryview, start: int) -> torch.Tensor:
    """The tensor whose bytes begin at `start`: a view of them where it can be."""
    array = np.frombuffer(body, datatype.stored, math.prod(shape), start).reshape(shape)
    if not array.flags.aligned or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))  # what torch cannot view
    if datatype.torch is torch.bool and array.size and array.view(np.uint8).max() > 1:
        raise BodyError(f"{what}: a BOOL is a byte that is 0 or 1")  # others make comparisons disagree with themselves
    tensor = torch.from_numpy(array)
    return tensor.view(datatype.torch) if tensor.dtype is not datatype.torch else tensor


def _numbers(what: str, data: object, datatype: Datatype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if not isinstance(data, np.ndarray):
        return numbers(what, data, datatype.numbers, shape)
    if data.size != math.prod(shape):
        raise BodyError(f"{what}: expected data of shape {list(shape)}, got {data.size} numbers")
    return data.reshape(shape)


def _requested(entry: object, binary_by_default: bool) -> Requested:
    fields = _mapping("an output", entry)
    name = _name("output", fields)
    what = f"output {name!r}"
    parameters = _parameters(what, fields)
    classes = _given(parameters, "classification", 0)
    if not _is_count(classes):
        raise BodyError(f"{what}: the parameter classification must be a number of classes, got {_said(classes)}")
    assert isinstance(classes, int)
    is_binary = _flag(what, parameters, "binary_data", default=binary_by_default)
    placed = _placed(what, parameters)
    if classes and placed is not None:
        raise BodyError(f"{what}: shared memory can't be set on classification output")
    return Requested(name, is_binary, classes, placed)


def _placed(what: str, parameters: Mapping[str, object]) -> Placed | None:
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    size, offset = parameters.get("shared_memory_byte_size"), _given(parameters, "shared_memory_offset", 0)
    if not isinstance(region, str):
        raise BodyError(f"{what}: shared_memory_region must be a name, got {_said(region)}")
    if not _is_count(size) or not _is_count(offset):
        raise BodyError(f"{what}: shared_memory_byte_size and shared_memory_offset must be numbers of bytes")
    assert isinstance(size, int)
    assert isinstance(offset, int)
    return Placed(region, offset, size)


def _check_size(what: str, parameter: str, datatype: Datatype, shape: tuple[int, ...], announced: int) -> None:
    size = math.prod(shape) * datatype.stored.itemsize
    if announced != size:
        raise BodyError(f"{what}: {datatype.name} of shape {list(shape)} has {size:,} bytes, {parameter} is {announced:,}")


def _seconds(parameters: Mapping[str, object], name: str, unit: float) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise BodyError(f"the parameter {name} must be a positive number, got {_said(value)}")
    return value * unit


def _priority(parameters: Mapping[str, object]) -> int | None:
    value = _given(parameters, "priority", 0)
    if not _is_count(value):
        raise BodyError(f"the parameter priority must be an integer of at least 0, got {_said(value)}")
    assert isinstance(value, int)
    return value - 1 if value else None


def _given(fields: Mapping[str, object], name: str, default: object) -> object:
    """A field that may be left out. Clients that are made of data classes send null for that."""
    value = fields.get(name)
    return default if value is None else value


def _mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BodyError(f"{what} must be a JSON object, got {_said(value)}")
    return value


def _list(what: str, value: object, least: int = 0) -> list[object]:
    if not isinstance(value, list) or not least <= len(value) <= MOST_TENSORS:
        raise BodyError(f"{what} must be a list of {least} to {MOST_TENSORS} tensors, got {_said(value)}")
    return value


def _name(what: str, fields: Mapping[str, object]) -> str:
    name = fields.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise BodyError(f"an {what}'s name must be a string of 1 to {_LONGEST_NAME} characters, got {_said(name)}")
    return name


def _datatype(what: str, name: object) -> Datatype:
    datatype = DATATYPES.get(name) if isinstance(name, str) else None
    if datatype is None:
        raise BodyError(f"{what}: datatype must be one of {', '.join([*DATATYPES, strings.NAME])}, got {_said(name)}")
    return datatype


def _shape(what: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS or not all(map(_is_count, value)):
        raise BodyError(f"{what}: shape must be a list of at most {_MOST_DIMENSIONS} extents, got {_said(value)}")
    if 0 in value and not is_possible(value):  # without a 0 there is never so much data
        raise BodyError(f"{what}: no tensor has the shape {value}")
    return tuple(value)


def _parameters(what: str, fields: Mapping[str, object]) -> Mapping[str, object]:
    parameters = _mapping(f"{what}'s parameters", _given(fields, "parameters", {}))
    for name, meaning in _REFUSED.items():
        if parameters.get(name):
            raise BodyError(f"{what} has the parameter {name}: this server does not have {meaning}")
    return parameters


def _flag(what: str, parameters: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = _given(parameters, name, default)
    if not isinstance(value, bool):
        raise BodyError(f"{what}: the parameter {name} must be true or false, got {_said(value)}")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _said(value: object) -> str:
    """A value in a message: of containers only the length."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    return said(value)


def _json(tensor: Result) -> bytes:
    if isinstance(tensor, np.ndarray):
        return orjson.dumps(tensor.ravel().tolist())
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    return dumped(tensor.contiguous().reshape(-1).numpy())
