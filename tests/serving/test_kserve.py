"""The Open Inference Protocol over a real socket: Triton's own client, and clients that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http.aio as triton
from onnx import TensorProto, helper
from starlette.requests import Request
from tritonclient.utils import InferenceServerException

import aiotrt
from aiotrt.errors import DeviceError
from aiotrt.serving import Standing
from aiotrt.serving.kserve import ModelSettings, ServerSettings, binary, create_app
from aiotrt.serving.kserve.binary import InferRequest
from aiotrt.serving.kserve.guards import Budget
from tests.building import models as onnx_models
from tests.serving.test_fastapi import until_slow, until_waiting
from tests.serving.tools import Served, raw, served
from tests.tools import executor_of, held

pytestmark = [
    pytest.mark.asyncio,
    # Its answers about health are never read, and so may keep their connections until they are collected.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]

DTYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
}  # fmt: skip
#: Some tests hold the device for a second, after which the next call must be as quick as ever.
SLOW_AND_QUICK = {"slots": 1, "device": "host", "max_queue": 1}
TOKEN = "a token of more than 16 characters"
X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


def identities(path: Path) -> Path:
    """Every datatype that ONNX Runtime has, in and out."""
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in DTYPES]
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{way}_{name}", dtype, [2, None]) for name, dtype in DTYPES.items()]
        for way in ("in", "out")
    )
    graph = helper.make_graph(nodes, "identities", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *more: ModelSettings, **options: Any) -> AsyncIterator[tuple[Served, Any]]:
    """A server of a model ``double`` (y = x + x), ready; and Triton's client of it."""
    path = onnx_models.save(tmp_path / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("?", 3)})
    model = ModelSettings("double", path, [[2, 3]], SLOW_AND_QUICK)
    failures: list[BaseException] = []
    app = create_app(ServerSettings((model, *more), **options), on_failure=failures.append)
    async with served(app) as client, triton.InferenceServerClient(f"{client.host}:{client.port}") as tritons:
        while (await client.get("/readyz")).status_code != 200:
            assert not failures
            await asyncio.sleep(0.01)
        yield client, tritons


def model_behind(client: Served, name: str = "double") -> aiotrt.Model:
    state: dict[str, Any] = client.server.lifespan.state
    model: aiotrt.Model = state["aiotrt"][name]
    return model


def given(array: np.ndarray[Any, Any], name: str = "x", datatype: str = "FP32", *, binary: bool = True) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    return tensor.set_data_from_numpy(array, binary_data=binary)


# --- Triton's client ----------------------------------------------------------------------------------------------------


