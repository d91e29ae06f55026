"""The simulated device is late, honest and repeatable."""

from __future__ import annotations

import asyncio
import gc

import pytest
import torch

from aiotrt.devices import CaptureError
from aiotrt.errors import DeviceError, UsageError
from aiotrt.testing import (
    DeadlockError,
    LoopBlockedError,
    Schedule,
    SimulatedDevice,
    SimulatedEvent,
    SimulatedStream,
    explore,
    run,
)
from aiotrt.testing.streams import Record


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice(1)


def raw(device: SimulatedDevice, tensor: torch.Tensor) -> torch.Tensor:
    """What is there now, unseen by the detector."""
    return device.memory.alias(tensor).clone()


def test_nothing_happens_before_time_passes(device: SimulatedDevice) -> None:
    stream = device.stream()
    x = device.tensor([1.0, 2.0])
    stream.wait(recorded(device, device.current_stream()))
    with device.use(stream):
        y = x * 2
    event = recorded(device, stream)
    assert not device.query(event)
    assert raw(device, y).isnan().all()
    device.run_until_idle()
    assert device.query(event)
    assert device.read(y).tolist() == [2.0, 4.0]
    device.check()


def recorded(device: SimulatedDevice, stream: SimulatedStream) -> SimulatedEvent:
    event = device.event()
    stream.record(event)
    return event


def test_fresh_memory_is_garbage_and_freed_memory_is_used_again(device: SimulatedDevice) -> None:
    x = device.empty((4,), torch.float32)
    assert raw(device, x).isnan().all()
    x.data_ptr()
    with device.use():
        x.fill_(1.0)
    address = x.data_ptr()
    del x
    y = device.empty((4,), torch.float32)
    assert y.data_ptr() == address
    device.run_until_idle()
    assert raw(device, y).isnan().all()


def test_memory_is_not_handed_to_another_stream(device: SimulatedDevice) -> None:
    other = device.stream()
    x = device.empty((4,), torch.float32)
    address = x.data_ptr()
    del x
    with device.use(other):
        assert device.empty((4,), torch.float32).data_ptr() != address


def test_a_view_keeps_memory_alive(device: SimulatedDevice) -> None:
    x = device.tensor([1.0, 2.0, 3.0, 4.0])
    view = x[2:].numpy()
    address = x.data_ptr()
    del x
    gc.collect()
    assert device.empty((4,), torch.float32).data_ptr() != address
    device.run_until_idle()
    assert view.tolist() == [3.0, 4.0]


def test_torch_operations_are_taken_apart(device: SimulatedDevice) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    image = torch.rand(2, 3, 8, 8)
    x = device.tensor(image)
    results: list[torch.Tensor] = []
    device.current_stream().run(lambda: results.append(net(x.clone().add_(1)).softmax(-1).topk(2).values[:, 0]))
    device.synchronize()
    with torch.no_grad():
        expected = net(image + 1).softmax(-1).topk(2).values[:, 0]
    assert torch.equal(device.read(results[0]), expected)
    device.check()


def test_operations_that_the_host_must_see_block(device: SimulatedDevice) -> None:
    x = device.tensor([1.0, -2.0, 3.0])
    with device.use():
        assert x.sum().item() == 2.0
        positive = x[x > 0]
        assert positive.shape == (2,)
    device.synchronize()
    assert device.read(positive).tolist() == [1.0, 3.0]
    device.check()


def test_a_copy_from_pageable_memory_has_read_it_when_it_returns(device: SimulatedDevice) -> None:
    host = torch.tensor([1.0, 2.0])
    x = device.tensor(host)
    host.zero_()
    device.synchronize()
    assert device.read(x).tolist() == [1.0, 2.0]


def test_a_stream_copy_wants_pinned_memory(device: SimulatedDevice) -> None:
    x = device.empty((2,), torch.float32)
    with pytest.raises(ValueError, match="pinned"):
        device.stream().copy(x, torch.zeros(2))
    with pytest.raises(ValueError, match="cannot copy"):
        device.stream().copy(x, device.pinned((3,), torch.float32))


def test_a_graph_replays_without_its_python(device: SimulatedDevice) -> None:
    stream = device.stream()
    calls = []
    x = device.call(stream, lambda: device.empty((2,), torch.float32).fill_(1.0))

    def body() -> list[torch.Tensor]:
        calls.append(1)
        return [x * len(calls)]

    graph, (y,) = device.capture(stream, body)
    assert raw(device, y).isnan().all()  # a capture computes nothing
    assert graph.nbytes == y.nbytes
    for value in (3.0, 5.0):
        with device.use(stream):
            x.fill_(value)
        graph.launch(stream)
        stream.synchronize()
        assert device.read(y).tolist() == [2 * value] * 2
    assert len(calls) == 2
    graph.close()
    with pytest.raises(UsageError, match="closed"):
        graph.launch(stream)
    device.check()


