"""Configuration, statistics and the batch axis, as Triton's clients ask for them over a real socket."""

from __future__ import annotations

import ast
import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http.aio as triton
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from aiotrt.serving import Standing
from aiotrt.serving.kserve import ModelSettings, servable
from tests.building import models as onnx_models
from tests.serving.test_fastapi import until_slow, until_waiting
from tests.serving.test_kserve import X, given, model_behind, request_of, serving
from tests.tools import held

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]
METADATA = {"stride": "32", "task": "detect", "names": "{0: 'person', 1: 'it''s'}", "empty": ""}


def items(path: Path, *, count: int = 1, max_size: int = 8, **options: Any) -> ModelSettings:
    """A batching model of rows of four: y_i = x_i + x_i; `count` inputs and outputs."""
    nodes = [helper.make_node("Add", [f"x{i}", f"x{i}"], [f"y{i}"]) for i in range(count)]
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{way}{i}", TensorProto.FLOAT, ["n", 4]) for i in range(count)] for way in "xy"
    )
    model = helper.make_model(
        helper.make_graph(nodes, "items", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, METADATA)
    onnx.save(model, path)
    warmup = [{f"x{i}": [4] for i in range(count)}]
    return ModelSettings("items", path, warmup, {"device": "host", "batching": {"max_size": max_size}} | options)


def numbered(rows: int, start: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(start, start + 4 * rows, dtype=np.float32).reshape(rows, 4)


# --- configuration ------------------------------------------------------------------------------------------------------


async def test_the_configuration(tmp_path: Path) -> None:
    async with serving(tmp_path, items(tmp_path / "items.onnx")) as (http, client):
        config = await client.get_model_config("items")
        assert (config["name"], config["platform"], config["max_batch_size"]) == ("items", "onnx_onnxv1", 8)
        assert config["input"] == [
            {
                "name": "x0", "data_type": "TYPE_FP32", "dims": [4], "is_shape_tensor": False, "format": "FORMAT_NONE",
                "allow_ragged_batch": False, "optional": False,
            }
        ]  # fmt: skip
        assert config["output"][0] | {"dims": [4]} == {
            "name": "y0", "data_type": "TYPE_FP32", "dims": [4], "is_shape_tensor": False, "label_filename": "",
        }  # fmt: skip
        assert config["dynamic_batching"]["priority_levels"] == 2
        assert config["instance_group"][0]["count"] == model_behind(http, "items").slots
        assert ast.literal_eval(config["parameters"]["metadata"]["string_value"]) == METADATA, "as Ultralytics reads it"
        config = await client.get_model_config("double", "1")
        assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [-1, 3])
        assert "dynamic_batching" not in config
        for name, version in (("other", ""), ("double", "2")):
            with pytest.raises(InferenceServerException) as caught:
                await client.get_model_config(name, version)
            assert caught.value.status() == "404"
        extensions = (await client.get_server_metadata())["extensions"]
        assert {"model_configuration", "statistics"} <= set(extensions)


async def test_metadata_are_found_behind_a_large_graph(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    weight = numpy_helper.from_array(np.ones((400, 1000), np.float32), "w")
    onnx_models.save(path, [helper.make_node("Add", ["x", "w"], ["y"])], {"x": (1, 1000)}, initializer=[weight])
    assert servable._parameters(path) == {}
    model = onnx.load(path)
    many = {f"key {i}": "value" * i for i in range(200)}
    helper.set_model_props(model, many)
    onnx.save(model, path)
    assert ast.literal_eval(servable._parameters(path)["metadata"]) == many


@pytest.mark.parametrize("data", [b"\xff" * 100, b"\x0d\x00\x00\x00\x00", b"not a model", b"\x3a" + b"\xff" * 9 + b"\x01"])
async def test_what_is_no_onnx_file_ends(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"wire type|number"):
        servable._parameters(path)


async def test_metadata_that_ultralytics_puts_before_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    text = b'{"stride": 32, "names": {"0": "person"}}'
    path.write_bytes(len(text).to_bytes(4, "little") + text + b"ftrt" + bytes(100))
    assert ast.literal_eval(servable._parameters(path)["metadata"]) == {"stride": 32, "names": {"0": "person"}}
    path.write_bytes(b"ftrt" + bytes(100))
    assert servable._parameters(path) == {}


# --- statistics ---------------------------------------------------------------------------------------------------------


async def test_statistics_count_what_was_done(tmp_path: Path) -> None:
    later = ModelSettings("later", onnx_models.relu(tmp_path / "relu.onnx"), options={"device": "host"}, is_loaded=False)
    async with serving(tmp_path, items(tmp_path / "items.onnx"), later) as (http, client):
        (before,) = (await client.get_inference_statistics("items"))["model_stats"]
        assert before["inference_stats"]["success"] == {"count": 0, "ns": 0}
        for _ in range(3):
            await client.infer("items", [given(numbered(2), "x0")])
        with pytest.raises(InferenceServerException):
            await client.infer("items", [given(X, "x0")])
        (found,) = (await client.get_inference_statistics("items", "1"))["model_stats"]
        counts = {name: entry["count"] for name, entry in found["inference_stats"].items()}
        assert counts.pop("fail") == 1
        assert {counts.pop("cache_hit"), counts.pop("cache_miss")} == {0}
        assert set(counts.values()) == {3}, "perf_analyzer wants them to be the same"
        assert (found["name"], found["version"], found["inference_count"]) == ("items", "1", 6)
        assert 3 <= found["execution_count"] <= 6
        stats = found["inference_stats"]
        parts = [stats[name]["ns"] for name in ("compute_input", "queue", "compute_infer", "compute_output")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(stats["success"]["ns"], abs=10)
        assert stats["fail"]["ns"] > 0
        assert found["last_inference"] > 1_600_000_000_000, "milliseconds"
        everything = (await client.get_inference_statistics())["model_stats"]
        assert [one["name"] for one in everything] == ["double", "items", "later"]
        assert everything[2]["inference_count"] == 0
        assert (await http.get("/v2/models/other/stats")).status_code == 404


# --- the batch axis -----------------------------------------------------------------------------------------------------


@pytest.mark.every_loop
@pytest.mark.parametrize("binary", [True, False])
async def test_a_batch_axis_is_split_and_rejoined_with_others_items(tmp_path: Path, binary: bool) -> None:
    async with serving(tmp_path, items(tmp_path / "items.onnx", count=2, slots=1)) as (http, client):
        assert [one["shape"] for one in (await client.get_model_metadata("items"))["inputs"]] == [[-1, 4]] * 2
        model = model_behind(http, "items")

        async def ask(x: np.ndarray[Any, Any]) -> None:
            inputs = [given(x, "x0", binary=binary), given(-x, "x1", binary=binary)]
            outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("y1", "y0")]
            result = await client.infer("items", inputs, outputs=outputs)
            np.testing.assert_array_equal(result.as_numpy("y0"), x + x)
            np.testing.assert_array_equal(result.as_numpy("y1"), -x - x)

        with held(model):
            first = asyncio.create_task(ask(numbered(1)))
            await until_slow(lambda: model.statistics().in_flight == 1)
            rest = [asyncio.create_task(ask(x)) for x in (numbered(5, 100), numbered(2, 200), numbered(1, 300)[0])]
            await until_waiting(model, 8)
        await asyncio.gather(first, *rest)
        assert dict(model.statistics().batches) == {1: 1, 8: 1}, "five, two and one item met in one batch"


async def test_batch_axes_that_do_not_fit(tmp_path: Path) -> None:
    def of(**shapes: list[int]) -> dict[str, Any]:
        return {
            "inputs": [
                {"name": name, "datatype": "FP32", "shape": shape, "data": [0] * int(np.prod(shape))}
                for name, shape in shapes.items()
            ]
        }

    async with serving(tmp_path, items(tmp_path / "items.onnx", count=2)) as (http, _):
        shape = "must have the shape [4] with or without a batch axis before it"
        for says, request in (
            ("the same size, from 1 to 8, got 2 and 3", of(x0=[2, 4], x1=[3, 4])),
            ("from 1 to 8, got 9", of(x0=[9, 4], x1=[9, 4])),
            ("from 1 to 8, got 0", of(x0=[0, 4], x1=[0, 4])),
            (f"input 'x0' {shape}, where -1 is any size, got [2, 4]", of(x0=[2, 4], x1=[4])),
            (f"input 'x0' {shape}, where -1 is any size, got [2, 3]", of(x0=[2, 3], x1=[2, 3])),
            (f"input 'x0' {shape}", of(x0=[1, 2, 4], x1=[1, 2, 4])),
        ):
            answer = await http.post("/v2/models/items/infer", json=request)
            assert (answer.status_code, says in answer.json()["error"]) == (400, True), answer.text
        assert model_behind(http, "items").statistics().submitted == 0
        answer = await http.post("/v2/models/double/infer", json=request_of(shape=[1, 2, 3]))
        assert answer.status_code == 400, "without batching there is no such axis"


@pytest.mark.every_loop
async def test_where_one_item_finds_no_place_none_is_left_behind(tmp_path: Path) -> None:
    async with serving(tmp_path, items(tmp_path / "items.onnx", slots=1, max_queue=3)) as (http, client):
        model = model_behind(http, "items")
        with held(model):
            first = asyncio.create_task(client.infer("items", [given(numbered(1), "x0")]))
            await until_slow(lambda: model.statistics().in_flight == 1)
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("items", [given(numbered(5), "x0")])
            assert caught.value.status() == "503"
            assert model.statistics().waiting == 0
            late = asyncio.create_task(client.infer("items", [given(numbered(3), "x0")]))
            await until_waiting(model, 3)
            late.cancel()
            await until_waiting(model, 0)
        await first
        np.testing.assert_array_equal(
            (await client.infer("items", [given(numbered(3), "x0")])).as_numpy("y0"), 2 * numbered(3)
        )


# --- what the server was told -------------------------------------------------------------------------------------------


@pytest.mark.every_loop
@pytest.mark.parametrize("heeds", [False, True])
async def test_tritons_timeout_is_a_deadline_where_the_model_allows_it(tmp_path: Path, heeds: bool) -> None:
    settings = replace(items(tmp_path / "items.onnx", slots=1), heeds_timeout=heeds)
    async with serving(tmp_path, settings) as (http, client):
        model = model_behind(http, "items")
        with held(model):
            call = asyncio.create_task(client.infer("items", [given(numbered(1), "x0")], timeout=30))  # as tritony does
            if heeds:
                with pytest.raises(InferenceServerException, match="deadline passed"):
                    await call
            else:
                await until_slow(lambda: model.statistics().in_flight == 1)
        if not heeds:
            assert (await call).as_numpy("y0").shape == (1, 4)


@pytest.mark.parametrize("strict", [False, True])
async def test_a_model_that_a_client_unloads_is_its_own_business(tmp_path: Path, strict: bool) -> None:
    async with serving(tmp_path, items(tmp_path / "items.onnx"), strict_readiness=strict) as (http, client):
        await client.unload_model("items")
        assert await client.is_server_ready() is not strict
        assert (await http.get("/readyz")).status_code == (503 if strict else 200)
        assert not await client.is_model_ready("items")
        await client.load_model("items")
        assert await client.is_server_ready()
        http.server.lifespan.state["aiotrt"]._entries["items"].standing = Standing.UNAVAILABLE  # as one that broke
        assert not await client.is_server_ready(), "it is one of those that must be there again"
        http.server.lifespan.state["aiotrt"]._entries["items"].standing = Standing.READY


@pytest.mark.parametrize("docs", [False, True])
async def test_docs(tmp_path: Path, docs: bool) -> None:
    async with serving(tmp_path, docs=docs) as (http, _):
        answer = await http.get("/docs")
        assert answer.status_code == (200 if docs else 404)
        assert ("/openapi.json" in answer.text) is docs