async def test_what_tritons_client_asks(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        assert await client.is_server_live()
        assert await client.is_model_ready("double")
        assert await client.is_model_ready("double", "1")
        assert not await client.is_model_ready("double", "2")
        assert not await client.is_model_ready("other")
        server = await client.get_server_metadata()
        assert server == {
            "name": "aiotrt",
            "version": aiotrt.__version__,
            "extensions": ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"],
        }
        assert await client.get_model_metadata("double", "1") == {
            "name": "double",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        }
        with pytest.raises(InferenceServerException, match="Request for unknown model: 'other' is not found"):
            await client.get_model_metadata("other")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
async def test_infer(tmp_path: Path, binary_in: bool, binary_out: bool | None) -> None:
    async with serving(tmp_path) as (_, client):
        outputs = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
        result = await client.infer(
            "double", [given(X, binary=binary_in)], outputs=outputs, request_id="mine", model_version="1"
        )
        np.testing.assert_array_equal(result.as_numpy("y"), X + X)
        said = result.get_response()
        assert (said["id"], said["model_name"], said["model_version"]) == ("mine", "double", "1")


@pytest.mark.parametrize("binary", [True, False])
async def test_every_datatype(tmp_path: Path, binary: bool) -> None:
    model = ModelSettings("all", identities(tmp_path / "all.onnx"), options={"device": "host"})
    arrays = {
        name: np.array([[0, 1, 1], [1, 0, 1]]).astype(helper.tensor_dtype_to_np_dtype(d)) for name, d in DTYPES.items()
    }
    async with serving(tmp_path, model) as (_, client):
        inputs = []
        for name, array in arrays.items():
            tensor = triton.InferInput(f"in_{name}", [2, 3], name)
            # Its JSON knows no FP16, for lack of a standard.
            inputs.append(tensor.set_data_from_numpy(array, binary_data=binary or name == "FP16"))
        inputs.reverse()  # by name, not by position
        outputs = [triton.InferRequestedOutput(f"out_{name}", binary_data=binary) for name in arrays]
        result = await client.infer("all", inputs, outputs=outputs)
        for name, array in arrays.items():
            found = result.as_numpy(f"out_{name}")
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        words = triton.InferInput("in_UINT8", [2], "BYTES")
        inputs = [one for one in inputs if one.name() != "in_UINT8"]
        inputs.append(words.set_data_from_numpy(np.array(["one", "two"], object), binary_data=binary))
        result = await client.infer("all", inputs, outputs=outputs)
        assert [bytes(row) for row in result.as_numpy("out_UINT8")] == [b"one", b"two"]


@pytest.mark.every_loop
async def test_a_hundred_requests_at_once_get_their_own_results(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))
    async with serving(tmp_path, ModelSettings("relu", path, options={"device": "host"})) as (_, client):

        async def one(i: int) -> None:
            array = np.full((1 + i % 7, 5), i, np.float32)
            result = await client.infer("relu", [given(array, binary=bool(i % 2))], request_id=str(i))
            assert result.get_response()["id"] == str(i)
            np.testing.assert_array_equal(result.as_numpy("y"), array)

        await asyncio.gather(*map(one, range(100)))


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # the client's own habit
async def test_a_large_answer_arrives_whole(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))
    async with serving(tmp_path, ModelSettings("relu", path, options={"device": "host"})) as (_, client):
        array = np.random.default_rng(0).random((1500, 1999), np.float32)
        for outputs in (None, [triton.InferRequestedOutput("y", binary_data=False)]):
            result = await client.infer("relu", [given(array)], outputs=outputs)
            np.testing.assert_array_equal(result.as_numpy("y"), array)


async def test_the_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    models = (
        ModelSettings("later", path, options={"device": "host"}, is_loaded=False),
        ModelSettings("bad", tmp_path / "missing.onnx", is_loaded=False),
    )
    async with serving(tmp_path, *models) as (http, client):
        index = {entry["name"]: entry for entry in await client.get_model_repository_index()}
        assert {name: entry["state"] for name, entry in index.items()} == {
            "double": "READY", "later": "UNAVAILABLE", "bad": "UNAVAILABLE",
        }  # fmt: skip
        assert index["later"]["reason"] == "not loaded yet"
        with pytest.raises(InferenceServerException, match="'later' is unavailable: not loaded yet"):
            await client.infer("later", [given(np.ones((1, 8), np.float32))])
        await client.load_model("later")
        assert await client.is_model_ready("later")
        assert (await client.get_model_metadata("later"))["outputs"][0]["name"] == "y"
        result = await client.infer("later", [given(np.ones((1, 8), np.float32))])
        assert result.as_numpy("y").sum() == 8
        ready = await http.post("/v2/repository/index", json={"ready": True})
        assert [entry["name"] for entry in ready.json()] == ["double", "later"]
        await client.unload_model("later")
        assert not await client.is_model_ready("later")
        assert await client.is_server_ready()  # it is not one of those that must be there
        with pytest.raises(InferenceServerException):
            await client.load_model("bad")
        assert (await client.get_model_repository_index())[2]["reason"] == "loading failed; the log says why"
        assert "missing.onnx" in caplog.text
        assert str(tmp_path) not in (await http.get("/readyz")).text, "files are nobody's business out there"
        with pytest.raises(InferenceServerException, match="parameters are not taken"):
            await client.load_model("later", config=json.dumps({"path": "/etc/passwd"}))
        with pytest.raises(InferenceServerException, match="404"):
            await client.load_model("../../etc/passwd")


