"""Dynamic batching through the public API: single items in, single items out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.batching.item import Item
from aiotrt.runtime.request import Request
from aiotrt.runtime.slots import State
from tests.tools import Affine, TwoOutputs, count, executor_of, frame, held, turns, until

pytestmark = pytest.mark.asyncio


def load(device: str, source: Any = None, *, slots: int = 1, warmup: object = (), **options: Any) -> aiotrt.Model:
    names = ("max_queue", "outputs", "graphs", "preprocess", "signatures")
    loading = {name: options.pop(name) for name in names if name in options}
    model: aiotrt.Model = aiotrt.load(
        Affine() if source is None else source,
        device=device, slots=slots, warmup=warmup, batching=aiotrt.Batching(**options), **loading,
    )  # fmt: skip
    return model


def calls(model: aiotrt.Model, values: Sequence[float], **options: Any) -> list[asyncio.Future[Any]]:
    return [asyncio.ensure_future(model(frame(value), **options)) for value in values]


def right(result: object, value: float) -> bool:
    return np.array_equal(np.asarray(result), frame(3 * value + 1))


async def test_a_burst_is_one_batch_and_everyone_gets_his_own(device: str) -> None:
    async with load(device, warmup=frame(0)) as model:
        results = await asyncio.gather(*[model(frame(value)) for value in range(11)])
        assert all(map(right, results, range(11)))
        assert all(result.base is None for result in results), "no aliases"
        statistics = model.statistics()
        assert (statistics.batches, statistics.padding) == ({11: 1}, 5)
        assert (statistics.submitted, statistics.completed, statistics.waiting) == (11, 11, 0)
        assert statistics.replays == 1


async def test_items_gather_while_every_slot_is_busy_and_go_when_one_is_free(device: str) -> None:
    async with load(device, warmup=frame(0), max_size=8) as model:
        with held(model):
            first = calls(model, [0])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            rest = calls(model, range(1, 12))
            await turns()
            assert model.statistics().waiting == 11
            assert model.statistics().batches == {1: 1}
        assert all(map(right, await asyncio.gather(*first, *rest), range(12)))
        assert model.statistics().batches == {1: 1, 3: 1, 8: 1}


async def test_warmup_captures_every_size_on_every_slot(device: str) -> None:
    async with load(device, slots=2, max_size=6) as model:
        await model.warmup(frame(0))
        assert model.statistics().captures == 2 * len((1, 2, 4, 6))
        await model.warmup((2, 3))  # the inputs are known now: a shape will do
        for number in range(1, 7):
            await asyncio.gather(*calls(model, range(number)))
        assert model.statistics().captures == 8
        assert model.inputs is not None
        assert [spec.shape for spec in model.inputs] == [(None, None)], "an item's, without the batch axis"


@pytest.mark.parametrize("source", [lambda x: x.sum(), lambda x: {"kept": x, "lost": x.mean(dim=0)}], ids=["bare", "named"])
async def test_an_output_without_the_batch_axis_is_named(device: str, source: object) -> None:
    name = "output" if isinstance(source(torch.ones(1)), torch.Tensor) else "lost"  # type: ignore[operator]
    message = rf"output '{name}' has shape \(.*\) for a batch of \d: with batching, the first extent of every output must be"
    async with load(device, source) as model:
        with pytest.raises(aiotrt.EngineError, match=message):
            await model(frame(1))
        with pytest.raises(aiotrt.EngineError, match=message):
            await model(torch.ones(2, 3, device="cpu" if device == "host" else device))
        await until(lambda: count(model, State.FREE) == 1)
    with pytest.raises(aiotrt.EngineError, match=message):
        _ = await load(device, source, warmup=frame(1))


async def test_a_bad_item_is_refused_and_its_neighbours_are_served(device: str) -> None:
    async with load(device, warmup=frame(0), signatures="fixed") as model:
        items = [frame(0), frame(1).astype(np.float64), frame(2), frame(3)[None], frame(4), "no tensor"]
        results = await asyncio.gather(*[model(item) for item in items], return_exceptions=True)
        assert all(right(results[i], i) for i in (0, 2, 4))
        assert all(isinstance(results[i], aiotrt.InputError) for i in (1, 3, 5))
        assert "a single item, without the batch axis" in str(results[3])
        assert model.statistics().batches == {3: 1}


async def test_a_first_item_that_the_engine_does_not_take_is_alone_with_its_error(device: str) -> None:
    def only_floats(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("floats, please")
        return x * 3 + 1

    async with load(device, only_floats) as model:
        items = [frame(0).astype(np.int32), frame(1), frame(2), frame(3).astype(np.int32)]
        results = await asyncio.gather(*[model(item) for item in items], return_exceptions=True)
        assert right(results[1], 1)
        assert right(results[2], 2)
        assert isinstance(results[0], aiotrt.EngineError)
        assert isinstance(results[3], aiotrt.EngineError)


async def test_an_item_that_leaves_no_extent_for_the_batch_is_refused(device: str) -> None:
    most = np.broadcast_to(np.zeros(()), (1,) * (64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0b1" else 32))
    async with load(device) as model:
        with held(model):
            first = asyncio.ensure_future(model(frame(1)))
            await turns()
            bad = asyncio.ensure_future(model(most.astype(np.float32)))
            await turns()
        with pytest.raises(aiotrt.InputError, match=f"'x' has {most.ndim} extents, which leaves none for the batch"):
            await bad
        assert right(await first, 1)
        assert right(await model(frame(2)), 2)
        assert model.statistics().submitted == 2


async def test_a_batch_that_fails_fails_its_members_and_nobody_else(device: str) -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative")
        return x * 3 + 1

    async with load(device, positive, max_size=4) as model:
        assert right(await model(frame(7)), 7)
        values = [0, 1, -5, 3, 4, 5]
        results = await asyncio.gather(*calls(model, values), return_exceptions=True)
        assert all(isinstance(result, aiotrt.EngineError) for result in results[:4])
        assert right(results[4], 4)
        assert right(results[5], 5)
        assert model.statistics().failed == 4
        assert right(await model(frame(8)), 8)


async def test_ragged_shapes_are_grouped(device: str) -> None:
    shapes = [(1, 3), (2, 3), (4,)]
    async with load(device, lambda x: x * 3 + 1, max_size=4, signatures="fixed") as model:
        with held(model):
            results = [asyncio.ensure_future(model(frame(i, shapes[i % 2]))) for i in range(10)]
            await turns()
        for i, result in enumerate(await asyncio.gather(*results)):
            np.testing.assert_array_equal(result, frame(3 * i + 1, shapes[i % 2]))
        with pytest.raises(aiotrt.InputError):
            await model(frame(0, shapes[2]))  # of another rank


async def test_several_inputs_and_outputs_and_items_without_extents(device: str) -> None:
    async with load(device, TwoOutputs()) as model:
        with pytest.raises(aiotrt.InputError, match="missing input 'y'"):
            await model(np.float32(1) * np.ones(()))
        results = await asyncio.gather(
            *[model(np.array(i, np.float32), y=np.array(2, np.float32)) for i in range(5)]
        )  # fmt: skip
        for i, result in enumerate(results):
            assert (result.total.shape, result.total, result.product) == ((), i + 2, i * 2)
        assert model.statistics().batches == {5: 1}


async def test_every_kind_of_item(device: str) -> None:
    where = "cpu" if device == "host" else device
    async with load(device, lambda x: x * 3 + 1) as model:
        numpy, strided, host, there = await asyncio.gather(
            model(frame(1)),
            model(frame(2, (3, 2)).T),
            model(torch.full((2, 3), 3.0)),
            model(torch.full((3, 2), 4.0, device=where).T),
        )
        assert right(numpy, 1)
        assert right(strided, 2)
        assert right(host, 3)
        assert right(there.cpu(), 4)
        assert isinstance(host, torch.Tensor)
        assert there.device.type == where.split(":")[0]
    async with load(device, lambda x: x * 3 + 1, outputs="device") as model:
        results = await asyncio.gather(*calls(model, range(3)))
        assert all(right(result.cpu(), value) for value, result in enumerate(results))
        assert len({result.untyped_storage().data_ptr() for result in results}) == 3, "no aliases"
    async with load(device, lambda x: x + 1) as model:
        items = [torch.full((4,), i, dtype=torch.bfloat16, device=where) for i in range(3)]
        for i, result in enumerate(await asyncio.gather(*map(model, items))):
            assert result.dtype is torch.bfloat16
            assert torch.equal(result.cpu(), torch.full((4,), i + 1, dtype=torch.bfloat16))


async def test_names_tell_items_apart_that_are_otherwise_equal(device: str) -> None:
    def either(*values: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return values[0] * 3 + 1 if values else named["x"] - 1

    async with load(device, either) as model:
        for value in range(4):  # from the second on, a signature is recognised
            assert np.array_equal(await model(x=frame(value)), frame(value - 1))
            assert right(await model(frame(value)), value)
            assert np.array_equal(await model(x=frame(value)), frame(value - 1))


async def test_an_item_that_is_reshaped_while_it_waits_fails_alone(device: str) -> None:
    async with load(device, warmup=frame(0)) as model:
        assert right(await model(frame(1)), 1)
        with held(model):
            first = calls(model, [2])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            items = [frame(value) for value in (3, 4, 5)]
            waiting = [asyncio.ensure_future(model(item)) for item in items]
            await turns()
            items[1].resize((1, 6), refcheck=False)
        assert right(await first[0], 2)
        with pytest.raises(aiotrt.InputError, match=r"changed while .* expected shapes \(\(2, 3\),\), got \(\(1, 6\),\)"):
            await waiting[1]
        assert right(await waiting[0], 3)
        assert right(await waiting[2], 5)
        statistics = model.statistics()
        assert (statistics.failed, statistics.batches) == (1, {1: 2, 2: 1})


async def test_large_items_are_copied_by_a_worker(device: str) -> None:
    async with load(device, max_size=4) as model:
        shape = (3, 400, 400)
        results = await asyncio.gather(*[model(frame(i, shape)) for i in range(6)])
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, frame(3 * i + 1, shape))


async def test_parity_with_the_unbatched_call(device: str) -> None:
    """Bit for bit where every element is computed by itself; else nearly, since the kernel may differ by size."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    network.eval().to("cpu" if device == "host" else device)
    items = np.random.default_rng(0).standard_normal((23, 3, 8, 8), np.float32)
    for source, exact in ((lambda x: torch.tanh(x) * 3 + 1, True), (network, False)):
        async with load(device, source, max_size=8, slots=2) as model, aiotrt.load(source, device=device) as plain:
            for got, item in zip(await asyncio.gather(*map(model, items)), items, strict=True):
                expected = (await plain(item[None]))[0]
                if exact:
                    np.testing.assert_array_equal(got, expected)
                else:
                    np.testing.assert_allclose(got, expected, rtol=2e-3 if device != "host" else 1e-5, atol=1e-3)


