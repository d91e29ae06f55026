"""Building programs: the inputs of the call are used where zeros fail, and a fall-back without a graph gives right results.

On a simulated device, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.engines.module import ModuleEngine
from aiotrt.runtime import executor
from aiotrt.testing import SimulatedDevice, SimulatedStream
from tests.test_laws_of_owners_simulated import GROUPS
from tests.test_laws_simulated import right, settle, under_schedules
from tests.tools import Affine, executor_of, frame


def picky(x: torch.Tensor) -> torch.Tensor:
    """As some networks do with masks of nothing."""
    if not bool(x.any()):
        raise ValueError("all zeros")
    return x * 3 + 1


def being_written(device: SimulatedDevice, stream: SimulatedStream, value: float) -> torch.Tensor:
    """A tensor that gets its values on this stream, later."""
    with device.use(stream):
        x = device.tensor(frame(0))
        stream.run(lambda: x.fill_(value))
    return x


def is_capturing(device: SimulatedDevice) -> bool:
    return device._scope.graph is not None


@pytest.mark.parametrize("given", ["host", "current stream", "ready event"])
@pytest.mark.parametrize("way", ["call", "warm-up"])
@pytest.mark.parametrize("group", GROUPS)
def test_what_raises_for_zeros_is_warmed_up_with_inputs_that_are_still_being_written(
    group: int, way: str, given: str
) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        streams = [device.stream(), device.stream()]
        current, writer = streams[0], streams[given == "ready event"]
        async with aiotrt.load(picky, device=device, slots=choose.randint(1, 2), hang_timeout=1.0) as model:
            x: Any = frame(5) if given == "host" else being_written(device, writer, 5)
            if given == "ready event":
                x._trt_ready_event = writer.record()
            with device.use(current):
                if way == "warm-up":
                    await model.warmup([x])
                result = await model(x)
            assert right(result if given == "host" else device.read(result), 5)
        for stream in streams:
            stream.close()

    under_schedules(group, program)


class Unusual(Affine):
    """A module that cannot be captured."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._place = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_capturing(self._place):
            raise RuntimeError(f"cannot be captured for {tuple(x.shape)}")
        return super().forward(x)


@pytest.mark.parametrize("group", GROUPS)
def test_a_module_whose_export_cannot_be_captured_either_runs_itself(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        def export(x: torch.Tensor) -> torch.Tensor:
            if is_capturing(device):
                raise RuntimeError("nor can this")
            return x * 100

        with mock.patch.object(ModuleEngine, "_export", return_value=export) as exported:
            async with aiotrt.load(Unusual(device), device=device, slots=2, hang_timeout=1.0) as model:
                for _ in range(2):
                    results = await asyncio.gather(model(frame(2)), model(frame(3)))
                    assert right(results[0], 2)
                    assert right(results[1], 3)
                assert any("nor could its export" in reason for reason in model.statistics().fallbacks)
                exported.assert_called_once()

    under_schedules(group, program)


def test_no_more_reasons_without_a_graph_are_kept_than_a_bound() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        with mock.patch.object(executor, "MOST_FALLBACKS", 2), mock.patch.object(ModuleEngine, "_export", return_value=None):
            async with aiotrt.load(Unusual(device), device=device, slots=1, hang_timeout=1.0) as model:
                for rows in range(1, 5):
                    assert right(await model(frame(rows, (rows, 3))), rows)
                reasons = model.statistics().fallbacks
                assert len(reasons) == 2
                assert "(1, 3)" in reasons[0]
                assert "(2, 3)" in reasons[1]

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_whose_signature_is_not_allowed_any_more_never_runs(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        dtypes = set()

        def affine(x: torch.Tensor) -> torch.Tensor:
            dtypes.add(x.dtype)
            return x * 3 + 1

        async with aiotrt.load(affine, device=device, slots=1, signatures="fixed", hang_timeout=1.0) as model:
            first, second, third = model(frame(1)), model(np.ones((2, 3))), model(frame(3))
            results = await asyncio.gather(first, second, third, return_exceptions=True)
            assert right(results[0], 1)
            assert isinstance(results[1], aiotrt.InputError)
            assert "fixed as (x: float32" in str(results[1])
            assert right(results[2], 3)
            assert dtypes == {torch.float32}
            await settle(model, 1)

    under_schedules(group, program)


@pytest.mark.interpreted
def test_only_what_a_worker_launched_is_polled_as_soon_as_the_loop_hears_of_it() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with (
            aiotrt.load(picky, device=device, slots=1, hang_timeout=1.0) as by_worker,
            aiotrt.load(Affine(), device=device, slots=1, hang_timeout=1.0) as by_loop,
        ):
            hub = executor_of(by_worker).hub
            with mock.patch.object(hub, "add_ended", wraps=hub.add_ended) as added:
                assert right(await by_worker(frame(1)), 1)
                assert added.call_count == 1
                assert right(await by_loop(frame(2)), 2)
                assert added.call_count == 1

    under_schedules(0, program)
