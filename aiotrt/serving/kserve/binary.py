"""Requests and answers of the Open Inference Protocol, from bytes and to bytes: JSON tensors, and the binary extension.

A body of the binary extension begins with JSON, whose length is in the header ``Inference-Header-Content-Length``. After it
come the bytes of the tensors whose JSON has ``binary_data_size`` instead of ``data``, one tensor after the other, without
padding, little-endian.

These are pure functions. Names, types, dimensions and their products, lengths and numbers of a request are checked before
memory is allocated for them, with Python's integers, which do not overflow. Everything that is wrong raises a `BodyError`.
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

#: A model's result, or an array of strings: its classes.
Result: TypeAlias = torch.Tensor | npt.NDArray[Any]

_NOTHING: Final = torch.empty(0, dtype=torch.uint8)
#: The maximum number of inputs, and of outputs, of one request.
MOST_TENSORS: Final = 256
_MOST_DIMENSIONS: Final = 32
_LONGEST_NAME: Final = 1024
#: Parameters of features that this server lacks, with the features. Without their effect the answer would be wrong, so a
#: request that has one is refused.
_REFUSED: Final = {
    "sequence_id": "sequences of requests",
    "sequence_start": "sequences of requests",
    "sequence_end": "sequences of requests",
}


@dataclass(frozen=True)
class Placed:
    """The place of a tensor in shared memory.

    Attributes:
        region: the name under which the region was registered.
        offset: the tensor's offset in the region, in bytes.
        size: the tensor's size in bytes; for an output, the maximum size.
        shape: the shape of an input.
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
        datatype: the datatype in the request; UINT8 for strings.
        tensor: the input's tensor, on the host. If it was sent as bytes, it is a view of the request's body where its bytes
            are aligned. It has no elements if there are `files`, or if the input is `placed`.
        files: the strings of an input that takes image files.
        placed: its place in shared memory; None if it is in the request.
    """

    name: str
    datatype: Datatype
    tensor: torch.Tensor
    files: Sequence[bytes | bytearray | memoryview] = ()
    placed: Placed | None = None


@dataclass(frozen=True)
class Requested:
    """One requested output.

    Attributes:
        name: the model's name for it.
        is_binary: whether it is sent as bytes.
        classes: how many of its largest elements are sent as classes; 0 for the whole tensor.
        placed: the place in shared memory to write it to; None if it is sent in the answer.
    """

    name: str
    is_binary: bool
    classes: int = 0
    placed: Placed | None = None


@dataclass(frozen=True)
class InferRequest:
    """One request.

    Attributes:
        id: the client's id of the request, which the answer repeats; None for none.
        inputs: at least one, with different names.
        outputs: the requested outputs; empty for all.
        is_binary: whether outputs are sent as bytes if the request does not list them by name.
        deadline: seconds that the client is ready to wait, from the parameter ``deadline_ms``; None without it.
        timeout: seconds that the client is ready to wait, from Triton's parameter ``timeout``; None without it.
        priority: the class, 0 for the most urgent; None for the model's usual one. In a request, as in Triton's, 1 means the
            most urgent, and 0 the usual one.
    """

    id: str | None
    inputs: tuple[Input, ...]
    outputs: tuple[Requested, ...]
    is_binary: bool
    deadline: float | None
    timeout: float | None
    priority: int | None


def header_length(header: str | None, length: int) -> int:
    """Return how many bytes of a body are JSON.

    Args:
        header: the value of ``Inference-Header-Content-Length``; None without it, when all bytes are JSON.
        length: the length of the body.

    Raises:
        BodyError: the header is not a number, or is more than `length`.
    """
    if header is None:
        return length
    if not (header.isascii() and header.isdecimal() and len(header) < 20):
        raise BodyError(f"Inference-Header-Content-Length must be a number of bytes, got {header[:40]!r}")
    if int(header) > length:
        raise BodyError(f"Inference-Header-Content-Length is {int(header):,}, and the whole body has {length:,} bytes")
    return int(header)


def parse(body: bytes | bytearray, json_length: int | None = None, images: Collection[str] = ()) -> InferRequest:
    """Parse a request's body.

    Args:
        body: the whole body. Tensors are views of it where possible, so it must not change while they are in use.
        json_length: how many bytes at its beginning are JSON; None for all.
        images: names of inputs whose strings are image files.

    Raises:
        BodyTooLargeError: the JSON contains more than the server accepts.
        BodyError: the body is wrong in another way; the message says how.
    """
    json_length = len(body) if json_length is None else json_length
    fields = _mapping("the request", loads("the request", body, json_length))
    rest = _Rest(memoryview(body), json_length)
    called = read_fields(fields, rest, images)
    rest.check_empty()
    return called


def read_fields(fields: Mapping[str, Any], rest: Rest, images: Collection[str] = ()) -> InferRequest:
    """Check the fields of a request, and return the request.

    Args:
        fields: the fields as in JSON; the data of a tensor may also be a flat array.
        rest: gives the bytes of inputs without data.
        images: names of inputs whose strings are image files.

    Raises:
        BodyError: a field is wrong; the message says how.
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
    """Return an answer's body: its JSON, and the bytes that follow. If no bytes follow, it is not a binary answer.

    Args:
        head: the fields of the answer without its outputs.
        outputs: for each output its name, whether it is sent as bytes, and a tensor on the host or an array of strings. A
            contiguous tensor is not copied.
        placed: names of the outputs in shared memory. They are described without parameters, because Triton's C++ client
            takes parameters as a sign that bytes follow.

    Raises:
        BodyError: the protocol has no datatype for a tensor.
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
    """Return the name, datatype and shape of an output.

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
    """Return a model's result of any kind as a tensor, without moving it to another device."""
    return result if isinstance(result, torch.Tensor) else torch.from_numpy(np.asarray(result))


