"""The shortest path from a call to a coroutine that goes on: the measure of aiotrt's own path.

It holds what every await needs: one input of one shape, and no faults, statistics or queue limits. A run that measures both
shows what aiotrt's duties cost on top. The file is plain Python; `core.pxd` gives it types where Cython compiles it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextvars import Context
from typing import Any, Final

__all__ = ["Model", "Poller", "Slot", "System", "Waiter"]

NEVER: Final = float("inf")
SPIN: Final = 40e-6  # seconds after the predicted completion in which every loop iteration polls
MARGIN: Final = 5e-6  # seconds; a timer shorter than this is not worth setting
LEARNING: Final = 0.05  # weight of the last wake-up in the lateness of timers


class Waiter:
    """One request: its entry in a slot's pending list and its awaitable.

    Attributes:
        inline: whether the poll resumes the task itself, instead of through `call_soon`.
        x: the input; None for a lease.
        submitted: when it was launched.
        polled: when it was last found incomplete.
        polls: how many times that was.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, x: Any, inline: bool) -> None:
        self.loop = loop
        self.x = x
        self.inline = inline
        self.callback: Callable[[Any], object] | None = None
        self.context: Context | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.is_cancelled = False
        self.submitted = 0.0
        self.polled = 0.0
        self.polls = 0
        self._asyncio_future_blocking = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self  # type: ignore[return-value]  # an iterator is all that `await` needs

    def __iter__(self) -> Waiter:
        return self

    def __next__(self) -> Waiter:
        if not self.is_done:
            self._asyncio_future_blocking = True
            return self
        if self.error is None and not self.is_cancelled:
            raise StopIteration(self.value)
        self.result()  # raises
        raise AssertionError

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        if self.is_done:
            self.loop.call_soon(callback, self, context=context)
        else:
            self.callback = callback
            self.context = context

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        removed = self.callback is not None
        self.callback = None
        return int(removed)

    def done(self) -> bool:
        return self.is_done

    def cancelled(self) -> bool:
        return self.is_cancelled

    def exception(self) -> BaseException | None:
        return self.error

    def result(self) -> Any:
        if self.is_cancelled:
            raise asyncio.CancelledError
        if self.error is not None:
            raise self.error
        return self.value

    def cancel(self, msg: object = None) -> bool:
        if self.is_done:
            return False
        self.is_cancelled = True
        self.inline = False  # a task is running: it cannot be resumed from here
        self.finish()
        return True

    def finish(self) -> None:
        """Resume the caller."""
        if self.is_done:
            return
        self.is_done = True
        callback = self.callback
        if callback is None:
            return
        self.callback = None
        context = self.context
        if self.inline and context is not None:
            context.run(callback, self)
        else:
            self.loop.call_soon(callback, self, context=context)


class Slot:
    """A stream with a captured graph. A subclass makes the device's calls.

    Attributes:
        pending: launched requests in order.
        owner: the model.
        estimate: seconds that a launch is expected to take.
        last_done: when the last completion was seen.
        late: completions in a row that the first poll found.
        x, out: input and result of the request in flight.
        spare: memory for the next result, allocated while the device is at work.
    """

    def __init__(self, estimate: float) -> None:
        self.pending: deque[Waiter] = deque()
        self.owner: Any = None
        self.estimate = estimate
        self.last_done = 0.0
        self.late = 0
        self.x: Any = None
        self.out: Any = None
        self.spare: Any = None

    def launch(self) -> int:
        """Launch the graph and record the event."""
        raise NotImplementedError

    def copy_and_launch(self, source: int, destination: int) -> int:
        """Set the addresses of the graph's copies where they changed, then launch."""
        raise NotImplementedError

    def query(self) -> bool:
        """Return whether the event is complete."""
        raise NotImplementedError


class System:
    """The clock, and a timer whose descriptor is readable when it has fired."""

    def now(self) -> float:
        """Seconds."""
        raise NotImplementedError

    def set_timer(self, seconds: float) -> int:
        """Fire once, after so many seconds."""
        raise NotImplementedError

    def clear(self) -> bool:
        """Return whether the timer has fired, and reset it."""
        raise NotImplementedError


