"""Programs on a simulated device, audited: after each step of the loop, and in the end."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch

import aiotrt.model
from aiotrt import tensors
from aiotrt.completion import hub as completion
from aiotrt.engines.module import ModuleEngine, ModuleExecution
from aiotrt.runtime import launch as submission
from aiotrt.runtime import memory
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request
from aiotrt.runtime.slots import State
from aiotrt.testing import Fault, FaultInjector, FaultKind, SimulatedDevice, SimulatedGraph, SimulatedStream, run
from aiotrt.testing.loop import _Selector
from aiotrt.testing.streams import Record

__all__ = ["Audit", "Striker", "auditing", "held_streams", "in_use", "run_simulated"]

T = TypeVar("T")


class Striker(FaultInjector):
    """Fails at the next use of a verb, when told to."""

    def strike(self, verb: str, kind: FaultKind, *, after: int = 0) -> None:
        use = self.uses[verb] + 1 + after
        self._faults[verb, use] = Fault(verb, use, kind)


@contextlib.contextmanager
def held_streams(device: SimulatedDevice, *streams: Any) -> Iterator[None]:
    """What is submitted to these streams from now on does not begin before the end of this."""
    gate = Record({})
    for stream in streams:
        stream = getattr(stream, "stream", stream)
        assert isinstance(stream, SimulatedStream), stream
        stream.follow(gate)
    try:
        yield
    finally:
        gate.is_done = True
        device.pump()


def in_use(device: SimulatedDevice) -> int:
    """Bytes of device memory that have an owner."""
    device._collect()
    return sum(b.memory.nbytes for b in device.memory._blocks.values() if not (b.pinned or b.is_free))


class Audit:
    """What must hold of every model, whatever a program does with it.

    Args:
        device: where the program runs.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.executors: weakref.WeakSet[Executor] = weakref.WeakSet()  # weak: a program may test what it is to forget one
        self.open_graphs = 0
        self.open_engines: set[object] = set()  # executions too
        self.contexts: list[dict[str, Any]] = []  # what came to the loop's exception handler

    def step(self) -> None:
        """The loop is about to wait: no callback is half done."""
        for executor in self.executors:
            machine = executor.machine
            states = machine.states
            assert not executor._granted, f"granted, and served by nobody: {executor._granted}"
            free = [i for i, state in enumerate(states) if state is State.FREE]
            assert sorted(machine._free) == free, f"the pool has {machine._free}, and free are {free}"
            assert not (machine.waiting and free), f"{machine.waiting} wait, and {free} are free"
            cache = executor.cache
            assert cache.nbytes == sum(program.nbytes for program in cache._programs.values()), "bytes were lost"
            owners = set()
            for slot, state in zip(executor.slots, states, strict=True):
                request = slot.request
                if state is State.FREE:
                    assert request is None, f"slot {slot.index} is free, and {request} has it"
                    assert slot.program is None, f"slot {slot.index} is free, and keeps its program"
                elif state is not State.BROKEN:
                    assert request is not None, f"slot {slot.index} is {state.name}, and nobody has it"
                    assert request.slot is slot, f"slot {slot.index} and its request disagree"
                    assert not request.is_queued, "in line, and being served"
                    assert id(request) not in owners, "one request has two slots"
                    owners.add(id(request))

    def end(self) -> None:
        """The program is over, and has closed its models: nothing of them is left."""
        assert not self.contexts, f"the loop's exception handler was told: {self.contexts}"
        hubs = [hub for (loop, _), hub in completion._hubs.items() if loop is asyncio.get_running_loop()]
        for hub in hubs:
            assert hub._users == 1, f"a hub has {hub._users - 1} users left"  # the loop's own aside
            left = [lane.pending for lane in hub.lanes]
            assert not left, f"a hub still looks at {left}"
        assert not any(device._callbacks for device in self.device.peers), "a callback for faults is still registered"
        kept = False
        for executor in self.executors:
            if executor.broken is None and executor.is_discarded:
                kept = True  # its model was forgotten
                continue
            states = set(executor.machine.states)
            assert executor.machine.waiting == 0, "somebody waits at a closed model"
            assert all(slot.request is None or slot.request.done() for slot in executor.slots), "nobody told them"
            assert not executor.submitting, "a replay is never told"
            if executor.broken is not None:
                kept = True
                assert states == {State.BROKEN}, f"broken, and has slots that are {states}"
                assert executor in memory._kept, "what a broken device may still write to is not kept"
                assert executor._workers._is_shut, "worker threads are left"  # type: ignore[attr-defined]
                continue
            assert states == {State.FREE}, f"closed, and has slots that are {states}"
            assert executor._workers._is_shut, "worker threads are left"  # type: ignore[attr-defined]
            assert not len(executor.cache), "programs are left in the cache"
            assert not executor.cache._holders, "the cache still names holders"
            for slot in executor.slots:
                stream: Any = slot.stream
                assert getattr(stream, "stream", stream)._is_closed, f"the stream of slot {slot.index} is open"
        assert kept or not self.open_graphs, f"{self.open_graphs} graphs were never closed"
        assert kept or not self.open_engines, f"{self.open_engines} were never closed"

    async def audited(self, main: Coroutine[Any, Any, T]) -> T:
        """Run it, and look at what it leaves."""
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.contexts.append(context))
        result = await main
        self.end()
        return result


