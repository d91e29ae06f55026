"""Closing, when something else happens in the same turn of the loop."""

from __future__ import annotations

import asyncio
import gc

import pytest

import aiotrt
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, held_streams, run_simulated
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


def drop(model: aiotrt.Model) -> None:
    """What `aclose(drain=False)` does first."""
    executor_of(model).refuse()
    executor_of(model).drop()


def test_a_lease_is_taken_back_without_waiting_for_what_is_nothing_to_it() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        lease, other = model.lease(), device.stream()
        await lease.__aenter__()
        with held_streams(device, other):
            other.record()
            async with asyncio.timeout(10.0):
                await model.aclose(drain=False)

    run_simulated(main(), device)


def test_a_lease_whose_readers_cannot_be_named_is_taken_back_when_the_device_is_idle() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        striker = Striker(device)
        model = await aiotrt.load(Affine(), device=striker, slots=1, warmup=frame(0))
        slot = await model.lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        slot.launch()
        seen = slot.outputs[0].tensor.clone()
        striker.strike("record", FaultKind.PASSING)
        async with asyncio.timeout(10.0):
            await model.aclose(drain=False)
        assert device.read(seen)[0, 0] == 4

    run_simulated(main(), device)


def test_a_device_that_is_found_broken_when_a_lease_is_taken_back_is_broken_for_everybody_at_once() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        striker = Striker(device)
        model, other = [await aiotrt.load(Affine(), device=striker, slots=1, warmup=frame(0)) for _ in range(2)]
        lease = model.lease()
        await lease.__aenter__()
        striker.strike("record", FaultKind.STICKY)
        drop(model)
        assert not other.is_ready
        await asyncio.gather(model.aclose(), other.aclose())

    run_simulated(main(), device)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_of_a_lease_that_is_forgotten_while_its_model_is_dropped_is_not_freed(seed: int) -> None:
    device = SimulatedDevice(seed)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        slot = await model.lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        reader = device.stream()
        reader.wait(slot.launch())
        with device.use(reader):
            seen = slot.outputs[0].tensor.clone()
        with held_streams(device, reader):
            with pytest.warns(ResourceWarning):
                del slot
                gc.collect()
            drop(model)
            closing = asyncio.ensure_future(model.aclose(drain=False))
            await asyncio.sleep(0.1)
        await closing
        await asyncio.to_thread(device.synchronize)
        assert device.read(seen)[0, 0] == 4

    run_simulated(main(), device)
