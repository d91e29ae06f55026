"""The Open Inference Protocol over gRPC on a real socket: Triton's clients, and gRPC's own."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import logging
import queue
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as triton
from onnx import helper
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

import aiotrt
from aiotrt.errors import DeviceError, MissingDependencyError, UsageError
from aiotrt.serving import Standing
from aiotrt.serving.kserve import ModelSettings, ServerSettings, create_app, regions
from aiotrt.serving.kserve.grpc_server import GrpcServer
from aiotrt.serving.kserve.messages import messages
from aiotrt.serving.kserve.service import Service
from tests.building import models as onnx_models
from tests.serving.test_extensions import image, same
from tests.serving.test_fastapi import until_slow, until_waiting
from tests.serving.test_shared_memory import needs_shared_memory, region
from tests.serving.tools import served
from tests.tools import executor_of, held

pytestmark = pytest.mark.asyncio

SLOW_AND_QUICK = {"slots": 1, "device": "host", "max_queue": 1}
TOKEN = "a token of more than 16 characters"
SERVICE = "/inference.GRPCInferenceService/"
X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


class Grpc:
    """A server on this loop, and Triton's client of it."""

    def __init__(self, service: Service, server: GrpcServer, client: Any, channel: Any) -> None:
        self.service, self.server, self.client, self.channel = service, server, client, channel

    @property
    def model(self) -> aiotrt.Model:
        return self.service.models["double"]

    async def infer(self, array: np.ndarray[Any, Any] = X, **options: Any) -> np.ndarray[Any, Any]:
        result = await self.client.infer("double", [given(array)], **options)
        found: np.ndarray[Any, Any] = result.as_numpy("y")
        return found

    def raw(self, method: str = f"{SERVICE}ModelInfer") -> Any:
        """A method as one that takes and gives bytes, one after the other."""
        return self.channel.stream_unary(method)


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, *more: ModelSettings, is_ready: bool = True, **options: Any) -> AsyncIterator[Grpc]:
    """A server of a model ``double`` (y = x + x), ready."""
    path = onnx_models.save(tmp_path / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("?", 3)})
    model = ModelSettings("double", path, [[2, 3]], SLOW_AND_QUICK)
    failures: list[BaseException] = []
    service = Service(ServerSettings((model, *more), **options))
    async with service.running(failures.append), GrpcServer(service, port=0) as server:
        async with (
            triton.InferenceServerClient(server.address) as client,
            grpc.aio.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel,
        ):
            while is_ready and not await client.is_server_ready():
                assert not failures
                await asyncio.sleep(0.01)
            yield Grpc(service, server, client, channel)


def given(array: np.ndarray[Any, Any], name: str = "x", datatype: str = "FP32") -> Any:
    tensor = blocking.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    code: grpc.StatusCode = caught.value.code()
    return code


@contextlib.contextmanager
def refused(code: str, says: str | None = None) -> Any:
    with pytest.raises(InferenceServerException, match=says) as caught:
        yield
    assert caught.value.status() == f"StatusCode.{code}"


# --- Triton's clients ---------------------------------------------------------------------------------------------------