@contextlib.contextmanager
def auditing(device: SimulatedDevice) -> Iterator[Audit]:
    """The runtime's own host copies are checked for races as well, and all models that are opened in here are audited."""
    audit = Audit(device)
    kept = len(memory._kept)
    select, opened, closed = _Selector.select, SimulatedGraph.__init__, SimulatedGraph.close

    def own(view: Any, dtype: torch.dtype, kind: tensors.Kind) -> Any:
        device.host_read(view, "copying results out")
        return tensors.own(view, dtype, kind)

    def copy_in(request: Request, program: Program) -> None:
        for argument, view in zip(request.arguments, program.input_views, strict=True):
            if argument.host is not None and view is not None:
                device.host_write(view, "copying inputs in")
        submission.copy_in(request, program)

    def audited_select(self: _Selector, timeout: float | None = None) -> Any:
        audit.step()
        return select(self, timeout)

    made: type[Executor] = vars(aiotrt.model)["Executor"]

    def audited_executor(*args: Any, **kwargs: Any) -> Executor:
        executor = made(*args, **kwargs)
        audit.executors.add(executor)
        return executor

    def graph_opened(self: SimulatedGraph, device: SimulatedDevice) -> None:
        opened(self, device)
        audit.open_graphs += 1

    def graph_closed(self: SimulatedGraph) -> None:
        audit.open_graphs -= not self._is_closed
        closed(self)

    def opens(kind: Any) -> Any:
        original = kind.__init__

        def opened(self: Any, *args: Any) -> None:
            original(self, *args)
            audit.open_engines.add(self)

        def closed(self: Any) -> None:
            audit.open_engines.discard(self)

        return mock.patch.multiple(kind, __init__=opened, close=closed)

    with (
        contextlib.ExitStack() as stack,
        mock.patch("aiotrt.runtime.executor.own", own),
        mock.patch("aiotrt.batching.batch.own", own),
        mock.patch("aiotrt.runtime.executor.copy_in", copy_in),
        mock.patch.object(_Selector, "select", audited_select),
        mock.patch("aiotrt.model.Executor", audited_executor),
        mock.patch.object(SimulatedGraph, "__init__", graph_opened),
        mock.patch.object(SimulatedGraph, "close", graph_closed),
        opens(ModuleEngine),
        opens(ModuleExecution),
    ):
        stack.callback(memory._kept.__delitem__, slice(kept, None))  # for ever is until the end of the simulation
        yield audit


def run_simulated(main: Coroutine[Any, Any, T], device: SimulatedDevice | FaultInjector) -> T:
    """`testing.run`, with the runtime's own host copies checked for races as well, and all models audited."""
    with auditing(device.simulated if isinstance(device, FaultInjector) else device) as audit:
        return run(audit.audited(main), device)
