"""An event loop in virtual time: nothing sleeps, and equal schedules give equal runs.

Each iteration of the loop takes a little virtual time, so that a program that polls sees time pass. When the loop is idle,
time jumps to the next event: a timer of the loop, or an action of the device or of a worker thread. When no event is left,
the program is deadlocked, and an error is raised instead of a hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from aiotrt.completion import hub as completion
from aiotrt.completion.prediction import SPIN_BUDGET, Progress
from aiotrt.testing.faults import FaultInjector
from aiotrt.testing.simulator import SimulatedDevice
from aiotrt.testing.virtual import DeadlockError, VirtualTime, Workers

__all__ = ["VirtualLoop", "run"]

T = TypeVar("T")

#: Seconds of virtual time that one iteration of the loop takes.
ITERATION: Final = 2e-6
#: Real seconds to wait for a real thread or socket when nothing can happen in virtual time.
PATIENCE: Final = 5.0
#: Iterations after which real files are polled even if no thread has woken the loop: a signal sets no flag.
POLL_INTERVAL: Final = 100


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's selector loop on a virtual clock. `run` creates it; use it directly only as a test framework's loop factory.

    Args:
        device: the device whose clock the loop uses.

    Attributes:
        device: that device.
        virtual_time: the device's clock.
        is_woken: whether another thread has woken the loop since real files were last polled.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.virtual_time: VirtualTime = device.time
        self.is_woken = False
        self._workers = device.workers(8)
        super().__init__(_Selector(self))
        # The loop's hubs must use its clock and its timers: real ones would sleep.
        self._hubs = [
            completion.Hub(self, progress=progress, clock=self.time, timer=_LoopTimer, spin=SPIN_BUDGET)
            for progress in Progress
        ]
        for hub in self._hubs:
            completion.Hub.install(hub)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.virtual_time.now

    def run_in_executor(  # type: ignore[override]  # typeshed spells the arguments with a TypeVarTuple
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run `func` in a worker thread in virtual time: in `executor` if it is a `Workers`, else in the loop's own pool."""
        workers = executor if isinstance(executor, Workers) else self._workers
        return asyncio.wrap_future(workers.submit(func, *args), loop=self)

    def _write_to_self(self) -> None:
        super()._write_to_self()  # type: ignore[misc]
        self.is_woken = True  # after the write: a poll that sees this flag must find the written byte

    def close(self) -> None:
        """Close the loop and its hubs."""
        super().close()
        completion._drop_hubs_of_closed_loops()


class _LoopTimer:
    """The hub's timer, by the loop's own timers, which are exact in virtual time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def set(self, delay: float) -> None:
        self.close()
        self._handle = self._loop.call_later(delay, self._callback)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class _Selector(selectors.BaseSelector):
    """A selector that waits in virtual time. It polls real files, and waits for them only when nothing else can happen."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()
        self._unpolled = 0  # iterations since real files were last polled

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for one iteration of the loop, at most `timeout` seconds of virtual time; None for no limit."""
        time = self._loop.virtual_time
        start = time.now
        time.advance(ITERATION)
        found = self._poll()
        if found or (timeout is not None and timeout <= 0):
            return found
        limit = float("inf") if timeout is None else start + timeout
        while not found and time.step(limit):
            found = self._poll()
        if found:
            return found
        if timeout is not None:
            time.now = max(time.now, limit)
            return []
        found = self._real.select(PATIENCE if self._may_be_woken() else 0)
        if not found:
            tasks = "\n".join(f"  {task!r}" for task in asyncio.all_tasks(self._loop))
            raise DeadlockError(f"no event is left that could end a wait; {time.describe()}; these tasks wait:\n{tasks}")
        return found

    def _poll(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Poll real files; without a wake-up only every `POLL_INTERVAL` iterations, because that costs a system call."""
        self._unpolled += 1
        if not self._loop.is_woken and self._unpolled < POLL_INTERVAL and len(self._real.get_map()) == 1:
            return []
        self._unpolled = 0
        self._loop.is_woken = False
        return self._real.select(0)

    def _may_be_woken(self) -> bool:
        """Whether a real thread, or a file other than the loop's own, could wake the loop."""
        return threading.active_count() > 1 + self._loop.virtual_time.workers or len(self._real.get_map()) > 1

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def close(self) -> None:
        self._real.close()


def run(main: Coroutine[Any, Any, T], device: SimulatedDevice | FaultInjector, *, debug: bool | None = None) -> T:
    """Run a coroutine to its end in virtual time, on a loop that uses the clock of `device`.

    Args:
        main: the coroutine; ``aiotrt.load(..., device=device)`` in it loads a model on the device.
        device: the simulated device, with its peers, or a fault injector around one.
        debug: asyncio's debug mode; None leaves it to ``PYTHONASYNCIODEBUG``.

    Returns:
        The result of `main`.

    Raises:
        DeadlockError: `main` waits for an event that can no longer happen.
        HazardError: the program has a race, even if its result was right.
        BaseException: any exception that `main` raises.
    """
    if isinstance(device, FaultInjector):
        device = device.simulated
    try:
        with (
            contextlib.ExitStack() as stack,
            asyncio.Runner(debug=debug, loop_factory=lambda: VirtualLoop(device)) as runner,
        ):
            for peer in device.peers:
                stack.enter_context(peer.intercepting())
            result = runner.run(main)
    except BaseException as error:
        for hazard in device.detector.found[:1]:  # the likely cause
            error.add_note(f"The detector found before that:\n{hazard}")
        raise
    finally:
        device.time.end()
    device.check()
    return result
