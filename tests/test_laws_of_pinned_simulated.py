"""Inputs in page-locked memory, which the device reads where they are: never before they are given, never after they go."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime import executor, route
from aiotrt.runtime import launch as submission
from aiotrt.runtime.request import Request
from aiotrt.runtime.slots import State
from aiotrt.testing import SimulatedDevice
from tests.simulated import held_streams
from tests.test_laws_simulated import GROUPS, SHAPE, load, right, settle, under_schedules
from tests.tools import count, executor_of, frame, until


@contextlib.contextmanager
def everything_is_large() -> Iterator[list[Request]]:
    """Inputs of any size are looked at; gives the requests whose inputs were copied on the host."""
    copied: list[Request] = []
    copy_in = submission.copy_in

    def counted(request: Request, program: Any) -> None:
        if any(argument.host is not None for argument in request.arguments):
            copied.append(request)
        copy_in(request, program)

    with large_from(0), mock.patch.object(executor, "copy_in", counted):
        yield copied


@contextlib.contextmanager
def large_from(nbytes: int) -> Iterator[None]:
    """Inputs of this size are read in place, if they can be."""
    with mock.patch.object(executor, "IN_PLACE_BYTES", nbytes), mock.patch.object(route, "IN_PLACE_BYTES", nbytes):
        yield


async def by_the_long_way(model: aiotrt.Model, x: Any) -> Any:
    """The result of a call whose signature is not remembered."""
    executor_of(model)._route = executor_of(model)._likely = None
    return await model(x)


def pinned(
    device: SimulatedDevice, value: float, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Page-locked memory, written by the host: there before the program began, since allocating it blocks."""
    with device.raw():
        tensor = device.memory.allocate(shape, None, dtype, None)
        span = device.memory.span(tensor)
        assert span is not None
        device.detector.allocated(span.block)
        tensor.fill_(value)
    return tensor


@pytest.mark.parametrize("group", GROUPS)
def test_page_locked_inputs_are_read_where_they_are(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        buffers = [pinned(device, 0) for _ in range(4)]
        with everything_is_large() as copied:
            async with load(device, slots=choose.randint(1, 3)) as model:

                async def call(buffer: torch.Tensor, value: float) -> None:
                    for again in range(3):
                        x: Any = buffer.numpy()
                        x[...] = value + again  # the call before has returned, so this is nobody's
                        kind = choose.choice(["numpy", "torch", "dlpack"])
                        result = await model(x if kind == "numpy" else buffer)
                        assert isinstance(result, np.ndarray if kind == "numpy" else torch.Tensor)
                        assert right(result, value + again)

                await asyncio.gather(*[call(buffer, 10 * i) for i, buffer in enumerate(buffers)])
                assert not copied
                for held in executor_of(model).cache._programs.values():
                    assert held.staged_inputs == [None], "memory for copies that nobody makes"

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_page_locked_memory_lives_until_it_was_read(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        x = pinned(device, 5)
        with everything_is_large() as copied:
            async with load(device, slots=1, warmup=frame(0)) as model:
                with held_streams(device, executor_of(model).slots[0].stream):
                    call = asyncio.ensure_future(model(x if choose.random() < 0.5 else x.numpy()))
                    await until(lambda: count(model, State.IN_FLIGHT) == 1)
                    if cancelled := choose.random() < 0.5:
                        call.cancel()
                        with pytest.raises(asyncio.CancelledError):
                            await call
                        call = None  # type: ignore[assignment]
                    del x
                    gc.collect()
                    device.check()
                if not cancelled:
                    assert right(await call, 5)
                await settle(model, 1)
                assert len(copied) == 0
                assert right(await model(frame(2)), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", range(2))
def test_what_is_not_plain_or_not_large_is_copied(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        wide = pinned(device, 4, (3, 2))
        plain = pinned(device, 4)
        with everything_is_large() as copied:
            async with load(device, slots=1, warmup=frame(0)) as model:
                assert right(await by_the_long_way(model, wide.T), 4)
                read_only = plain.numpy()[...]
                read_only.flags.writeable = False
                assert right(await by_the_long_way(model, read_only), 4)
                assert right(await by_the_long_way(model, frame(4)), 4)
                assert len(copied) == 3
                assert right(await by_the_long_way(model, plain), 4)
                assert len(copied) == 3
                with large_from(plain.nbytes + 1):
                    assert right(await by_the_long_way(model, plain), 4)
                    assert len(copied) == 4
                    assert right(await by_the_long_way(model, plain.numpy()), 4)
                    assert len(copied) == 5
                with large_from(plain.nbytes):
                    assert right(await by_the_long_way(model, plain), 4)
                    assert right(await by_the_long_way(model, plain.numpy()), 4)
                assert len(copied) == 5

    under_schedules(group, program)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("group", range(2))
def test_a_page_locked_input_of_a_remembered_signature_is_read_where_it_is(group: int, kind: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        def as_given(tensor: torch.Tensor) -> Any:
            return tensor.numpy() if kind == "numpy" else tensor

        buffer, plain = pinned(device, 4), torch.from_numpy(frame(5))
        with large_from(buffer.nbytes):
            async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
                known = executor_of(model)
                for _ in range(3):
                    assert right(await model(as_given(plain)), 5)
                assert known._route is not None
                for x, value, is_copied in ((buffer, 4, False), (plain, 5, True)):
                    request = known.submit((as_given(x),), {})
                    assert (request.route is not None) == is_copied
                    assert right(await request, value)
        with large_from(buffer.nbytes + 1):
            async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
                for _ in range(3):
                    assert right(await model(as_given(plain)), 5)
                request = executor_of(model).submit((as_given(buffer),), {})
                assert request.route is not None, "a small one is copied"
                assert right(await request, 4)

    under_schedules(group, program)


def test_arrays_that_torch_does_not_take_are_copied() -> None:
    """numpy calls them contiguous: the stride of an axis of extent 1 may be anything."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        flipped = np.full((1, 3), 4, np.float32)[::-1]
        fields = np.full(1, 4, np.dtype([("x", np.float32, (3,)), ("odd", np.uint8)]))
        fields["x"] = 4
        with everything_is_large() as copied:
            async with load(device, slots=1, warmup=frame(0, (1, 3))) as model:
                assert right(await model(flipped), 4)
                assert right(await model(fields["x"]), 4)
                assert len(copied) == 2
            async with aiotrt.load(lambda x: x.float(), device=device, warmup=torch.zeros(3, dtype=torch.uint64)) as model:
                assert (await model(np.full(3, 4, np.ulonglong)) == 4).all()

    under_schedules(0, program)


def test_dtypes_that_numpy_lacks() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        x = pinned(device, 2, dtype=torch.bfloat16)
        with everything_is_large() as copied:
            async with aiotrt.load(
                lambda x: x * 3 + 1, device=device, warmup=torch.zeros(SHAPE, dtype=torch.bfloat16)
            ) as model:
                copied.clear()
                result = await model(x)
                assert result.dtype is torch.bfloat16
                assert (result == 7).all()
                assert not copied

    under_schedules(0, program)