@pytest.mark.parametrize("body", [lambda x: [x.sum() * x.sum().item()], lambda x: [x[x > 0]]])
def test_what_the_host_must_see_cannot_be_captured(device: SimulatedDevice, body: object) -> None:
    assert callable(body)
    stream = device.stream()
    x = device.call(stream, lambda: device.empty((2,), torch.float32).zero_())
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        device.capture(stream, lambda: body(x))
    with device.use(stream):
        y = x + 1
    stream.synchronize()
    assert device.read(y).tolist() == [1.0, 1.0]


def test_an_operation_that_raises_breaks_the_device(device: SimulatedDevice) -> None:
    x = device.tensor([1.0, 2.0])
    with device.use():
        x[device.tensor([5])]
    event = recorded(device, device.current_stream())
    device.run_until_idle()
    for verb in (lambda: device.query(event), device.synchronize, device.stream, lambda: x + x):
        with device.use(), pytest.raises(DeviceError) as caught:
            verb()
        assert caught.value.name == "cudaErrorAssert"


def test_equal_seeds_are_equal_runs_and_others_are_not() -> None:
    def order(seed: int) -> tuple[list[int], float]:
        device = SimulatedDevice(seed)
        finished: list[int] = []
        for i in range(5):
            stream = device.stream()
            with device.use(stream):
                device.empty((1,), torch.float32).fill_(0.0)
            stream.put_instant(lambda i=i: finished.append(i))  # type: ignore[misc]
        device.run_until_idle()
        return finished, device.time.now

    assert order(1) == order(1)
    assert len({tuple(order(seed)[0]) for seed in range(50)}) > 20


def test_explore_finds_every_order() -> None:
    orders = []

    def scenario(schedule: Schedule) -> None:
        device = SimulatedDevice(schedule)
        finished: list[str] = []
        for name in "ab":
            stream = device.stream()
            with device.use(stream):
                memory = device.empty((1,), torch.float32)
                for i in range(2):
                    memory.fill_(i)
                    stream.put_instant(lambda name=name: finished.append(name))  # type: ignore[misc]
        device.run_until_idle()
        orders.append("".join(finished))

    runs = explore(scenario)
    assert set(orders) == {"aabb", "abab", "abba", "baab", "baba", "bbaa"}
    assert runs == len(orders)
    with pytest.raises(RuntimeError, match="smaller"):
        explore(scenario, limit=2)


def test_waiting_for_what_cannot_happen_is_a_deadlock(device: SimulatedDevice) -> None:
    with pytest.raises(DeadlockError, match="waits permanently"):
        device.time.block_until(lambda: False, "this test")


def test_blocking_calls_are_refused_on_the_loop(device: SimulatedDevice) -> None:
    async def main() -> None:
        for call in (device.synchronize, device.stream().synchronize, device.event().synchronize):
            with pytest.raises(LoopBlockedError, match="event loop"):
                call()
        with pytest.raises(LoopBlockedError):
            device.pinned((1,), torch.float32)
        with pytest.raises(LoopBlockedError):
            device.tensor([1.0]).sum().item()

    run(main(), device)


def test_time_on_the_loop_is_virtual(device: SimulatedDevice) -> None:
    async def main() -> float:
        start = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time() - start

    assert 3600 <= run(main(), device) < 3600.01


def test_polling_on_the_loop_sees_time_pass(device: SimulatedDevice) -> None:
    async def main() -> None:
        event = device.event()
        device.tensor([1.0])
        device.current_stream().record(event)
        while not device.query(event):
            await asyncio.sleep(0)

    run(main(), device)


def test_workers_block_in_virtual_time_and_the_loop_goes_on(device: SimulatedDevice) -> None:
    async def main() -> list[str]:
        happened: list[str] = []
        stream = device.stream()
        held = Record({})
        stream.follow(held)

        def job() -> None:
            happened.append("job started")
            stream.synchronize()
            happened.append("job ended")

        work = asyncio.get_running_loop().run_in_executor(None, job)
        while not happened:
            await asyncio.sleep(0)
        happened.append("loop")
        held.is_done = True
        device.pump()
        await work
        return happened

    assert run(main(), device) == ["job started", "loop", "job ended"]


def test_a_hang_is_an_error_that_says_who_waits() -> None:
    async def waits_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError, match="waits_for_ever"):
        run(waits_for_ever(), SimulatedDevice(1))
