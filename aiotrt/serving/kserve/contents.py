"""Requests and answers of the Open Inference Protocol over gRPC: tensors in messages, from bytes and to bytes.

A message's tensors are in `raw_input_contents`, as bytes, or in typed lists inside the inputs. The bytes are separated from
the message before the rest is parsed, so that each byte is copied once. Parsing holds the interpreter lock, and the result
takes more memory than the message, so the parsed part is bounded like JSON. `binary` contains the checks that both protocols
share.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from aiotrt.serving.errors import BodyError, BodyTooLargeError
from aiotrt.serving.kserve import strings
from aiotrt.serving.kserve.binary import MOST_TENSORS, InferRequest, Rest, Result, bytes_of, described, read_fields
from aiotrt.serving.kserve.datatypes import DATATYPES
from aiotrt.serving.kserve.guards import Body
from aiotrt.serving.kserve.messages import messages

__all__ = ["Parts", "decode", "encode", "parsed", "split", "streamed"]

_RAW: Final = 7  # field of ModelInferRequest
_RAW_OUTPUT: Final = 6  # field of ModelInferResponse
_RESPONSE: Final = 2  # field of ModelStreamInferResponse
_BYTES: Final = 2  # wire type
#: The maximum number of fields of a message, enough for `MOST_TENSORS` tensors; more fields would only cost memory.
_MOST_FIELDS: Final = 4 * MOST_TENSORS
_MOST_STRINGS: Final = 1 << 18
#: The alignment of each tensor in the body, in bytes, because torch cannot view numbers that are not aligned.
_ALIGNMENT: Final = 16
#: How many numbers one call converts, which takes less than a millisecond.
_PIECE: Final = 1 << 15
#: The field for the values of each datatype. Other datatypes are sent only as bytes.
_FIELDS: Final = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    strings.NAME: "bytes_contents",
}
#: The dtype of a field's values, for fields that are wider than some of their datatypes.
_WIDE: Final = {"int_contents": np.int32, "uint_contents": np.uint32}


@dataclass
class Parts:
    """A request's message, split into its parsed fields and the bytes of its tensors.

    Attributes:
        data: the message; empty once it was decoded.
        head: the parsed message without `raw_input_contents`.
        head_size: the size of `head` in bytes, before parsing.
        raw: the begin and end of each of `raw_input_contents` in the message.
    """

    data: bytes
    head: Any
    head_size: int
    raw: Sequence[tuple[int, int]]


def split(data: bytes, max_head: int) -> Parts:
    """Split a ModelInferRequest.

    Args:
        data: the message.
        max_head: how many bytes it may have without those of `raw_input_contents`.

    Raises:
        BodyTooLargeError: it has more bytes, or too many fields.
        BodyError: the bytes are not a ModelInferRequest.
    """
    raw: list[tuple[int, int]] = []
    rest: list[bytes] = []
    at = begin = count = 0
    while at < len(data):
        count += 1
        if count > _MOST_FIELDS:
            raise BodyTooLargeError(f"the request has more than {_MOST_FIELDS:,} fields, which is all that is taken")
        start = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            if tag >> 3 == _RAW:
                rest.append(data[begin:start])
                raw.append((at, at + size))
                begin = at + size
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise BodyError(f"the request is not a ModelInferRequest: it has a field of wire type {kind}")
        if at > len(data):
            raise BodyError("the request is not a ModelInferRequest: a field ends after its message")
    rest.append(data[begin:])
    head = b"".join(rest)
    if len(head) > max_head:
        raise BodyTooLargeError(
            f"the request has {len(head):,} bytes beside raw_input_contents, at most {max_head:,} are taken: "
            "send tensors in raw_input_contents"
        )
    return Parts(data, parsed("ModelInferRequest", head), len(head), raw)


def parsed(name: str, data: bytes) -> Any:
    """Parse the message of this name.

    Raises:
        BodyError: the bytes are not such a message.
    """
    try:
        return messages[name].FromString(data)
    except DecodeError as error:
        raise BodyError(f"the request is not a {name}") from error


def decode(parts: Parts, body: Body, images: Collection[str] = ()) -> InferRequest:
    """Return the request in a message.

    Args:
        parts: the result of `split`. The message in it is dropped.
        body: an empty body, in which the message's size is counted. Tensors that were sent as bytes are copied into it, and
            are views of it.
        images: names of inputs whose strings are image files.

    Raises:
        BodyTooLargeError: there are more strings than the server accepts.
        BodyError: the request is wrong in another way; the message says how.
    """
    head = parts.head
    for what, entries in (("inputs", head.inputs), ("outputs", head.outputs)):
        if len(entries) > MOST_TENSORS:
            raise BodyError(f"{what} must be at most {MOST_TENSORS} tensors, got {len(entries)}")
    inputs = [{**_named(tensor), "datatype": tensor.datatype, "shape": list(tensor.shape)} for tensor in head.inputs]
    are_placed = [fields["parameters"].get("shared_memory_region") is not None for fields in inputs]
    if parts.raw and len(parts.raw) != are_placed.count(False):
        raise BodyError(
            f"the request has {len(inputs)} inputs, {sum(are_placed)} of them in shared memory, and {len(parts.raw)} "
            "raw_input_contents"
        )
    starts = []
    with memoryview(parts.data) as view:
        for start, end in parts.raw:
            body.extend(bytes(-len(body) % _ALIGNMENT))
            starts.append(len(body))
            body.extend(view[start:end])
    parts.data = b""
    raw = iter(parts.raw)
    for tensor, fields, is_placed in zip(head.inputs, inputs, are_placed, strict=True):
        if parts.raw and tensor.HasField("contents"):
            raise BodyError(f"input {tensor.name[:80]!r} has contents, and there are raw_input_contents")
        if is_placed:
            fields["data"] = _typed(tensor) if tensor.HasField("contents") else None
        elif parts.raw:
            start, end = next(raw)
            fields["parameters"]["binary_data_size"] = end - start
        else:
            fields["data"] = _typed(tensor)
    outputs = [{**_named(output), "parameters": {**_parameters(output), "binary_data": True}} for output in head.outputs]
    parameters = {**_parameters(head), "binary_data_output": True}
    fields = {"id": head.id or None, "inputs": inputs, "outputs": outputs, "parameters": parameters}
    return read_fields(fields, _Raw(memoryview(body), starts), images)


def encode(
    head: dict[str, Any], outputs: Sequence[tuple[str, bool, Result]], placed: Collection[str] = ()
) -> list[bytes | memoryview]:
    """Return a ModelInferResponse, as pieces to be concatenated. Contiguous tensors are not copied.

    Args:
        head: the fields of the answer without its outputs.
        outputs: for each output its name, whether it is sent as bytes (ignored: all are), and a tensor on the host or an
            array of strings.
        placed: names of the outputs in shared memory. They get empty raw contents, because clients expect one for each
            output.

    Raises:
        BodyError: the protocol has no datatype for a tensor.
    """
    entries = [described(name, tensor) for name, _, tensor in outputs]
    pieces = [messages["ModelInferResponse"](**head, outputs=entries).SerializeToString()]
    for name, _, tensor in outputs:
        data = b"" if name in placed else bytes_of(tensor)
        pieces += [_head(_RAW_OUTPUT, len(data)), data]
    return pieces


def streamed(pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return a ModelStreamInferResponse that contains a ModelInferResponse, both in pieces."""
    return [_head(_RESPONSE, sum(map(len, pieces))), *pieces]


