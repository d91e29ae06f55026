"""An event loop in virtual time: nothing sleeps, and every run with one schedule is the same.

Time passes a little with each iteration of the loop, since a program that polls must see it pass. When the loop has
nothing to do, time jumps to whatever happens first: a timer of the loop, or something on the device or in a worker thread.
When nothing can happen any more, that is a deadlock, and an error instead of a hang.
"""

from __future__ import annotations

import asyncio
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
#: Real seconds to wait for a real thread or socket, when nothing can happen in virtual time.
PATIENCE: Final = 1.0
#: Iterations after which real files are looked at, though nobody said that there is anything: a signal says nothing.
GLANCE: Final = 100


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, on a virtual clock. Made by `run`; needed directly only with a test framework's loop factory.

    Args:
        device: whose clock it is.

    Attributes:
        device: that device.
        virtual_time: its clock.
        is_woken: whether another thread has woken it since it last looked.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.virtual_time: VirtualTime = device.time
        self.is_woken = False
        self._workers = device.workers(8)
        super().__init__(_Selector(self))
        # The hub of this loop must use its clock and its timers: real ones would sleep.
        self._hubs = [
            completion.Hub(self, progress=progress, clock=self.time, timer=_LoopTimer, spin=SPIN_BUDGET)
            for progress in Progress
        ]
        for hub in self._hubs:
            completion.Hub.install(hub)

    def time(self) -> float:
        """Seconds of virtual time."""
        return self.virtual_time.now

    def run_in_executor(  # type: ignore[override]  # typeshed spells the arguments with a TypeVarTuple
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run `func` in a worker thread in virtual time, whatever `executor` is, unless it is one of those itself."""
        workers = executor if isinstance(executor, Workers) else self._workers
        return asyncio.wrap_future(workers.submit(func, *args), loop=self)

    def _write_to_self(self) -> None:
        super()._write_to_self()  # type: ignore[misc]
        self.is_woken = True  # after it: who sees this finds what was written

    def close(self) -> None:
        """Close the loop and its hubs."""
        super().close()
        completion._drop_hubs_of_closed_loops()


class _LoopTimer:
    """The hub's timer: the loop's own timers are exact here."""

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
    """Waits in virtual time; real files are looked at, and waited for only when nothing else can happen."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()
        self._unseen = 0  # iterations since the last look at real files

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """One iteration's wait; `timeout` in seconds of virtual time, None for no timer."""
        time = self._loop.virtual_time
        start = time.now
        time.advance(ITERATION)
        found = self._look()
        if found or (timeout is not None and timeout <= 0):
            return found
        limit = float("inf") if timeout is None else start + timeout
        while not found and time.step(limit):
            found = self._look()
        if found:
            return found
        if timeout is not None:
            time.now = max(time.now, limit)
            return []
        found = self._real.select(PATIENCE if self._may_be_woken() else 0)
        if not found:
            tasks = "\n".join(f"  {task!r}" for task in asyncio.all_tasks(self._loop))
            raise DeadlockError(f"nothing is left that could happen; {time.describe()}; these tasks wait:\n{tasks}")
        return found

    def _look(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What real files have to say, if anybody woke the loop, as worker threads do; a look costs a system call."""
        self._unseen += 1
        if not self._loop.is_woken and self._unseen < GLANCE and len(self._real.get_map()) == 1:
            return []
        self._unseen = 0
        self._loop.is_woken = False
        return self._real.select(0)

    def _may_be_woken(self) -> bool:
        """Whether there is a real thread, or a file besides the loop's own, that could wake it."""
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
    """Run a coroutine to its end in virtual time, on a loop that knows `device`.

    Args:
        main: the coroutine; ``aiotrt.load(..., device=device)`` in it opens a model there.
        device: the simulated device, or a fault injector around one.
        debug: asyncio's debug mode; None leaves it to ``PYTHONASYNCIODEBUG``.

    Returns what `main` returns.

    Raises:
        DeadlockError: `main` waits for what can no longer happen.
        HazardError: the program has a race, though its result may have been right this time.
        BaseException: whatever `main` raises.
    """
    if isinstance(device, FaultInjector):
        device = device.simulated
    try:
        with (
            device.intercepting(),
            asyncio.Runner(debug=debug, loop_factory=lambda: VirtualLoop(device)) as runner,
        ):
            result = runner.run(main)
    except BaseException as error:
        for hazard in device.detector.found[:1]:  # most likely why
            error.add_note(f"The detector found before that:\n{hazard}")
        raise
    finally:
        device.time.end()
    device.check()
    return result