@pytest.mark.every_loop
async def test_unloading_waits_for_what_is_under_way(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        with held(model_behind(http)) as latch:
            call = asyncio.create_task(client.infer("double", [given(X)]))
            await until_waiting(model_behind(http), 0)
            unloading = asyncio.create_task(client.unload_model("double"))
            while (await client.get_model_repository_index())[0]["state"] != "UNLOADING":
                await asyncio.sleep(0.01)
            with pytest.raises(InferenceServerException, match="being unloaded"):
                await client.infer("double", [given(X)])
            latch.open()
            await unloading
        np.testing.assert_array_equal((await call).as_numpy("y"), X + X)


@pytest.mark.every_loop
async def test_unloading_goes_on_without_who_asked_for_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        models = http.server.lifespan.state["aiotrt"]
        model = model_behind(http)
        with held(model):
            call = asyncio.create_task(client.infer("double", [given(X)]))
            await until_waiting(model, 0)
            unloading = asyncio.create_task(http.post("/v2/repository/models/double/unload"))
            await until_slow(lambda: models.standing("double")[0] is Standing.UNLOADING)
            unloading.cancel()
            await until_slow(lambda: not models._entries["double"].lock.locked())  # its client has gone
        np.testing.assert_array_equal((await call).as_numpy("y"), X + X)
        await until_slow(lambda: models.standing("double") == (Standing.UNAVAILABLE, "it was unloaded"))
        assert model._executor is None, "its memory is free"
        await client.load_model("double")
        np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)


async def test_a_model_that_is_unloaded_while_a_request_comes_is_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, unloaded = asyncio.Event(), asyncio.Event()
    real = Budget.read

    async def read(budget: Budget, request: Request) -> bytearray:
        reading.set()
        return await real(budget, request)

    async with serving(tmp_path) as (http, client):

        async def body() -> AsyncIterator[bytes]:
            text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}).encode()
            yield text[:-1]
            await unloaded.wait()
            yield text[-1:]

        with monkeypatch.context() as patch:
            patch.setattr(Budget, "read", read)
            call = asyncio.create_task(http.post("/v2/models/double/infer", content=body()))
            await reading.wait()
        await client.unload_model("double")
        unloaded.set()
        answer = await call
        assert answer.status_code == 503
        assert "closed" in answer.json()["error"]


@pytest.mark.every_loop
async def test_deadlines_full_queues_and_priorities(tmp_path: Path) -> None:
    async with serving(tmp_path, max_deadline=1.0) as (http, client):
        model = model_behind(http)
        with held(model):
            with pytest.raises(InferenceServerException, match="deadline passed") as caught:
                await client.infer("double", [given(X)], parameters={"deadline_ms": 20})
            assert caught.value.status() == "504"
            first = asyncio.create_task(client.infer("double", [given(X)], timeout=10**9))
            await until_waiting(model, 1)
            answer = await http.post("/v2/models/double/infer", json=request_of())
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            with pytest.raises(InferenceServerException, match="deadline passed"):
                await first  # the server's own limit
        with pytest.raises(InferenceServerException, match="priority must be at most 2, got 3"):
            await client.infer("double", [given(X)], priority=3)
        await until_slow(lambda: model.statistics().free == 1)
        await client.infer("double", [given(X)])


@pytest.mark.every_loop
async def test_without_batching_urgent_requests_go_first_and_the_late_are_dropped(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 4))
    model = ModelSettings("line", path, [[1, 4]], {"device": "host", "slots": 1})
    async with serving(tmp_path, model) as (http, client):
        line, order = model_behind(http, "line"), []

        async def one(i: int, priority: int) -> None:
            await client.infer("line", [given(np.full((1, 4), i, np.float32))], priority=priority)
            order.append(i)

        with held(line):
            calls = [asyncio.create_task(one(0, 2))]
            await until_slow(lambda: line.statistics().in_flight == 1)
            for i, priority in ((1, 2), (2, 1)):
                calls.append(asyncio.create_task(one(i, priority)))
                await until_waiting(line, i)
            with pytest.raises(InferenceServerException, match="deadline passed"):
                await client.infer("line", [given(np.zeros((1, 4), np.float32))], parameters={"deadline_ms": 10})
            assert (line.statistics().expired, line.statistics().waiting) == (1, 2)
        await asyncio.gather(*calls)
        assert order == [0, 2, 1]
        assert line.statistics().batches == {}, "nothing was stacked"


