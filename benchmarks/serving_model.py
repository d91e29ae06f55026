"""The models that are served: files from the rapidocr-onnxruntime package, and a reader that says whose answer it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples import ocr

__all__ = ["HEIGHT", "WIDTH", "crops", "reader"]

Pixels = npt.NDArray[np.uint8]

HEIGHT: Final = 48  # of a line of text
WIDTH: Final = 160


def crops(count: int, width: int, random: np.random.Generator) -> list[Pixels]:
    """Pieces of a scanned page, as pixels (3, height, width); every one another."""
    page = ocr.scanned_page(scale=2)
    tops = random.integers(0, page.shape[0] - HEIGHT, count)
    lefts = random.integers(0, page.shape[1] - width, count)
    return [page[y : y + HEIGHT, x : x + width].transpose(2, 0, 1).copy() for y, x in zip(tops, lefts, strict=True)]


def reader(path: Path) -> Path:
    """PP-OCR's recogniser, of pixels and a number, to letters and a number.

    The number that it gives is the sum of the item's pixels and the number that came with it: computed on the device, in the
    item's own row of its batch, and not to be had from any other request.
    """
    model = onnx.load(ocr.detector_file().with_name("ch_PP-OCRv4_rec_infer.onnx"))
    graph = model.graph
    (inside,), (probabilities,) = graph.input, graph.output
    constants = {"half": np.float32(127.5), "one": np.float32(1)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    before = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "half"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], [inside.name]),
    ]
    after = [
        helper.make_node("ArgMax", [probabilities.name], ["letters"], axis=2, keepdims=0),
        helper.make_node("Cast", ["pixels"], ["integers"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["integers"], ["sums"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Add", ["sums", "number"], ["checksum"]),
    ]
    nodes: Any = [*before, *graph.node, *after]
    served = helper.make_graph(
        nodes,
        "reader",
        [
            helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 3, HEIGHT, WIDTH]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["n"]),
        ],
        [
            helper.make_tensor_value_info("letters", TensorProto.INT64, ["n", WIDTH // 8]),
            helper.make_tensor_value_info("checksum", TensorProto.INT64, ["n"]),
        ],
        graph.initializer,
    )
    onnx.save(helper.make_model(served, opset_imports=model.opset_import, ir_version=model.ir_version), path)
    return path
