"""A model on another GPU than the current one: nothing that it does goes to the wrong one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

import aiotrt
from tests.tools import Affine, Latch, TwoOutputs, executor_of, frame, held, turns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.asyncio,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

OTHER = "cuda:1"


@pytest.fixture(autouse=True)
def _the_current_gpu_is_the_first() -> None:
    torch.cuda.set_device(0)


async def test_calls_from_the_host_and_from_the_device_get_their_own_results_where_they_belong() -> None:
    async with aiotrt.load(Affine(), device=OTHER, slots=3, warmup=frame(0)) as model:
        assert executor_of(model).device.name == OTHER
        for i in range(0, 90, 3):
            values = [frame(i), torch.from_numpy(frame(i + 1)), torch.from_numpy(frame(i + 2)).to(OTHER)]
            array, host, device = await asyncio.gather(*map(model, values))
            assert isinstance(array, np.ndarray)
            assert (array == 3 * i + 1).all()
            assert host.device.type == "cpu"
            assert (host == 3 * (i + 1) + 1).all()
            assert device.device == torch.device(OTHER)
            assert (device == 3 * (i + 2) + 1).all()
        assert model.statistics().fallbacks == ()
        assert torch.cuda.current_device() == 0


async def test_large_and_changing_shapes_are_right_too() -> None:
    async with aiotrt.load(Affine(), device=OTHER, slots=2) as model:
        for rows in (1, 700, 3, 1500, 700):
            result = await model(frame(rows, (rows, 1000)))
            assert result.shape == (rows, 1000)
            assert (result == 3 * rows + 1).all()


async def test_an_input_on_another_gpu_is_refused() -> None:
    async with aiotrt.load(Affine(), device=OTHER, slots=1, warmup=frame(0)) as model:
        with pytest.raises(aiotrt.InputError, match="cuda:0"):
            await model(torch.from_numpy(frame(1)).to("cuda:0"))
        assert (await model(frame(1)) == 4).all()


async def test_a_lease_orders_the_other_gpus_current_stream() -> None:
    async with aiotrt.load(TwoOutputs(), device=OTHER, slots=1, warmup=(frame(0), frame(0))) as model:
        x, y = (torch.from_numpy(frame(value)).to(OTHER) for value in (5, 7))
        async with model.lease() as slot:
            with held(model) as latch:
                slot.inputs[0][...] = x
                slot.inputs[1][...] = y
                event = slot.launch()
                total = slot.outputs.total.tensor.clone()  # on the current stream of that GPU, after the launch
                assert not event.query()
                latch.open()
                await aiotrt.wait(event)
            assert (total == 12).all()
        with torch.cuda.device(1):
            side = torch.cuda.Stream()
        async with Latch(OTHER) as latch:
            async with model.lease() as slot:
                slot.inputs[0][...] = x
                slot.inputs[1][...] = y
                _, product = await slot.replay()
                stream = executor_of(model).device.adopt_stream(side)
                latch.hold(stream)
                with torch.cuda.stream(side):
                    seen = product.clone()  # held back: the next launch must not overwrite what it reads
                slot.consumed(side)
            call = asyncio.ensure_future(model(frame(1), frame(1)))
            await turns(100)
            assert not call.done(), "the gate of the consumer holds"
            latch.open()
            assert ((await call).total == 2).all()
            torch.cuda.synchronize(1)
            assert (seen == 35).all()


async def test_models_on_two_gpus_share_a_loop() -> None:
    async with (
        aiotrt.load(Affine(), device="cuda:0", slots=2, warmup=frame(0)) as first,
        aiotrt.load(Affine(), device=OTHER, slots=2, warmup=frame(0)) as second,
    ):
        results = await asyncio.gather(*((first, second)[i % 2](frame(i)) for i in range(400)))
        assert all((result == 3 * i + 1).all() for i, result in enumerate(results))
        with held(first) as latch:
            waits = asyncio.ensure_future(first(frame(1)))
            assert (await second(frame(2)) == 7).all(), "one that is held does not hold the other"
            assert not waits.done()
            latch.open()
            assert (await waits == 4).all()


async def test_opening_and_closing_on_the_other_gpu_leaves_no_memory_there_or_here() -> None:
    async def once() -> tuple[int, int]:
        async with aiotrt.load(Affine(), device=OTHER, slots=2, warmup=frame(0)) as model:
            await model(torch.from_numpy(frame(1)).to(OTHER))
        return torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)

    await once()
    before = await once()
    assert [await once() for _ in range(5)] == [before] * 5