@pytest.mark.every_loop
async def test_batching(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 4))
    model = ModelSettings("items", path, [[4]], {"device": "host", "slots": 1, "batching": {"max_size": 8}})
    async with serving(tmp_path, model) as (http, client):
        described = await client.get_model_metadata("items")
        assert described["inputs"][0]["shape"] == [-1, 4]
        assert len(described["outputs"][0]["shape"]) == 2

        async def one(i: int) -> None:
            result = await client.infer("items", [given(np.full(4, i, np.float32))], priority=1 + i % 2)
            np.testing.assert_array_equal(result.as_numpy("y"), np.full(4, i, np.float32))

        await asyncio.gather(*map(one, range(40)))
        batches = model_behind(http, "items").statistics().batches
        assert sum(size * count for size, count in batches.items()) == 40
        assert "aiotrt_batches_total{" in (await http.get("/metrics")).text


# --- clients that mean no good ------------------------------------------------------------------------------------------


def request_of(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": X.ravel().tolist()} | changes]}


async def test_bad_requests_are_400_and_harm_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        url = "/v2/models/double/infer"
        octets = {"content-type": "application/octet-stream"}
        for status, says, options in (
            (400, "not JSON", {"content": b"{"}),
            (400, "not JSON", {"content": b""}),
            (400, "not JSON", {"content": json.dumps(request_of()).replace("1.0", "nan")}),
            (400, "not JSON", {"content": b"[" * 10_000}),
            (
                400,
                "input 'x' must have the shape [-1, 3], where -1 is any size, got [2, 3, 1]",
                {"json": request_of(shape=[2, 3, 1])},
            ),
            (
                400,
                "input 'x' must have the shape [-1, 3], where -1 is any size, got [0, 4]",
                {"json": request_of(shape=[0, 4], data=[])},
            ),
            (400, "input 'x' must be FP32, got FP64", {"json": request_of(datatype="FP64")}),
            (400, "the model's inputs are x FP32; the request has 'z'", {"json": request_of(name="z")}),
            (400, "the model's inputs are", {"json": {"inputs": request_of()["inputs"] + request_of(name="z")["inputs"]}}),
            (400, "no output 'z'; the outputs are y", {"json": request_of() | {"outputs": [{"name": "z"}]}}),
            (400, "expected lists of strings", {"json": request_of(datatype="BYTES")}),
            (400, "must be FP32, got UINT8", {"json": request_of(datatype="BYTES", shape=[6], data=["a"] * 6)}),
            (400, "whole body has", {"json": request_of(), "headers": {"inference-header-content-length": "9999"}}),
            (400, "number of bytes", {"json": request_of(), "headers": {"inference-header-content-length": "x"}}),
            (413, "more than", {"content": bytes((64 << 20) + 1), "headers": octets}),
            (413, "send tensors with the binary extension", {"content": b'{"a": "' + b"a" * (4 << 20) + b'"}'}),
            (415, "gzip, deflate or identity, got 'br'", {"json": request_of(), "headers": {"content-encoding": "br"}}),
        ):
            with contextlib.suppress(ConnectionError):
                answer = await http.post(url, **options)
                assert answer.status_code == status, (says, answer.text)
                assert says in answer.json()["error"], (says, answer.text)
        for status, method, path in (
            (404, "POST", "/v2/models/other/infer"), (404, "POST", "/v2/models/double/versions/2/infer"),
            (404, "GET", "/v2/nothing"), (405, "GET", url), (404, "GET", "/v2/models/" + "x" * 5000),
            (404, "GET", "/v2/models/..%2f..%2fetc%2fpasswd"),
        ):  # fmt: skip
            answer = await http.request(method, path)
            assert (answer.status_code, list(answer.json())) == (status, ["error"])
        np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)
        assert model_behind(http).statistics().failed == 0


async def test_what_the_engine_refuses_is_the_clients_where_it_took_other_shapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((1, 3), np.float32), "w")
    path = onnx_models.save(
        tmp_path / "three.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], {"x": ("?", "?")}, initializer=[weight]
    )
    three = ModelSettings("three", path, options={"device": "host"})
    url = "/v2/models/three/infer"
    wrong = request_of(shape=[2, 2], data=[1.0] * 4)
    async with serving(tmp_path, three) as (http, _):
        answer = await http.post(url, json=wrong)
        assert (answer.status_code, answer.json()) == (500, {"error": "the model failed for this input"}), "it never worked"
        assert (await http.post(url, json=request_of())).status_code == 200
        caplog.clear()
        answer = await http.post(url, json=wrong)
        assert answer.status_code == 400
        assert answer.json() == {"error": "the model fails for inputs of these shapes: x [2, 2]; it took others"}
        assert "ONNX Runtime failed" in caplog.text
        assert (await http.post(url, json=request_of())).status_code == 200


