"""When a refused client shall come back: learned from completions, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import aiotrt
from aiotrt.errors import OverloadedError, QueueFullError
from aiotrt.serving.errors import problem
from aiotrt.serving.monitor import Monitor
from aiotrt.testing import SimulatedDevice, run
from aiotrt.testing.virtual import Scripted

ITEM = np.ones((1, 4), np.float32)


class Slow(Scripted):
    """Operations take `seconds`."""

    seconds = 1e-5

    def duration(self, what: str) -> float:
        return self.seconds


def overloaded(seconds: list[tuple[float, float]], *, batch: int = 0) -> tuple[float | None, float]:
    """Keep 64 calls waiting; what `Monitor` says of the queue, and how long it then takes.

    Args:
        seconds: until when, and how long an operation takes till then; in the end what the monitor says is read.
        batch: most items of a batch; 0 for none.
    """
    schedule = Slow()
    device = SimulatedDevice(schedule)
    batching = aiotrt.Batching(max_size=batch) if batch else None
    item = ITEM[0] if batch else ITEM

    async def main() -> tuple[float | None, float]:
        loop = asyncio.get_running_loop()
        async with (
            aiotrt.load(lambda x: x + 1, device=device, slots=1, batching=batching, warmup=[item]) as model,
            Monitor(lambda: {"m": model}, CollectorRegistry(), clock=loop.time) as monitor,
        ):
            calls: set[asyncio.Future[Any]] = set()

            async def keep_waiting() -> None:
                while True:
                    while model.statistics().waiting < 64:
                        calls.add(asyncio.ensure_future(model(item)))
                        await asyncio.sleep(0)
                    await asyncio.sleep(0.001)

            began = loop.time()
            asking = asyncio.create_task(keep_waiting())
            for end, duration in seconds:
                schedule.seconds = duration
                await asyncio.sleep(began + end - loop.time())
            asking.cancel()
            said, before = monitor.seconds_to_wait(), loop.time()
            await asyncio.gather(*calls)
            took = loop.time() - before
        return said, took

    return run(main(), device)


@pytest.mark.parametrize("batch", [0, 8])
@pytest.mark.parametrize("duration", [0.002, 0.02, 0.1])
def test_a_second_after_an_overload_began_it_is_right_within_a_factor_of_two(duration: float, batch: int) -> None:
    said, took = overloaded([(1.05, duration)], batch=batch)
    assert said is not None
    assert took / 2 <= said <= took * 2


def test_a_slow_beginning_is_not_remembered() -> None:
    said, took = overloaded([(0.25, 0.25), (1.3, 0.02)])
    assert said is not None
    assert took / 2 <= said <= took * 2


def test_before_a_call_is_complete_no_rate_is_made_up() -> None:
    assert overloaded([(0.55, 5.0)])[0] is None
    assert overloaded([(0.55, 5.0)], batch=8)[0] is None


def test_a_change_of_pace_is_followed() -> None:
    said, took = overloaded([(10.0, 0.02), (20.0, 0.1)])
    assert said is not None
    assert took / 1.5 <= said <= took * 1.5


@pytest.mark.parametrize(
    ("error", "wait", "says"),
    [
        (QueueFullError("full"), None, 1),
        (QueueFullError("full"), 0.2, 1),
        (QueueFullError("full"), 7.2, 8),
        (QueueFullError("full"), 700.0, 60),
        (OverloadedError("late", seconds=3.0), None, 3),
        (OverloadedError("late", seconds=3.0), 7.2, 3),
        (OverloadedError("late", seconds=81.0), 7.2, 8),
    ],
)
def test_what_a_client_is_told(error: Exception, wait: float | None, says: int) -> None:
    assert problem(error, wait).retry_after == says
