"""A loop that is closed under a model's pending work: nothing in use is freed, and everything is once the device is done."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

import aiotrt
from aiotrt.devices.host import HostDevice
from aiotrt.runtime import memory
from tests.tools import Affine, Latch, executor_of, frame, turns


class Gated(torch.nn.Module):
    """3 x + 1, which its latch holds from inside the module: also while it is warmed up."""

    def __init__(self, opened: threading.Event) -> None:
        super().__init__()
        self.opened = opened
        self.entered = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        self.opened.wait()
        return x * 3 + 1


async def call(model: aiotrt.Model) -> None:
    await model(frame(1))


async def lease(model: aiotrt.Model) -> None:
    async with model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        await slot.replay()


async def keep_a_lease(model: aiotrt.Model) -> None:
    async with model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        slot.launch()
        await asyncio.get_running_loop().create_future()


async def consume(model: aiotrt.Model) -> None:
    async def frames() -> AsyncIterator[Any]:
        for value in range(10):
            yield frame(value)

    async for _ in model.map(frames()):
        pass


async def wait(model: aiotrt.Model) -> None:
    await aiotrt.wait(executor_of(model).slots[0].stream.record())


async def capture(model: aiotrt.Model) -> None:
    await model(frame(1, (5, 5)))


USES: list[Callable[[aiotrt.Model], Coroutine[Any, Any, None]]] = [call, lease, keep_a_lease, consume, wait, capture]


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """The texts of warnings: a warning that is recorded as such keeps the model that it is of."""
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: told.append(str(message))
        yield told


def forget(coroutine: Coroutine[Any, Any, None]) -> None:
    """Start it in a task, and keep no reference to the task."""
    asyncio.ensure_future(coroutine)  # type: ignore[unused-awaitable]  # noqa: RUF006


async def settled(condition: Callable[[], bool]) -> None:
    """Other threads are to end something; the test's timeout is the bound."""
    while not condition():
        gc.collect()
        await asyncio.sleep(0.001)


def closed_under(main: Callable[[], Coroutine[Any, Any, list[weakref.ref[Any]]]]) -> list[weakref.ref[Any]]:
    """Run `main` on a loop that is closed under what it began; what is told to the loop's handler is of no interest."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: None)  # asyncio's word on tasks that were destroyed
    found = loop.run_until_complete(main())
    loop.close()
    return found


@pytest.mark.parametrize("batching", [False, True])
@pytest.mark.parametrize("use", USES)
def test_what_a_closed_loop_leaves_is_freed_when_the_device_is_done(
    use: Callable[[aiotrt.Model], Coroutine[Any, Any, None]], batching: bool
) -> None:
    if batching and use in (lease, keep_a_lease):
        pytest.skip("a model with batching has no leases")
    latch = Latch("host")
    devices = [HostDevice()]
    threads, kept = threading.active_count(), len(memory._kept)

    async def main() -> list[weakref.ref[Any]]:
        options: Any = {"batching": aiotrt.Batching(max_size=2)} if batching else {}
        model = await aiotrt.load(Affine(), device=devices[0], slots=1, warmup=[frame(0)], **options)
        executor = executor_of(model)
        latch.hold(executor.slots[0].stream)
        for _ in range(3):
            forget(use(model))
        await turns(50)
        programs = [weakref.ref(program) for program in executor.cache]
        return [weakref.ref(model), weakref.ref(executor), *programs]

    with warned() as told:
        found = closed_under(main)
        gc.collect()
        if use is not wait:  # which is no work of the model's
            assert all(reference() is not None for reference in found[1:])
        latch.open()
        asyncio.run(settled(lambda: all(reference() is None for reference in found)))
    assert [message for message in told if message.startswith("<aiotrt.Model Affine on host: ")]
    assert not devices.pop()._callbacks  # and its own stream ends with it
    asyncio.run(settled(lambda: threading.active_count() <= threads))
    assert len(memory._kept) == kept


@pytest.mark.parametrize("is_entered", [True, False])
def test_a_loop_that_is_closed_under_a_load(is_entered: bool) -> None:
    opened = threading.Event()
    device = HostDevice()
    threads, kept = threading.active_count(), len(memory._kept)

    async def main() -> list[weakref.ref[Any]]:
        module = Gated(opened)
        model = aiotrt.load(module, device=device, slots=1, warmup=frame(0))

        async def load() -> None:
            _ = await model

        forget(load())
        await turns(2)
        while is_entered and not module.entered.is_set():
            await asyncio.sleep(0)
        return [weakref.ref(model), weakref.ref(module)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = closed_under(main)
        gc.collect()
        opened.set()
        asyncio.run(settled(lambda: all(reference() is None for reference in found)))
    asyncio.run(settled(lambda: threading.active_count() <= threads))
    assert len(memory._kept) == kept
    assert not device._callbacks


def test_ten_loops_that_were_closed_leave_nothing() -> None:
    latch = Latch("host")
    threads = threading.active_count()
    found: list[weakref.ref[Any]] = []

    async def main() -> list[weakref.ref[Any]]:
        model = await aiotrt.load(Affine(), device="host", slots=1, warmup=frame(0))
        latch.hold(executor_of(model).slots[0].stream)
        for value in range(3):
            forget(model(frame(value)))
        await turns()
        return [weakref.ref(model), weakref.ref(executor_of(model))]

    with warned() as told:
        for _ in range(10):
            found += closed_under(main)
        latch.open()
        asyncio.run(settled(lambda: all(reference() is None for reference in found)))
    assert len(told) == 10
    assert all("was never closed: use 'async with'" in message for message in told)
    asyncio.run(settled(lambda: threading.active_count() <= threads))


def test_a_device_that_breaks_after_its_loop_was_closed_keeps_the_memory() -> None:
    class Breaking(HostDevice):
        def synchronize(self) -> None:
            asked.set()
            raise aiotrt.DeviceError("gone")

    latch, asked = Latch("host"), threading.Event()
    threads, kept = threading.active_count(), len(memory._kept)

    async def main() -> list[weakref.ref[Any]]:
        model = await aiotrt.load(Affine(), device=Breaking(), slots=1, warmup=frame(0))
        latch.hold(executor_of(model).slots[0].stream)
        forget(model(frame(1)))
        await turns()
        return []

    with warned():
        closed_under(main)
        latch.open()
        asyncio.run(settled(asked.is_set))
    asyncio.run(settled(lambda: threading.active_count() <= threads + 1))  # the slot's stream
    assert len(memory._kept) == kept + 1
    del memory._kept[kept:]