async def test_an_engine_for_one_size_of_batch_is_padded_to_it(device: str) -> None:
    example = torch.zeros(4, 2, 3, device="cpu" if device == "host" else device)
    program = torch.export.export(Affine(), (example,))
    async with load(device, program) as model:
        results = await asyncio.gather(*calls(model, range(6)))
        assert all(map(right, results, range(6)))
        assert (model.statistics().batches, model.statistics().padding) == ({2: 1, 4: 1}, 2)
    with pytest.raises(aiotrt.InputError, match="has none that the engine takes: batches of 4 to 4"):
        _ = await load(device, program, sizes=[1, 2])


@pytest.mark.parametrize("overload", ["reject", "drop_oldest", "latest", "wait"])
async def test_a_map_takes_no_place_in_the_queue_and_loses_none(device: str, overload: str) -> None:
    async with load(device, warmup=frame(0), max_size=2, max_queue=2, overload=overload) as model:
        results = model.map(map(frame, range(12)), in_flight=8)
        with held(model):
            first = asyncio.ensure_future(anext(results))
            await until(lambda: model.statistics().waiting == 6)
            single = calls(model, [20, 21])
            await turns()
            assert not any(call.done() for call in single)
            single += calls(model, [22])
            await turns()
            refused = {"reject": [2], "wait": []}.get(overload, [0])
            assert [i for i, call in enumerate(single) if call.done()] == refused
        assert all(map(right, [await first, *[result async for result in results]], range(12)))
        for i, call in enumerate(single):
            if i in refused:
                with pytest.raises(aiotrt.QueueFullError):
                    await call
            else:
                assert right(await call, 20 + i)


