"""The Open Inference Protocol's bytes: what goes in comes out, and nonsense is an `InputError` and nothing else."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request

from aiotrt.errors import InputError
from aiotrt.serving.kserve.binary import encode, header_length, parse
from aiotrt.serving.kserve.datatypes import DATATYPES

X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


def one(**changes: Any) -> dict[str, Any]:
    """A request of one input; None removes a field."""
    fields = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": X.ravel().tolist()} | changes
    return {"inputs": [{name: value for name, value in fields.items() if value is not None}]}


def binary(payload: bytes, **changes: Any) -> tuple[bytes, int]:
    """A body of the binary extension, and how long its JSON is."""
    size = changes.pop("binary_data_size", 24)
    head = json.dumps(one(data=None, parameters={"binary_data_size": size}, **changes)).encode()
    return head + payload, len(head)


def refused(body: bytes, json_length: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        parse(bytearray(body), json_length)
    return str(caught.value)


@pytest.mark.parametrize("data", [X.ravel().tolist(), X.tolist()], ids=["flat", "nested"])
def test_json(data: object) -> None:
    request = parse(json.dumps(one(data=data) | {"id": "7", "outputs": [{"name": "y"}]}).encode())
    assert request.id == "7"
    assert request.outputs[0].name == "y"
    assert not request.outputs[0].is_binary
    assert request.deadline is None
    np.testing.assert_array_equal(request.inputs[0].tensor.numpy(), X)


@pytest.mark.parametrize("name", DATATYPES)
@pytest.mark.parametrize("is_binary", [True, False])
def test_every_datatype_there_and_back(name: str, is_binary: bool) -> None:
    datatype = DATATYPES[name]
    if name == "BOOL":
        array = np.array([[True, False, True]])
    elif datatype.numbers.kind in "iu":
        limits = np.iinfo(datatype.numbers)
        array = np.array([[limits.min, 1, limits.max]], datatype.numbers)
    else:
        array = np.array([[-1.5, 0, 256]], datatype.numbers)
    if is_binary:
        stored = torch.from_numpy(array).to(datatype.torch).view(torch.uint8).numpy().tobytes()
        body, length = binary(stored, datatype=name, shape=[1, 3], binary_data_size=len(stored))
        request = parse(bytearray(body), length)
    else:
        request = parse(json.dumps(one(datatype=name, shape=[1, 3], data=array.tolist())).encode())
    (given,) = request.inputs
    assert given.tensor.dtype is datatype.torch
    np.testing.assert_array_equal(given.tensor.to(torch.from_numpy(array).dtype).numpy(), array)
    head, chunks = encode({"model_name": "m"}, [("y", is_binary, given.tensor)])
    result = InferResult.from_response_body(head + b"".join(chunks), header_length=len(head) if is_binary else None)
    np.testing.assert_array_equal(result.as_numpy("y"), array)


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("shape", [[2, 3], [6], [], [0, 3]])
def test_strings_of_one_length_are_bytes_with_one_more_axis(shape: list[int], is_binary: bool) -> None:
    count = math.prod(shape)
    words = np.array([f"no. {i}" for i in range(count)], object).reshape(shape)
    tensor = InferInput("x", shape, "BYTES").set_data_from_numpy(words, binary_data=is_binary)
    body, length = _get_inference_request([tensor], "", None, 0, False, False, 0, None, None)
    (given_input,) = parse(bytearray(body), length).inputs
    assert given_input.datatype is DATATYPES["UINT8"]
    assert given_input.tensor.shape == (*shape, 5 if count else 0)
    found = given_input.tensor.reshape(count, 5 if count else 0).numpy()
    assert [row.tobytes().decode() for row in found] == list(words.flat)


@pytest.mark.parametrize("is_binary", [True, False])
def test_shorter_strings_end_in_zeros(is_binary: bool) -> None:
    words = np.array(["one", "three", ""], object)
    tensor = InferInput("x", [3], "BYTES").set_data_from_numpy(words, binary_data=is_binary)
    body, length = _get_inference_request([tensor], "", None, 0, False, False, 0, None, None)
    found = parse(bytearray(body), length).inputs[0].tensor.numpy()
    assert [bytes(row) for row in found] == [b"one\0\0", b"three", b"\0" * 5]


def prefixed(*words: bytes) -> bytes:
    return b"".join(len(word).to_bytes(4, "little") + word for word in words)


def test_strings_whose_lengths_lie() -> None:
    true = prefixed(b"one", b"two")
    of = {"datatype": "BYTES", "shape": [2]}
    body, length = binary(true, **of, binary_data_size=14)
    assert parse(bytearray(body), length).inputs[0].tensor.tolist() == [list(b"one"), list(b"two")]
    for payload in (b"\xff" * 4 + true[4:], true[:7] + b"\x02" + true[8:], true[:-1], true + b"e", b"", b"\x01"):
        says = f"{len(payload)} bytes are not BYTES of shape [2], each with its length in four bytes before it"
        assert says in refused(*binary(payload, **of, binary_data_size=len(payload)))
    assert "at most 131,072, got 18,446,744,073,709,551,616" in refused(
        *binary(true, datatype="BYTES", shape=[1 << 32, 1 << 32], binary_data_size=14)
    )
    assert "and 14 bytes of the body are left" in refused(*binary(true, **of, binary_data_size=15))
    assert "14 bytes are not BYTES of shape [0]" in refused(*binary(true, datatype="BYTES", shape=[0], binary_data_size=14))


def test_strings_do_not_take_much_more_memory_than_was_sent() -> None:
    payload = prefixed(b"x" * 3000, *[b""] * 2000)
    of = {"datatype": "BYTES", "binary_data_size": len(payload)}
    assert (
        "2,001 strings, the longest of 3,000 bytes, would be 6,003,000 bytes as a tensor, and 11,004 were sent"
        in refused(*binary(payload, shape=[2001], **of))
    )
    body, length = binary(
        payload := prefixed(b"x" * 1000, *[b""] * 999), datatype="BYTES", shape=[1000], binary_data_size=len(payload)
    )
    assert parse(bytearray(body), length).inputs[0].tensor.shape == (1000, 1000)


def test_what_tritons_client_writes_is_read() -> None:
    inputs = []
    for i, dtype in enumerate([np.uint8, np.float32, np.int64]):  # the second does not stand where a float can
        given_input = InferInput(f"i{i}", [3], {0: "UINT8", 1: "FP32", 2: "INT64"}[i])
        given_input.set_data_from_numpy(np.array([1, 2, 3], dtype), binary_data=True)
        inputs.append(given_input)
    outputs = [InferRequestedOutput("a", binary_data=True), InferRequestedOutput("b", binary_data=False)]
    body, length = _get_inference_request(inputs, "id", outputs, 0, False, False, 2, 2500, None)
    request = parse(bytearray(body), length)
    assert [one.tensor.tolist() for one in request.inputs] == [[1, 2, 3]] * 3
    assert [(one.name, one.is_binary) for one in request.outputs] == [("a", True), ("b", False)]
    assert request.deadline is None
    assert request.timeout == pytest.approx(0.0025)
    assert request.priority == 1
    body, length = _get_inference_request(inputs, "", None, 0, False, False, 0, None, {"deadline_ms": 40})
    request = parse(bytearray(body), length)
    assert request.is_binary
    assert request.deadline == pytest.approx(0.04)
    assert request.priority is None


def test_bytes_are_not_copied_where_they_are_aligned() -> None:
    head = json.dumps(one(data=None, parameters={"binary_data_size": 24})).encode()
    head += b" " * (-len(head) % 8)
    body = bytearray(head + X.tobytes())
    tensor = parse(body, len(head)).inputs[0].tensor
    body[len(head) : len(head) + 4] = np.float32(9).tobytes()
    assert tensor[0, 0] == 9


def test_empty_tensors_and_scalars() -> None:
    body, length = binary(b"", shape=[0, 3], binary_data_size=0)
    assert parse(bytearray(body), length).inputs[0].tensor.shape == (0, 3)
    assert parse(json.dumps(one(shape=[0], data=[])).encode()).inputs[0].tensor.shape == (0,)
    body, length = binary(bytes(4), shape=[], binary_data_size=4)
    assert parse(bytearray(body), length).inputs[0].tensor.shape == ()
    head, chunks = encode(
        {}, [("a", True, torch.empty(0, 3)), ("b", False, torch.empty(0)), ("c", False, torch.tensor(2.5))]
    )
    assert [output.get("data") for output in orjson.loads(head)["outputs"]] == [None, [], [2.5]]
    assert b"".join(chunks) == b""


@pytest.mark.parametrize(
    ("says", "request_"),
    [
        ("the request must be a JSON object, got an array of 0", []),
        ("inputs must be a list of 1 to 256 tensors, got null", {}),
        ("inputs must be a list of 1 to 256 tensors, got an array of 0", {"inputs": []}),
        ("got an array of 300", {"inputs": [{}] * 300}),
        ("an input must be a JSON object, got 7", {"inputs": [7]}),
        ("an input's name must be a string of 1 to 1024", one(name="")),
        ("an input's name must be a string of 1 to 1024", one(name="x" * 2000)),
        ("datatype must be one of BOOL, UINT8", one(datatype="FP8")),
        ("datatype must be one of BOOL, UINT8", one(datatype=["FP32"])),
        ("send strings of more equal lengths", one(datatype="BYTES", shape=[2001], data=[""] * 2000 + ["ab" * 1000])),
        ("expected data of shape [2, 3], flat or nested, got shape [5]", one(datatype="BYTES", data=["a"] * 5)),
        ("expected lists of strings", one(datatype="BYTES", data=["a"] * 5 + [None])),
        ("expected lists of strings", one(datatype="BYTES", data=[["a"] * 3, ["a"] * 2])),
        ("expected lists of strings", one(datatype="BYTES", data=7)),
        ("expected lists of strings", one(datatype="BYTES", data=json.loads("[" * 500 + "]" * 500))),
        ("shape must be a list", one(shape=6)),
        ("shape must be a list", one(shape=[-2, -3])),
        ("shape must be a list", one(shape=[2.0, 3])),
        ("shape must be a list", one(shape=[True, 6])),
        ("shape must be a list", one(shape=[1 << 63])),
        ("shape must be a list", one(shape=[1] * 33)),
        ("expected data of shape [4294967296, 4294967296]", one(shape=[1 << 32, 1 << 32])),
        ("no tensor has the shape [0, 4611686018427387904]", one(shape=[0, 1 << 62], data=[])),
        ("no tensor has the shape [0, 4611686018427387904]", one(shape=[0, 1 << 62], datatype="BYTES", data=[])),
        (
            "no tensor has the shape [281474976710656, 0]",
            one(shape=[1 << 48, 0], data=None, parameters={"binary_data_size": 0}),
        ),
        ("expected data of shape [3, 2], flat or nested, got shape [2, 3]", one(shape=[3, 2], data=X.tolist())),
        ("expected data of shape [2, 3], flat or nested, got shape [1]", one(data=[1])),
        ("expected a list of numbers, got 7", one(data=7)),
        ("the lists differ in length", one(data=[[1, 2], [3]])),
        ("expected only numbers, got '1'", one(data=["1"] * 6)),
        ("expected only numbers, got null", one(data=[None] * 6)),
        ("expected only numbers, got {}", one(data=[{}] * 6)),
        ("a number does not fit into float32", one(data=[1e39] * 6)),
        ("a number does not fit into float16", one(datatype="FP16", data=[70000] * 6)),
        ("256 does not fit into uint8", one(datatype="UINT8", data=[256] * 6)),
        ("-1 does not fit into uint64", one(datatype="UINT64", data=[-1] * 6)),
        ("expected only integers, got 1.5", one(datatype="INT32", data=[1.5] * 6)),
        (
            "expected only integers, got 1.2345678901234568e+29",
            one(datatype="INT64", data=[123456789012345678901234567890] * 6),
        ),
        ("expected only true and false, got 1", one(datatype="BOOL", data=[1] * 6)),
        ("neither data nor the parameter binary_data_size", one(data=None)),
        ("both data and the parameter binary_data_size", one(parameters={"binary_data_size": 24})),
        ("binary_data_size must be a number of bytes, got -24", one(data=None, parameters={"binary_data_size": -24})),
        ("binary_data_size must be a number of bytes, got '24'", one(data=None, parameters={"binary_data_size": "24"})),
        ("0 bytes of the body are left", one(data=None, parameters={"binary_data_size": 24})),
        ("parameters must be a JSON object, got an array of 0", one(parameters=[])),
        ("must be numbers of bytes", one(parameters={"shared_memory_region": "a"})),
        ("does not have sequences", one() | {"parameters": {"sequence_id": 3}}),
        ("must be a number of classes", one() | {"outputs": [{"name": "y", "parameters": {"classification": -3}}]}),
        ("id must be a string", one() | {"id": 7}),
        ("outputs must be a list", one() | {"outputs": "y"}),
        ("an output's name", one() | {"outputs": [{}]}),
        ("output 'y' is there twice", one() | {"outputs": [{"name": "y"}, {"name": "y"}]}),
        ("input 'x' is there twice", {"inputs": one()["inputs"] * 2}),
        ("binary_data must be true or false, got 1", one() | {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}),
        ("deadline_ms must be a positive number, got -1", one() | {"parameters": {"deadline_ms": -1}}),
        ("timeout must be a positive number, got true", one() | {"parameters": {"timeout": True}}),
        ("priority must be an integer", one() | {"parameters": {"priority": "high"}}),
    ],
)
def test_bad_requests(says: str, request_: object) -> None:
    assert says in refused(json.dumps(request_).encode())


def test_bad_json() -> None:
    text = json.dumps(one()).encode()
    for body in (b"", b"{", b"\xff\xfe", b"[" * 10_000, text.replace(b"1.0", b"Nan"), text.replace(b"1.0", b"1e999")):
        assert "the request is not JSON" in refused(body)


def test_lengths_that_lie() -> None:
    data = X.tobytes()
    for says, payload, changes in (
        ("FP32 of shape [2, 3] has 24 bytes, binary_data_size is 20", data[:20], {"binary_data_size": 20}),
        ("binary_data_size 24, and 20 bytes of the body are left for it", data[:20], {}),
        ("4 bytes at the end of the body belong to no input", data + data[:4], {}),
        ("has 73,786,976,294,838,206,464 bytes", data, {"shape": [1 << 32, 1 << 32]}),
        ("a BOOL is a byte that is 0 or 1", bytes([0, 1, 2, 0, 0, 0]), {"datatype": "BOOL", "binary_data_size": 6}),
    ):  # fmt: skip
        assert says in refused(*binary(payload, **changes))
    body, length = binary(data)
    assert "not JSON" in refused(body, length - 1)
    assert "not JSON" in refused(body, length + 1)
    for header, says in (
        ("1e3", "must be a number"),
        ("-1", "must be a number"),
        ("²", "must be a number"),
        ("99", "whole body"),
    ):
        with pytest.raises(InputError, match=says):
            header_length(header, 98)
    assert header_length("98", 98) == header_length(None, 98) == 98


def test_outputs_that_are_no_numbers() -> None:
    head, _ = encode({}, [("y", False, torch.tensor([1.0, float("nan"), -math.inf], dtype=torch.bfloat16))])
    assert head.endswith(b'"data":[1.0,NaN,-Infinity]}]}')
    with pytest.raises(InputError, match="no datatype"):
        encode({}, [("y", True, torch.zeros(2, dtype=torch.complex64))])


# --- fuzzing ------------------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=8,
)
SIZES = st.integers(-2, 40) | st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64])
PARAMETERS = st.fixed_dictionaries({}, optional={"binary_data_size": SIZES | ANYTHING, "binary_data": ANYTHING})
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | ANYTHING,
        "shape": st.lists(SIZES, max_size=4) | ANYTHING,
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | ANYTHING,
        "parameters": PARAMETERS | ANYTHING,
        "data": st.lists(st.integers(-3, 300) | st.floats(allow_nan=False) | st.booleans(), max_size=8) | ANYTHING,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | ANYTHING},
    optional={"outputs": st.lists(TENSOR, max_size=2) | ANYTHING, "id": ANYTHING, "parameters": PARAMETERS | ANYTHING},
)


@pytest.mark.parametrize("group", range(4))
@settings(max_examples=400, deadline=None)
@given(request=REQUEST, payload=st.binary(max_size=64), lie=st.integers(-3, 3))
@example(request=one(data=[], shape=[0, 1 << 62, 1 << 62]), payload=b"", lie=0)
@example(request=one(data=None, shape=[1 << 40], parameters={"binary_data_size": 1 << 42}), payload=bytes(24), lie=0)
def test_any_request_is_read_or_refused(group: int, request: object, payload: bytes, lie: int) -> None:
    text = json.dumps(request).encode()
    body = bytearray(text + payload)
    length = min(max(len(text) + lie, 0), len(body))
    try:
        parsed = parse(body, length)
    except InputError:
        return
    for given_input in parsed.inputs:
        assert given_input.tensor.dtype is given_input.datatype.torch
        assert given_input.tensor.numel() <= len(body)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_any_bytes_are_read_or_refused(body: bytes, length: int) -> None:
    try:
        parse(bytearray(body), header_length(str(length), len(body)))
    except InputError:
        pass


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_good_request_with_one_thing_changed(data: st.DataObject) -> None:
    body, length = binary(X.tobytes())
    at = data.draw(st.integers(0, len(body) - 1))
    changed = bytearray(body)
    if data.draw(st.booleans()):
        changed[at] = data.draw(st.integers(0, 255))
    else:
        del changed[at : at + data.draw(st.integers(1, 40))]
    try:
        request = parse(changed, header_length(str(length), len(changed)))
    except InputError:
        return
    assert request.inputs[0].tensor.numel() <= len(changed)


def test_no_memory_is_taken_for_what_was_only_announced() -> None:
    tracemalloc.start()
    try:
        for shape in ([1 << 30], [1 << 20, 1 << 20], [1 << 62]):
            for changes in ({"data": [1.0]}, {"data": None, "parameters": {"binary_data_size": 1 << 32}}):
                refused(json.dumps(one(shape=shape, **changes)).encode())
        # One long string among many short ones: numpy would make all of them as long.
        refused(json.dumps(one(shape=[2000], data=["a" * 100_000] + ["b"] * 1999)).encode())
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