async def test_health_and_metadata(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        client = server.client
        assert await client.is_server_live()
        assert await client.is_model_ready("double")
        assert await client.is_model_ready("double", "1")
        assert not await client.is_model_ready("double", "2")
        assert not await client.is_model_ready("other")
        said = await client.get_server_metadata(as_json=True)
        assert said == server.service.metadata()
        said = await client.get_model_metadata("double", "1", as_json=True)
        assert said == {
            "name": "double",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": ["-1", "3"]}],
        }
        with refused("NOT_FOUND", "Request for unknown model: 'other' is not found"):
            await client.get_model_metadata("other")
        with refused("NOT_FOUND", "Request for unknown model: 'double' version 7 is not found"):
            await client.get_model_config("double", "7")


async def test_infer_and_statistics(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        result = await server.client.infer(
            "double", [given(X)], outputs=[blocking.InferRequestedOutput("y")], request_id="seven"
        )
        np.testing.assert_array_equal(result.as_numpy("y"), X + X)
        assert result.get_response().id == "seven"
        with refused("INVALID_ARGUMENT", "no output 'z'; the outputs are y"):
            await server.client.infer("double", [given(X)], outputs=[blocking.InferRequestedOutput("z")])
        said = (await server.client.get_inference_statistics("double", as_json=True))["model_stats"][0]
        assert (said["inference_count"], said["inference_stats"]["fail"]["count"]) == ("1", "1")
        assert int(said["inference_stats"]["compute_infer"]["ns"]) > 0
        everything = await server.client.get_inference_statistics(as_json=True)
        assert [model["name"] for model in everything["model_stats"]] == ["double"]


async def test_the_configuration_as_ultralytics_reads_it(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    proto = onnx.load(path)
    helper.set_model_props(proto, {"task": "detect", "names": "{0: 'text'}"})
    onnx.save(proto, path)
    async with serving(tmp_path, ModelSettings("relu", path, options={"device": "host"})) as server:

        def remote() -> np.ndarray[Any, Any]:
            with contextlib.closing(blocking.InferenceServerClient(server.server.address)) as client:
                config = client.get_model_config("relu", as_json=True)["config"]
                assert [one["data_type"] for one in config["input"]] == ["TYPE_FP32"]
                metadata = ast.literal_eval(config["parameters"]["metadata"]["string_value"])
                assert metadata == {"task": "detect", "names": "{0: 'text'}"}
                tensor = blocking.InferInput("x", [1, 8], config["input"][0]["data_type"].replace("TYPE_", ""))
                tensor.set_data_from_numpy(np.ones((1, 8), np.float32))
                outputs = [blocking.InferRequestedOutput(one["name"]) for one in config["output"]]
                result: Any = client.infer("relu", [tensor], outputs=outputs)
                found: np.ndarray[Any, Any] = result.as_numpy("y")
                return found

        np.testing.assert_array_equal(await asyncio.to_thread(remote), np.ones((1, 8), np.float32))


async def test_the_configuration_is_that_of_http(tmp_path: Path) -> None:
    batched = ModelSettings(
        "batched", tmp_path / "double.onnx", options={"device": "host", "batching": {"max_size": 4, "max_delay": 0.001}}
    )
    async with serving(tmp_path, batched) as server:
        said = (await server.client.get_model_config("batched", as_json=True))["config"]
        assert said["max_batch_size"] == 4
        assert said["dynamic_batching"]["max_queue_delay_microseconds"] == "1000"
        assert said["instance_group"][0]["kind"] == "KIND_CPU"
        assert said["version_policy"] == {"latest": {"num_versions": 1}}


async def test_the_blocking_clients_calls(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:

        def calls() -> None:
            answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

            def answered(result: Any, error: Any) -> None:
                answers.put((result, error))

            with contextlib.closing(blocking.InferenceServerClient(server.server.address)) as client:
                assert client.is_server_live()
                result: Any = client.infer("double", [given(X)])
                np.testing.assert_array_equal(result.as_numpy("y"), X + X)
                client.async_infer("double", [given(X)], answered)
                result, error = answers.get(timeout=30)
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("y"), X + X)
                client.start_stream(answered)
                for i in range(5):
                    client.async_stream_infer("double", [given(X + i)], request_id=str(i), priority=1)
                    result, error = answers.get(timeout=30)
                    assert error is None
                    assert result.get_response().id == str(i)
                    np.testing.assert_array_equal(result.as_numpy("y"), 2 * (X + i))
                client.stop_stream()

        await asyncio.to_thread(calls)


async def test_strings(tmp_path: Path) -> None:
    path = onnx_models.save(
        tmp_path / "text.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": ("?", 3)},
        elem_type=onnx.TensorProto.UINT8,
    )
    async with serving(tmp_path, ModelSettings("text", path, options={"device": "host"})) as server:
        texts = np.array([b"abc", b"def"], np.object_)
        result = await server.client.infer("text", [given(texts, datatype="BYTES")])
        assert result.as_numpy("y").tobytes() == b"abcdef"
        contents = {"bytes_contents": [b"abc", b"def"]}
        message = messages["ModelInferRequest"](
            model_name="text", inputs=[{"name": "x", "datatype": "BYTES", "shape": [2], "contents": contents}]
        )
        answer = await server.raw()(iter([message.SerializeToString()]))
        assert messages["ModelInferResponse"].FromString(answer).raw_output_contents == [b"abcdef"]
        texts = np.array([b"a", b"bcd"], np.object_)
        result = await server.client.infer("text", [given(texts, datatype="BYTES")])
        assert result.as_numpy("y").tobytes() == b"a\0\0bcd", "shorter strings end in zeros"
        with refused("INVALID_ARGUMENT", r"must have the shape \[-1, 3\]"):
            await server.client.infer("text", [given(np.array([b"a", b"bc"], np.object_), datatype="BYTES")])


async def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        client = server.client
        with refused("INVALID_ARGUMENT", "sequence_id: this server does not have sequences"):
            await client.infer("double", [given(X)], sequence_id=5, sequence_start=True)
        for kind in ("system", "cuda"):
            with refused("UNIMPLEMENTED", f"does not have {kind} shared memory: it is off without --shared-memory"):
                await getattr(client, f"get_{kind}_shared_memory_status")()
            with refused("UNIMPLEMENTED", f"does not have {kind} shared memory"):
                await getattr(client, f"unregister_{kind}_shared_memory")()
        for inputs, outputs in (([placed("x", 24)], None), ([given(X)], [wanted(24)])):
            with refused("INVALID_ARGUMENT", "this server has no shared memory without --shared-memory"):
                await client.infer("double", inputs, outputs=outputs)
        with refused("UNIMPLEMENTED", "does not have trace settings"):
            await client.get_trace_settings("double")
        with refused("UNIMPLEMENTED", "does not have log settings"):
            await client.get_log_settings()
        with refused("UNIMPLEMENTED", "gzip"):
            await client.infer("double", [given(X)], compression_algorithm="gzip")
        assert await code_of(server.raw(f"{SERVICE}Nothing")(iter([b""]))) is grpc.StatusCode.UNIMPLEMENTED
        np.testing.assert_array_equal(await server.infer(), X + X)


# --- extensions ---------------------------------------------------------------------------------------------------------


def placed(name: str, size: int, offset: int = 0, shape: tuple[int, ...] = (2, 3), datatype: str = "FP32") -> Any:
    tensor = blocking.InferInput(name, list(shape), datatype)
    tensor.set_shared_memory("in", size, offset)
    return tensor


def wanted(size: int, offset: int = 0, key: str = "out") -> Any:
    output = blocking.InferRequestedOutput("y")
    output.set_shared_memory(key, size, offset)
    return output


async def test_the_largest_elements_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding="utf-8")
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 3))
    options = {"device": "host", "batching": True}
    pets = ModelSettings("pets", path, options=options, labels=tmp_path / "labels.txt")
    array = np.array([[0.25, 2, 1.5], [7, 7, 0]], np.float32)
    async with serving(tmp_path, pets) as server:
        assert "classification" in (await server.client.get_server_metadata()).extensions
        assert (await server.client.get_model_config("pets")).config.output[0].label_filename == "labels.txt"
        outputs = [blocking.InferRequestedOutput("y", class_count=2)]
        found = (await server.client.infer("pets", [given(array)], outputs=outputs)).as_numpy("y")
        assert found.tolist() == [[b"2.000000:1:dog", b"1.500000:2"], [b"7.000000:0:cat", b"7.000000:1:dog"]]
        with refused("INVALID_ARGUMENT", "must be a number of classes, got -1"):
            await server.client.infer("pets", [given(array)], outputs=[blocking.InferRequestedOutput("y", class_count=-1)])


