from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import aiotrt
from aiotrt.building.proto import external_locations, unranked
from aiotrt.building.source import read_onnx
from tests.building import models

pytestmark = pytest.mark.asyncio


def multiply(path: Path, shape: list[int | str] | None) -> Path:
    """Of an input of this shape and a scalar."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    factor = helper.make_tensor_value_info("factor", TensorProto.FLOAT, [])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    graph = helper.make_graph(nodes, "graph", [x, factor], [y], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


async def test_an_input_of_any_rank_is_told_from_a_scalar(tmp_path: Path) -> None:
    path = multiply(tmp_path / "a.onnx", None)
    assert unranked(path) == {"x", "y"}
    assert unranked(multiply(tmp_path / "b.onnx", ["n", 3])) == set()
    assert unranked(multiply(tmp_path / "c.onnx", [])) == set()
    two, x = np.full((), 2, np.float32), np.zeros(1, np.float32)
    async with aiotrt.load(path, device="host", warmup=[(np.zeros((2, 3), np.float32), two)]) as model:
        assert model.inputs is not None
        assert list(map(str, model.inputs)) == ["x: float32 (...)", "factor: float32 ()"]
        assert model.outputs is not None
        assert [spec.shape for spec in model.outputs] == [None]
        for shape in ((), (3,), (2, 3), (1, 2, 3, 4)):
            x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
            assert np.array_equal(await model(x, two), x * 2)
        async with model.lease([(4,), ()]) as slot:
            slot.inputs.x[...] = np.ones(4, np.float32)
            slot.inputs.factor[...] = two
            assert (await slot.replay()).tolist() == [2.0] * 4
        with pytest.raises(aiotrt.InputError, match=r"factor.*rank 1, shape \(1,\)"):
            await model(x, np.ones(1, np.float32))
        with pytest.raises(aiotrt.InputError, match=r"expected x: float32 \(\.\.\.\), got dtype float64"):
            await model(np.ones(3), two)


async def test_items_of_any_rank_are_batched(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "graph", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    async with aiotrt.load(path, device="host", batching=aiotrt.Batching(max_size=2)) as model:
        assert (await model(np.full(3, 2, np.float32))).tolist() == [4.0] * 3
        assert (await model(np.full((1, 2), 3, np.float32))).tolist() == [[9.0, 9.0]]


@pytest.mark.parametrize("data", [b"\x3a\x7f", b"\x0b", b"\x80" * 12, b"\x3a\x02\x5a\x09"])
async def test_what_is_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a protocol buffer"):
        unranked(path)


def linked(folder: Path) -> Path:
    """A model whose weights are a link out of its folder, as caches of downloads have them."""
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    path = models.external(folder / "snapshot" / "a.onnx")
    weights = path.with_name("weights.bin")
    weights.rename(folder / "blobs" / "1")
    weights.symlink_to(folder / "blobs" / "1")
    return path


async def test_weights_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    path = linked(tmp_path)
    assert external_locations(path) == {"weights.bin"}
    x = np.arange(64, dtype=np.float32)[None]
    async with aiotrt.load(path, device="host") as model:
        assert np.array_equal(await model(x), x)
    path.with_name("weights.bin").unlink()
    with pytest.raises(aiotrt.EngineError, match=r"weights\.bin"):
        _ = await aiotrt.load(path, device="host")


@pytest.mark.parametrize("location", ["../blobs/1", "{folder}/blobs/1"])
async def test_weights_that_the_model_names_outside_its_folder_are_refused(tmp_path: Path, location: str) -> None:
    path = linked(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location.format(folder=tmp_path)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(aiotrt.EngineError, match="cannot load this file"):
        _ = await aiotrt.load(path, device="host")
    with pytest.raises(aiotrt.EngineError, match="outside the model's folder"):
        read_onnx(path)


async def test_files_of_constants_in_nodes_and_subgraphs_are_found(tmp_path: Path) -> None:
    def constant(name: str, location: str) -> onnx.NodeProto:
        tensor = helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0])
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="offset", value="0")
        tensor.external_data.add(key="location", value=location)
        return helper.make_node("Constant", [], [name], value=tensor)

    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    branch = helper.make_graph([constant("y", "inner.bin")], "branch", [], [y])
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    nodes = [constant("k", "outer.bin"), helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    graph = helper.make_graph(nodes, "graph", [condition], [y])
    path = tmp_path / "a.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert external_locations(path) == {"inner.bin", "outer.bin"}