async def test_limits_of_an_engine_are_said_in_the_protocols_words(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, _):
        specs = model_behind(http)._gatherer.specs  # type: ignore[union-attr]
        specs.specs = tuple(replace(spec, minimum=(1, 3), maximum=(4, 3)) for spec in specs.known())
        answer = await http.post("/v2/models/double/infer", json=request_of(shape=[5, 3], data=[1.0] * 15))
        says = "input 'x' must have the shape [-1, 3], from [1, 3] to [4, 3], where -1 is any size, got [5, 3]"
        assert (answer.status_code, answer.json()) == (400, {"error": says})


async def test_a_failure_of_the_servers_own_is_json_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the server's")

    async with serving(tmp_path) as (http, _):
        monkeypatch.setattr("aiotrt.serving.kserve.app.parse", fail)
        answer = await http.post("/v2/models/double/infer", json=request_of())
        assert (answer.status_code, answer.json()) == (500, {"error": "the server failed"})
        assert "a secret of the server's" in capfd.readouterr().err


async def test_null_is_as_good_as_nothing_and_ids_are_echoed(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, _):
        url = "/v2/models/double/infer"
        unset = {"id": None, "parameters": None, "outputs": None}
        for request in (
            request_of() | unset,
            request_of(parameters=None),
            request_of(parameters={"binary_data_size": None}),
            request_of() | {"outputs": []},
            request_of() | {"outputs": [{"name": "y", "parameters": None}]},
            request_of() | {"parameters": {"binary_data_output": None, "priority": None, "deadline_ms": None}},
        ):
            answer = await http.post(url, json=request)
            assert (answer.status_code, "id" in answer.json()) == (200, False), answer.text
            assert answer.json()["outputs"][0]["data"] == (2 * X).ravel().tolist()
        for name in ("", "mine"):
            assert (await http.post(url, json=request_of() | {"id": name})).json()["id"] == name
        assert (await http.post("/v2/repository/index", json={"ready": None, "parameters": None})).status_code == 200


async def test_nonsense_on_the_socket(tmp_path: Path) -> None:
    async with serving(tmp_path, body_timeout=0.3) as (http, client):
        head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        headers = b"".join(b"x-%d: %d\r\n" % (i, i) for i in range(10_000))
        for says, parts, ends in (
            (b"400", [head + headers + b"\r\n"], False),
            (b"400", [head + b"x: " + b"y" * 100_000 + b"\r\n\r\n"], False),
            (b"400", [b"GARBAGE\r\n\r\n"], False),
            (b"400", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n"], False),
            (b"400", [head + b"Content-Length: -5\r\n\r\n"], False),
            (b"400", [head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"], False),
            (b"400", [head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"], False),
            (b"413", [head + b"Content-Length: 99999999999999\r\n\r\n"], False),
            (b"408", [head + b"Content-Length: 100\r\n\r\n{"], False),
            (b"", [head + b"Content-Length: 100\r\n\r\n{"], True),
        ):  # fmt: skip
            answer = await raw(http, *parts, ends=ends)
            assert says in answer.split(b"\r\n")[0], (says, answer[:300])
        assert (await client.infer("double", [given(X)])).as_numpy("y").sum() == 2 * X.sum()


@pytest.mark.every_loop
async def test_slow_clients_hold_up_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path, body_timeout=1.0) as (http, client):
        head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{"
        writers = []
        for _ in range(100):
            _, writer = await asyncio.open_connection(http.host, http.port)
            writer.write(head)
            writers.append(writer)
        for _ in range(20):
            np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)
        for writer in writers:
            writer.close()
        await until_slow(lambda: len(http.server.server_state.connections) < 10)


async def test_a_large_json_request_does_not_stop_the_loop(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))
    async with serving(tmp_path, ModelSettings("relu", path, options={"device": "host"})) as (http, _):
        data = [0.5] * 600_000
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 600_000], "datatype": "FP32", "data": data}]})
        longest = 0.0

        async def heartbeat() -> None:
            nonlocal longest
            loop = asyncio.get_running_loop()
            while True:
                before = loop.time()
                await asyncio.sleep(0.001)
                longest = max(longest, loop.time() - before)

        beating = asyncio.create_task(heartbeat())
        answer = await http.post("/v2/models/relu/infer", content=body)
        beating.cancel()
        assert answer.status_code == 200
        assert longest < 0.5  # the client's own work is on this loop too