async def test_image_files(tmp_path: Path) -> None:
    path = same(tmp_path / "view.onnx", ("h", "w", 3))
    view = ModelSettings("view", path, options={"device": "host"}, takes_images=True)
    file, pixels = image(20, 10)
    async with serving(tmp_path, view) as server:
        result = await server.client.infer("view", [given(np.array([file], np.object_), datatype="BYTES")])
        np.testing.assert_array_equal(result.as_numpy("y"), pixels)
        tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [file]}}
        message = messages["ModelInferRequest"](model_name="view", inputs=[tensor])
        answer = messages["ModelInferResponse"].FromString(await server.raw()(iter([message.SerializeToString()])))
        assert answer.raw_output_contents == [pixels.tobytes()]
        with refused("INVALID_ARGUMENT", "not an image that can be read"):
            await server.client.infer("view", [given(np.array([b"GIF89a"], np.object_), datatype="BYTES")])
        assert server.service.budget.used == 0


@needs_shared_memory
async def test_inputs_and_outputs_in_shared_memory(tmp_path: Path) -> None:
    path = onnx_models.save(
        tmp_path / "sum.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], {"a": ("?", 3), "b": ("?", 3)}
    )
    models = (
        ModelSettings("sum", path, options={"device": "host"}),
        ModelSettings("view", same(tmp_path / "view.onnx", ("h", "w", 3)), options={"device": "host"}, takes_images=True),
    )
    file, pixels = image(20, 10)
    files = serialize_byte_tensor(np.array([file], np.object_)).item()
    async with serving(tmp_path, *models, shared_memory=True) as server:
        client = server.client
        assert "system_shared_memory" in (await client.get_server_metadata()).extensions
        with region(8 + X.nbytes, np.zeros(2, np.float32), X) as (_, key), region(4096) as (other, key_out):
            await client.register_system_shared_memory("in", key, X.nbytes, 8)
            await client.register_system_shared_memory("out", key_out, 4096)
            result = await client.infer("double", [placed("x", 24)], outputs=[wanted(24, 48)])
            assert list(result.get_output("y").shape) == [2, 3]
            assert list(result.get_response().raw_output_contents) == [b""]
            np.testing.assert_array_equal(shm.get_contents_as_numpy(other, np.float32, [2, 3], 48), X + X)
            # Raw contents are those of the inputs that are not in shared memory, in their order.
            for inputs in ([placed("a", 24), given(10 * X, "b")], [given(10 * X, "a"), placed("b", 24)]):
                np.testing.assert_array_equal((await client.infer("sum", inputs)).as_numpy("y"), 11 * X)
            result = await client.infer("sum", [placed("a", 24), placed("b", 24)], outputs=[wanted(24)])
            np.testing.assert_array_equal(shm.get_contents_as_numpy(other, np.float32, [2, 3]), X + X)
            shm.set_shared_memory_region(other, [np.frombuffer(files, np.uint8)])
            tensor = blocking.InferInput("x", [1], "BYTES")
            tensor.set_shared_memory("out", len(files))
            np.testing.assert_array_equal((await client.infer("view", [tensor])).as_numpy("y"), pixels)
            for inputs, outputs, says in (
                ([placed("x", 24, 1)], None, "region 'in' has 24 bytes, and not 24 from its byte 1 on"),
                ([placed("x", 20)], None, "has 24 bytes, shared_memory_byte_size is 20"),
                ([given(X)], [wanted(24, key="none")], "Unable to find shared memory region: 'none'"),
                ([given(X)], [wanted(20)], "should be at least 24 bytes to hold the results"),
            ):
                with refused("INVALID_ARGUMENT", says):
                    await client.infer("double", inputs, outputs=outputs)
        assert server.service.budget.used == 0


