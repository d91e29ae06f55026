"""Exported programs whose inputs and results are nested, or constants: they are used as modules are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.export import Dim, ExportedProgram, export, register_dataclass

import aiotrt

pytestmark = pytest.mark.asyncio


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    pairs: list[Pair]
    kind: str


register_dataclass(Found, serialized_type_name="tests.Found")


class Detector(torch.nn.Module):
    """Takes a list, a dict, a number and an option; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    def forward(
        self, images: list[torch.Tensor], state: dict[str, Any], scale: int, *, extra: torch.Tensor | None = None
    ) -> Found:
        boxes = images[0] * self.weight * scale + state["h"]
        if extra is not None:
            boxes = boxes + extra
        return Found(boxes, [Pair(images[1] + 1, state["c"][0] * 2)], "box")


def inputs(device: str, value: float, rows: int = 2) -> tuple[list[torch.Tensor], dict[str, Any]]:
    def made(more: float) -> torch.Tensor:
        return torch.full((rows, 3), value + more, device=place(device))

    return [made(0), made(1)], {"h": made(2), "c": (made(3),)}


def program(device: str, **options: Any) -> ExportedProgram:
    return export(Detector().to(place(device)), (*inputs(device, 1), 10), options)


def check(found: Found, expected: Found) -> None:
    assert type(found) is Found
    assert type(found.pairs[0]) is Pair
    assert found.kind == "box"
    for got, wanted in zip([found.boxes, *found.pairs[0]], [expected.boxes, *expected.pairs[0]], strict=True):
        assert torch.equal(got, wanted)


async def test_inputs_and_results_are_nested(device: str) -> None:
    module = Detector().to(place(device))
    async with aiotrt.load(program(device), device=device, outputs="device") as model:
        assert model.inputs is None
        for value in (1.0, 5.0, 7.0):
            images, state = inputs(device, value)
            with torch.no_grad():
                expected = module(images, state, 10)
            for call in (
                model(images, state, 10),
                model(images, state),  # the constant is known
                model(images, state=state),
                model(state=state, images=images, scale=10),
            ):
                check(await call, expected)
        assert not model.statistics().fallbacks


async def test_arrays_and_leases(device: str) -> None:
    async with aiotrt.load(program(device), device=device) as model:
        one = np.ones((2, 3), np.float32)
        images, state = [one, one], {"h": one, "c": (one,)}
        np.testing.assert_array_equal((await model(images, state)).boxes, np.full((2, 3), 21.0))
        async with model.lease() as slot:
            for buffer in slot.inputs:
                buffer[...] = one
            np.testing.assert_array_equal((await slot.replay()).boxes.cpu(), np.full((2, 3), 21.0))


async def test_weights_that_change_in_place_are_used(device: str) -> None:
    exported = program(device)
    async with aiotrt.load(exported, device=device, outputs="device") as model:
        images, state = inputs(device, 1)
        first = (await model(images, state)).boxes
        with torch.no_grad():
            exported.state_dict["weight"].mul_(2)
        assert torch.equal((await model(images, state)).boxes - first, images[0] * 20)


async def test_a_named_option(device: str) -> None:
    images, state = inputs(device, 1)
    extra = torch.ones(3, device=place(device))
    async with aiotrt.load(program(device, extra=extra), device=device, outputs="device") as model:
        expected = Detector().to(place(device))(images, state, 10, extra=extra * 3)
        check(await model(images, state, extra=extra * 3), expected)
        check(await model(images, state, 10, extra * 3), expected)
        with pytest.raises(aiotrt.InputError, match="extra"):
            await model(images, state)
    async with aiotrt.load(program(device, extra=None), device=device, outputs="device") as model:
        check(await model(images, state, extra=None), Detector().to(place(device))(images, state, 10))


async def test_what_it_was_not_exported_for_is_refused(device: str) -> None:
    async with aiotrt.load(program(device), device=device, outputs="device") as model:
        images, state = inputs(device, 1)
        boxes = (await model(images, state)).boxes
        wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((images, state, 11), {}),
            ((images, state), {"scale": 11}),
            (([*images, images[0]], state), {}),
            ((images, {"h": state["h"]}), {}),
            (inputs(device, 1, rows=3), {}),
            ((images,), {}),
            ((images, state), {"other": images[0]}),
        ]
        for values, named in wrong:
            with pytest.raises((aiotrt.InputError, aiotrt.EngineError)):
                await model(*values, **named)
            assert model.statistics().free == 2
        assert torch.equal((await model(images, state)).boxes, boxes)


async def test_dynamic_shapes(device: str) -> None:
    rows = {0: Dim("rows")}
    shapes = {"images": [rows, rows], "state": {"h": rows, "c": (rows,)}, "scale": None}
    exported = export(Detector().to(place(device)), (*inputs(device, 1), 10), dynamic_shapes=shapes)
    async with aiotrt.load(exported, device=device, outputs="device") as model:
        for number in (2, 5, 3):
            assert (await model(*inputs(device, 1, number))).boxes.shape == (number, 3)


async def test_no_arguments_but_a_list_of_nothing_and_a_constant(device: str) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: int, parts: list[torch.Tensor]) -> torch.Tensor:
            return x * scale + len(parts)

    x = torch.ones(2, 3, device=place(device))
    async with aiotrt.load(export(Scaled(), (x, 2, [])), device=device) as model:
        assert torch.equal((await model(x.cpu(), 2, [])), torch.full((2, 3), 2.0))
        assert torch.equal((await model(x.cpu(), parts=[])), torch.full((2, 3), 2.0))
