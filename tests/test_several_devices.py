"""`load(device=[...])` on the host device: what it accepts, what it refuses, and how modules come to each device."""

from __future__ import annotations

import asyncio
import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import open_device, open_devices
from aiotrt.engines.replicas import check_free, replicas
from tests.tools import Affine, frame

pytestmark = pytest.mark.asyncio

HOSTS = ["host", "host", "host"]


class Elsewhere:
    """Stands for a device of which torch has no memory here: tensors there are "meta" tensors."""

    name = "meta"
    torch_device = torch.device("meta")


async def test_one_model_on_the_host_several_times() -> None:
    async with aiotrt.load(Affine(), device=HOSTS, slots=1, warmup=frame(0)) as model:
        results = await asyncio.gather(*(model(frame(value)) for value in range(30)))
        assert all((result == 3 * value + 1).all() for value, result in enumerate(results))
        now = model.statistics()
        assert now.device == "host, host:1, host:2"
        assert [one.device for one in now.devices] == ["host", "host:1", "host:2"]
        assert sum(one.completed for one in now.devices) == now.completed == now.submitted == 30
        assert all(one.captures == 1 for one in now.devices)
        assert model.slots == 3
        assert not model.is_degraded
        assert "on host, host:1, host:2: 3 free; 0 waiting" in repr(model)
        assert [result.sum() async for result in model.map([frame(1)] * 5)] == [24.0] * 5
        async with model.lease(device="host:1") as slot:
            assert slot.device == "host:1"
        stream = model.stream("host:2")
        stream.close()
        with pytest.raises(aiotrt.UsageError, match=r"one of the model's \(host, host:1, host:2\), got 'cuda:7'"):
            model.stream("cuda:7")
    with pytest.raises(aiotrt.ModelClosedError):
        await model(frame(1))


async def test_a_list_of_one_device_is_that_device() -> None:
    async with aiotrt.load(Affine(), device=["host"], retry=True) as model:
        assert (await model(frame(1)) == 4).all()
        assert model.statistics().devices == ()
        assert model._gatherer is None, "the path of one device"
        async with model.lease([(1, 2)], device="host") as slot:
            assert slot.device == "host"
        with pytest.raises(aiotrt.UsageError, match=r"the model's \(host\), got 'host:1'"):
            model.lease([(1, 2)], device="host:1")


async def test_named_inputs_options_as_names_and_structures_go_to_any_device() -> None:
    def network(deadline: torch.Tensor, pair: Any) -> Any:
        return {"sum": deadline + pair[0], "difference": deadline - pair[1]}

    async with aiotrt.load(network, device=HOSTS, slots=1) as model:
        results = await asyncio.gather(*(model(deadline=frame(value), pair=(frame(1), frame(2))) for value in range(6)))
        for value, result in enumerate(results):
            assert (result["sum"] == value + 1).all()
            assert (result["difference"] == value - 2).all()
        with pytest.raises(aiotrt.InputError, match="missing input"):
            await model(frame(1))


async def test_batches_fixed_signatures_and_observers_know_all_devices() -> None:
    seen: list[Any] = []
    batching = aiotrt.Batching(max_size=4)
    async with aiotrt.load(Affine(), device=HOSTS, batching=batching, warmup=frame(0), signatures="fixed") as model:
        model.observe(seen.append)
        results = await asyncio.gather(*(model(frame(value)) for value in range(24)))
        assert all((result == 3 * value + 1).all() for value, result in enumerate(results))
        assert sum(size * n for size, n in model.statistics().batches.items()) == 24
        assert len(seen) >= 24
        with pytest.raises(aiotrt.InputError, match="expected x: float32"):
            await model(frame(1).astype(np.float64))
        with pytest.raises(aiotrt.UsageError, match="no slots of a caller's own"):
            model.lease()


async def test_the_queue_is_bounded_for_all_devices_together() -> None:
    async with aiotrt.load(Affine(), device=["host", "host"], slots=1, max_queue=0, warmup=frame(0)) as model:
        async with model.lease(), model.lease():
            with pytest.raises(aiotrt.QueueFullError):
                await model(frame(1))
        assert (await model(frame(1)) == 4).all()
        assert model.statistics().rejected == 1