@needs_shared_memory
async def test_regions_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path, shared_memory=True) as server:
        client = server.client
        with region(64) as (_, key):
            await client.register_system_shared_memory("a", key, 32, 32)
            await client.register_system_shared_memory("b", key, 64)
            regions_ = (await client.get_system_shared_memory_status()).regions
            assert sorted(regions_) == ["a", "b"]
            assert (regions_["a"].name, regions_["a"].key) == ("a", key)
            assert (regions_["a"].offset, regions_["a"].byte_size) == (32, 32)
            assert list((await client.get_system_shared_memory_status("b")).regions) == ["b"]
            assert not (await client.get_cuda_shared_memory_status()).regions
            for name, path, size, says in (
                ("a", key, 64, "'a' already in manager"),
                ("c", key, 65, "has 64 bytes, and not 65"),
                ("c", "../../etc/passwd", 1, "must be a name of letters"),
                ("c", key, 1 << 63, "byte_size of shared memory must be an integer"),
                ("", key, 1, "names of 1 to 1,024 characters"),
            ):
                with refused("INVALID_ARGUMENT", says):
                    await client.register_system_shared_memory(name, path, size)
            with refused("NOT_FOUND", "Unable to find cuda shared memory region: 'a'"):
                await client.get_cuda_shared_memory_status("a")
            await client.unregister_system_shared_memory("a")
            assert list((await client.get_system_shared_memory_status()).regions) == ["b"]
            await client.unregister_system_shared_memory()
            assert not (await client.get_system_shared_memory_status()).regions


async def test_cuda_memory_on_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    memory[8:32] = torch.from_numpy(X.ravel().view(np.uint8))
    made: list[tuple[bytes, int, int]] = []
    monkeypatch.setattr(regions.CudaRegion, "_view", memory)
    monkeypatch.setattr(regions, "_open_cuda", lambda *arguments: made.append(arguments))
    async with serving(tmp_path, shared_memory=True) as server:
        client = server.client
        await client.register_cuda_shared_memory("in", base64.b64encode(bytes(range(64))), 0, 64)
        assert made == [(bytes(range(64)), 0, 64)]
        found = (await client.get_cuda_shared_memory_status()).regions["in"]
        assert (found.name, found.device_id, found.byte_size) == ("in", 0, 64)
        await client.infer("double", [placed("x", 24, 8)], outputs=[wanted(24, 40, "in")])
        np.testing.assert_array_equal(memory[40:].numpy().view(np.float32).reshape(2, 3), X + X)
        for handle, index, says in ((b"abc", 0, "has 64 bytes, got 3"), (bytes(64), -1, "device_id of shared memory must")):
            with refused("INVALID_ARGUMENT", says):
                await client.register_cuda_shared_memory("other", base64.b64encode(handle), index, 64)
        await client.unregister_cuda_shared_memory("in")
        assert not (await client.get_cuda_shared_memory_status()).regions


