from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import aiotrt
from aiotrt.building.ranks import unranked

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
    with pytest.raises(ValueError, match="no protocol buffer"):
        unranked(path)