# Bad input...


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ([], aiotrt.InputError, "names no device"),
        (["host", ["host"]], aiotrt.InputError, "one device in each place"),
        (["host", "cuda:*"], aiotrt.InputError, "one device in each place"),
        (["host", "tpu"], aiotrt.UsageError, "unknown device 'tpu'"),
        (["host", None], aiotrt.UsageError, "unknown device None"),
        (["host", "cuda:99"], aiotrt.UsageError, "cuda:99"),
    ],
)
async def test_a_list_that_is_none_is_refused_in_words(device: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ = await aiotrt.load(Affine(), device=device)


async def test_a_device_twice_is_refused_unless_it_is_the_host() -> None:
    host = open_device("host")
    with pytest.raises(aiotrt.InputError, match="names host twice"):
        open_devices([host, host])
    assert [device.name for device in open_devices(HOSTS)] == ["host", "host:1", "host:2"]
    assert open_devices(HOSTS) == open_devices(HOSTS), "one object for each, so that models share their faults"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
async def test_all_gpus_of_a_machine_that_has_none() -> None:
    with pytest.raises(aiotrt.UsageError, match="sees no CUDA device"):
        _ = await aiotrt.load(Affine(), device="cuda:*")


async def test_retry_needs_another_device() -> None:
    with pytest.raises(aiotrt.InputError, match="pass a list"):
        _ = aiotrt.load(Affine(), device="host", retry=True)


async def test_the_callers_list_is_read_once() -> None:
    devices = ["host", "host"]
    model = aiotrt.load(Affine(), device=devices)
    devices.clear()
    async with model:
        assert (await model(frame(1)) == 4).all()


# Modules and functions...


async def test_a_module_is_used_as_it_is_where_it_lives_and_copied_to_each_other_device_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.second = torch.nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.ones(2))

    module = Tied().eval()
    host, other, again = replicas(module, [open_device("host"), Elsewhere(), Elsewhere()])  # type: ignore[list-item]
    assert host is module
    assert other is again
    assert isinstance(other, Tied)
    assert other.second.weight is other.first.weight, "weights that are shared stay shared"
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert not other.training


async def test_a_module_that_cannot_be_copied_is_refused_by_name() -> None:
    class Stubborn(torch.nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("there can be only one")

    devices: Any = [open_device("host"), Elsewhere()]
    with pytest.raises(
        aiotrt.EngineError, match=r"Stubborn cannot be copied to meta \(RuntimeError: there can be only one\)"
    ):
        replicas(Stubborn(2, 2), devices)
    spread = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(aiotrt.EngineError, match="parameters and buffers on cpu, meta"):
        replicas(spread, devices)

    class Hiding(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.anchors = torch.ones(3, device="meta")

    with pytest.raises(aiotrt.EngineError, match="Hiding cannot run on cpu: anchors is a tensor on meta"):
        replicas(Hiding(), devices)


async def test_weights_are_equal_bit_for_bit() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(module.state_dict())
    x = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    async with aiotrt.load(module, device=HOSTS, slots=1, warmup=[x]) as model:
        for result in await asyncio.gather(*(model(x) for _ in range(9))):
            assert result.tobytes() == expected.tobytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


WEIGHT = torch.ones(2)
NUMBER = torch.tensor(2.0)


def by_global(x: torch.Tensor) -> torch.Tensor:
    return x * WEIGHT


def through_another(x: torch.Tensor) -> torch.Tensor:
    return by_global(x)


def by_default(x: torch.Tensor, weight: torch.Tensor = WEIGHT) -> torch.Tensor:
    return x * weight


def by_number(x: torch.Tensor) -> torch.Tensor:
    return x * NUMBER + np.pi


def by_closure() -> Any:
    layer = torch.nn.Linear(2, 2)
    return lambda x: layer(x) + 1


class Callable:
    def __init__(self) -> None:
        self.weights = {"first": [WEIGHT]}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights["first"][0]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (by_global, "WEIGHT"),
        (through_another, "WEIGHT"),
        (by_default, "weight"),
        (by_closure(), "layer"),
        (functools.partial(by_default, weight=WEIGHT), "weight"),
        (Callable(), "weights"),
        (Callable().__call__, "self"),
        (torch.nn.Linear(2, 2).forward, "self"),
    ],
)
async def test_functions_that_use_tensors_of_one_device_are_refused_by_name(function: Any, name: str) -> None:
    devices: Any = [open_device("host"), Elsewhere()]
    with pytest.raises(aiotrt.EngineError, match=f"function uses {name}, which is on cpu, and the model runs on cpu, meta"):
        check_free("function", function, devices)
    check_free("function", function, devices[:1])


async def test_functions_that_use_none_are_not_refused() -> None:
    devices: Any = [open_device("host"), Elsewhere()]
    for function in (by_number, torch.relu, functools.partial(torch.add, other=1), torch.nn.functional.relu):
        check_free("function", function, devices)
