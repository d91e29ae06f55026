"""Each program learns its own duration: what one shape takes says nothing about another."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

import aiotrt
from aiotrt.testing import SimulatedDevice
from tests.simulated import run_simulated
from tests.tools import frame
from tests.virtual_devices import VirtualDevice, held_slots, load, on_both, run_on

SHORT, LONG = (2, 3), (4, 3)


class Timed:
    """A schedule by which each operation takes `seconds`, which a law sets before each call."""

    def __init__(self) -> None:
        self.seconds = 1e-5

    def choose(self, options: Sequence[str]) -> int:
        return 0

    def duration(self, what: str) -> float:
        return self.seconds

    def preempts(self, what: str) -> bool:
        return False


@on_both
def test_a_hang_is_reported_with_what_this_shape_takes(where: str) -> None:
    """The one place where the host device, which tells when work is complete, shows an estimate."""
    schedule = Timed()

    async def program(device: VirtualDevice) -> None:
        async with load(device, warmup=[frame(0, SHORT), frame(0, LONG)], hang_timeout=1.0) as model:
            for shape, seconds in ((SHORT, 1e-4), (LONG, 1e-2)):
                schedule.seconds = seconds
                for _ in range(5):
                    await model(frame(1, shape))
            schedule.seconds = 1e-4
            with held_slots(device, model):
                with pytest.raises(aiotrt.DeviceHangError) as caught:
                    await model(frame(1, SHORT))
            said = re.search(r"expected to take (\S+) s", str(caught.value))
            assert said is not None
            assert float(said[1]) < 1e-3, f"it takes 1e-4 s an operation, and the report says {said[1]} s"

    run_on(where, program, [schedule])


def test_a_shape_is_polled_as_if_there_were_no_other() -> None:
    """Work whose duration is known takes few polls, also after calls of another shape that take ten times longer."""

    def polls(*, alternate: bool) -> int:
        schedule = Timed()
        made: list[int] = []

        async def program(device: SimulatedDevice) -> None:
            async with load(device, warmup=[frame(0, SHORT), frame(0, LONG)]) as model:
                for _ in range(10):
                    if alternate:
                        schedule.seconds = 1e-3
                        await model(frame(1, LONG))
                    schedule.seconds = 1e-4
                    before = model.statistics().polls
                    await model(frame(1, SHORT))
                    made.append(model.statistics().polls - before)

        device = SimulatedDevice(schedule)
        run_simulated(program(device), device)
        return made[-1]

    alone, alternating = polls(alternate=False), polls(alternate=True)
    assert alternating <= alone + 1, f"{alone} polls by itself, {alternating} beside another shape"