def bytes_of(tensor: Result) -> memoryview:
    """Return the bytes of a host tensor or an array of strings, little-endian; a contiguous tensor is not copied."""
    if isinstance(tensor, np.ndarray):
        return memoryview(strings.to_bytes(tensor))
    flat = tensor.contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return memoryview(array)


class Rest(Protocol):
    """Gives the bytes of inputs, in the order of the inputs."""

    def take(self, name: str, size: int) -> tuple[memoryview, int]:
        """Return the buffer that contains the next input's bytes, and their offset in it."""


class _Rest(Rest):
    """Gives the bytes after the JSON of a body."""

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
    """Return an input with the data that was read from shared memory.

    Args:
        given: the input.
        placed: its place in shared memory.
        data: its bytes as UINT8, on any device.
        images: names of inputs whose strings are image files.

    Raises:
        BodyError: the number of strings does not match the shape, or a BOOL is neither 0 nor 1.
    """
    what, datatype = f"input {given.name!r}", given.datatype
    if data.is_cuda and not placed.are_strings:
        if datatype.torch is torch.bool:
            return replace(given, tensor=data.ne(0).reshape(placed.shape), placed=None)
        if data.data_ptr() % datatype.stored.itemsize:
            data = data.clone()  # torch can only view aligned elements
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
    """Return a request whose body consists only of the bytes of a model's single input.

    Args:
        body: the whole body.
        spec: the input. One of its dimensions may be dynamic; the length of the body determines its size.
        has_axis: whether a batch axis of size 1 is added before its dimensions.
        is_image: whether the body is an image file.

    Raises:
        BodyError: the body's length does not match the input, or cannot determine its shape.
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
    """Return the tensor whose bytes begin at `start`, as a view where possible."""
    array = np.frombuffer(body, datatype.stored, math.prod(shape), start).reshape(shape)
    if not array.flags.aligned or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))  # torch cannot view it
    if datatype.torch is torch.bool and array.size and array.view(np.uint8).max() > 1:
        raise BodyError(f"{what}: a BOOL is a byte that is 0 or 1")  # other bytes give inconsistent comparisons
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
    """Return an optional field. Clients that use data classes send null for a field that is not set."""
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
    if 0 in value and not is_possible(value):  # a shape without 0 cannot be too large: its data must match it
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
    """Return a value as text for a message; for a container, only its length."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    return said(value)


def _json(tensor: Result) -> bytes:
    if isinstance(tensor, np.ndarray):
        return orjson.dumps(tensor.ravel().tolist())
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    return dumped(tensor.contiguous().reshape(-1).numpy())
