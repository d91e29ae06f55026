"""Host inputs that a thread copies, which then launches: right under load, in both builds."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from tests.tools import executor_of

pytestmark = [pytest.mark.asyncio, pytest.mark.gpu]

#: Elements of float32: below the size from which threads copy, above it, and above a mebibyte.
SIZES = (1 << 10, 1 << 17, 3 << 17)


def summed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, (x * 2).sum(dtype=torch.float64).reshape(1)


@pytest.mark.parametrize("kind", ["numpy", "torch", "strided"])
@pytest.mark.parametrize("size", SIZES)
async def test_many_callers_get_their_own_results(size: int, kind: str) -> None:
    def array(value: float) -> Any:
        if kind == "strided":
            return np.full((size, 2), value, np.float32)[:, 0]
        return np.full(size, value, np.float32) if kind == "numpy" else torch.full((size,), value)

    async with aiotrt.load(summed, device="cuda", slots=4, warmup=(array(0), array(0))) as model:
        for _ in range(3):
            await model(array(1), array(2))
        for _ in range(8):
            results = await asyncio.gather(*[model(array(i), array(3 * i)) for i in range(32)])
            for i, (both, twice) in enumerate(results):
                assert (np.asarray(both) == 4 * i).all()
                assert float(np.asarray(twice)[0]) == 2.0 * i * size
        statistics = model.statistics()
        assert statistics.misses <= 4
        assert statistics.free == 4


async def test_callers_that_leave_disturb_nobody() -> None:
    choose = random.Random(7)
    size = SIZES[2]
    async with aiotrt.load(lambda x: x + 1, device="cuda", slots=3, warmup=np.zeros(size, np.float32)) as model:
        for _ in range(20):
            calls = [asyncio.ensure_future(model(np.full(size, i, np.float32))) for i in range(16)]
            for call in choose.sample(calls, 8):
                for _ in range(choose.randint(0, 6)):
                    await asyncio.sleep(0)
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            for i, result in enumerate(results):
                assert isinstance(result, asyncio.CancelledError) or np.all(result == i + 1)
        assert executor_of(model).counters.failed == 0


async def test_inputs_are_freed_after_the_call() -> None:
    size = SIZES[2]

    class Tracked(np.ndarray[Any, Any]):
        pass

    async with aiotrt.load(lambda x: x + 1, device="cuda", slots=2, warmup=np.zeros(size, np.float32)) as model:
        references = []
        for i in range(8):
            owner = np.full(size, i, np.float32).view(Tracked)
            references.append(weakref.ref(owner))
            plain = np.asarray(owner)
            results = await asyncio.gather(model(plain), model(plain))
            assert all((result == i + 1).all() for result in results)
            del owner, plain, results
        await model(np.zeros(size, np.float32))
        gc.collect()
        assert sum(reference() is not None for reference in references) == 0


@pytest.mark.parametrize("size", SIZES)
async def test_calls_from_the_host_are_right_between_calls_of_other_kinds(size: int) -> None:
    """The graph's copies, once set for the slot's own host memory, are set anew after anything else used them."""
    choose = random.Random(size)

    def host(value: float) -> Any:
        return np.full(size, value, np.float32)

    def device(value: float) -> torch.Tensor:
        return torch.full((size,), float(value), device="cuda")

    async with aiotrt.load(summed, device="cuda", slots=1, warmup=(host(0), host(0))) as model:
        for i in range(60):
            way = choose.choice(["host", "host", "host", "mixed", "device", "lease", "staged lease"])
            if way.endswith("lease"):
                async with model.lease(outputs="numpy" if way == "staged lease" else None) as slot:
                    for buffer, value in zip(slot.inputs, (i, 1), strict=True):
                        buffer[...] = host(value) if way == "staged lease" else device(value)
                    both = (await slot.replay())[0]
                    assert bool((both == i + 1).all())
                    del both
                continue
            x, y = (host(i) if way == "host" else device(i)), (device(1) if way == "device" else host(1))
            results = await model(x, y)
            assert bool((results[0] == i + 1).all()), (i, way)
            assert float(results[1][0]) == 2.0 * i * size
