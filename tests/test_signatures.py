"""A signature is a key: calls of other dtypes, ranks, structures and constants are right, in graphs of their own."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.tensors.input_specs import KEPT
from aiotrt.tensors.structure import take_apart
from tests.tools import Affine, TwoOutputs, executor_of, frame

DTYPES = (np.float32, np.float64, np.float16, np.int32, np.int64, np.uint8)


def optional(x: torch.Tensor, y: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    return x * scale if y is None else x * scale + y


@pytest.mark.asyncio
async def test_the_first_call_fixes_nothing(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=2) as model:
        for _ in range(3):
            for dtype in DTYPES:
                for shape in ((3,), (2, 3), (1, 2, 3), ()):
                    x = np.full(shape, 2, dtype)
                    result = await model(x)
                    assert result.dtype == dtype
                    np.testing.assert_array_equal(result, x * 3 + 1)
        statistics = model.statistics()
        assert statistics.failed == 0
        assert model.inputs == (aiotrt.TensorSpec("x", (None,), torch.float32),), "the first that was accepted"


@pytest.mark.asyncio
async def test_each_signature_has_its_graphs_in_the_cache(device: str) -> None:
    async with aiotrt.load(optional, device=device, slots=1) as model:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], float]] = [
            ((frame(1),), {}, 1),
            ((frame(1), frame(2)), {}, 3),
            ((frame(1), None), {}, 1),
            ((frame(1),), {"scale": 2.0}, 2),
            ((frame(1),), {"scale": 3.0}, 3),
            ((), {"y": frame(2), "x": frame(1), "scale": 3.0}, 5),
        ]
        for round_ in range(3):
            for values, named, expected in calls:
                np.testing.assert_array_equal(await model(*values, **named), frame(expected))
            assert model.statistics().captures == len(calls), round_
        # Names do not stand in an order, and a name is as good as a position where each argument is a tensor.
        await model(y=frame(2), x=frame(1))
        await model(frame(1), y=frame(2))
        await model(scale=3.0, x=frame(1), y=frame(2))
        assert model.statistics().captures == len(calls)


@pytest.mark.asyncio
async def test_two_signatures_of_one_shape_do_not_share_a_graph(device: str) -> None:
    async with aiotrt.load(lambda x: x + x, device=device, slots=1) as model:
        for _ in range(4):
            for dtype in (np.int32, np.float32):  # of one size: one graph on the other's memory would give numbers
                x = np.array([1, 2], dtype)
                result = await model(x)
                assert result.dtype == dtype
                np.testing.assert_array_equal(result, x + x)
        assert model.statistics().captures == 2


@pytest.mark.asyncio
async def test_a_signature_that_the_engine_does_not_take_is_the_callers_mistake(device: str) -> None:
    linear = torch.nn.Linear(3, 3).to("cpu" if device == "host" else device)
    async with aiotrt.load(linear, device=device, slots=1) as model:
        for _ in range(2):
            with pytest.raises(aiotrt.EngineError, match="Linear raised RuntimeError"):
                await model(np.ones((2, 3)))  # which input is right nobody knows yet
        assert (await model(frame(1))).shape == (2, 3)
        for _ in range(2):
            message = r"\(input: float64 \(\*, \*\)\) do not work .*RuntimeError\); inputs \(input: float32 \(\*, \*\)\) do"
            with pytest.raises(aiotrt.InputError, match=message) as caught:
                await model(np.ones((2, 3)))
            assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(aiotrt.EngineError, match="Linear raised RuntimeError"):
            await model(frame(1, (2, 4)))  # of a signature that works
        assert (await model(frame(1))).shape == (2, 3)
        assert (await model(frame(1, (3,)))).shape == (3,)
        assert model.statistics().free == 1


# Fixed signatures...


@pytest.mark.asyncio
async def test_fixed_signatures_are_those_of_the_warm_up(device: str) -> None:
    warmup = [frame(0), frame(0, (2,)), (frame(0), frame(0)), {"x": np.zeros((2, 3)), "scale": 2.0}]
    async with aiotrt.load(optional, device=device, slots=1, warmup=warmup, signatures="fixed") as model:
        captures = model.statistics().captures
        assert captures == 4
        np.testing.assert_array_equal(await model(frame(1)), frame(1))
        np.testing.assert_array_equal(await model(frame(1, (4,))), frame(1, (4,)))
        np.testing.assert_array_equal(await model(frame(1), frame(2)), frame(3))
        np.testing.assert_array_equal(await model(x=np.ones((2, 3)), scale=2.0), frame(2))
        captures = model.statistics().captures
        wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
            ((np.ones((2, 3)),), {}, r"got \(x: float64 \(\*, \*\)\)"),
            ((frame(1, (1, 2, 3)),), {}, r"got \(x: float32 \(\*, \*, \*\)\)"),
            ((np.ones((2, 3)),), {"scale": 3.0}, r"got \(x: float64 \(\*, \*\), scale=3\.0\)"),
        ]
        for values, named, got in wrong:
            with pytest.raises(aiotrt.InputError, match=r"fixed as \(x: float32 \(\*, \*\)\) or .*scale=2\.0\), " + got):
                await model(*values, **named)
            with pytest.raises(aiotrt.InputError, match=got):
                await model.warmup([{"x": values[0], **named}])
        assert model.statistics().captures == captures
        assert model.statistics().free == 1


@pytest.mark.asyncio
async def test_without_a_warm_up_the_first_call_fixes_the_signature(device: str) -> None:
    async with aiotrt.load(TwoOutputs(), device=device, slots=2, signatures="fixed") as model:
        first = [model(frame(1), frame(2)), model(np.ones((2, 3)), np.ones((2, 3)))]
        results = await asyncio.gather(*first, return_exceptions=True)
        assert sum(isinstance(result, aiotrt.InputError) for result in results) == 1
        assert model.inputs is not None
        dtype = model.inputs[0].dtype
        right, wrong = (np.float32, np.float64) if dtype is torch.float32 else (np.float64, np.float32)
        for _ in range(2):
            await model(np.ones(6, right).reshape(2, 3), np.ones((2, 3), right))
            with pytest.raises(aiotrt.InputError, match=r"input 'x': expected x: float.*astype"):
                await model(np.ones((2, 3), wrong), np.ones((2, 3), wrong))


@pytest.mark.asyncio
async def test_fixed_signatures_of_items(device: str) -> None:
    batching = aiotrt.Batching(max_size=4)
    warmup = [frame(0), (frame(0), frame(0))]
    async with aiotrt.load(optional, device=device, batching=batching, warmup=warmup, signatures="fixed") as model:
        results = await asyncio.gather(*[model(frame(i)) for i in range(3)], *[model(frame(i), frame(2)) for i in range(3)])
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, frame(i if i < 3 else i - 1))
        message = r"fixed as \(x: float32 \(\*, \*\)\) or \(x: float32 \(\*, \*\), y: float32 \(\*, \*\)\), got \(x: float64"
        with pytest.raises(aiotrt.InputError, match=message):  # of items, which have no batch axis
            await model(np.ones((2, 3)))


@pytest.mark.asyncio
async def test_items_of_any_signature_are_batched_with_their_like(device: str) -> None:
    async with aiotrt.load(optional, device=device, slots=1, batching=aiotrt.Batching(max_size=8)) as model:
        items: list[tuple[Any, ...]] = []
        for i in range(4):
            items += [
                (frame(i),),
                (frame(i).astype(np.float64),),
                (frame(i, (3,)),),
                (frame(i), frame(1)),
                (frame(i), None, 2.0),
            ]
        results = await asyncio.gather(*[model(*item) for item in items])
        for item, result in zip(items, results, strict=True):
            arguments = [torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in item]
            expected = optional(*arguments)  # type: ignore[arg-type]
            assert result.dtype == item[0].dtype
            np.testing.assert_array_equal(result, expected.numpy())
        assert model.statistics().batches == {4: 5}
        assert model.inputs == (aiotrt.TensorSpec("x", (None, None), torch.float32),)


@pytest.mark.asyncio
async def test_an_item_that_does_not_work_is_named_as_an_item(device: str) -> None:
    linear = torch.nn.Linear(3, 3).to("cpu" if device == "host" else device)
    async with aiotrt.load(linear, device=device, batching=aiotrt.Batching(max_size=4)) as model:
        assert (await model(frame(1)[0])).shape == (3,)
        message = r"\(input: float64 \(\*\)\) do not work \(the engine raised RuntimeError\); .*\(input: float32 \(\*\)\) do"
        with pytest.raises(aiotrt.InputError, match=message):
            await model(np.ones(3))


# Many of them...


def reduced(x: Any) -> torch.Tensor:
    return torch.stack([tensor.sum() for tensor in take_apart(x)[1]]).sum()


def other(i: int) -> Any:
    """The input of another signature for each number."""
    kinds: list[Any] = [
        lambda: np.ones((1,) * (i % 30), np.float32),
        lambda: [np.ones(1, np.float32), i],
        lambda: {f"name {i}": np.ones(1, np.float32)},
        lambda: [np.ones(1, np.float32)] * (i % 50 + 1),
        lambda: (np.ones(1, np.float32), str(i), float(i)),
    ]
    return kinds[i % len(kinds)]()


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.proof)])
async def test_thousands_of_signatures_leave_nothing_behind(count: int) -> None:
    async with aiotrt.load(reduced, device="host", slots=2, graph_cache_entries=8) as model:
        executor = executor_of(model)
        programs: list[weakref.ref[Any]] = []
        for i in range(count):
            x = other(i)
            assert await model(x) == len(take_apart(x)[1])
            if i % (count // 10) == 0:
                programs.append(weakref.ref(next(iter(executor.cache))))
        statistics = model.statistics()
        assert statistics.completed == count
        assert statistics.graphs <= 8
        assert statistics.signatures <= 8
        assert statistics.captures > 0.7 * count
        assert statistics.evictions == statistics.captures - statistics.graphs
        assert len(executor.specs.accepted) <= KEPT
        assert len(executor.specs._recognised) <= KEPT
        assert len(executor.fallbacks) == 0
        gc.collect()
        assert sum(program() is not None for program in programs) <= 1


@pytest.mark.asyncio
async def test_reasons_without_a_graph_are_bounded() -> None:
    async with aiotrt.load(reduced, device="host", slots=1, graphs=False, graph_cache_entries=4) as model:
        for i in range(100):
            await model([frame(1), i])
        assert model.statistics().fallbacks == ("graphs=False",)


@pytest.mark.asyncio
async def test_many_signatures_that_are_refused_leave_nothing_behind() -> None:
    async with aiotrt.load(torch.nn.Linear(3, 3), device="host", slots=1) as model:
        await model(frame(1))
        for i in range(300):
            with pytest.raises((aiotrt.InputError, aiotrt.EngineError)):
                await model([frame(1), i])
        statistics = model.statistics()
        assert (statistics.graphs, statistics.captures, statistics.signatures) == (1, 1, 1)
        assert len(executor_of(model).specs.accepted) == 1
        assert (await model(frame(1))).shape == (2, 3)
