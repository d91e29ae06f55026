"""Closing, when something else happens in the same turn of the loop."""

from __future__ import annotations

import asyncio

import pytest

import aiotrt
from aiotrt.testing import SimulatedDevice
from tests.simulated import run_simulated
from tests.tools import Affine, executor_of, frame


def test_a_lease_that_is_granted_when_the_model_is_dropped_is_told_so() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        first, second = model.lease(), model.lease()
        await first.__aenter__()
        waiting = asyncio.ensure_future(second.__aenter__())
        await asyncio.sleep(0)
        await first.__aexit__(None, None, None)  # does not suspend: the second is granted, and has not run yet
        closing = asyncio.ensure_future(model.aclose(drain=False))
        executor_of(model).refuse()  # what `aclose` does first; its task has not run yet either
        executor_of(model).drop()
        with pytest.raises(aiotrt.ModelClosedError, match="closed before this lease could be entered"):
            await waiting
        await closing

    run_simulated(main(), device)


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("seed", range(4))
def test_a_close_that_is_cancelled_still_closes(seed: int, turns: int) -> None:
    device = SimulatedDevice(seed)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        closing = asyncio.ensure_future(model.aclose())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        await model.aclose()
        assert repr(model) == "<aiotrt.Model Affine: closed>"

    run_simulated(main(), device)  # which looks whether graphs, engines, streams and threads are closed


def test_what_the_holder_of_a_revoked_lease_reads_is_not_freed_under_it() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        lease = model.lease()
        slot = await lease.__aenter__()
        slot.inputs.x[...] = frame(1)
        slot.launch()
        seen = slot.outputs[0].tensor.clone()
        await model.aclose(drain=False)
        await lease.__aexit__(None, None, None)
        del slot, lease
        await asyncio.to_thread(device.synchronize)
        assert device.read(seen)[0, 0] == 4

    run_simulated(main(), device)
