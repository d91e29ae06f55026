"""How inputs reach functions and exported programs, and what may stand before and after an engine."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim, ExportedProgram, export

import aiotrt
from tests.test_engines import FLOAT, save
from tests.tools import Affine, frame

X, Y = frame(5), frame(2)


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


# Parameters; all of these compute x - y (y = 0.5 where it may be left out), so that a mix-up shows...


def keyword_only(x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
    return x - y


def optional(x: torch.Tensor, scale: torch.Tensor | None = None, y: torch.Tensor | float = 0.5) -> torch.Tensor:
    return (x if scale is None else x * scale) - y


def positional_only(x: torch.Tensor, y: torch.Tensor, /) -> torch.Tensor:
    return x - y


def any_number(*tensors: torch.Tensor) -> torch.Tensor:
    return tensors[0] - tensors[1]


def any_number_and_keyword(*tensors: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return tensors[0] - y


def and_any_keywords(x: torch.Tensor, y: torch.Tensor | float = 0.5, **_: object) -> torch.Tensor:
    return x - y


class Forward(torch.nn.Module):
    """As many published models have it."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, return_dict: bool = False, **_: object) -> torch.Tensor:
        return x - y


class Caller:
    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y


CALLS: list[tuple[object, tuple[object, ...], dict[str, object], float]] = [
    (keyword_only, (X, Y), {}, 3),
    (keyword_only, (X,), {"y": Y}, 3),
    (keyword_only, (), {"y": Y, "x": X}, 3),
    (optional, (X,), {}, 4.5),
    (optional, (), {"x": X}, 4.5),
    (optional, (X,), {"y": Y}, 3),
    (optional, (), {"y": Y, "x": X}, 3),
    (optional, (X, Y), {}, 9.5),
    (optional, (X, Y, Y), {}, 8),
    (positional_only, (X, Y), {}, 3),
    (positional_only, (), {"y": Y, "x": X}, 3),
    (any_number, (X, Y), {}, 3),
    (any_number, (X, Y, Y), {}, 3),
    (any_number_and_keyword, (X,), {"y": Y}, 3),
    (and_any_keywords, (X,), {}, 4.5),
    (and_any_keywords, (X, Y), {}, 3),
    (and_any_keywords, (), {"x": X, "y": Y}, 3),
    (and_any_keywords, (), {"y": Y, "x": X}, 3),
    (and_any_keywords, (), {"more": X, "x": X}, 4.5),
    (Forward(), (), {"y": Y, "x": X}, 3),
    (Forward(), (X,), {"y": Y}, 3),
    (Caller(), (), {"y": Y, "x": X}, 3),
    (functools.partial(optional, y=2), (X,), {}, 3),
    (functools.partial(optional, scale=None, y=2), (), {"x": X}, 3),
    (torch.sub, (X, Y), {}, 3),
]


def name_of(case: tuple[Any, ...]) -> str:
    function, values, named, _ = case
    function = getattr(function, "func", function)
    name = getattr(function, "__name__", type(function).__name__)
    return f"{name}-{len(values)}-{'-'.join(named)}"


@pytest.mark.asyncio
@pytest.mark.parametrize("case", CALLS, ids=name_of)
async def test_inputs_reach_the_parameters_that_they_name(device: str, case: tuple[Any, ...]) -> None:
    function, values, named, expected = case
    async with aiotrt.load(function, device=device) as model:
        for _ in range(2):
            np.testing.assert_array_equal(await model(*values, **named), frame(expected))
        if len(named) == 2:  # names do not stand in an order
            turned = dict(reversed(named.items()))
            np.testing.assert_array_equal(await model(*values, **turned), frame(expected))


@pytest.mark.asyncio
async def test_a_skipped_input_stays_skipped(device: str) -> None:
    """Where signatures are fixed, the warm-up says which inputs there are."""
    async with aiotrt.load(optional, device=device, warmup=[{"x": X, "y": Y}], signatures="fixed") as model:
        with pytest.raises(aiotrt.InputError, match="missing input 'y'"):
            await model(x=X)
        with pytest.raises(aiotrt.InputError, match="no input 'scale'; the inputs are x, y"):
            await model(x=X, y=Y, scale=Y)
        np.testing.assert_array_equal(await model(X, Y), frame(3))