async def test_map_is_item_by_item(device: str) -> None:
    async with load(device, max_size=4, slots=2, warmup=frame(0), max_queue=0) as model:
        values = range(50)
        results = [result async for result in model.map(map(frame, values))]
        assert len(results) == 50
        assert all(map(right, results, values))
        assert max(model.statistics().batches) == 4
        async for result in model.map(map(frame, values)):
            assert right(result, 0)
            break
        await until(lambda: count(model, State.FREE) == 2)
        statistics = model.statistics()
        assert statistics.submitted == statistics.completed + statistics.cancelled


async def test_leases_are_refused_and_arguments_checked(device: str) -> None:
    async with load(device) as model:
        with pytest.raises(aiotrt.UsageError, match="no slots of a caller's own; load the engine without batching="):
            model.lease()
        for options in (
            {"priority": 2},
            {"priority": -1},
            {"priority": True},
            {"deadline": "1"},
            {"deadline": float("nan")},
            {"deadline": 10**400},
            {"deadline": -(10**5000)},
        ):
            with pytest.raises(aiotrt.InputError, match=rf"{next(iter(options))} must be"):
                await model(frame(1), **options)
        with pytest.raises(aiotrt.DeadlineError):
            await model(frame(1), deadline=0)
        assert right(await model(frame(1), deadline=100, priority=0), 1)
    with pytest.raises(aiotrt.InputError, match=r"batching must be an aiotrt.Batching or None, got 4"):
        _ = aiotrt.load(Affine(), batching=4)  # type: ignore[call-overload]
    async with aiotrt.load(lambda x, deadline: x + deadline, device=device) as plain:
        named: dict[str, Any] = {"deadline": frame(2)}
        assert (await plain(frame(1), **named) == 3).all(), "without batching, a name like any other"