class _Raw(Rest):
    """Gives the bytes of the inputs that were copied into a body."""

    def __init__(self, body: memoryview, starts: Sequence[int]) -> None:
        self._body = body
        self._starts = iter(starts)

    def take(self, name: str, size: int) -> tuple[memoryview, int]:
        return self._body, next(self._starts)


def _named(message: Any) -> dict[str, Any]:
    return {"name": message.name, "parameters": _parameters(message)}


def _parameters(message: Any) -> dict[str, object]:
    if len(message.parameters) > MOST_TENSORS:
        raise BodyError(f"there may be at most {MOST_TENSORS} parameters, got {len(message.parameters)}")
    found = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    for name in ("binary_data_size", "binary_data", "binary_data_output"):
        found.pop(name, None)  # of the binary extension over HTTP; over gRPC all is binary
    return found


def _typed(tensor: Any) -> npt.NDArray[Any] | list[bytes]:
    what = f"input {tensor.name[:80]!r}"
    given = [field.name for field, _ in tensor.contents.ListFields()]
    field = _FIELDS.get(tensor.datatype)
    if field is None and tensor.datatype in DATATYPES:
        raise BodyError(f"{what}: {tensor.datatype} comes in raw_input_contents only")
    if any(name != field for name in given):
        raise BodyError(f"{what}: the contents of {tensor.datatype[:40]!r} belong in {field}, got {', '.join(given)}")
    if field is None:
        return []  # `read_fields` refuses the datatype
    values = getattr(tensor.contents, field)
    if field == "bytes_contents":
        if len(values) > _MOST_STRINGS:
            raise BodyTooLargeError(f"{what} has {len(values):,} strings, at most {_MOST_STRINGS:,} are taken")
        return list(values)
    array = np.empty(len(values), DATATYPES[tensor.datatype].numbers)
    for start in range(0, len(values), _PIECE):
        piece = np.array(values[start : start + _PIECE], _WIDE.get(field, array.dtype))
        if field in _WIDE:
            limits, low, high = np.iinfo(array.dtype), piece.min(), piece.max()
            if low < limits.min or high > limits.max:
                raise BodyError(f"{what}: {low if low < limits.min else high} does not fit into {tensor.datatype}")
        array[start : start + _PIECE] = piece
    return array


def _head(number: int, size: int) -> bytes:
    """Return the tag and the length that precede a field's value of `size` bytes."""
    head = bytearray([number << 3 | _BYTES])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BodyError("the request is not a ModelInferRequest: a number does not end")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
