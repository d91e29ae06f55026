"""Closing, when something else happens in the same turn of the loop."""

from __future__ import annotations

import asyncio
import gc
import weakref
from unittest import mock

import pytest

import aiotrt
from aiotrt import model as model_module
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


def test_a_closed_model_keeps_nothing_that_it_used_and_no_timer() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        batching = aiotrt.Batching(max_size=2)
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0), batching=batching)
        gatherer = model._gatherer
        assert gatherer is not None
        timer = gatherer._held = asyncio.get_running_loop().call_later(1000, gatherer.pump)
        used = weakref.ref(executor_of(model))
        await model.aclose()
        assert timer.cancelled()
        del gatherer, timer
        gc.collect()
        assert used() is None

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


@pytest.mark.parametrize("turns", range(1, 6))
@pytest.mark.parametrize("seed", range(4))
def test_a_close_that_nobody_waits_for_goes_on_to_its_end(seed: int, turns: int) -> None:
    device = SimulatedDevice(seed)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        call = asyncio.ensure_future(model(frame(1)))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(model.aclose())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert (await call == 4).all()
        await asyncio.sleep(0.1)
        assert repr(model) == "<aiotrt.Model Affine: closed>"

    run_simulated(main(), device)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_ends_every_task_waits_for_a_closing_and_for_no_lease(seed: int) -> None:
    device = SimulatedDevice(seed)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0))
        slot = await model.lease().__aenter__()  # nobody leaves it
        with held_streams(device, *executor_of(model).slots):
            call = asyncio.ensure_future(model(frame(1)))
            await asyncio.sleep(0)
            closer = asyncio.ensure_future(model.aclose())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:  # as `asyncio.run` does in the end
                task.cancel()
            await asyncio.sleep(0.1)
            assert [task for task in tasks if not task.done()] == [model._closing]
            assert call.cancelled()
            assert closer.cancelled()
        async with asyncio.timeout(10.0):
            await asyncio.wait(tasks)
        assert repr(model) == "<aiotrt.Model Affine: closed>"
        with pytest.raises(aiotrt.ModelClosedError, match="and this lease with it"):
            slot.launch()

    run_simulated(main(), device)


def test_whoever_ends_every_task_does_not_wait_for_a_device_that_never_ends() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0), hang_timeout=None)
        with held_streams(device, *executor_of(model).slots):
            call = asyncio.ensure_future(model(frame(1)))
            await asyncio.sleep(0)
            closer = asyncio.ensure_future(model.aclose())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            async with asyncio.timeout(2 * model_module.LOOP_END):
                await asyncio.wait(tasks)
            assert call.cancelled()
            assert closer.cancelled()
            assert model._closing is not None
            assert model._closing.cancelled()
            assert "1 draining" in repr(model)
        await model.aclose()  # where there is another turn after all
        assert repr(model) == "<aiotrt.Model Affine: closed>"

    run_simulated(main(), device)


def test_a_closing_that_could_not_free_is_taken_up_where_it_stopped() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model, other = [await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) for _ in range(2)]
        with (
            mock.patch.object(model_module, "_start_thread", side_effect=RuntimeError("can't start new thread")),
            pytest.raises(RuntimeError, match="can't start new thread"),
        ):
            await model.aclose()
        with pytest.raises(aiotrt.ModelClosedError):
            await model(frame(1))
        await model.aclose()
        assert repr(model) == "<aiotrt.Model Affine: closed>"
        assert (await other(frame(1)) == 4).all()  # their hub was given back once
        await other.aclose()

    run_simulated(main(), device)


def test_a_closing_that_fails_to_free_says_so() -> None:
    device = SimulatedDevice(0)

    async def main() -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        free = executor_of(model).free

        def fails() -> None:
            free()
            raise OSError("it could not be freed")

        with mock.patch.object(executor_of(model), "free", fails), pytest.raises(OSError, match="could not be freed"):
            await model.aclose()

    run_simulated(main(), device)


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
