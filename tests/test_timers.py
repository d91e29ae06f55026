"""The hub's timer: it fires once, after the time last set, and keeps no descriptor when it is closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiotrt
from aiotrt.completion.timers import LoopTimer, TimerFd, open_timer

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]

OPENS: list[Any] = [TimerFd, LoopTimer, open_timer]


class Fired:
    """A timer, and the moments at which it fired."""

    def __init__(self, opens: Callable[..., Any]) -> None:
        self.at: list[float] = []
        self.timer = opens(asyncio.get_running_loop(), self.fire)
        self.event = asyncio.Event()

    def fire(self) -> None:
        read = getattr(self.timer, "read", None)
        if read is not None:
            try:
                read()
            except BlockingIOError:
                return
        self.at.append(time.monotonic())
        self.event.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.event.wait(), 20)
        self.event.clear()


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("opens", OPENS)
async def test_it_fires_once_each_time_it_is_set_and_not_early(opens: Callable[..., Any]) -> None:
    fired = Fired(opens)
    for delay in (0.003, 0.0, -1.0, 1e-9, 0.012):
        start = time.monotonic()
        fired.timer.set(delay)
        await fired.wait()
        # libuv's clock stands still during an iteration, and its milliseconds are rounded.
        assert fired.at.pop() - start >= delay - (2e-3 if opens is LoopTimer else 0.0)
    assert fired.at == []
    fired.timer.close()


@pytest.mark.parametrize("opens", OPENS)
async def test_setting_it_again_replaces_the_time(opens: Callable[..., Any]) -> None:
    fired = Fired(opens)
    fired.timer.set(3600.0)
    fired.timer.set(0.001)
    await fired.wait()
    fired.timer.set(0.001)
    fired.timer.set(3600.0)
    later = Fired(LoopTimer)
    later.timer.set(0.01)
    await later.wait()
    assert len(fired.at) == 1
    fired.timer.close()


@pytest.mark.parametrize("opens", OPENS)
async def test_a_closed_timer_does_not_fire_and_its_descriptor_is_free(opens: Callable[..., Any]) -> None:
    await asyncio.sleep(0)  # the loop opens what it keeps
    before = descriptors()
    fired = Fired(opens)
    fired.timer.set(0.001)
    fired.timer.close()
    fired.timer.close()
    assert descriptors() == before
    later = Fired(LoopTimer)
    later.timer.set(0.01)
    await later.wait()
    assert fired.at == []


async def test_the_compiled_build_sets_its_timer_without_ctypes() -> None:
    timer = open_timer(asyncio.get_running_loop(), lambda: None)
    assert (type(timer) is TimerFd) == (aiotrt.__impl__ == "python")
    timer.close()
