"""The laws' checks on a GPU in virtual time: what applies only where inputs can still be in the making, and its failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import pytest

import aiotrt
from aiotrt.devices import Stream
from aiotrt.selftest import Options, laws
from aiotrt.selftest.bench import Bench
from aiotrt.selftest.cases import Case
from aiotrt.selftest.report import CheckFailed, Finding
from aiotrt.testing import SimulatedDevice, run
from aiotrt.testing.streams import Record
from tests.tools import Affine, frame

CHECKS = [laws.completion, laws.consumers, laws.inputs, laws.callers]


class SimulatedLatch:
    """A latch for streams in virtual time."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._record = Record({})

    def hold(self, stream: Stream) -> None:
        self._device.adopt_stream(stream).follow(self._record)

    def open(self) -> None:
        self._record.is_done = True
        self._device.pump()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open()


def checked(check: Callable[[Bench], Awaitable[Finding]], seed: int) -> Finding:
    """Run one check on a simulated device."""
    device = SimulatedDevice(seed)

    async def program() -> Finding:
        async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0)) as model:
            assert model.inputs is not None
            case = Case("fixed", model.inputs, ((2, 3),), {})
            return await check(Bench(model, lambda: model, [case], case, Options(Path("x"))))

    return run(program(), device)


@pytest.fixture(autouse=True)
def _latch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "Latch", SimulatedLatch)


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=pytest.mark.proof if check is laws.callers else ()) for check in CHECKS]
)
def test_the_laws_hold(check: Callable[[Bench], Awaitable[Finding]]) -> None:
    for seed in range(10):
        assert checked(check, seed).detail


def test_device_inputs_take_part() -> None:
    assert "from host and device inputs" in checked(laws.callers, 0).detail


def test_an_input_that_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotrt.runtime.launch.Request.order", lambda self, slot: None)
    with pytest.raises(CheckFailed, match=r"its input was still being written|did not wait for its input"):
        checked(laws.inputs, 0)


def test_a_consumer_that_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("launch", "executor", "hold"):
        monkeypatch.setattr(f"aiotrt.runtime.{module}.open_gates", lambda slot: slot.gates.clear())
    with pytest.raises(CheckFailed, match="a consumer of its results had not read them"):
        checked(laws.consumers, 0)


def test_a_result_that_is_handed_out_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    query: Any = SimulatedDevice.query
    monkeypatch.setattr(SimulatedDevice, "query", lambda self, event: query(self, event) or True)
    with pytest.raises(CheckFailed, match="2 of 2 calls returned while the device was held"):
        checked(laws.completion, 0)


def test_cancelling_a_check_leaves_nothing_held() -> None:
    device = SimulatedDevice(0)

    async def program() -> None:
        async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0)) as model:
            assert model.inputs is not None
            case = Case("fixed", model.inputs, ((2, 3),), {})
            bench = Bench(model, lambda: model, [case], case, Options(Path("x")))
            for check in CHECKS:
                for delay in (0.001, 0.05, laws.HOLD + 0.01):
                    task = asyncio.ensure_future(check(bench))
                    await asyncio.sleep(delay)
                    task.cancel()
                    await asyncio.wait([task])
                    assert (await model(frame(2)))[0, 0] == 7

    run(program(), device)
