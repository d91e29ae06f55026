"""Small ONNX models, PP-OCR's three, and a program in another process that builds."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.tools import interruptible

Shape = Sequence[int | str | None]

#: PP-OCR's models, and a small profile for each.
OCR: dict[str, tuple[str, dict[str, Any]]] = {
    "detector": ("ch_PP-OCRv4_det_infer.onnx", {"x": ((1, 3, 32, 32), (1, 3, 64, 64), (2, 3, 96, 96))}),
    "recogniser": ("ch_PP-OCRv4_rec_infer.onnx", {"x": ((1, 3, 48, 32), (1, 3, 48, 64), (2, 3, 48, 96))}),
    "classifier": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": ((1, 3, 48, 192), (1, 3, 48, 192), (2, 3, 48, 192))}),
}


def ocr(name: str) -> Path:
    """One of PP-OCR's models."""
    distribution = importlib.metadata.distribution("rapidocr-onnxruntime")
    return Path(str(distribution.locate_file(f"rapidocr_onnxruntime/models/{OCR[name][0]}")))


def save(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, Shape], **options: Any) -> Path:
    """A model of these nodes; its output is ``y``, FP32, of the rank of the first input."""
    elem_type = options.pop("elem_type", TensorProto.FLOAT)
    rank = len(next(iter(inputs.values())))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, elem_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", elem_type, [None] * options.pop("output_rank", rank))],
        options.pop("initializer", []),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, **options)
    return path


def relu(path: Path, shape: Shape = (1, 8)) -> Path:
    """``y = relu(x)``."""
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], {"x": shape})


def add(path: Path, a: Shape, b: Shape) -> Path:
    """``y = a + b``."""
    return save(path, [helper.make_node("Add", ["a", "b"], ["y"])], {"a": a, "b": b})


def matmul(path: Path, size: int = 64, **options: Any) -> Path:
    """``y = x @ w`` with a weight that is worth a file of its own."""
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, size)}, initializer=[weight], **options)


def external(path: Path, size: int = 64) -> Path:
    """`matmul` with its weight in ``weights.bin`` beside it."""
    return matmul(path, size, save_as_external_data=True, location="weights.bin", size_threshold=0)


def reshape(path: Path) -> Path:
    """``y = x.reshape(size)``: the network reads its input `size` as a shape."""
    return _save_graph(
        path,
        [helper.make_node("Reshape", ["x", "size"], ["y"])],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 6)),
            helper.make_tensor_value_info("size", TensorProto.INT64, (2,)),
        ],
        (None, None),
    )


def loop(path: Path, times: int = 3) -> Path:
    """``y = x * 2 ** times``, in a loop."""
    scalars = {"i": TensorProto.INT64, "more": TensorProto.BOOL}
    body = helper.make_graph(
        [helper.make_node("Identity", ["more"], ["again"]), helper.make_node("Add", ["a", "a"], ["twice"])],
        "body",
        [*(helper.make_tensor_value_info(name, kind, ()) for name, kind in scalars.items()), _float("a", (4,))],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, ()), _float("twice", (4,))],
    )
    constants = [numpy_helper.from_array(np.array(times), "times"), numpy_helper.from_array(np.array(True), "yes")]
    node = helper.make_node("Loop", ["times", "yes", "x"], ["y"], body=body)
    return _save_graph(path, [node], [_float("x", (4,))], (4,), constants)


def _float(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: Shape,
    constants: Sequence[onnx.TensorProto] = (),
) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, [_float("y", output)], list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(program: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a program in another process of this interpreter."""
    command = interruptible(sys.executable, "-c", program, *arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