class Poller:
    """Polls the first pending request of each slot from shortly before its predicted completion on.

    Attributes:
        lateness, deviation: how late timers wake the loop, and how much that varies, in seconds.
        due: when the timer that is set should fire.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, system: System, descriptor: int) -> None:
        self.loop = loop
        self.system = system
        self.descriptor = descriptor
        self.slots: list[Slot] = []
        self.count = 0
        self.is_timed = False
        self.is_spinning = False
        self.is_polling = False
        self.due = 0.0
        self.lateness = 50e-6
        self.deviation = 20e-6
        self.spin_callback = self.spin
        loop.add_reader(descriptor, self.fire)

    def close(self) -> None:
        self.is_spinning = False
        self.loop.remove_reader(self.descriptor)

    def fire(self) -> None:
        """The timer's callback."""
        if not self.system.clear():
            return
        error = self.system.now() - self.due - self.lateness
        self.lateness += LEARNING * error
        self.deviation += LEARNING * (abs(error) - self.deviation)
        self.poll()

    def spin(self) -> None:
        """The loop's callback while every iteration polls."""
        if self.is_spinning:
            self.poll()

    def poll(self) -> None:
        """Complete what is complete, then wait for the rest."""
        self.is_timed = self.is_spinning = False
        self.is_polling = True
        try:
            for slot in self.slots:
                # A completion launches the next request. What is launched now is polled next time.
                left = len(slot.pending)
                while left > 0:
                    waiter = slot.pending[0]
                    complete = slot.query()
                    now = self.system.now()
                    if not complete:
                        waiter.polls += 1
                        waiter.polled = now
                        break
                    slot.pending.popleft()  # type: ignore[unused-awaitable]  # its caller awaits it
                    self.count -= 1
                    left -= 1
                    self.learn(slot, waiter, now)
                    slot.owner.complete(slot, waiter)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self.is_polling = False
        if self.count:
            # Callers that were resumed may have launched on any slot, so only now is the next one known.
            earliest = NEVER
            for slot in self.slots:
                if slot.pending:
                    waiter = slot.pending[0]
                    started = waiter.submitted if waiter.submitted > slot.last_done else slot.last_done  # noqa: FURB136
                    if started + slot.estimate < earliest:
                        earliest = started + slot.estimate
            self.arm(earliest)

    def fail(self, error: BaseException) -> None:
        """Fail every pending request, so that a fault ends the measurement."""
        for slot in self.slots:
            while slot.pending:
                waiter = slot.pending.popleft()
                waiter.error = error
                waiter.inline = False
                waiter.finish()
        self.count = 0

    def learn(self, slot: Slot, waiter: Waiter, now: float) -> None:
        """Correct the estimate of how long the work takes."""
        started = waiter.submitted if waiter.submitted > slot.last_done else slot.last_done  # noqa: FURB136
        ran = now - started
        slot.last_done = now
        if waiter.polls:
            # It completed between two polls.
            seen = 0.5 * (waiter.polled - started + ran) if waiter.polled > started else ran
            slot.estimate += (0.3 if seen < slot.estimate else 0.1) * (seen - slot.estimate)
            slot.late = 0
            return
        # The first poll found it complete, so it took at most this long: poll earlier next time.
        if ran < slot.estimate:
            slot.estimate = ran
        slot.estimate *= 1 - min(0.5, 0.003 * (1 << min(slot.late, 8)))
        slot.late += 1

    def arm(self, due: float) -> None:
        """Poll again for a completion predicted at this time."""
        now = self.system.now()
        wake = due - (self.lateness + 1.5 * self.deviation + MARGIN)
        if wake <= now + MARGIN:
            if now < due + SPIN:
                self.is_timed = False
                self.is_spinning = True
                self.loop.call_soon(self.spin_callback)
                return
            wake = now + max(10e-6, 0.03 * (now - due))
        self.due = wake
        self.is_timed = True
        self.is_spinning = False
        self.system.set_timer(wake - now)

    def watch(self, slot: Slot, waiter: Waiter) -> None:
        """Add a request that was just launched."""
        now = self.system.now()
        waiter.submitted = now
        slot.pending.append(waiter)
        self.count += 1
        if self.is_polling or self.is_spinning:
            return
        due = now + slot.estimate
        if not self.is_timed or (len(slot.pending) == 1 and due - self.lateness - 1.5 * self.deviation < self.due):
            self.arm(due)


class Model:
    """Slots and a queue for requests of one shape.

    Args:
        loop: the event loop.
        poller: the loop's poller.
        slots: at least one.
        example: an input.
        allocate: allocates memory for a result.
        is_ordered: returns whether all work that wrote the caller's input is complete.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        slots: Iterable[Slot],
        example: Any,
        allocate: Callable[[], Any],
        is_ordered: Callable[[], bool],
    ) -> None:
        self.loop = loop
        self.poller = poller
        self.free = list(slots)
        self.queue: deque[Waiter] = deque()
        self.allocate = allocate
        self.is_ordered = is_ordered
        self.device = example.device
        self.dtype = example.dtype
        self.shape = example.shape
        for slot in self.free:
            slot.owner = self
            poller.slots.append(slot)

    def lease(self) -> Waiter:
        """Launch with no copies."""
        waiter = Waiter(self.loop, None, True)
        if self.free:
            self.launch(self.free.pop(), waiter)
        else:
            self.queue.append(waiter)
        return waiter

    def call(self, x: Any) -> Waiter:
        """Check the input, copy it in, launch, and copy the result into memory of its own."""
        if x.device != self.device or x.dtype is not self.dtype or x.shape != self.shape or not x.is_contiguous():
            raise ValueError(f"expected a contiguous {self.dtype} of shape {tuple(self.shape)} on {self.device}")
        waiter = Waiter(self.loop, x, True)
        if self.free:
            self.launch(self.free.pop(), waiter)
        else:
            self.queue.append(waiter)
        return waiter

    def launch(self, slot: Slot, waiter: Waiter) -> None:
        x = waiter.x
        if x is None:
            slot.launch()
            self.poller.watch(slot, waiter)
            return
        out = slot.spare
        if out is None:
            out = self.allocate()
        slot.spare = None
        if not self.is_ordered():
            raise RuntimeError("the caller's stream is busy: the prototype orders nothing behind it")
        slot.x = x
        slot.out = out
        slot.copy_and_launch(x.data_ptr(), out.data_ptr())
        self.poller.watch(slot, waiter)
        slot.spare = self.allocate()

    def complete(self, slot: Slot, waiter: Waiter) -> None:
        """Hand out the result, launch the next request, then resume the caller."""
        waiter.value = slot.out
        slot.out = slot.x = waiter.x = None
        if self.queue:
            self.launch(slot, self.queue.popleft())
        else:
            self.free.append(slot)
        waiter.finish()