@pytest.mark.asyncio
async def test_first_calls_at_once_may_name_their_inputs_in_any_order(device: str) -> None:
    async with aiotrt.load(Subtract(), device=device, slots=2) as model:
        results = await asyncio.gather(model(x=X, y=Y), model(y=Y, x=X), model(X, y=Y), model(X, Y))
        for result in results:
            np.testing.assert_array_equal(result, frame(3))


# Exported programs...


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


class Subtract(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y


def exported(device: str, rows: object = None) -> tuple[Net, ExportedProgram]:
    net = Net().eval().to(place(device))
    shapes = None if rows is None else {"x": {0: rows}}
    return net, export(net, (torch.ones(4, 3, device=place(device)),), dynamic_shapes=shapes)


async def like_the_module(model: aiotrt.Model, net: Net, rows: int, device: str) -> None:
    x = torch.rand(rows, 3)
    with torch.no_grad():
        expected = net(x.to(place(device))).cpu()
    torch.testing.assert_close(await model(x), expected)
    torch.testing.assert_close(torch.from_numpy(await model(x.numpy())), expected)


@pytest.mark.asyncio
async def test_a_static_program(device: str) -> None:
    net, program = exported(device)
    async with aiotrt.load(program, device=device) as model:
        assert model.inputs == (aiotrt.TensorSpec("x", (4, 3), torch.float32),)
        await like_the_module(model, net, 4, device)
        for shape in ((3, 3), (5, 3), (4, 4), (1, 3)):
            message = re.escape(f"input 'x': expected x: float32 (4, 3), got shape {shape}")
            with pytest.raises(aiotrt.InputError, match=message):
                await model(frame(1, shape))
        async with model.lease() as slot:  # the declared shapes are enough
            slot.inputs.x[...] = frame(1, (4, 3))
            assert (await slot.replay()).shape == (4, 2)
        await like_the_module(model, net, 4, device)


@pytest.mark.asyncio
@pytest.mark.parametrize("dim", [Dim("rows"), Dim.AUTO, Dim.DYNAMIC], ids=["named", "auto", "dynamic"])
async def test_a_dynamic_program(device: str, dim: object) -> None:
    net, program = exported(device, dim)
    async with aiotrt.load(program, device=device) as model:
        for rows in (2, 7, 4, 2, 100):
            await like_the_module(model, net, rows, device)
        with pytest.raises(aiotrt.InputError, match=r"expected x: float32 \(\*, 3\), got shape \(4, 4\)"):
            await model(frame(1, (4, 4)))


@pytest.mark.asyncio
async def test_a_program_with_a_bounded_extent(device: str) -> None:
    net, program = exported(device, Dim("rows", min=2, max=8))
    async with aiotrt.load(program, device=device) as model:
        for rows in (2, 8):
            await like_the_module(model, net, rows, device)
        with pytest.raises(aiotrt.InputError, match=r"got shape \(9, 3\).*\(8, 3\)"):
            await model(frame(1, (9, 3)))
        await like_the_module(model, net, 4, device)


@pytest.mark.asyncio
async def test_a_program_whose_extents_must_agree(device: str) -> None:
    a, b = torch.ones(2, 4, 3, device=place(device))  # torch takes inputs that are one tensor for one input
    rows = Dim("rows")
    program = export(Subtract(), (a, b), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    async with aiotrt.load(program, device=device) as model:
        np.testing.assert_array_equal(await model(X, y=Y), frame(3))
        with pytest.raises((aiotrt.InputError, aiotrt.EngineError)):
            await model(frame(1, (2, 3)), frame(1, (5, 3)))
        np.testing.assert_array_equal(await model(y=Y, x=X), frame(3))
        assert model.statistics().free == 2


@pytest.mark.asyncio
async def test_a_program_exported_with_keywords(device: str) -> None:
    a, b = torch.ones(2, 2, 3, device=place(device))
    async with aiotrt.load(export(Subtract(), (a,), kwargs={"y": b}), device=device) as model:
        np.testing.assert_array_equal(await model(X, Y), frame(3))
        np.testing.assert_array_equal(await model(y=Y, x=X), frame(3))


# Around the engine...


@pytest.mark.asyncio
async def test_preprocess_may_return_a_tuple_or_a_dict_by_name(device: str) -> None:
    def split(xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return xy[0], xy[1]

    def named(xy: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": xy[1], "x": xy[0]}

    a, b = torch.ones(2, 2, 3, device=place(device))
    both = np.stack([X, Y])
    for engine in (Subtract(), export(Subtract(), (a, b)), keyword_only):
        for preprocess in (split, named):
            async with aiotrt.load(engine, device=device, preprocess=preprocess) as model:
                np.testing.assert_array_equal(await model(both), frame(3))
                np.testing.assert_array_equal(await model(xy=both), frame(3))
                with pytest.raises(aiotrt.InputError, match="there is no input 'x'; the inputs are xy"):
                    await model(x=both)


@pytest.mark.asyncio
async def test_preprocess_for_an_onnx_model(tmp_path: Path) -> None:
    path = save(tmp_path / "difference.onnx", "Sub", {"x": FLOAT, "y": FLOAT}, {"z": FLOAT})

    def named(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": pixels.float() / 2, "x": pixels.float()}

    async with aiotrt.load(path, preprocess=named) as model:
        result = await model(np.full((3, 4), 6, np.uint8))
        np.testing.assert_array_equal(result, frame(3, (3, 4)))


@pytest.mark.asyncio
async def test_postprocess_may_return_a_tensor_a_tuple_or_a_dict(device: str) -> None:
    results: list[tuple[Callable[..., Any], Any, tuple[Any, ...]]] = [
        (lambda y: y + 1, np.ndarray, ()),
        (lambda y: (y + 1, y), tuple, (0, 1)),
        (lambda y: {"more": y + 1, "same": y}, dict, ("more", "same")),
    ]
    for postprocess, kind, keys in results:
        async with aiotrt.load(Affine(), device=device, postprocess=postprocess) as model:
            result: Any = await model(X)
            assert type(result) is kind
            if not keys:
                np.testing.assert_array_equal(result, frame(17))
            else:
                np.testing.assert_array_equal(result[keys[0]], frame(17))
                np.testing.assert_array_equal(result[keys[1]], frame(16))
            statistics = model.statistics()
            assert (statistics.replays, statistics.fallbacks) == (1, ())


def raising(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no good")


PREPROCESS: dict[str, tuple[Callable[..., Any], str]] = {
    "dtype": (lambda x: x.double(), "preprocess returned float64 (4, 3); the engine takes x: float32 (4, 3)"),
    "shape": (lambda x: x[:2], "preprocess returned float32 (2, 3); the engine takes x: float32 (4, 3)"),
    "too many": (lambda x: (x, x), "preprocess returned 2 tensors; the engine takes 1 (x: float32 (4, 3))"),
    "other name": (lambda x: {"z": x}, "preprocess returned no 'x'; the engine takes ['x']"),
    "nothing": (lambda x: None, "preprocess returned nothing (None)"),
    "nested": (lambda x: [[x, x]], "preprocess returned 2 tensors; the engine takes 1 (x: float32 (4, 3))"),
    "raises": (raising, "raised ValueError"),
}


@pytest.mark.asyncio
async def test_preprocess_that_does_not_fit(device: str) -> None:
    _, program = exported(device)
    for preprocess, message in PREPROCESS.values():
        options: dict[str, Any] = {"device": device, "preprocess": preprocess}
        async with aiotrt.load(program, **options) as model:
            with pytest.raises(aiotrt.EngineError) as caught:
                await model(frame(1, (4, 3)))
            assert message in str(caught.value)
            assert model.statistics().free == 2
        with pytest.raises(aiotrt.EngineError):
            _ = await aiotrt.load(program, warmup=[frame(1, (4, 3))], **options)


@pytest.mark.asyncio
async def test_whoever_raises_is_named(device: str) -> None:
    cases: list[dict[str, Any]] = [{"preprocess": raising}, {"postprocess": raising}]
    for options in cases:
        async with aiotrt.load(Affine(), device=device, **options) as model:
            with pytest.raises(aiotrt.EngineError, match=rf"{next(iter(options))} raised ValueError.*no good"):
                await model(X)
            assert model.statistics().free == 2
