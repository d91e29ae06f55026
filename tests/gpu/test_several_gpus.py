"""One model on several GPUs: right results where the inputs were, the order across GPUs, failures that stay apart.

What needs two GPUs is skipped where there is one. The rest runs on twins: two devices of aiotrt's that are one GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Device, open_devices
from aiotrt.engines.replicas import replicas
from tests.tools import Affine, Latch, TwoOutputs, frame, turns

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio]

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PAIR = ["cuda:0", "cuda:1"]


@pytest.fixture
def twins() -> list[Device]:
    """One GPU as two devices, which fail apart."""
    from aiotrt.devices.cuda import CudaDevice

    first, second = CudaDevice(0), CudaDevice(0)
    second.name = "cuda:0 (twin)"
    return [first, second]


@pytest.fixture
def latch() -> Iterator[Latch]:
    """Holds streams; opened at the end at the latest."""
    latch = Latch("cuda:0")
    yield latch
    latch.open()


def hold(latch: Latch, model: aiotrt.Model, device: int) -> None:
    for slot in model._executors[device].slots:
        latch.hold(slot.stream)


def error() -> aiotrt.DeviceError:
    return aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress")


async def calls(model: aiotrt.Model, places: list[str], count: int = 90) -> None:
    """Host calls and calls from each place, all at once; each result is right, and where its input was."""

    async def call(value: int) -> None:
        array = frame(value)
        if value % 3 == 0:
            assert (await model(array) == 3 * value + 1).all()
        elif value % 3 == 1:
            assert bool((await model(torch.from_numpy(array)) == 3 * value + 1).all())
        else:
            x = torch.from_numpy(array).to(places[value % len(places)])
            result = await model(x)
            assert result.device == x.device
            assert bool((result == 3 * value + 1).all())

    await asyncio.gather(*map(call, range(count)))


@pytest.mark.parametrize("batching", [None, aiotrt.Batching(max_size=4)])
async def test_twins_share_one_queue(twins: list[Device], batching: Any) -> None:
    async with aiotrt.load(Affine(), device=twins, slots=2, warmup=frame(0), batching=batching) as model:
        for _ in range(3):
            await calls(model, ["cuda:0"])
        now = model.statistics()
        assert now.completed == now.submitted == 270
        assert all(one.completed for one in now.devices)
        assert now.fallbacks == ()


async def test_an_input_that_runs_on_the_other_twin_is_waited_for(twins: list[Device], latch: Latch) -> None:
    async with aiotrt.load(Affine(), device=twins, slots=1, warmup=frame(0)) as model:
        await asyncio.gather(model(frame(1)), model(frame(1)))
        side = torch.cuda.Stream()  # all for the first time, before the device is held: it would wait until that ends
        with torch.cuda.stream(side):
            torch.cuda._sleep(1)
            assert bool((await model(torch.full((2, 3), 1.0, device="cuda:0")) == 4).all())
        hold(latch, model, 0)
        stuck = model._executors[0].submit((frame(5),), {})
        await asyncio.sleep(0.3)  # overdue: whatever comes goes to the other
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            x = torch.full((2, 3), 2.0, device="cuda:0")
            result = await model(x)
        assert bool((result == 7).all())
        assert not stuck.done()
        latch.open()
        assert (await stuck == 16).all()


@pytest.mark.parametrize("retry", [True, False])
async def test_when_one_twin_fails_the_other_goes_on(twins: list[Device], latch: Latch, retry: bool) -> None:
    model = await aiotrt.load(Affine(), device=twins, slots=2, warmup=frame(0), retry=retry)
    hold(latch, model, 1)
    waiting = [asyncio.ensure_future(model(frame(value))) for value in range(12)]
    await turns(50)
    twins[1].fail(error())
    results = await asyncio.gather(*waiting, return_exceptions=True)
    failed = [result for result in results if isinstance(result, aiotrt.DeviceError)]
    assert len(failed) == (0 if retry else 2)
    for value, result in enumerate(results):
        assert isinstance(result, aiotrt.DeviceError) or (np.asarray(result) == 3 * value + 1).all()
    assert model.is_degraded
    for result in await asyncio.gather(*(model(frame(1)) for _ in range(12))):
        assert (result == 4).all()
    latch.open()  # torch's own copies could wait in the held streams' hardware queue
    await calls(model, ["cuda:0"])
    await model.aclose()


# With two GPUs...


@two
@pytest.mark.parametrize("batching", [None, aiotrt.Batching(max_size=4)])
async def test_calls_from_the_host_and_from_both_gpus(batching: Any) -> None:
    async with aiotrt.load(Affine(), device="cuda:*", slots=2, warmup=frame(0), batching=batching) as model:
        for _ in range(3):
            await calls(model, PAIR)
        assert all(one.completed for one in model.statistics().devices)
        assert torch.cuda.current_device() == 0


@two
async def test_results_are_bit_equal_to_those_of_one_gpu_and_weights_are_copied_once() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval().to("cuda:0")
    copies = replicas(network, open_devices(PAIR))
    assert copies[0] is network
    for mine, other in zip(network.parameters(), copies[1].parameters(), strict=True):  # type: ignore[attr-defined]
        assert other.device == torch.device("cuda:1")
        assert torch.equal(mine.cpu(), other.cpu())
    inputs = [np.random.default_rng(i).random((1, 3, 32, 32), np.float32) for i in range(24)]
    async with aiotrt.load(network, device="cuda:0", warmup=inputs[:1]) as one:
        expected = [(await one(x)).tobytes() for x in inputs]
    async with aiotrt.load(network, device=PAIR, warmup=inputs[:1]) as model:
        results = await asyncio.gather(*map(model, inputs))
        assert [result.tobytes() for result in results] == expected
        assert all(one.completed for one in model.statistics().devices)
    assert {parameter.device for parameter in network.parameters()} == {torch.device("cuda:0")}


@two
async def test_an_input_of_a_busy_gpu_is_copied_behind_what_makes_it_and_its_result_comes_back(latch: Latch) -> None:
    async with aiotrt.load(Affine(), device=PAIR, slots=1, warmup=frame(0)) as model:
        await asyncio.gather(model(frame(1)), model(frame(1)))
        side = torch.cuda.Stream()  # all for the first time, before the device is held: it would wait until that ends
        with torch.cuda.stream(side):
            torch.cuda._sleep(1)
            assert bool((await model(torch.full((2, 3), 1.0, device="cuda:0")) == 4).all())
        hold(latch, model, 0)
        stuck = model._executors[0].submit((frame(5),), {})
        await asyncio.sleep(0.3)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            x = torch.full((2, 3), 2.0, device="cuda:0")
            result = await model(x)
            assert result.device == x.device
            assert bool((result == 7).all())
            strided = torch.full((3, 2), 2.0, device="cuda:0").T
            assert bool((await model(strided) == 7).all())
        assert not stuck.done()
        latch.open()
        await stuck


@two
async def test_inputs_on_both_gpus_meet_on_one() -> None:
    async with aiotrt.load(TwoOutputs(), device=PAIR, slots=1) as model:
        for value in range(6):
            x, y = torch.full((2, 3), float(value), device="cuda:0"), torch.ones((2, 3), device="cuda:1")
            total, product = await (model(x, y) if value % 2 else model(y, x))
            assert total.device == (x if value % 2 else y).device
            assert bool((total.cpu() == value + 1).all())
            assert bool((product.cpu() == value).all())


@two
async def test_leases_name_their_gpu() -> None:
    async with aiotrt.load(Affine(), device=PAIR, slots=1, warmup=frame(0)) as model:
        for place in PAIR:
            async with model.lease(device=place) as slot:
                slot.inputs[0][...] = torch.full((2, 3), 2.0, device=place)
                result = await slot.replay()
                assert str(result.device) == slot.device == place
                assert bool((result == 7).all())


@two
async def test_functions_and_modules_that_belong_to_one_gpu_and_inputs_from_elsewhere_are_refused_by_name() -> None:
    weight = torch.ones(3, device="cuda:1")
    with pytest.raises(aiotrt.EngineError, match=r"uses weight, which is on cuda:1, and the model runs on cuda:0, cuda:1"):
        _ = await aiotrt.load(lambda x: x * weight, device=PAIR)
    with pytest.raises(aiotrt.InputError, match="names cuda:1 twice"):
        _ = await aiotrt.load(Affine(), device=["cuda:1", "cuda:1"])
    with pytest.raises(aiotrt.InputError, match="mixes GPUs and the host"):
        _ = await aiotrt.load(Affine(), device=["cuda:0", "host"])
    with pytest.raises(aiotrt.UsageError, match="there is no device 'cuda:99'"):
        _ = await aiotrt.load(Affine(), device=["cuda:0", "cuda:99"])
    if torch.cuda.device_count() > 2:
        async with aiotrt.load(Affine(), device=PAIR) as model:
            with pytest.raises(aiotrt.InputError, match="the model is on cuda:0, cuda:1"):
                await model(torch.ones(2, 3, device="cuda:2"))


@two
async def test_opening_and_closing_leaves_no_memory_on_either_gpu() -> None:
    async def once() -> list[int]:
        async with aiotrt.load(Affine(), device=PAIR, slots=2, warmup=frame(0)) as model:
            await calls(model, PAIR, 12)
        return [torch.cuda.memory_allocated(place) for place in PAIR]

    await once()
    before = await once()
    assert [await once() for _ in range(3)] == [before] * 3