@pytest.mark.parametrize(("size", "is_aside"), [(1 << 21, True), (1 << 12, False)])
async def test_strings_are_copied_aside_if_they_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, is_aside: bool
) -> None:
    threads: list[threading.Thread] = []

    def parse(body: bytearray, *more: Any) -> InferRequest:
        threads.append(threading.current_thread())
        return binary.parse(body, *more)

    monkeypatch.setattr("aiotrt.serving.kserve.app.parse", parse)
    path = onnx_models.save(
        tmp_path / "same.onnx", [helper.make_node("Identity", ["x"], ["y"])], {"x": ("?", "?")}, elem_type=TensorProto.UINT8
    )
    parameters = {"binary_data_size": size + 4}
    entry = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": parameters}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    head += b" " * (-len(head) % 8)  # so that numbers after it would be aligned
    async with serving(tmp_path, ModelSettings("same", path, options={"device": "host"})) as (http, _):
        answer = await http.post(
            "/v2/models/same/infer",
            content=head + size.to_bytes(4, "little") + b"x" * size,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        assert answer.content.endswith(b"x" * size)
    assert [thread is not threading.main_thread() for thread in threads] == [is_aside]


async def test_request_bytes_in_memory_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, max_bodies=1000) as (http, client):
        with held(model_behind(http)):
            calls = [asyncio.create_task(client.infer("double", [given(X)])) for _ in range(2)]
            await until_waiting(model_behind(http), 1)
            answer = await http.post("/v2/models/double/infer", content=bytes(900))
            assert (answer.status_code, "bytes are in memory" in answer.text) == (503, True)
            assert answer.headers["retry-after"] == "1"
        await asyncio.gather(*calls)
        answer = await http.post("/v2/models/double/infer", content=bytes(900))
        assert answer.status_code == 400


async def test_the_token(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    settings = ServerSettings((ModelSettings("relu", path, options={"device": "host"}),), token=TOKEN)
    assert TOKEN not in repr(settings)
    async with served(create_app(settings)) as client:
        await until_slow(lambda: client.server.lifespan.state["aiotrt"].is_ready)
        assert (await client.get("/readyz")).json() == {"ready": True, "draining": False}, "no names, and no reasons"
        for open_path in ("/livez", "/v2/health/live"):
            assert (await client.get(open_path)).status_code == 200
        for path_, headers in (
            ("/v2", {}), ("/metrics", {}), ("/openapi.json", {}), ("/v2/models/relu", {"authorization": "Bearer wrong"}),
            ("/v2", {"authorization": TOKEN}), ("/v2", {"authorization": f"Basic {TOKEN}"}), ("/livez/../v2", {}),
        ):  # fmt: skip
            answer = await client.get(path_, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path_
        assert (await client.get("/v2", headers={"authorization": f"Bearer {TOKEN}"})).status_code == 200
        assert (await client.get("/v2", headers={"authorization": f"bearer  {TOKEN}"})).status_code == 200


async def test_a_broken_model_and_health(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        executor_of(model_behind(http)).break_down(DeviceError("the device", code=700, name="illegal"))
        with pytest.raises(InferenceServerException, match="broken") as caught:
            await client.infer("double", [given(X)])
        assert caught.value.status() == "503"
        assert not await client.is_server_ready()
        assert await client.is_server_live()
        assert (await http.get("/readyz")).status_code == 503
        await client.load_model("double")  # which closes the broken one first
        assert await client.is_server_ready()


@pytest.mark.every_loop
async def test_a_client_that_goes_leaves_the_queue(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        model = model_behind(http)
        with held(model):
            calls = [asyncio.create_task(client.infer("double", [given(X)])) for _ in range(2)]
            await until_waiting(model, 1)
            for call in calls:
                call.cancel()
            await until_slow(lambda: model.statistics().cancelled == 2)
        await until_slow(lambda: model.statistics().free == 1)
        await client.infer("double", [given(X)])


async def test_openapi(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, _):
        paths = (await http.get("/openapi.json")).json()["paths"]
        assert "/v2/models/{name}/infer" in paths
        assert "application/octet-stream" in paths["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