async def test_deadlines_that_are_due_at_once(device: str) -> None:
    async with load(device, warmup=frame(0)) as model:
        with held(model):
            first = calls(model, [0])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            late = [asyncio.ensure_future(model(frame(i), deadline=i * 1e-5)) for i in (3, 1, 2)]
            results = await asyncio.gather(*late, return_exceptions=True)
            assert all(isinstance(result, aiotrt.DeadlineError) for result in results)
            assert (model.statistics().expired, model.statistics().waiting) == (3, 0)
        assert right(await first[0], 0)


async def test_priorities(device: str) -> None:
    async with load(device, max_size=2, warmup=frame(0)) as model:
        order: list[float] = []

        async def call(value: float, priority: int | None) -> None:
            assert right(await model(frame(value), priority=priority), value)
            order.append(value)

        with held(model):
            first = asyncio.ensure_future(call(0, None))
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            rest = [asyncio.ensure_future(call(value, 1 if value < 5 else 0)) for value in range(1, 9)]
            await turns()
        await asyncio.gather(first, *rest)
        assert order == [0, 5, 6, 7, 8, 1, 2, 3, 4]


@pytest.mark.parametrize("overload", ["reject", "drop_oldest", "latest", "wait"])
async def test_overload(device: str, overload: str) -> None:
    async with load(device, max_size=2, max_queue=3, overload=overload, warmup=frame(0)) as model:
        with held(model):
            first = calls(model, [0])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            rest = calls(model, range(1, 7))
            await turns()
            assert model.statistics().waiting == {"reject": 3, "drop_oldest": 3, "latest": 2, "wait": 6}[overload]
        results = await asyncio.gather(*first, *rest, return_exceptions=True)
        served = [value for value, result in enumerate(results) if not isinstance(result, BaseException)]
        assert all(right(results[value], value) for value in served)
        assert served == {
            "reject": [0, 1, 2, 3], "drop_oldest": [0, 4, 5, 6], "latest": [0, 5, 6], "wait": [0, 1, 2, 3, 4, 5, 6]
        }[overload]  # fmt: skip
        refused = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(error, aiotrt.QueueFullError) for error in refused)
        assert model.statistics().rejected == len(refused)


async def test_no_queue_at_all_still_serves_who_finds_a_free_slot(device: str) -> None:
    async with load(device, max_size=2, max_queue=0, slots=2, warmup=frame(0)) as model:
        with held(model):
            results = calls(model, range(6))
            await turns()
        outcomes = await asyncio.gather(*results, return_exceptions=True)
        assert right(outcomes[0], 0)
        assert isinstance(outcomes[-1], aiotrt.QueueFullError)
        assert right(await model(frame(9)), 9)


async def test_ten_thousand_cancellations_in_random_order(device: str) -> None:
    choose = random.Random(0)
    async with load(device, max_size=16, slots=2, max_queue=None, warmup=frame(0)) as model:
        with held(model):
            tasks = calls(model, range(10_000), deadline=3600.0)
            await until(lambda: model.statistics().submitted == 10_000)
            await turns()
            doomed = choose.sample(range(10_000), 9_900)
            for i in doomed:
                tasks[i].cancel()
                if choose.random() < 0.01:
                    await asyncio.sleep(0)
            await turns()
            assert model.statistics().waiting <= 100
        for i, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
            assert isinstance(result, asyncio.CancelledError) or right(result, i)
        statistics = model.statistics()
        assert (statistics.cancelled, statistics.completed, statistics.waiting) == (9_900, 100, 0)
        await until(lambda: count(model, State.FREE) == 2)
        assert right(await model(frame(5)), 5)
        scheduled = getattr(asyncio.get_running_loop(), "_scheduled", [])  # asyncio's loop sweeps what is cancelled
        assert len(scheduled) < 300, "memory for those who are done"