# --- the repository -----------------------------------------------------------------------------------------------------


async def test_the_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = (
        ModelSettings("later", onnx_models.relu(tmp_path / "relu.onnx"), options={"device": "host"}, is_loaded=False),
        ModelSettings("bad", tmp_path / "missing.onnx", is_loaded=False),
    )
    async with serving(tmp_path, *models) as server:
        client = server.client
        index = {model.name: model for model in (await client.get_model_repository_index()).models}
        assert {name: model.state for name, model in index.items()} == {
            "double": "READY", "later": "UNAVAILABLE", "bad": "UNAVAILABLE",
        }  # fmt: skip
        assert index["later"].reason == "not loaded yet"
        with refused("UNAVAILABLE", "'later' is unavailable: not loaded yet"):
            await client.infer("later", [given(np.ones((1, 8), np.float32))])
        await client.load_model("later")
        assert await client.is_model_ready("later")
        await client.unload_model("later")
        assert not await client.is_model_ready("later")
        with pytest.raises(InferenceServerException):
            await client.load_model("bad")
        assert "missing.onnx" in caplog.text
        with refused("INVALID_ARGUMENT", "parameters are not taken"):
            await client.load_model("later", config='{"path": "/etc/passwd"}')
        with refused("NOT_FOUND", "failed to load .*unknown model"):
            await client.load_model("../../etc/passwd")


async def test_a_repository_that_is_closed(tmp_path: Path) -> None:
    async with serving(tmp_path, repository=False) as server:
        for call in (server.client.load_model, server.client.unload_model):
            with refused("UNIMPLEMENTED", "may not load and unload"):
                await call("double")
        assert len((await server.client.get_model_repository_index()).models) == 1


# --- Streams ------------------------------------------------------------------------------------------------------------


async def test_a_streams_answers_come_as_they_are_complete(tmp_path: Path) -> None:
    quick = ModelSettings("quick", tmp_path / "double.onnx", options={"device": "host"})
    async with serving(tmp_path, quick) as server:
        asked: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            while (request := await asked.get()) is not None:
                yield request

        answers = aiter(server.client.stream_infer(requests()))
        with held(server.model) as latch:
            await asked.put({"model_name": "double", "inputs": [given(X)], "request_id": "held"})
            await until_waiting(server.model, 0)
            await asked.put({"model_name": "quick", "inputs": [given(X + 1)], "request_id": "quick"})
            result, error = await anext(answers)
            assert (result.get_response().id, error) == ("quick", None)
            np.testing.assert_array_equal(result.as_numpy("y"), X + X + 2)
            await asked.put(None)  # the end of the requests, not of the answers
            latch.open()
        result, _ = await anext(answers)
        assert result.get_response().id == "held"
        assert [answer async for answer in answers] == []


