"""One event loop with one model on a simulated device, and everybody who awaits something there, watched from outside.

A party moves only when it is told to: turn by turn of its loop. Whatever is awaited has an entry, and an end is judged once:
the right result of its own, or an error that something has happened to account for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Container, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import torch

import aiotrt
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.request import Request, Slot
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, VirtualLoop
from tests.simulated import Audit, Striker
from tests.tools import Affine, executor_of, frame

__all__ = ["Awaited", "Holder", "Party", "Saboteur", "World"]

T = TypeVar("T")

#: Turns of the loop after which a cancelled task must have ended: a few callbacks, and nothing that waits.
AT_ONCE: Final = 6
#: Seconds of virtual time after which work counts as hung.
HANG: Final = 0.5


class Saboteur(Striker):
    """Fails when told to, unless it is told not to."""

    def disarm(self) -> None:
        """Whatever was ordered and has not happened does not."""
        self._faults.clear()


@dataclass
class World:
    """What all parties share.

    Attributes:
        device: where they are; fails when told to.
        audit: what must hold of every model.
        values: a number for each request, which tells its result from all others.
        kept: copies on the device that consumers made, with what they must hold in the end.
        failures: of requests, by faults that passed.
    """

    device: Saboteur
    audit: Audit
    values: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    kept: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def is_allowed(self, error: BaseException) -> bool:
        """Whether a fault that has happened accounts for this error."""
        happened = [fault.kind for fault in self.device.happened]
        fatal = {FaultKind.STICKY, FaultKind.HANG}.intersection(happened)
        if isinstance(error, (aiotrt.DeviceError, aiotrt.ModelBrokenError)):
            return bool(fatal) or len(happened) > 1  # a second one, when the first was being dealt with, can break it too
        if isinstance(error, aiotrt.EngineError):
            self.failures.append(error)
            return len(self.failures) <= len(happened)  # one fault fails one request
        return False


@dataclass(eq=False)
class Awaited:
    """Something that somebody awaits."""

    what: str
    task: asyncio.Task[Any]
    is_cancelled: bool = False

    def __str__(self) -> str:
        return f"{self.what}, {self.task!r}"


@dataclass(eq=False)
class Holder:
    """Somebody with a lease, or on the way to one."""

    shape: tuple[int, int]
    on_host: bool
    entering: Awaited = field(init=False)
    lease: aiotrt.Lease = field(init=False)  # once it is entered
    replay: Awaited | None = None
    is_launched: bool = False
    has_failed: bool = False  # then it only leaves

    @property
    def is_held(self) -> bool:
        task = self.entering.task
        return task.done() and not task.cancelled() and task.exception() is None

    @property
    def is_ready(self) -> bool:
        """Whether it can write and launch."""
        return self.is_held and not self.has_failed and (self.replay is None or self.replay.task.done())


class Party:
    """One loop, one model.

    Args:
        world: what all parties share.
        options: for `aiotrt.load`.

    Attributes:
        holders: of leases that were entered, or are being.
        closing: once it is being closed.
    """

    def __init__(self, world: World, **options: Any) -> None:
        self.world = world
        self.inner = world.device.simulated
        self.options = options
        self.captured: bool = options["graphs"]
        self.loop = VirtualLoop(self.inner)
        self.loop.set_exception_handler(lambda _, context: world.audit.contexts.append(context))
        self.awaited: list[Awaited] = []
        self.holders: list[Holder] = []
        self.closing: Awaited | None = None
        self.arrived: list[Request | None] = []  # None for those that have ended, and are used for later calls
        self.granted: list[int] = []  # their places among those that arrived
        self._open()

    # Moving...

    def turn(self, count: int = 1) -> None:
        """Let the loop go round, without waiting for anything."""
        for _ in range(count):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def do(self, function: Callable[[], T]) -> T:
        """Call a function on the loop."""

        async def call() -> T:
            return function()

        return self.loop.run_until_complete(call())

    def finish(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run until this has ended; a deadlock is an error."""
        return self.loop.run_until_complete(coroutine)

    def wait(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.finish(asyncio.sleep(seconds))

    def start(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> Awaited:
        """Await it from now on."""
        awaited = Awaited(what, self.loop.create_task(coroutine))
        self.awaited.append(awaited)
        return awaited

    def cancel(self, awaited: Awaited) -> None:
        """Its caller waits no longer: it must have ended at once."""
        awaited.is_cancelled = True
        awaited.task.cancel()
        self.turn(AT_ONCE)
        assert awaited.task.done(), f"cancelled, and still there: {awaited}"

    # Opening and closing...

    def _open(self) -> None:
        self.world.device.disarm()  # loading under faults has tests of its own
        self.model: aiotrt.Model = aiotrt.load(
            Affine(), device=self.world.device, hang_timeout=HANG, warmup=frame(0, (1, 3)), **self.options
        )
        self.closing = None
        self.finish(asyncio.wait([self.start("open", self._opened()).task]))

    async def _opened(self) -> None:
        executor = executor_of(await self.model)
        enter, begin, replay = executor._enter, executor.begin, executor._replay

        def entered(request: Request, bounded: bool, prefer: Container[int]) -> None:
            if request in self.arrived:
                self.arrived[self.arrived.index(request)] = None
            self.arrived.append(request)
            try:
                enter(request, bounded, prefer)
            except aiotrt.QueueFullError:
                self.arrived.remove(request)
                assert bounded
                assert executor.machine.waiting >= (executor.machine.max_waiting or 0), "refused, and the line was not full"
                assert State.FREE not in executor.machine.states, "refused, and a slot was free"
                raise

        def granted(slot: Slot, request: Request) -> None:
            self.granted.append(self.arrived.index(request))
            begin(slot, request)

        def replayed(slot: Slot, request: Request, was_queued: bool) -> bool:
            place = self.arrived.index(request)
            self.granted.append(place)
            if replay(slot, request, was_queued):
                return True
            assert self.granted.pop() == place
            return False

        executor._replay = replayed  # type: ignore[method-assign]
        executor._enter = entered  # type: ignore[method-assign]
        executor.begin = granted  # type: ignore[method-assign]

    @property
    def executor(self) -> Executor | None:
        """The model's, while it is open."""
        return self.model._executor

    @property
    def is_usable(self) -> bool:
        """Whether requests are welcome."""
        return self.model.is_ready

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or could not be opened."""
        return self.model._executor is None and (self.closing is None or self.closing.task.done())

    def close(self, *, drain: bool) -> None:
        """Begin to close."""
        self.closing = self.start("close", self.model.aclose(drain=drain))
        self.turn()

    def reopen(self) -> None:
        """Once it is closed, and everybody who still called it was told."""
        self.turn(AT_ONCE)
        self.judge()
        self.arrived.clear()
        self.granted.clear()
        self.holders.clear()
        self._open()

    def end(self) -> None:
        """Everybody leaves, the model is closed, and whoever still waits is waited for."""
        for holder in list(self.holders):
            if not holder.entering.task.done():
                self.cancel(holder.entering)
            elif holder.is_held:
                self.leave(holder)
        if self.model._executor is not None:
            self.close(drain=True)
        tasks = [awaited.task for awaited in self.awaited]
        if tasks:
            self.finish(asyncio.wait(tasks))

    def abandon(self) -> None:
        """It has failed: whatever is left must not say so too."""
        for awaited in self.awaited:
            awaited.task.cancel()
        self.turn(AT_ONCE)
        for awaited in self.awaited:
            if awaited.task.done() and not awaited.task.cancelled():
                awaited.task.exception()

    # What must hold...

    def judge(self) -> None:
        """Look at whatever has ended since."""
        for awaited in [awaited for awaited in self.awaited if awaited.task.done()]:
            self.awaited.remove(awaited)
            if awaited.task.cancelled():
                assert awaited.is_cancelled, f"nobody cancelled it: {awaited}"
            elif (error := awaited.task.exception()) is not None:
                self.accept(error, awaited.what)

    def accept(self, error: BaseException, what: str) -> None:
        """Raise it, unless something accounts for it."""
        if isinstance(error, aiotrt.QueueFullError):
            return  # that the line was full was looked at when it was raised
        is_over = self.closing is not None or self.model._executor is None
        if is_over and isinstance(error, (aiotrt.ModelClosedError, aiotrt.UsageError)):
            return
        if self.world.is_allowed(error):
            return
        error.add_note(f"which nothing accounts for, in: {what}")
        raise error

    def check(self) -> None:
        """What must hold whenever the loop is about to wait."""
        executor = self.executor
        if executor is None:
            return
        self._check_line(executor)
        figures = self.model.statistics()
        states = ("free", "claimed", "preparing", "in_flight", "readable", "draining", "broken")
        assert sum(getattr(figures, state) for state in states) == len(executor.slots), "a slot was lost"
        if not self.world.device.happened:  # a call that was cancelled counts as failed too, when its launch fails later
            assert figures.completed + figures.failed + figures.cancelled <= figures.submitted, "one request ended twice"
        if executor.broken is not None:
            self.turn(AT_ONCE)
            waiting = [awaited for awaited in self.awaited if awaited.what != "close" and not awaited.task.done()]
            assert not waiting, f"the model is broken, and nobody told {[*map(str, waiting)]}"

    def _check_line(self, executor: Executor) -> None:
        """First come, first served; and whoever was not served yet either stands in line or has left."""
        order = self.granted
        assert order == sorted(order), f"somebody jumped the line: {order}"
        assert len(set(order)) == len(order), f"somebody was served twice: {order}"
        served = set(order)
        left = [request for place, request in enumerate(self.arrived) if request is not None and place not in served]
        assert executor.machine.waiting == sum(request.is_queued for request in left), "the line is not who waits in it"
        for request in left:
            if not request.is_queued:
                assert request.done(), "neither served, nor in line, nor told"

    # Requests...

    def call(self, kind: str, shape: tuple[int, int]) -> None:
        """A call, from host memory, or from device memory that another stream is still writing."""
        value = next(self.world.values)
        self.start(f"call {value} from {kind}", self._call(value, kind, shape))

    async def _call(self, value: int, kind: str, shape: tuple[int, int]) -> None:
        inner = self.inner
        if kind in ("numpy", "torch"):
            array = frame(value, shape)
            result = await self.model(array if kind == "numpy" else torch.from_numpy(array))
            check(result, value, shape)
            return
        producer = inner.stream()
        with inner.use(producer):
            x = inner.tensor(frame(value, shape))
        made = producer.record()
        if kind == "ready":
            x._trt_ready_event = made  # type: ignore[attr-defined]
        else:
            inner.current_stream().wait(made)
        result = await self.model(x)
        check(inner.read(result), value, shape)
        with inner.use():
            self.world.kept.append((value, result.clone()))

    def map(self, count: int, in_flight: int, shape: tuple[int, int]) -> None:
        """Several calls in order."""
        values = [next(self.world.values) for _ in range(count)]
        self.start(f"map {values}", self._map(values, in_flight, shape))

    async def _map(self, values: list[int], in_flight: int, shape: tuple[int, int]) -> None:
        frames = [frame(value, shape) for value in values]
        async with contextlib.aclosing(self.model.map(frames, in_flight=in_flight)) as results:
            got = [result async for result in results]
        assert len(got) == len(values)
        for result, value in zip(got, values, strict=True):
            check(result, value, shape)

    # Leases...

    def enter(self, shape: tuple[int, int], *, on_host: bool) -> None:
        """Ask for a lease."""
        holder = Holder(shape, on_host)
        holder.entering = self.start("lease", self._enter(holder))
        self.holders.append(holder)

    async def _enter(self, holder: Holder) -> None:
        lease = self.model.lease([holder.shape], outputs="numpy" if holder.on_host else None)
        await lease.__aenter__()
        holder.lease = lease

    def launch(self, holder: Holder, readers: int, *, from_device: bool) -> None:
        """Write and launch; streams of their own read the outputs, and the lease hears of each."""
        self.do(lambda: self._launch(holder, next(self.world.values), readers, from_device))

    def _launch(self, holder: Holder, value: int, readers: int, from_device: bool) -> None:
        lease, inner = holder.lease, self.inner
        try:
            self._write(holder, value, from_device or holder.is_launched)
            event = lease.launch()
            for _ in range(readers):
                side = inner.stream()
                side.wait(event)
                with inner.use(side):
                    copy = lease.outputs[0].tensor.clone()
                lease.consumed(side)
                self.world.kept.append((value, copy))
            with inner.use():
                self.world.kept.append((value, lease.outputs[0].tensor.clone()))
        except aiotrt.AiotrtError as error:
            holder.has_failed = True
            self.accept(error, "launch")

    def replay(self, holder: Holder, *, from_device: bool) -> None:
        """Write and replay, and look at the results."""
        value = next(self.world.values)
        holder.replay = self.start(f"replay {value}", self._replay(holder, value, from_device))

    async def _replay(self, holder: Holder, value: int, from_device: bool) -> None:
        try:
            self._write(holder, value, from_device or holder.is_launched)
            result = await holder.lease.replay()
            check(result if holder.on_host else self.inner.read(result), value, holder.shape)
        except aiotrt.AiotrtError as error:
            holder.has_failed = True
            if holder in self.holders:  # whoever has left hears that
                self.accept(error, "replay")

    def _write(self, holder: Holder, value: int, from_device: bool) -> None:
        """All of one input from one side; from the host only while nothing that was launched may still read it."""
        array = frame(value, holder.shape)
        holder.lease.inputs[0][...] = self.inner.tensor(array) if from_device else array
        holder.is_launched = True

    def leave(self, holder: Holder) -> None:
        """The end of the block."""
        self.holders.remove(holder)
        try:
            self.finish(holder.lease.__aexit__(None, None, None))
        except aiotrt.AiotrtError as error:
            self.accept(error, "leaving a lease")


def check(result: object, value: int, shape: tuple[int, ...]) -> None:
    """Whether this is the result of the request with this number."""
    got = np.asarray(result)
    assert got.shape == shape, f"request {value} got {got.shape}, expected {shape}"
    assert np.all(got == 3 * value + 1), f"request {value} got {got.ravel()}, expected {3 * value + 1}"
