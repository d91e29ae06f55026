"""Slots that do not overlap: one launch after the other on the device, in the order of submission."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.selftest.instruments import Latch
from tests.tools import Affine, count, executor_of, frame, turns, until

pytestmark = pytest.mark.asyncio


def load(device: str, **options: Any) -> aiotrt.Model:
    model: aiotrt.Model = aiotrt.load(Affine(), device=device, warmup=frame(0), **options)
    return model


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_launch_waits_for_the_one_before_it_in_another_slot(device: str, overlap: bool) -> None:
    async with load(device, slots=3, overlap=overlap) as model:
        latch = Latch(executor_of(model).device.name)
        first = asyncio.ensure_future(model(frame(1)))
        await turns()
        assert (await first)[0, 0] == 4
        busy = next(slot for slot in executor_of(model).slots if slot.index == executor_of(model).machine._free[-1])
        latch.hold(busy.stream)  # of the slot that is granted next
        try:
            done: list[int] = []

            async def call(value: int) -> None:
                result = await model(frame(value))
                assert result[0, 0] == 3 * value + 1
                done.append(value)

            calls = [asyncio.ensure_future(call(value)) for value in range(3)]
            await until(lambda: count(model, State.IN_FLIGHT) == 3 - len(done) and len(done) == (2 if overlap else 0))
            if overlap:
                assert sorted(done) == [1, 2], "nobody waits for a slot that is held"
            else:
                for _ in range(2):  # were they not held too, they would be done by the time that this is
                    side = model.stream()
                    side.run(lambda: None)
                    await aiotrt.wait(side.record())
                    await turns()
                assert done == []
                assert not any(slot.event.query() for slot in executor_of(model).slots), "the device has not waited"
                assert count(model, State.IN_FLIGHT) == 3
        finally:
            latch.open()
        await asyncio.gather(*calls)
        assert (sorted(done[:2]), done[2]) == ([1, 2], 0) if overlap else done == [0, 1, 2]


async def test_a_lease_and_a_call_wait_for_each_other_too(device: str) -> None:
    async with load(device, slots=2, overlap=False) as model:
        latch = Latch(executor_of(model).device.name)
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            leased = next(one for one in executor_of(model).slots if one.request is not None)
            latch.hold(leased.stream)
            try:
                replay = asyncio.ensure_future(slot.replay())
                await until(lambda: count(model, State.IN_FLIGHT) == 1)
                call = asyncio.ensure_future(model(frame(2)))
                await until(lambda: count(model, State.IN_FLIGHT) == 2)
                await turns(20)
                assert not call.done()
            finally:
                latch.open()
            assert (await call)[0, 0] == 7
            await replay
            latch = Latch(executor_of(model).device.name)
            other = next(one for one in executor_of(model).slots if one is not leased)
            latch.hold(other.stream)
            try:
                call = asyncio.ensure_future(model(frame(3)))
                await until(lambda: count(model, State.IN_FLIGHT) == 1)
                replay = asyncio.ensure_future(slot.replay())
                await turns(20)
                assert not replay.done()
                call.cancel()  # the device goes on with it, and the lease after it
                await turns()
                assert not replay.done()
            finally:
                latch.open()
            await replay


async def test_one_slot_waits_for_nobody(device: str) -> None:
    async with load(device, slots=1, overlap=False) as model:
        for value in range(3):
            assert (await model(frame(value)))[0, 0] == 3 * value + 1
            assert executor_of(model).slots[0].gates == []


async def test_what_has_no_graph_waits_for_nobody_and_is_right(device: str) -> None:
    async with load(device, slots=2, overlap=False, graphs=False) as model:
        results = await asyncio.gather(*[model(frame(value)) for value in range(8)])
        assert [result[0, 0] for result in results] == [3 * value + 1 for value in range(8)]


async def test_overlap_is_true_or_false() -> None:
    with pytest.raises(aiotrt.InputError, match="overlap must be True or False, got 'no'"):
        _ = load("host", overlap="no")