async def test_everybody_cancelled_lets_the_slot_drain(device: str) -> None:
    async with load(device, warmup=frame(0)) as model:
        with held(model):
            tasks = calls(model, range(3))
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert count(model, State.DRAINING) == 1
            late = calls(model, [7])
            await turns()
        assert right(await late[0], 7)
        assert model.statistics().cancelled == 3


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("delay", [0.0, 100.0])
async def test_closing(device: str, drain: bool, delay: float) -> None:
    model = await load(device, max_size=2, warmup=frame(0), max_delay=delay)
    with held(model):
        tasks = calls(model, range(7))
        await turns()
        closing = asyncio.ensure_future(model.aclose(drain=drain))
        await turns()
        assert not closing.done()
    await closing
    for value, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
        assert right(result, value) if drain else isinstance(result, aiotrt.ModelClosedError)
    with pytest.raises(aiotrt.ModelClosedError):
        await model(frame(0))


@pytest.mark.parametrize("deadline", [None, 60.0])
async def test_who_is_served_leaves_no_memory_behind(device: str, deadline: float | None) -> None:
    async with load(device, warmup=frame(0)) as model:
        gc.disable()
        try:
            item = frame(1)
            alive = weakref.ref(item)
            results = await asyncio.gather(model(item, deadline=deadline), model(frame(2)))
            del item
            await until(lambda: count(model, State.FREE) == 1)
            await turns()
            assert alive() is None, "a cycle keeps inputs until the next garbage collection, or a deadline until it passes"
            assert len(results) == 2
        finally:
            gc.enable()


async def test_the_batch_takes_the_last_moment(device: str) -> None:
    """Its members are chosen when the slot is granted, not when the first of them came."""
    async with load(device, warmup=frame(0)) as model:
        with held(model):
            first = calls(model, [0])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            early = calls(model, [1])
            await turns()
            assert executor_of(model).machine.waiting == 1
            late = calls(model, [2, 3])
            await turns()
            early[0].cancel()
        assert all(map(right, await asyncio.gather(*first, *late), [0, 2, 3]))
        assert model.statistics().batches == {1: 1, 2: 1}


# --- without stacking ---------------------------------------------------------------------------------------------------


async def test_nothing_is_stacked_and_a_call_is_what_it_is_without_batching(device: str) -> None:
    warmup = [(frame(0), frame(0))]
    async with load(device, TwoOutputs(), stack=False, slots=2, warmup=warmup) as model:
        assert model.statistics().captures == 2, "one for each slot: there are no sizes"
        assert model.inputs is not None
        assert [len(spec.shape or ()) for spec in model.inputs] == [2, 2]
        results = await asyncio.gather(*[model(frame(value), y=frame(2)) for value in range(20)])
        for value, (total, product) in enumerate(results):
            assert np.array_equal(total, frame(value + 2))
            assert np.array_equal(product, frame(value * 2))
            assert total.base is None
        tensors = await model(torch.ones(4, 1), torch.ones(4, 1), deadline=60, priority=0)
        assert torch.equal(tensors.total, torch.full((4, 1), 2.0))
        statistics = model.statistics()
        assert (statistics.completed, statistics.replays, statistics.batches, statistics.padding) == (21, 21, {}, 0)
        with pytest.raises(aiotrt.UsageError):
            model.lease()
    async with load(device, lambda x: x.sum(), stack=False, signatures="fixed") as model:
        assert (await model(frame(1))) == 6, "an output needs no batch axis"
        with pytest.raises(aiotrt.InputError):
            await model(frame(1)[0])
        assert np.array_equal(await asyncio.gather(*[model(frame(value)) for value in range(5)]), [0, 6, 12, 18, 24])


