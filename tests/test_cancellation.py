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
from aiotrt.runtime.slots import State
from tests.tools import Affine, Latch, count, executor_of, frame, held, turns, until

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]


def is_idle(model: aiotrt.Model) -> bool:
    executor = executor_of(model)
    return executor._is_idle()


async def cancelled(task: asyncio.Task[object] | asyncio.Future[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_in_line_it_leaves_the_line_at_once(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(5)]
            await turns()
            assert model.statistics().waiting == 4
            await cancelled(calls[2])
            assert model.statistics().waiting == 3
            latch.open()
            assert [(await calls[i])[0, 0] for i in (0, 1, 3, 4)] == [1, 4, 10, 13]
        assert model.statistics().cancelled == 1


async def test_on_the_device_it_returns_at_once_and_the_slot_drains(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            await cancelled(call)
            assert count(model, State.DRAINING) == 1
            after = asyncio.ensure_future(model(frame(2)))
            await turns(50)
            assert not after.done()
            latch.open()
            assert (await after)[0, 0] == 7


async def test_inputs_stay_alive_until_the_device_is_done(device: str) -> None:
    class Owned(np.ndarray):  # plain arrays cannot be referred to weakly
        pass

    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            array = frame(1).view(Owned)
            alive = weakref.ref(array)
            call = asyncio.ensure_future(model(array))
            del array
            await turns()
            await cancelled(call)
            del call
            gc.collect()
            assert alive() is not None
            latch.open()
            await until(lambda: is_idle(model))
        await turns()
        gc.collect()
        assert alive() is None


async def test_while_its_graph_is_captured(device: str) -> None:
    latch = Latch("host")
    entered = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loop.call_soon_threadsafe(entered.set)
            latch._opened.wait()
            return x * 3 + 1

    async with aiotrt.load(Slow(), device=device, slots=1) as model:
        call = asyncio.ensure_future(model(frame(1)))
        await entered.wait()
        assert count(model, State.PREPARING) == 1
        await cancelled(call)
        assert count(model, State.DRAINING) == 1
        latch.open()
        assert (await model(frame(2)))[0, 0] == 7
        assert model.statistics().captures == 1


async def test_while_large_results_are_copied_out(device: str) -> None:
    big = np.ones((1024, 512), np.float32)
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=big) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(big))
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            latch.open()
        await turns(1)
        await cancelled(call)
        await until(lambda: is_idle(model))
        np.testing.assert_array_equal(await model(big), big * 4)


async def test_completed_and_cancelled_in_the_same_turn(device: str) -> None:
    """The result is there, the task has not run yet, and then it is cancelled: the slot was given back, once."""
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            executor = executor_of(model)
            finish = executor._finish

            def finish_and_cancel(*arguments: Any) -> None:
                finish(*arguments)
                call.cancel()

            executor._finish = finish_and_cancel  # type: ignore[method-assign, assignment]
            latch.open()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert is_idle(model)
        del executor._finish
        assert (await model(frame(2)))[0, 0] == 7


async def test_a_lease_that_is_prepared_and_cancelled_in_the_same_turn(device: str) -> None:
    """A worker prepared the slot and the lease's future is resolved, but its task has not run: nothing raises or is lost."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        entering = asyncio.ensure_future(model.lease((5, 5)).__aenter__())
        await until(lambda: count(model, State.PREPARING) == 1)
        await until(lambda: count(model, State.PREPARING) == 0)
        assert count(model, State.CLAIMED) == 1
        assert not entering.done(), "the task has run: this is not the state to be tested"
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert is_idle(model), "the slot stayed with a lease that nobody entered"
        assert (await model(frame(2)))[0, 0] == 7
    assert problems == []


async def test_a_lease_that_is_cancelled_while_its_prepared_slot_is_on_the_way(device: str) -> None:
    """The cancellation comes first, and the worker's callback before the task runs: nothing raises or is lost."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        executor = executor_of(model)
        built = executor._built

        def cancel_and_build(*arguments: Any) -> None:
            assert count(model, State.PREPARING) == 1
            assert entering.cancel()
            built(*arguments)

        executor._built = cancel_and_build  # type: ignore[method-assign, assignment]
        entering = asyncio.ensure_future(model.lease((5, 5)).__aenter__())
        with pytest.raises(asyncio.CancelledError):
            await entering
        del executor._built
        await until(lambda: is_idle(model))
        assert (await model(frame(2)))[0, 0] == 7
    assert problems == []


async def test_a_timeout_leaves_the_model_usable(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await model(frame(1))
        assert (await model(frame(2)))[0, 0] == 7


async def test_a_closed_coroutine_abandons_its_call(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model):
            coroutine = model(frame(1))
            coroutine.send(None)
            assert count(model, State.IN_FLIGHT) == 1
            coroutine.close()
            assert count(model, State.DRAINING) == 1
        await until(lambda: is_idle(model))


async def test_cancellation_is_not_swallowed_by_a_task_group(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model):
            with pytest.raises(ExceptionGroup) as group:
                async with asyncio.TaskGroup() as tasks:
                    for i in range(4):
                        tasks.create_task(model(frame(i)))
                    await turns()
                    raise ZeroDivisionError
            assert group.group_contains(ZeroDivisionError)
        await until(lambda: is_idle(model))
        assert model.statistics().cancelled == 4


@pytest.mark.parametrize("seed", range(4))
async def test_ten_thousand_cancellations_in_random_order(device: str, seed: int) -> None:
    """Calls, leases and maps, cancelled at every stage: afterwards all slots are free and every result was its own."""
    chance = random.Random(seed)
    wrong: list[object] = []

    async def call(i: int) -> None:
        result = await model(frame(i, chance.choice([(2, 3), (1, 3), (4, 2)])))
        if not (np.asarray(result) == 3 * i + 1).all():
            wrong.append((i, result))

    async def lease(i: int) -> None:
        async with model.lease(outputs="numpy") as slot:
            slot.inputs.x[...] = float(i)
            if chance.random() < 0.3:
                slot.launch()
                return
            result = await slot.replay()
            if not (result == 3 * i + 1).all():
                wrong.append((i, result.copy()))

    async def several(i: int) -> None:
        async for result in model.map([frame(i)] * 3):
            if not (np.asarray(result) == 3 * i + 1).all():
                wrong.append((i, result))

    async with aiotrt.load(Affine(), device=device, slots=3, max_queue=None, warmup=frame(0)) as model:
        done = 0
        while done < 2500:
            tasks = [asyncio.ensure_future(chance.choice([call, call, lease, several])(i)) for i in range(40)]
            for task in chance.sample(tasks, len(tasks)):
                await turns(chance.choice([0, 0, 0, 1, 3]))
                if chance.random() < 0.8:
                    task.cancel()
                    done += 1
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        await until(lambda: is_idle(model))
        assert wrong == []
        statistics = model.statistics()
        assert statistics.free == 3
        assert (await model(frame(2)))[0, 0] == 7
