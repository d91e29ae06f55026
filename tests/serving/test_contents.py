"""Requests and answers of gRPC, from messages and to messages."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from aiotrt.serving.errors import BodyError, BodyTooLargeError
from aiotrt.serving.kserve.binary import InferRequest
from aiotrt.serving.kserve.contents import decode, encode, split, streamed
from aiotrt.serving.kserve.datatypes import DATATYPES
from aiotrt.serving.kserve.guards import Body, Budget
from aiotrt.serving.kserve.messages import messages

X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
MAX_HEAD = 4 << 20


def parse(message: Any, max_head: int = MAX_HEAD) -> InferRequest:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return decode(split(data, max_head), Body(Budget(1 << 30, 1 << 30, 1.0)))


def request(*raw: bytes, **fields: Any) -> Any:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3]} | fields
    return messages["ModelInferRequest"](model_name="m", inputs=[tensor], raw_input_contents=raw)


def with_region(*raw: bytes, **fields: Any) -> Any:
    message = request(*raw, **fields)
    message.inputs[0].parameters["shared_memory_region"].string_param = "a"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 24
    return message


@pytest.mark.parametrize("name", DATATYPES)
def test_bytes_of_every_datatype(name: str) -> None:
    stored = DATATYPES[name].stored
    array = np.arange(6).reshape(2, 3).astype(stored) if name != "BOOL" else np.eye(2, 3, dtype=np.bool_)
    (given,) = parse(request(array.tobytes(), datatype=name)).inputs
    assert given.tensor.dtype is DATATYPES[name].torch
    assert given.tensor.view(torch.uint8).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-32768, 32767]),
        ("INT32", "int_contents", [-(1 << 31), (1 << 31) - 1]),
        ("INT64", "int64_contents", [-(1 << 63), (1 << 63) - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT32", "uint_contents", [0, (1 << 32) - 1]),
        ("UINT64", "uint64_contents", [0, (1 << 64) - 1]),
        ("FP32", "fp32_contents", [1.5, float("inf")]),
        ("FP64", "fp64_contents", [1e300, -0.1]),
    ],
)
def test_typed_contents_of_every_datatype(name: str, field: str, values: list[Any]) -> None:
    (given,) = parse(request(datatype=name, shape=[2, 1], contents={field: values})).inputs
    assert given.tensor.dtype is DATATYPES[name].torch
    assert given.tensor.tolist() == [[values[0]], [values[1]]]


def test_typed_contents_in_pieces() -> None:
    values = np.arange(100_000, dtype=np.float32)
    (given,) = parse(request(shape=[100_000], contents={"fp32_contents": values})).inputs
    np.testing.assert_array_equal(given.tensor.numpy(), values)


def test_strings_both_ways() -> None:
    typed = request(datatype="BYTES", shape=[2], contents={"bytes_contents": [b"ab\xff", b"cde"]})
    raw = request(b"\3\0\0\0ab\xff\3\0\0\0cde", datatype="BYTES", shape=[2])
    for message in (typed, raw):
        (given,) = parse(message).inputs
        assert given.tensor.tolist() == [list(b"ab\xff"), list(b"cde")]


def test_tensors_are_views_of_one_copy_and_aligned() -> None:
    message = messages["ModelInferRequest"](
        inputs=[
            {"name": "a", "datatype": "UINT8", "shape": [3]},
            {"name": "b", "datatype": "FP64", "shape": [2]},
        ],
        raw_input_contents=[b"abc", np.array([1.5, 2.5]).tobytes()],
    )
    body = Body(Budget(1 << 30, 1 << 30, 1.0))
    a, b = decode(split(message.SerializeToString(), MAX_HEAD), body).inputs
    base, end = torch.frombuffer(body, dtype=torch.uint8).data_ptr(), len(body)
    assert base <= a.tensor.data_ptr() < b.tensor.data_ptr() < base + end
    assert a.tensor.tolist() == list(b"abc")
    assert b.tensor.tolist() == [1.5, 2.5]


def test_parameters_and_outputs() -> None:
    message = request(X.tobytes())
    message.id = "seven"
    message.parameters["deadline_ms"].int64_param = 50
    message.parameters["timeout"].int64_param = 31
    message.parameters["priority"].uint64_param = 2
    message.parameters["binary_data_output"].bool_param = False  # of the other protocol
    message.parameters["nothing"].SetInParent()
    message.outputs.add(name="y").parameters["binary_data"].string_param = "?"
    called = parse(message)
    assert (called.id, called.deadline, called.timeout, called.priority) == ("seven", 0.05, 31e-6, 1)
    assert called.is_binary
    assert [(output.name, output.is_binary) for output in called.outputs] == [("y", True)]
    assert parse(request(X.tobytes())).id is None


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (messages["ModelInferRequest"](), "inputs must be a list of 1"),
        (request(), "expected data of shape"),
        (request(X.tobytes()[:-1]), "has 24 bytes"),
        (request(X.tobytes(), b""), "1 inputs, 0 of them in shared memory, and 2 raw_input_contents"),
        (with_region(X.tobytes()), "1 inputs, 1 of them in shared memory, and 1 raw_input_contents"),
        (with_region(contents={"fp32_contents": [1.0] * 6}), "has both data and the parameter shared_memory_region"),
        (request(X.tobytes(), contents={"fp32_contents": [1]}), "has contents, and there are raw_input_contents"),
        (request(X.tobytes(), shape=[-1, 3]), "shape must be"),
        (request(X.tobytes(), datatype="FP33"), "datatype must be one of"),
        (request(datatype="FP33"), "datatype must be one of"),
        (request(X.tobytes(), name=""), "name must be"),
        (request(contents={"fp64_contents": [1.0] * 6}), "belong in fp32_contents, got fp64_contents"),
        (request(datatype="FP16", contents={"fp32_contents": [1.0]}), "FP16 comes in raw_input_contents only"),
        (request(datatype="INT8", contents={"int_contents": [1, 2, 3, 4, 5, 128]}), "128 does not fit into INT8"),
        (request(datatype="BYTES", shape=[2001], contents={"bytes_contents": [*[b""] * 2000, b"b" * 3000]}), "more equal"),
        (request(b"\2" * 6, datatype="BOOL"), "0 or 1"),
        (b"\x3a\x05abc", "a field ends after its message"),
        (b"\x3a\xff", "a number does not end"),
        (b"\x3b", "wire type 3"),
        (b"\x0a\x01\xff", "not a ModelInferRequest"),
    ],
)
def test_what_is_refused(message: Any, says: str) -> None:
    with pytest.raises(BodyError, match=says):
        parse(message)


def test_what_is_not_done_here_is_refused_by_name() -> None:
    message = request(X.tobytes())
    message.parameters["sequence_id"].int64_param = 1
    with pytest.raises(BodyError, match="has the parameter sequence_id: this server does not have"):
        parse(message)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x2a\x00" * 2000, "more than 1,024 fields"),
        (b"\x3a\x00" * 2000, "more than 1,024 fields"),
        (request(contents={"fp32_contents": [0.0] * 300}).SerializeToString(), "1,000 are taken: send tensors in raw"),
    ],
)
def test_what_costs_more_than_its_bytes_is_bounded(data: bytes, says: str) -> None:
    with pytest.raises(BodyTooLargeError, match=says):
        parse(data, 1000)


def test_strings_and_parameters_are_counted_before_objects_are_made() -> None:
    many = b"".join([b"\x42\x00"] * 300_000)
    contents = messages["InferTensorContents"].FromString(many)
    with pytest.raises(BodyTooLargeError, match="300,000 strings"):
        parse(request(datatype="BYTES", shape=[300_000], contents=contents))
    message = request(X.tobytes())
    for i in range(300):
        message.parameters[str(i)].bool_param = True
    with pytest.raises(BodyError, match="at most 256 parameters, got 300"):
        parse(message)


def test_answers() -> None:
    y = torch.tensor([[1.0, 2.0]])[:, ::1]
    empty = torch.empty(0, 3, dtype=torch.int64)
    head = {"model_name": "m", "model_version": "1", "id": "seven"}
    pieces = encode(head, [("y", True, y), ("z", True, empty)])
    answer = messages["ModelInferResponse"].FromString(b"".join(pieces))
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "seven")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("y", "FP32", [1, 2]), ("z", "INT64", [0, 3])]
    assert list(answer.raw_output_contents) == [y.numpy().tobytes(), b""]
    said = messages["ModelStreamInferResponse"].FromString(b"".join(streamed(pieces)))
    assert said.infer_response == answer
    assert not said.error_message
    with pytest.raises(BodyError, match="complex64, for which the protocol has no datatype"):
        encode(head, [("y", True, torch.zeros(1, dtype=torch.complex64))])


def test_a_long_answer() -> None:
    y = torch.arange(1 << 20, dtype=torch.float32)
    answer = messages["ModelInferResponse"].FromString(b"".join(encode({}, [("y", True, y)])))
    assert answer.raw_output_contents[0] == y.numpy().tobytes()


@pytest.mark.parametrize("count", [4000, pytest.param(200_000, marks=pytest.mark.proof)])
@pytest.mark.timeout(600)
def test_mutated_messages_are_read_or_refused(count: int) -> None:
    randomly = random.Random(0)
    seeds = [seed.SerializeToString() for seed in _seeds()]
    read = 0
    for _ in range(count):
        try:
            parse(mutated(randomly, seeds))
            read += 1
        except BodyError:
            pass
    assert count / 100 < read < count


def _seeds() -> list[Any]:
    many = request(X.tobytes())
    many.id, many.parameters["priority"].int64_param, many.outputs.add(name="y").name = "1", 1, "y"
    return [
        request(X.tobytes()),
        many,
        request(contents={"fp32_contents": [1, 2, 3, 4, 5, 6]}),
        request(datatype="BYTES", shape=[2], contents={"bytes_contents": [b"ab", b"cd"]}),
        request(datatype="INT8", contents={"int_contents": [1, -2, 3, -4, 5, -6]}),
    ]


def mutated(randomly: random.Random, seeds: list[bytes]) -> bytes:
    """One of these with bytes changed, left out, repeated or from another."""
    data = bytearray(randomly.choice(seeds))
    for _ in range(randomly.randint(1, 3)):
        at = randomly.randrange(len(data) + 1)
        match randomly.randrange(5):
            case 0:
                data[at : at + 1] = bytes([randomly.randrange(256)])
            case 1:
                del data[at : at + randomly.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + randomly.randint(1, 16)]
            case 3:
                data[at:at] = randomly.choice(seeds)[: randomly.randint(1, 40)]
            case _:
                data[at : at + 1] = bytes([(data[at] ^ 1 << randomly.randrange(8)) if at < len(data) else 0x80])
    return bytes(data)
