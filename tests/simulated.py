"""Programs on a simulated device, and what the core does not offer yet to run them there."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

import anyio
import anyio.to_thread
import torch

from aiotrt import submission, tensors
from aiotrt.graphs import Program
from aiotrt.testing import FaultInjector, SimulatedDevice, VirtualLoop, Workers, run

T = TypeVar("T")


def run_simulated(main: Coroutine[Any, Any, T], device: SimulatedDevice | FaultInjector) -> T:
    """`testing.run`, with the core's threads and tensors made the device's."""
    simulated = device.simulated if isinstance(device, FaultInjector) else device
    original = tensors.InputSpecs._check

    def check(specs: tensors.InputSpecs, spec: tensors.TensorSpec, value: object) -> tensors.Argument:
        argument = original(specs, spec, value)
        if isinstance(value, torch.Tensor) and simulated.holds(value):
            return tensors.Argument(argument.shape, (value, value), tensor=value)
        return argument

    def own(view: Any, dtype: torch.dtype, kind: tensors.Kind) -> Any:
        simulated.host_read(view, "copying results out")
        return tensors.own(view, dtype, kind)

    def copy_in(request: submission.Request, program: Program) -> None:
        for argument, view in zip(request.arguments, program.input_views, strict=True):
            if argument.host is not None and view is not None:
                simulated.host_write(view, "copying inputs in")
        submission.copy_in(request, program)

    def pool(count: int, **options: object) -> Workers:
        return simulated.workers(count)

    async def run_sync(function: Callable[[], T], **options: object) -> T:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return await loop.run_in_executor(None, function)

    shim = types.SimpleNamespace(
        Lock=anyio.Lock,
        CancelScope=anyio.CancelScope,
        CapacityLimiter=anyio.CapacityLimiter,
        to_thread=types.SimpleNamespace(run_sync=run_sync),
    )
    with (
        mock.patch("aiotrt.tensors.InputSpecs._check", check),
        mock.patch("aiotrt.executor.ThreadPoolExecutor", pool),
        mock.patch("aiotrt.executor.own", own),
        mock.patch("aiotrt.executor.copy_in", copy_in),
        mock.patch("aiotrt.model.anyio", shim),
    ):
        return run(main, device)
