"""A module that never returns: `load`, the loop and the process end within `hang_timeout` and two seconds."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aiotrt
from aiotrt.devices.host import HostDevice
from aiotrt.runtime import memory
from aiotrt.runtime.alarm import Alarm
from tests.tools import frame

HANG_TIMEOUT = 0.5


@pytest.mark.serial
@pytest.mark.parametrize("where", ["capture", "warmup", "run", "warmup, and nobody closes", "batch"])
def test_a_module_that_hangs_keeps_neither_the_loop_nor_the_process(where: str) -> None:
    program = f"""
        import asyncio, threading, time
        import numpy as np, torch, aiotrt

        calls, start = 0, 0.0
        hangs_at = {1 if where != "run" else 2}

        class Hangs(torch.nn.Module):
            def forward(self, x):
                global calls, start
                calls += 1
                if calls == hangs_at:
                    start = time.monotonic()
                    threading.Event().wait()
                return x

        async def main():
            x = np.zeros((2, 3), np.float32)
            options = {{"batching": aiotrt.Batching(max_size=2)}} if {where == "batch"} else {{}}
            if {where != "capture"}:
                options["warmup"] = [x]
            model = aiotrt.load(Hangs(), device="host", slots=2, hang_timeout={HANG_TIMEOUT}, **options)
            try:
                if {where.endswith("closes")}:
                    await model
                async with model:
                    await model(x)
            except aiotrt.DeviceHangError as error:
                print(error)

        asyncio.run(main())
        print(f"loop {{time.monotonic() - start:.3f}}", flush=True)
    """
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told, loop = done.stdout.splitlines()
    assert f"hang_timeout={HANG_TIMEOUT} s" in told
    assert float(loop.split()[1]) < HANG_TIMEOUT + 2
    assert time.monotonic() - before < 50


class Held(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.opened.wait()
        return x


@pytest.mark.asyncio
async def test_a_load_that_hangs_says_what_was_late_and_leaves_no_model() -> None:
    module, kept = Held(), len(memory._kept)
    model = aiotrt.load(module, device=HostDevice(), slots=2, hang_timeout=0.05, warmup=frame(0))
    with pytest.raises(aiotrt.DeviceHangError, match="the engine's first run for these shapes, or its capture, did not end"):
        _ = await model
    assert repr(model) == "<aiotrt.Model Held: closed>"
    assert len(memory._kept) == kept + 1  # the module may still write to it
    module.opened.set()
    del memory._kept[kept:]


@pytest.mark.asyncio
async def test_a_first_run_for_new_shapes_that_hangs_breaks_the_model() -> None:
    module, kept = Held(), len(memory._kept)
    module.opened.set()
    async with aiotrt.load(module, device=HostDevice(), slots=1, hang_timeout=0.05, warmup=frame(0)) as model:
        module.opened.clear()
        with pytest.raises(aiotrt.DeviceHangError):
            await model(frame(0, (5, 5)))
        with pytest.raises(aiotrt.ModelBrokenError):
            await model(frame(0))
        module.opened.set()
    del memory._kept[kept:]


class Clock:
    """A loop's clock and its only timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[..., object], tuple[object, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., object], *args: object) -> object:
        self.timers.append((when, callback, args))
        return self

    def ring(self, late: float = 0.0) -> None:
        (timer,) = self.timers
        self.timers.clear()
        when, callback, args = timer
        self.now = when + late
        callback(*args)


def alarm_of(clock: Any, device: HostDevice, told: list[str]) -> Alarm:
    return Alarm(clock, device, 10.0, "it did not end", lambda error: told.append(str(error)))


def test_a_capture_that_waits_for_the_turn_of_others_does_not_hang() -> None:
    """Each capture of the process waits for the one before it, which may be another model's."""
    clock, device = Clock(), HostDevice()
    told: list[str] = []
    alarm_of(clock, device, told)
    for _ in range(3):
        device.captures += 1
        clock.ring()
    assert told == []
    clock.ring()
    assert told == ["it did not end within hang_timeout=10 s"]
    assert clock.now == 40.0
    assert not clock.timers


def test_time_in_which_the_loop_stood_still_does_not_count() -> None:
    clock = Clock()
    told: list[str] = []
    alarm_of(clock, HostDevice(), told)
    clock.ring(late=100.0)
    assert told == []
    clock.ring(late=0.5)
    assert len(told) == 1
    assert clock.now == 120.5


def test_no_hang_timeout_is_no_timer() -> None:
    clock: Any = Clock()
    Alarm(clock, HostDevice(), None, "", lambda error: None).cancel()
    assert not clock.timers
