"""A lease's hold on its slot: what was written, launched and consumed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

import torch

from aiotrt.completion.hub import check_loop
from aiotrt.completion.prediction import LONG
from aiotrt.devices import Event, Stream
from aiotrt.errors import AiotrtError, DeviceError, ModelBrokenError, ModelClosedError, UsageError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.handshake import GraphState
from aiotrt.runtime.launch import open_gates, submit_lease
from aiotrt.runtime.programs import Program
from aiotrt.runtime.replay import Replay
from aiotrt.runtime.request import Request, Slot
from aiotrt.runtime.slots import BROKEN, COMPLETE, DRAINING, IN_FLIGHT, LAUNCH, State
from aiotrt.tensors import DEVICE, Kind, widened

__all__ = ["Hold"]


class _Orders(NamedTuple):
    """Extra work of one launch: inputs written since the last one (True: from the host), and other streams that read."""

    sources: dict[int, bool]
    consumers: dict[int, Stream]


_NOTHING: Final = _Orders({}, {})

HANDED_OUT: Final = 2  # attributes of a tensor that `Hold.handed_out` made


def _nothing(_: BaseException | None) -> None:
    pass


def _nobody_knows() -> None:
    # For a model that is closed before the loop has reclaimed a forgotten lease: without this error `close` would treat the
    # lease's buffers as free at once.
    raise UsageError("the lease was never left, so who reads its buffers is not known")


class Hold:
    """State that a lease shares with its buffers: the slot, and what was written, launched and consumed."""

    def __init__(self, executor: Executor, slot: Slot, request: Request, program: Program) -> None:
        self.executor = executor
        self.slot = slot
        self.program = program
        self.kind = request.kind
        self.specs = request.specs
        self.unified = executor.device.unified
        self.consumers: dict[int, Stream] = {}  # streams that read the buffers, by handle
        self._request = request
        request.record_readers = self._record_readers
        self._sources: dict[int, bool] = {}  # inputs written since the last launch: True from the host
        self._ever_written: set[int] = set()
        self._last: Replay | None = None  # the last launch
        self._unordered: Replay | None = None  # the last launch, while it is not known to be complete
        self._launches: deque[Replay] = deque()  # pending, in order
        self._spares: list[Replay] = []  # awaited launches whose events were not handed out, for reuse
        self._current: Stream | None = None  # the caller's current stream at the last launch
        #: The graph of launches without new inputs and extra consumers, if such a launch is one graph without copies.
        self._graph = program.graph if slot.turn is None and not self.unified and self.kind is DEVICE else None
        self._tells = executor.device.tells
        self._ordered: set[int] = set()  # handles of the streams that wait for `_unordered`
        self._current_mark: Event | None = None  # on the host device, the event after the last write on the current stream
        self._marks: dict[int, Event] = {}  # on the host device, the event after the last write to each input
        self._state = GraphState()
        self._kept: torch.Tensor | None = None  # the tensor handed out for a complete launch of a program with one output
        self._left = False

    def open(self) -> None:
        """Order the caller's stream after the previous consumers: it may write into buffers that they still read."""
        if self.slot.gates and not self.unified:
            current = self.executor.device.current_stream()
            for gate in self.slot.gates:
                current.wait(gate)

    @property
    def is_held(self) -> bool:
        """Whether the lease still has its slot."""
        return not self._left and self.slot.request is self._request and not self._request.is_revoked

    def check(self) -> None:
        """Raise unless the lease is held, the model works, and its loop runs on this thread."""
        executor = self.executor
        if (
            self._left
            or self._request.is_revoked
            or executor.broken is not None
            or asyncio._get_running_loop() is not executor.loop  # last: before Python 3.13 this is a system call
        ):
            self._refuse()

    def _refuse(self) -> NoReturn:
        executor = self.executor
        check_loop(executor.loop, "a lease")
        if self._left:
            raise UsageError("this lease has ended: its buffers are somebody else's now; take another with model.lease()")
        if executor.broken is not None:
            raise ModelBrokenError(f"{executor.recipe.engine.name} is broken: {executor.broken}") from executor.broken
        raise ModelClosedError(f"{executor.recipe.engine.name} was closed, and this lease with it")

    def check_submitted(self) -> None:
        """Raise while a worker thread submits the last launch: it owns the slot, and its work is not ordered yet."""
        if self.executor.machine.states[self.slot.index] is State.PREPARING:
            raise UsageError(
                "the last launch is not complete: without a graph, a worker submits it; await it or take another lease"
            )

    def check_launched(self) -> None:
        """Raise unless there was a launch."""
        if self._last is None:
            raise UsageError("nothing was launched in this lease yet: call launch() or await replay() first")

    def check_settled(self, what: str) -> None:
        """Raise unless the last launch is complete, so that the CPU may read or write `what`."""
        if self._last is not None and not self._is_complete(self._last.event):
            raise UsageError(
                f"{what}: the last launch is not complete, and the host must not touch this before it is: await it"
            )

    def _is_complete(self, event: Event) -> bool:
        try:
            return self.executor.device.query(event)
        except DeviceError:
            raise
        except Exception:  # the work itself failed, and no longer runs; the caller that awaits it gets the error
            return True

    def wrote(self, index: int, *, host: bool) -> None:
        """Record that an input was written, and from where."""
        if not self.unified and self._sources.setdefault(index, host) is not host:
            name = self.specs[index].name
            raise UsageError(f"input {name!r} was written from the host and from the device; write all of it from one side")
        self._ever_written.add(index)

    # The current stream of the host device, where copies between buffers are ordered...

    def on_current(self, index: int, function: Callable[[], None]) -> None:
        """Submit a function that writes an input to the current stream, and record events after it."""
        stream = self.executor.device.current_stream()
        stream.run(function)
        self._current_mark = self._marks[index] = self.executor.device.event()
        stream.record(self._current_mark)

    def is_current_idle(self) -> bool:
        """Return whether all that `on_current` submitted is complete."""
        return self._current_mark is None or self._is_complete(self._current_mark)

    def check_arrived(self, index: int, name: str) -> None:
        """Raise while work of `on_current` is still to write an input: it would overwrite what plain Python writes now."""
        mark = self._marks.get(index)
        if mark is not None and not self._is_complete(mark):
            raise UsageError(
                f"input {name!r}: what was assigned to it waits for a launch and would overwrite this: "
                "assign this too, with buffer[...] = value, or await that launch"
            )

    # Launching...

    def replay(self) -> Replay:
        """Launch, for a holder that then awaits the replay and calls `awaited`."""
        self.check()
        return self.launch_in_worker() if self.program.blocking else self.launch(False)

    def launch(self, is_given: bool) -> Replay:
        """Launch on this thread.

        Args:
            is_given: whether the caller gets the event; if so, the current stream also waits for it.
        """
        executor, slot = self.executor, self.slot
        if len(self._ever_written) < len(self.program.inputs):
            self._refuse_unwritten()
        orders = _NOTHING
        if self._sources or self.consumers or self._state.assigned:
            orders = self._take_orders()
        replay: Replay | None = None
        try:
            replay = self._take(is_given)
            event = replay.event
            current = self._current
            if current is None or current.handle != executor.device.current_handle():
                current = self._current = executor.device.current_stream()
            if orders is _NOTHING and self._graph is not None:
                if slot.gates:
                    open_gates(slot)
                self._graph.submit(slot.stream, current, slot.mark, (), (), (), (), event)
            else:
                executor.follow_latest(slot)
                self._submit(event, current, orders)
            self._launched(replay)
        except Exception as error:
            # No attribute keeps this error: its traceback refers to the lease, which must end when its holder forgets it.
            raise self._failed(error, replay, orders) from error
        except BaseException as error:  # an interrupt, after which the loop may go on
            self._failed(error, replay, orders)
            raise
        if is_given:  # else the holder awaits it, so that what follows comes after its completion
            self.order()
        return replay

    def _take(self, is_given: bool) -> Replay:
        """Return a replay to launch: a spare one, unless the caller gets its event, which must be a new event."""
        if self._spares and not is_given:
            replay = self._spares.pop()
            replay.is_done = False
            return replay
        device = self.executor.device
        event = device.event()
        replay = Replay(self.executor.loop, event, device.probe(event), is_given=is_given)
        replay.estimate = self.program.estimate
        replay.confirm = partial(device.query, event)
        replay.hang_timeout = self.executor.hang_timeout
        return replay

    def awaited(self, replay: Replay) -> Any:
        """Return the results of a replay that was awaited to its end, and keep it for reuse if its event was not given."""
        if not replay.is_given:
            self._spares.append(replay)
        return self.results()

    def order(self) -> None:
        """Make the current stream wait, on the device, for the last launch."""
        launch = self._unordered
        if launch is None:
            return
        try:
            current = self.executor.device.current_stream()
            if current.handle not in self._ordered:
                current.wait(launch.event)
                self._ordered.add(current.handle)
        except Exception as error:
            raise self.executor.failed(error, "while the current stream was made to wait for a launch") from error

    def launch_in_worker(self) -> Replay:
        """Launch in a worker thread, for a program whose launch occupies its thread."""
        executor, slot = self.executor, self.slot
        if len(self._ever_written) < len(self.program.inputs):
            self._refuse_unwritten()
        self.check_submitted()
        if executor.machine.states[slot.index] is State.IN_FLIGHT:
            raise UsageError("the last launch is not complete: await it before the next")
        try:
            replay = self._take(is_given=False)
            current = executor.device.current_stream()
        except Exception as error:
            raise executor.failed(error, "while it was launched") from error
        event = replay.event
        orders = self._take_orders()  # before the job starts: meanwhile the loop's thread may add consumers
        executor.submitting.add(replay)

        def submit() -> None:
            executor.device.prepare_thread()
            self._submit(event, current, orders)
            current.wait(event)

        def submitted(error: BaseException | None) -> None:
            if error is not None:
                replay.failure = self._failed(error, replay, orders)  # if the model broke, this has failed `replay` already
            else:
                try:
                    executor.pass_turn(slot)
                except Exception as failure:
                    executor.lost_track(failure)  # `replay` fails too
                else:
                    self._launched(replay, ordered=current)
            executor.submitting.discard(replay)  # last: now it is in its slot's lane, or has ended

        executor.submit_in_worker(slot, submit, submitted)
        return replay

    def _failed(self, error: BaseException, replay: Replay | None, orders: _Orders) -> AiotrtError:
        """Clean up after a failed launch, and return the error to raise.

        Part of the work may be on the stream, so the slot is in flight until that has ended.
        """
        executor = self.executor
        # The next launch must still copy the inputs that were written, and wait for the consumers.
        self._sources = orders.sources | self._sources
        self.consumers = orders.consumers | self.consumers
        explained = executor.failed(error, "while it was launched")
        if replay is None or replay in self.slot.lane.pending:
            return explained
        if executor.broken is None:
            try:
                executor.pass_turn(self.slot)
                self.slot.stream.record(replay.event)
                self._launched(replay)
            except Exception as second:
                executor.lost_track(second)
        return explained

    def _take_orders(self) -> _Orders:
        if self._state.assigned:
            self.slot.gates += self._state.take()
        if not (self._sources or self.consumers):
            return _NOTHING
        orders = _Orders(self._sources, self.consumers)
        self._sources, self.consumers = {}, {}
        return orders

    def _submit(self, event: Event, current: Stream, orders: _Orders) -> None:
        from_host: Collection[int] = ()
        consumers: Iterable[Stream] = (current,)
        if orders is not _NOTHING:
            from_host = [i for i, written_by_host in orders.sources.items() if written_by_host]
            consumers = ({current.handle: current} | orders.consumers).values()
        submit_lease(self.executor.device, self.slot, self.program, event, consumers, from_host, self.kind)

    def _launched(self, replay: Replay, *, ordered: Stream | None = None) -> None:
        """Watch a replay whose event was recorded after its work: the slot is in flight until the event is complete."""
        executor, slot, program = self.executor, self.slot, self.program
        self._last = self._unordered = replay
        if self._ordered:
            self._ordered.clear()
        if ordered is not None:
            self._ordered.add(ordered.handle)
        replay.on_done = self._completed
        if not (self._launches and self._launches[-1] is replay):  # after an interrupt it may have been appended already
            self._launches.append(replay)
        state = executor.machine.states[slot.index]
        if state is BROKEN:
            return
        if state is not DRAINING:  # it is DRAINING if the lease ended while a worker thread submitted this launch
            executor.machine.move(slot.index, LAUNCH)
        executor.count(program)
        slot.launches = replay.number = slot.launches + 1
        if slot.turn is not None:
            executor.latest = slot
        if self._tells:
            executor.hub.add(slot.lane, replay, partial(executor.device.when_complete, replay.event))
            return
        if replay.estimate.seconds >= LONG and self._current is not None:
            slot.lane.prepare = partial(executor.warm_up_driver, self._current)
        executor.hub.add(slot.lane, replay)

    def _completed(self, error: BaseException | None) -> None:
        """End the first pending launch, as a callback of the hub, which is polling."""
        executor, slot = self.executor, self.slot
        replay = self._launches.popleft()
        try:
            if slot.request is self._request:
                state = executor.machine.states[slot.index]
                if error is None and state is IN_FLIGHT:
                    if replay.number == slot.launches:  # else it is an earlier launch of several
                        executor.machine.move(slot.index, COMPLETE)
                elif state is not BROKEN:
                    executor.lease_completed(slot, replay.number, error)
        finally:
            replay.on_done = _nothing  # breaks a cycle, which would keep the buffers until the next garbage collection
            if self._unordered is replay:
                self._unordered = None
            if not replay.is_done:
                error = replay.failure or error
                if error is None:
                    replay.is_done = True
                else:
                    replay.reject(executor.explain(error, "while it ran"))
                executor.hub.finished.append(replay)

    def _refuse_unwritten(self) -> NoReturn:
        name = next(spec.name for i, spec in enumerate(self.specs) if i not in self._ever_written)
        raise UsageError(f"input {name!r} was never written in this lease: write it before the first launch")

    def results(self) -> Any:
        """Return the outputs in the lease's kind. Raises as `check` does, but does not check the loop and the thread."""
        if self._left or self._request.is_revoked or self.executor.broken is not None:
            self._refuse()
        kept = self._kept
        if kept is not None and self._unordered is None and len(kept.__dict__) == HANDED_OUT:
            return kept  # the same tensor again, unless its holder has set more attributes on it
        names, outputs = self.program.names, self.program.outputs
        if self.kind is DEVICE:
            if not names.is_bare:
                return names.pack([self.handed_out(output) for output in outputs])
            tensor = self.handed_out(outputs[0])
            if self._graph is not None and self._unordered is None:  # without a graph, a launch may replace the tensor
                self._kept = tensor
            return tensor
        if self.kind is Kind.NUMPY:
            return names.pack([widened(self.program.output_view(i), output.dtype) for i, output in enumerate(outputs)])
        if self.unified:
            return names.pack(list(outputs))
        return names.pack(list(self.program.staged_outputs))

    def handed_out(self, output: torch.Tensor) -> torch.Tensor:
        """Return an output as a separate tensor object: attributes on the slot's own would be the next launch's too."""
        tensor = output.detach()
        launch = self._unordered
        if launch is None:
            tensor._trt_produce_event = self.executor.complete  # type: ignore[attr-defined]
        else:
            launch.is_given = True  # so that the event is not reused for another launch
            tensor._trt_produce_event = launch.event  # type: ignore[attr-defined]
        tensor._trt_graph_state = self._state  # type: ignore[attr-defined]
        return tensor

    # Leaving...

    def consumed(self, stream: object) -> None:
        """See `Lease.consumed`."""
        device = self.executor.device
        try:
            adopted = device.current_stream() if stream is None else device.adopt_stream(stream)
        except TypeError as error:
            raise UsageError(str(error)) from error
        self.consumers[adopted.handle] = adopted

    def leave(self) -> None:
        """End the lease, see `Lease`: record events of its consumers, and release the slot."""
        self._request.record_readers = None  # breaks a cycle, which would keep the buffers until the next garbage collection
        if not self._left and self.is_held and self.executor.broken is None:
            self._left = True
            try:
                self._record_readers()
            except Exception as error:
                failure = self.executor.failed(error, "while its consumers were recorded")
                if self.executor.broken is None:
                    self.executor.reclaim(self.slot)  # as if it were forgotten: its consumers are unknown
                raise failure from error
            # Last: from here on another caller may launch in the slot, and its launch waits for these consumer events.
            self.executor.end_lease(self.slot)
        self._left = True

    def _record_readers(self) -> None:
        """Record an event on each stream that reads the buffers; the slot's next launch waits for these events."""
        current = self.executor.device.current_stream()
        for stream in ({current.handle: current} | self.consumers).values():
            self.slot.gates.append(stream.record())
        self.slot.gates += self._state.take()

    def forget(self) -> bool:
        """Reclaim the slot of a lease that is garbage, through the loop, since any thread may call this.

        Returns whether the lease still held its slot.
        """
        if not self.is_held or self.executor.broken is not None:
            return False
        self._left = True
        self._request.record_readers = _nobody_knows
        with contextlib.suppress(RuntimeError):  # the loop is closed: the model can no longer be used, nor can the slot
            self.executor.loop.call_soon_threadsafe(self.executor.reclaim, self.slot)
        return True

    def describe(self) -> str:
        """Return the slot's state as one word."""
        return "ended" if not self.is_held else self.executor.machine.states[self.slot.index].value
