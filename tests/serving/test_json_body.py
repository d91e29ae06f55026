"""JSON in bodies: bounded before it is parsed, large texts one at a time, and then in pieces."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from fastapi import Depends, FastAPI

from aiotrt import serving
from aiotrt.decoding.threads import off_loop
from aiotrt.errors import InputError
from aiotrt.serving import BodyTooLargeError, json_body
from aiotrt.serving.json_body import dumped, from_base64, loads, numbers
from tests.serving.test_kserve import serving as kserve
from tests.serving.tools import served

PIECE = json_body._PIECE
#: What orjson needs long for: empty arrays and objects, many keys and strings, many numbers.
BOMBS = {
    "arrays": b"[" + b"[]," * 70_000 + b"0]",
    "objects": b"[" + b"{}," * 70_000 + b"0]",
    "both": b"[" + b"[],{}," * 35_000 + b"0]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(140_000)) + b"}",
    "strings": b"[" + b'"",' * 140_000 + b"0]",
    "numbers": b"[" + b"0," * ((1 << 20) + 1) + b"0]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_json_contains_is_bounded_before_it_is_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    monkeypatch.setattr(orjson, "loads", parsed.append)
    with pytest.raises(BodyTooLargeError, match=r"the body has JSON with [\d,]+ [a-z ]+, at most [\d,]+ are taken"):
        loads("the body", BOMBS[name])
    assert not parsed


def test_as_much_as_may_be() -> None:
    assert len(loads("it", b'["",' + b"[]," * 65_000 + b"0]")) == 65_002
    assert loads("it", b"[" + b"0," * (1 << 20) + b"0]").shape == ((1 << 20) + 1,)
    assert loads("it", b"[1]" + BOMBS["arrays"], 3) == [1], "what follows the text does not count"
    assert loads("it", json.dumps("[" * 65_000).encode()) == "[" * 65_000


def test_nesting_is_bounded() -> None:
    assert loads("it", b"[" * 1000 + b"]" * 1000)
    with pytest.raises(InputError, match="it is not JSON"):
        loads("it", b"[" * 1100 + b"]" * 1100)


@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_numbers_in_pieces(count: int) -> None:
    given = np.arange(count, dtype=np.int64) * 7 - 5
    np.testing.assert_array_equal(numbers("x", given.tolist(), np.dtype(np.int64)), given)
    np.testing.assert_array_equal(numbers("x", given.tolist(), np.dtype(np.float32)), given.astype(np.float32))
    np.testing.assert_array_equal(numbers("x", (given % 2 == 0).tolist(), np.dtype(bool)), given % 2 == 0)
    assert orjson.loads(dumped(given)) == given.tolist()
    for columns in (1, 3):  # many short lists, and few long ones
        rows = given[: count // columns * columns].reshape(-1, columns)
        for nested in (rows, rows.T):
            if nested.size:
                np.testing.assert_array_equal(numbers("x", nested.tolist(), np.dtype(np.int64)), nested)


@pytest.mark.parametrize("shape", [(40_000,), (5000, 8), (2, 100, 200), (1, 1, 20_000, 2)])
@pytest.mark.parametrize("separators", [(",", ":"), (",\n ", " : ")])
def test_long_arrays_are_parsed_in_pieces(
    shape: tuple[int, ...], separators: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    parse = orjson.loads

    def counted(text: memoryview) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return parse(text)

    monkeypatch.setattr(orjson, "loads", counted)
    given = np.arange(40_000, dtype=np.int64).reshape(shape)
    decoy = '\\":[' + "1," * 70_000 + "1]"
    fields = {"a": decoy, "data": given.tolist(), "b": [{"data": (given + 1).tolist()}], "c": "\\"}
    text = json.dumps(fields, separators=separators).encode()
    found = loads("it", text)
    assert (found["a"], found["c"]) == (decoy, "\\")
    assert longest < 4 * len(decoy), "the text but for its arrays"
    longest = 0
    for data, expected in ((found["data"], given), (found["b"][0]["data"], given + 1)):
        np.testing.assert_array_equal(numbers("x", data, np.dtype(np.int64)), expected)
        np.testing.assert_array_equal(numbers("x", data, np.dtype(np.int64), shape), expected)
        with pytest.raises(InputError, match="flat or nested, got shape"):
            numbers("x", data, np.dtype(np.int64), (2, 20_001))
    assert longest < 2 * json_body._TEXT_PIECE
    root = loads("it", json.dumps(given.tolist(), separators=separators).encode())
    np.testing.assert_array_equal(numbers("x", root, np.dtype(np.int64)), given)


ROWS = b"[1,2,3]," * 20_000
MANY = b"1," * 40_000


@pytest.mark.parametrize(
    "text",
    [
        ROWS[:-3] + b",4]", ROWS[:-3] + b"]", ROWS + b"4", ROWS + b"[]", ROWS + b"[[1,2,3]]", ROWS[:-2] + b"]4",
        b"[4" + ROWS[:-1], MANY + b"", MANY + b"[1]", MANY + b"1 2", MANY + b"x", b"," + MANY + b"1", MANY + b"]",
        b"[" * 40 + MANY + b"1" + b"]" * 40,
        b" " * 70_000, MANY + b",1", MANY + b"null", MANY + b"true", b"[" + MANY + b"1", b"[],[5]," + ROWS[:-1],
    ],
)  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused_however_long(text: bytes) -> None:
    with pytest.raises(InputError, match=r"not JSON|differ in length|expected only integers"):
        numbers("x", loads("it", b'{"data": [' + text + b"]}")["data"], np.dtype(np.int64))


def test_numbers_that_json_does_not_have() -> None:
    odd = [float("nan"), float("inf"), -float("inf"), 1.5]
    for count in (1, 20_000):
        text = json.dumps({"id": "é", "data": odd * count}).encode()
        array = numbers("x", loads("it", text)["data"], np.dtype(np.float32))
        np.testing.assert_array_equal(array, np.array(odd * count, np.float32))
        np.testing.assert_array_equal(np.array(json.loads(dumped(array)), np.float32), array)
    assert dumped(np.array(odd, np.float16)) == b"[NaN,Infinity,-Infinity,1.5]"
    with pytest.raises(InputError, match="expected only integers, got nan"):
        numbers("x", loads("it", b"[NaN]"), np.dtype(np.int8))
    for wrong in (
        b'["\\ud800",NaN]',
        b"[NaN,1e]",
        b"[NaN," + b"9" * 30 + b"]",
        b"[" * 1100 + b"NaN" + b"]" * 1100,
        b"\xff[NaN]",
    ):
        with pytest.raises(InputError, match="it is not JSON"):
            loads("it", wrong)


@pytest.mark.parametrize(
    ("wrong", "dtype", "says"),
    [
        ("a", np.float32, "expected only numbers, got 'a'"),
        (True, np.float32, "expected only numbers, got true"),
        (None, np.int8, "expected only integers, got null"),
        (128, np.int8, "128 does not fit into int8"),
        (-129, np.int8, "-129 does not fit into int8"),
        (1e300, np.float32, "a number does not fit into float32"),
    ],
)
def test_what_is_wrong_in_the_last_piece_is_found(wrong: object, dtype: npt.DTypeLike, says: str) -> None:
    with pytest.raises(InputError, match=says):
        numbers("x", [1] * (2 * PIECE) + [wrong], np.dtype(dtype))
    with pytest.raises(InputError, match="differ in length"):
        numbers("x", [[1]] * (2 * PIECE) + [[1, 2]], np.dtype(dtype))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 3 * 65536, 3 * 65536 + 1, 3 * 65536 + 2, 10 * 65536])
def test_base64_in_pieces(length: int) -> None:
    data = np.random.default_rng(1).bytes(length)
    assert from_base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize("text", ["?", "a", "AA==AAAA", "A" * (json_body._BASE64_PIECE - 4) + "AA==AAAA", "é" * 4, "AA\nAA"])
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|ASCII|data|padding|multiple"):
        from_base64(text)


@pytest.mark.asyncio
async def test_every_entry_refuses_it(tmp_path: Path) -> None:
    app = FastAPI()

    @app.post("/image")
    async def image(page: Annotated[npt.NDArray[np.uint8], Depends(serving.image_body())]) -> int:
        return page.size

    @app.post("/array")
    async def array(array: Annotated[npt.NDArray[np.float32], Depends(serving.array_body())]) -> int:
        return array.size

    serving.install(app)
    bomb = b"[" + b"[]," * (1 << 20) + b"0]"
    async with served(app) as client, kserve(tmp_path) as (http, _):
        for url in (f"{client.base_url}/image", f"{client.base_url}/array", f"{http.base_url}/v2/models/double/infer"):
            answer = await client.post(url, content=bomb, headers={"content-type": "application/json"})
            assert answer.status_code == 413, answer.text
            assert "1,048,577 arrays and objects" in answer.text


@pytest.mark.asyncio
@pytest.mark.every_loop
async def test_large_texts_are_parsed_one_at_a_time_and_short_ones_beside_them() -> None:
    gate, running, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def parse() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(30)
        with lock:
            running -= 1

    calls = [asyncio.create_task(off_loop(parse, 1 << 20, json=1 << 20)) for _ in range(4)]
    while not running:
        await asyncio.sleep(0)
    await off_loop(lambda: None, 100_000, json=100_000)
    assert not any(call.done() for call in calls)
    gate.set()
    await asyncio.gather(*calls)
    assert most == 1
