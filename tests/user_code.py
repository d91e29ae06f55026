"""Code of a user, for type checkers: see `test_user_code`. It is never run.

A line that ends in ``# E`` must be an error, and no other may be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, assert_type

import numpy as np
import torch

import aiotrt

Array = np.ndarray[Any, np.dtype[Any]]


class Found(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def detect(x: torch.Tensor, scale: float = 1.0) -> Found:
    return Found(x * scale, x)


def named(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x}


async def results(x: torch.Tensor, array: Array) -> None:
    async with aiotrt.load(double, outputs="torch") as model:
        assert_type(await model(x), torch.Tensor)
        assert_type(await model(array), torch.Tensor)
    async with aiotrt.load(double, outputs="device", slots=3) as model:
        assert_type(await model(x), torch.Tensor)
    async with aiotrt.load(double, outputs="numpy", warmup=[array]) as arrays:
        assert_type(await arrays(x), Array)
        assert_type([one async for one in arrays.map([x, array])], list[Array])
        (await arrays(x)).cuda()  # E
    async with aiotrt.load(double) as either:
        assert_type(await either(x), torch.Tensor)
        assert_type(await either(array), Array)
        assert_type(await either([x, array]), torch.Tensor | Array)
    async with aiotrt.load(detect, batching=aiotrt.Batching(max_size=4)) as detector:
        assert_type(await detector(x, 2.0, deadline=0.1, priority=0), Found)
        assert_type((await detector(x)).boxes, torch.Tensor)
        (await detector(x)).masks  # E
    async with aiotrt.load(named, outputs="torch") as by_name:
        assert_type(await by_name(x=x), dict[str, torch.Tensor])
    opened = await aiotrt.load(double, outputs="torch")
    same: aiotrt.Model[torch.Tensor] = opened
    assert_type(await same(x), torch.Tensor)


async def whatever(x: torch.Tensor, path: Path, net: torch.nn.Module, program: torch.export.ExportedProgram) -> None:
    for model in (
        aiotrt.load(net),
        aiotrt.load(torch.nn.Linear(3, 3), outputs="numpy"),
        aiotrt.load(program),
        aiotrt.load("model.onnx", sha256=None),
        aiotrt.load(path, precision="fp16"),
        aiotrt.load(net, preprocess=double, postprocess=named),
        aiotrt.load(double, postprocess=named),
    ):
        assert_type(await model(x), Any)


async def leases(array: Array) -> None:
    model: aiotrt.Model = aiotrt.load("model.onnx")  # bare, it is a model of anything
    async with model.lease(outputs="torch") as slot:
        slot.inputs.x[...] = array
        slot.inputs[0][...] = 1.0
        assert_type(slot.outputs[0], aiotrt.Buffer)
        assert_type(slot.outputs["scores"], aiotrt.Buffer)
        assert_type(slot.outputs[:2], tuple[aiotrt.Buffer, ...])
        assert_type(slot.outputs[0].tensor, torch.Tensor)
        assert_type(slot.outputs.scores.host, torch.Tensor)
        read: Array = np.asarray(slot.outputs[0])
        assert read.size
        slot.outputs[1.5]  # E


async def passed_on(model: aiotrt.Model[Found], frames: AsyncIterator[torch.Tensor]) -> list[torch.Tensor]:
    return [found.boxes async for found in model.map(frames, in_flight=4)]


async def wrong(x: torch.Tensor) -> None:
    aiotrt.load(3)  # E
    aiotrt.load(None)  # E
    aiotrt.load(double, slots="2")  # E
    aiotrt.load(double, outputs="nump")  # E
    aiotrt.load(double, slot=2)  # E
    aiotrt.load("model.onnx", signatures="some")  # E
    model = aiotrt.load(double)
    await model(x, deadline="soon")  # E
    await passed_on(model, frames=x)  # E