@pytest.mark.parametrize("overload", ["reject", "drop_oldest", "latest", "wait"])
async def test_policies_deadlines_and_priorities_without_stacking(device: str, overload: str) -> None:
    async with load(device, stack=False, max_queue=3, overload=overload, warmup=[frame(0)]) as model:
        with held(model):
            first = calls(model, [0])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            late = calls(model, [99], deadline=0.01)
            with pytest.raises(aiotrt.DeadlineError):
                await late[0]
            assert model.statistics().waiting == 0, "what is late never reaches the device"
            rest = calls(model, range(1, 7)) + calls(model, [7], priority=0)
            await turns()
            assert model.statistics().waiting == {"reject": 3, "drop_oldest": 3, "latest": 1, "wait": 7}[overload]
        results = await asyncio.gather(*first, *rest, return_exceptions=True)
        served = [value for value, result in enumerate(results) if not isinstance(result, BaseException)]
        assert all(right(results[value], value) for value in served)
        assert served == {
            "reject": [0, 1, 2, 3], "drop_oldest": [0, 5, 6, 7], "latest": [0, 7], "wait": [0, 1, 2, 3, 4, 5, 6, 7]
        }[overload]  # fmt: skip
        assert all(isinstance(result, aiotrt.QueueFullError) for result in results if isinstance(result, BaseException))


async def test_an_engine_that_fails_without_stacking_fails_that_call(device: str) -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:
            raise ValueError("three")
        return x + 1

    async with load(device, picky, stack=False) as model:
        with pytest.raises(aiotrt.EngineError, match="three"):
            await model(frame(1, (3, 1)))
        assert (await model(frame(1))).tolist() == frame(2).tolist()


# --- shedding -----------------------------------------------------------------------------------------------------------


async def test_what_would_be_too_late_is_refused_at_once(device: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        models = [load(device, max_size=2, warmup=frame(0), shed=shed) for shed in (True, False)]
        model, other = [await stack.enter_async_context(one) for one in models]
        for one in (model, other):
            assert one._gatherer is not None
            pace = one._gatherer._pace
            for _ in range(200):
                pace.end(pace.begin(0.0), 10.0)  # as if batches had taken ten seconds
            with held(one):
                first = calls(one, [0], deadline=15)  # a free slot takes anybody: how else would it be found out
                await until(lambda one=one: count(one, State.IN_FLIGHT) == 1)  # type: ignore[misc]
                rest = calls(one, [1], deadline=100) + calls(one, [2])
                hasty = calls(one, [3], deadline=15)
                await turns()
                assert hasty[0].done() is (one is model)
                patient = calls(one, [4], deadline=45)
            results = await asyncio.gather(*first, *rest, *patient)
            assert all(map(right, results, (0, 1, 2, 4)))
            if one is other:
                assert right(await hasty[0], 3)
            else:
                with pytest.raises(
                    aiotrt.OverloadedError, match=r"result is expected in \d+.* after deadline=15 s"
                ) as caught:
                    await hasty[0]
                assert isinstance(caught.value, aiotrt.DeadlineError)
                assert 10 < caught.value.seconds <= 20 + 1, "the batch on the device, the next one, its own"
                assert (model.statistics().rejected, model.statistics().expired) == (1, 0)
            assert not pace._running


# --- observing ----------------------------------------------------------------------------------------------------------


async def test_an_observer_is_told_of_items_and_batches(device: str) -> None:
    # Not shed: on a slow machine the last call would be refused before it is in line.
    async with load(device, max_size=4, shed=False, warmup=frame(0)) as model:
        told: list[Any] = []
        model.observe(told.append)
        await asyncio.gather(*[model(frame(value)) for value in range(6)])
        items, batches = told[:6], told[6:]
        assert [len(request.batch.items) for request in batches] == [4, 2]
        assert [call for request in batches for call in request.batch.items] == items
        assert all(call.done() and call.times.entered <= call.times.granted for call in items)
        assert all(batch.exception() is None and batch.times.granted < batch.times.seen for batch in batches)
        assert all(0 <= batch.times.late <= batch.times.ran < 60 for batch in batches)
        with held(model):
            gone = calls(model, [1, 2])
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            late = calls(model, [3], deadline=0.01)
            with pytest.raises(aiotrt.DeadlineError):
                await late[0]
            for one in gone:
                one.cancel()
            await turns()
        gone_items = [one for one in told[8:] if isinstance(one, Item)]
        gone_batches = [one for one in told[8:] if isinstance(one, Request)]
        assert [one.cancelled() for one in gone_items] == [True, True, False]
        assert gone_batches[0].cancelled(), "nobody waits for the batch"
        assert gone_items[2].times is not None
        assert gone_items[2].times.granted == 0.0, "it never left the queue"