async def test_an_error_is_of_one_request_of_a_stream(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        call = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        bad = [message("nowhere", "1"), message("double", "2", shape=(3, 3)), b"\x3b", message("double", "4")]
        answers = []
        for data in bad:
            await call.write(data)
            answers.append(messages["ModelStreamInferResponse"].FromString(await call.read()))
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert [answer.infer_response.id for answer in answers] == ["1", "2", "", "4"]
        assert "unknown model: 'nowhere'" in answers[0].error_message
        assert "has 36 bytes" in answers[1].error_message
        assert "wire type 3" in answers[2].error_message
        assert not answers[3].error_message
        assert answers[3].infer_response.raw_output_contents[0] == (X + X).tobytes()


async def test_a_stream_of_many_requests_is_not_read_ahead_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotrt.serving.kserve.grpc_server._MOST_IN_STREAM", 4)
    many = ModelSettings("many", tmp_path / "double.onnx", options={"device": "host", "slots": 1})
    async with serving(tmp_path, many) as server:
        model = server.service.models["many"]
        call = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        with held(model):
            for i in range(8):
                await call.write(message("many", str(i)))
            await until_waiting(model, 3)
            await asyncio.sleep(0)
            assert model.statistics().waiting == 3
        ids = [messages["ModelStreamInferResponse"].FromString(await call.read()).infer_response.id for _ in range(8)]
        assert sorted(ids) == list("01234567")
        call.cancel()


async def test_a_stream_that_is_cancelled_cancels_its_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        call = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        with held(server.model):
            await call.write(message("double", "1"))
            await until_waiting(server.model, 0)
            call.cancel()
            await until_slow(lambda: server.model.statistics().cancelled == 1)
        await until_slow(lambda: server.service.budget.used == 0)
        np.testing.assert_array_equal(await server.infer(), X + X)


# --- Deadlines, cancellation, overload ----------------------------------------------------------------------------------


async def test_deadlines_and_full_queues(tmp_path: Path) -> None:
    async with serving(tmp_path, max_deadline=30.0) as server:
        model = server.model
        with held(model):
            first = asyncio.create_task(server.infer())
            await until_waiting(model, 0)
            second = asyncio.create_task(server.infer())
            await until_waiting(model, 1)
            call = server.raw()(iter([message("double", "3")]))
            assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
            assert 1000 <= int(dict(iter(await call.trailing_metadata()))["grpc-retry-pushback-ms"]) <= 60_000
            second.cancel()
            await until_waiting(model, 0)
            late = messages["ModelInferRequest"].FromString(message("double", "4"))
            late.parameters["deadline_ms"].int64_param = 20
            call = server.raw()(iter([late.SerializeToString()]))
            assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "deadline passed" in await call.details()
        np.testing.assert_array_equal(await first, X + X)
        assert model.statistics().expired == 1


async def test_the_deadline_of_the_call_is_the_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with held(server.model):
            first = asyncio.create_task(server.infer())
            await until_waiting(server.model, 0)
            with refused("DEADLINE_EXCEEDED"):
                await server.infer(client_timeout=0.05)
            # The deadline is found by the model's queue, or by gRPC, which cancels the call.
            await until_slow(lambda: server.model.statistics().expired + server.model.statistics().cancelled == 1)
        np.testing.assert_array_equal(await first, X + X)


async def test_a_call_that_is_cancelled_leaves_the_queue(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with held(server.model):
            first = asyncio.create_task(server.infer())
            await until_waiting(server.model, 0)
            call = server.raw()(iter([message("double", "1")]))
            await until_waiting(server.model, 1)
            call.cancel()
            await until_waiting(server.model, 0)
        np.testing.assert_array_equal(await first, X + X)
        await until_slow(lambda: server.service.budget.used == 0)


async def test_a_broken_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        executor_of(server.model).break_down(DeviceError("the device", code=700, name="illegal"))
        assert not await server.client.is_model_ready("double")
        assert not await server.client.is_server_ready()
        with refused("UNAVAILABLE", "'double' is broken"):
            await server.infer()


async def test_a_failure_of_the_servers_own_is_logged_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    async with serving(tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr("aiotrt.serving.kserve.grpc_server.decode", fail)
            with refused("INTERNAL", "^.{0,30}the server failed$"):
                await server.infer()
            call = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")(iter([message("double", "1")]))
            answer = messages["ModelStreamInferResponse"].FromString(await call.read())
            assert (answer.error_message, answer.infer_response.id) == ("the server failed", "1")
        assert caplog.text.count("RuntimeError: a secret") == 2
        np.testing.assert_array_equal(await server.infer(), X + X)


async def test_a_path_that_is_no_text_does_not_end_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields: tuple[bytes, ...] = (
            b":method",
            b"POST",
            b":scheme",
            b"http",
            b":path",
            b"/\xff",
            b":authority",
            b"localhost",
        )
        fields += (b"content-type", b"application/grpc", b"te", b"trailers")
        head = b"".join((b"" if i % 2 else b"\0") + bytes([len(field)]) + field for i, field in enumerate(fields))
        reader, writer = await asyncio.open_connection(*server.server.address.split(":"))
        settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
        writer.write(settings + bytes([0, 0, len(head), 1, 5, 0, 0, 0, 1]) + head)
        answer = b""
        while b"grpc-status" not in answer:
            answer += await reader.read(1 << 16)
        writer.close()
        np.testing.assert_array_equal(await server.infer(), X + X)


# --- Limits -------------------------------------------------------------------------------------------------------------


async def test_the_token(tmp_path: Path) -> None:
    async with serving(tmp_path, token=TOKEN) as server:
        assert await server.client.is_server_live(), "probes have none"
        health = await server.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert messages["HealthCheckResponse"].FromString(health).status == 1
        for headers in (None, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            for call in (
                server.infer(headers=headers),
                server.client.get_model_repository_index(headers=headers),
                server.client.is_model_ready("double", headers=headers),
            ):
                with refused("UNAUTHENTICATED", "the token is missing or wrong"):
                    await call
        assert await code_of(server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")(iter([b""])).read()) is (
            grpc.StatusCode.UNAUTHENTICATED
        )
        np.testing.assert_array_equal(await server.infer(headers={"authorization": f"Bearer {TOKEN}"}), X + X)


async def test_bodies_and_the_memory_of_all_are_bounded(tmp_path: Path) -> None:
    big = np.ones((200_000, 3), np.float32)  # 2.4 MB
    async with serving(tmp_path, max_body=3 << 20, max_bodies=4 << 20, max_json=1 << 20) as server:
        with refused("RESOURCE_EXHAUSTED", "larger than max"):
            await server.infer(np.ones((400_000, 3), np.float32))
        with refused("RESOURCE_EXHAUSTED", "send tensors in raw_input_contents"):
            contents = {"fp32_contents": big.reshape(-1)}
            tensor = {"name": "x", "datatype": "FP32", "shape": big.shape, "contents": contents}
            typed = messages["ModelInferRequest"](model_name="double", inputs=[tensor]).SerializeToString()
            await triton_errors(server.raw()(iter([typed])))
        with refused("RESOURCE_EXHAUSTED", "at most 65,536"):
            await server.client.get_model_metadata("n" * 70_000)
        with held(server.model) as latch:
            first = asyncio.create_task(server.infer(big))
            await until_waiting(server.model, 0)
            assert big.nbytes < server.service.budget.used < 2 * big.nbytes
            with refused("UNAVAILABLE", "bytes are in memory"):
                await server.infer(big)
            latch.open()
        np.testing.assert_array_equal(await first, big + big)
        await until_slow(lambda: server.service.budget.used == 0)


async def test_a_large_request_and_answer_arrive_whole(tmp_path: Path) -> None:
    big = np.arange(3 << 20, dtype=np.float32).reshape(-1, 3)  # 12 MiB
    async with serving(tmp_path) as server:
        np.testing.assert_array_equal(await server.infer(big), big + big)


async def test_a_request_that_does_not_arrive_ends(tmp_path: Path) -> None:
    async with serving(tmp_path, body_timeout=1.0) as server:
        call = server.raw()()
        await call.wait_for_connection()
        assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not arrive in time" in await call.details()
        call = server.raw()()
        await call.done_writing()
        assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


async def test_of_too_many_slow_requests_the_slowest_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotrt.serving.kserve.grpc_server._SLOW", 0.0)
    async with serving(tmp_path, max_body=1 << 20, max_bodies=2 << 20) as server:
        calls = []
        for number in (1, 2, 2):
            calls.append(server.raw()())
            await calls[-1].wait_for_connection()
            await until_slow(lambda: len(server.server._slow) == number)  # noqa: B023
        assert await code_of(calls[0]) is grpc.StatusCode.DEADLINE_EXCEEDED
        await calls[2].write(message("double", "1"))
        await calls[2].done_writing()
        await calls[2]
        np.testing.assert_array_equal(await server.infer(), X + X)
        calls[1].cancel()


async def test_an_answer_that_is_not_taken_holds_up_nobody(tmp_path: Path) -> None:
    big = np.zeros((1 << 20, 3), np.float32)
    async with serving(tmp_path, body_timeout=2.0) as server:
        call = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        await call.write(message("double", "1", array=big))
        await until_slow(lambda: server.model.statistics().completed == 1)
        unary = server.channel.unary_stream(f"{SERVICE}ModelInfer")(message("double", "2", array=big))
        await until_slow(lambda: server.service.budget.used >= 2 * big.nbytes)
        await until_slow(lambda: not server.server._tasks and server.service.budget.used == 0)
        np.testing.assert_array_equal(await server.infer(), X + X)
        unary.cancel()
        call.cancel()


async def test_a_client_that_cannot_take_an_answer_is_not_the_servers_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    big = np.zeros((1 << 19, 3), np.float32)
    async with serving(tmp_path) as server, grpc.aio.insecure_channel(server.server.address) as channel:
        call = channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        await call.write(message("double", "1", array=big))
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert await call.read() is grpc.aio.EOF
        # More than the client takes; what that is called depends on gRPC's version.
        assert await call.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        await until_slow(lambda: not server.server._tasks and server.service.budget.used == 0)
        np.testing.assert_array_equal(await server.infer(), X + X)
    assert not caplog.records


# --- Health, draining, and how it begins --------------------------------------------------------------------------------


async def test_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotrt.serving.kserve.grpc_server._WATCHED", 0.01)
    async with serving(tmp_path) as server:
        check = server.channel.unary_unary("/grpc.health.v1.Health/Check")

        def asks(service: str) -> bytes:
            data: bytes = messages["HealthCheckRequest"](service=service).SerializeToString()
            return data

        def status(data: bytes) -> str:
            answer = messages["HealthCheckResponse"].FromString(data)
            name: str = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values[answer.status].name
            return name

        for name in ("", "inference.GRPCInferenceService"):
            assert status(await check(asks(name))) == "SERVING"
        assert await code_of(check(asks("double"))) is grpc.StatusCode.NOT_FOUND
        watch = server.channel.unary_stream("/grpc.health.v1.Health/Watch")
        unknown = watch(asks("double"))
        assert status(await unknown.read()) == "SERVICE_UNKNOWN"
        unknown.cancel()
        call = watch(asks(""))
        assert status(await call.read()) == "SERVING"
        server.service.models.drain()
        assert status(await call.read()) == "NOT_SERVING"
        stopping = asyncio.create_task(server.server.stop())
        assert await call.read() is grpc.aio.EOF
        await stopping


@pytest.mark.every_loop
async def test_stopping_waits_for_what_is_under_way(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        stream = server.channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
        await stream.write(message("double", "0"))
        await stream.read()
        with held(server.model) as latch:
            call = asyncio.create_task(server.infer())
            await until_waiting(server.model, 0)
            await stream.write(message("double", "1"))
            await until_waiting(server.model, 1)
            stopping = asyncio.create_task(server.server.stop())
            # What is no longer accepted is refused at once.
            await until_slow(server.server._is_stopping.is_set)
            latch.open()
        np.testing.assert_array_equal(await call, X + X)
        answer = messages["ModelStreamInferResponse"].FromString(await stream.read())
        assert answer.infer_response.raw_output_contents[0] == (X + X).tobytes()
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        await stopping
        await server.server.stop()
        await server.server.wait()
        with refused("UNAVAILABLE"):
            await server.infer()


@pytest.mark.every_loop
async def test_what_takes_longer_than_the_drain_is_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, drain_timeout=0.0) as server:
        with held(server.model):
            calls = [server.raw()(iter([message("double", "1")]))]
            await until_waiting(server.model, 0)
            calls.append(server.raw()())  # does not arrive
            await calls[1].wait_for_connection()
            await until_slow(lambda: len(server.server._tasks) == 2)
            await server.server.stop()
            for call in calls:
                assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
                assert "the server ended before this request did" in await call.details()


async def test_beside_http_in_one_application(tmp_path: Path) -> None:
    path = onnx_models.save(tmp_path / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("?", 3)})
    app = create_app(ServerSettings((ModelSettings("double", path, options={"device": "host"}),), grpc_port=0))
    async with served(app) as http:
        async with triton.InferenceServerClient(app.state.grpc.address) as client:
            await until_slow(lambda: app.state.models.is_ready)
            assert (await http.get("/readyz")).status_code == 200
            result = await client.infer("double", [given(X)])
            np.testing.assert_array_equal(result.as_numpy("y"), X + X)
            assert (await http.get("/v2/models/double/stats")).json()["model_stats"][0]["inference_count"] == 1


async def test_where_a_server_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as server:
        with pytest.raises(UsageError, match="needs a port"):
            GrpcServer(server.service)
        other = GrpcServer(server.service, port=int(server.server.address.rpartition(":")[2]))
        with pytest.raises(OSError, match="cannot bind to 127"):
            await other.start()
        await other.stop()
        assert GrpcServer(server.service, "::1", 1).address == "[::1]:1"
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "aiotrt.serving.kserve.grpc_server")
    with pytest.raises(MissingDependencyError, match=r"needs grpc; pip install .*\[grpc\]'"):
        create_app(ServerSettings((ModelSettings("double", tmp_path / "double.onnx"),), grpc_port=0))


async def test_a_model_that_is_unloaded_waits_for_its_calls(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with held(server.model) as latch:
            call = asyncio.create_task(server.infer())
            await until_waiting(server.model, 0)
            unloading = asyncio.create_task(server.client.unload_model("double"))
            await until_slow(lambda: server.service.models.standing("double")[0] is Standing.UNLOADING)
            with refused("UNAVAILABLE", "being unloaded"):
                await server.infer()
            latch.open()
            await unloading
        np.testing.assert_array_equal(await call, X + X)


async def test_the_access_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.access")
    async with serving(tmp_path, access_log=True) as server:
        await server.infer()
        with pytest.raises(InferenceServerException):
            await server.client.get_model_metadata("other")
    assert '"gRPC ModelInfer" OK' in caplog.text
    assert '"gRPC ModelMetadata" NOT_FOUND' in caplog.text


async def triton_errors(call: Any) -> None:
    """Let Triton's client say what this call said."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        raise InferenceServerException(error.details(), str(error.code())) from error


def message(model: str, name: str, array: np.ndarray[Any, Any] = X, shape: tuple[int, ...] | None = None) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": shape or array.shape}
    request = messages["ModelInferRequest"](model_name=model, id=name, inputs=[tensor], raw_input_contents=[array.tobytes()])
    data: bytes = request.SerializeToString()
    return data
