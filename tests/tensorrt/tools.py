"""Networks for the double, and how a model is loaded on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from aiotrt.devices import open_device
from aiotrt.engines.tensorrt import TensorRTEngine
from aiotrt.engines.tensorrt_api import Api
from tests.tensorrt.double import Border, Network, TensorRTDouble

Tensors = dict[str, torch.Tensor]


def affine(values: Tensors) -> Tensors:
    """3 x + 1."""
    return {"y": values["x"] * 3 + 1}


AFFINE = Network((Border("x", (2, 3)),), (Border("y", (2, 3)),), affine)
#: Two profiles that do not touch: batches of 1 to 4, and of 8 to 16.
PROFILES = Network(
    (Border("x", (-1, 3)),),
    (Border("y", (-1, 3)),),
    affine,
    profiles=({"x": ((1, 3), (2, 3), (4, 3))}, {"x": ((8, 3), (8, 3), (16, 3))}),
)
MANY = Network(
    (Border("x", (2, 3)), Border("y", (2, 3), "HALF"), Border("index", (2,), "INT64")),
    (Border("total", (2, 3)), Border("product", (2, 3), "HALF"), Border("picked", (2, 3))),
    lambda v: {
        "total": v["x"] + v["y"].float(),
        "product": v["x"].half() * v["y"],
        "picked": v["x"][v["index"]],
    },
)
#: Its output's first extent is how many elements are positive.
POSITIVE = Network(
    (Border("x", (6,)),),
    (Border("y", (-1,)),),
    lambda v: {"y": v["x"][v["x"] > 0]},
    infer=lambda shapes, values: {"y": (-1,)},
)


def _repeat(values: Tensors) -> Tensors:
    count = int(values["times"].item())
    return {"y": values["x"].repeat(count)}


#: A host input whose value decides the output's shape.
REPEAT = Network(
    (Border("x", (2,)), Border("times", (), "INT64", host=True)),
    (Border("y", (-1,)),),
    _repeat,
    values=({"times": ((1,), (2,), (4,))},),
    infer=lambda shapes, values: {"y": (shapes["x"][0] * values["times"][0],)},
)


def save(path: Path, double: TensorRTDouble, network: Network) -> Path:
    """An engine file of the double's."""
    path.write_bytes(double.plan(network))
    return path


def double_on(device: str, product: str = "tensorrt_rtx", version: str = "1.6.1.120") -> TensorRTDouble:
    """A double whose addresses are of this device."""
    return TensorRTDouble(product, version, device=open_device(device).torch_device)


def engine_of(path: Path, double: TensorRTDouble, device: str = "host", **options: Any) -> TensorRTEngine:
    """The adapter over the double."""
    return TensorRTEngine(path, open_device(device), runtime_module=cast("Api", double), require_cuda=False, **options)


@contextlib.contextmanager
def loading(double: TensorRTDouble, **options: object) -> Iterator[list[TensorRTEngine]]:
    """Inside, `aiotrt.load` of a file loads it with the double; gives the engines that were loaded."""
    engines: list[TensorRTEngine] = []

    def open_engine(source: Any, device: Any, _: object) -> TensorRTEngine:
        keywords: Mapping[str, Any] = options
        engine = TensorRTEngine(Path(source), device, runtime_module=cast("Api", double), require_cuda=False, **keywords)
        engines.append(engine)
        return engine

    with mock.patch("aiotrt.model.open_engine", open_engine):
        yield engines
