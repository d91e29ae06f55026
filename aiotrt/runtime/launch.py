"""What goes on a slot's stream, and in which order: the device calls of a request and of a lease.

Rule 1: nothing here decides or waits. The executor and the lease say when, and own the slot while this runs, on the loop's
thread or, for programs without a graph, on a worker's.
Rule 2: the order is always the same. Wait for the consumers of what the slot held before; wait for the caller's stream;
copy in; launch; copy out; and last of all record the produce event, so that it covers everything. Copies are given to the
launch, which on CUDA has them in the graph. So is the turn that is waited for and passed on where launches of several slots
go one after the other: their copies need not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import torch

from aiotrt.completion.poller import Lane
from aiotrt.devices import Copies, Device, Event, Stream
from aiotrt.errors import DeviceError
from aiotrt.runtime.handshake import mark_consumed
from aiotrt.runtime.programs import Program
from aiotrt.tensors import DEVICE, Argument, Key, Kind, Shapes, Specs

__all__ = [
    "Request",
    "Slot",
    "Times",
    "allocate",
    "await_gates",
    "copy_in",
    "follow",
    "has_passed",
    "keep_for_ever",
    "pass_turn",
    "retire",
    "submit_lease",
    "submit_request",
]

T = TypeVar("T")

_log: Final = logging.getLogger("aiotrt")
_kept: Final[list[object]] = []


class Times:
    """What happened when to a request, or to an item of a batch, that somebody observes.

    Attributes:
        entered: when it came in; this and the next two are moments of `time.perf_counter`.
        granted: when it left the queue: it had its slot, or its place in a batch. 0.0 until then.
        seen: when it was seen to be complete on the device. 0.0 until then, and always of an item.
        ran: for how many seconds it had run by then, as the hub saw it.
        late: how many of them may have passed since it was complete.
    """

    __slots__ = ("entered", "granted", "late", "ran", "seen")

    def __init__(self, entered: float) -> None:
        self.entered = entered
        self.granted = self.seen = self.ran = self.late = 0.0


class Request:
    """One caller's wish: to run these arguments, or to lease a slot that is prepared for these shapes.

    Attributes:
        future: resolved with the packed results, or for a lease with None when the slot is claimed and prepared.
        arguments: the checked inputs; they, and so the caller's memory, live until the slot is done with the request.
        specs: what the inputs were checked against.
        shapes: of the inputs.
        bound: inputs that the graph shall read where they are.
        kind: what the results should be.
        is_lease: whether the caller wants the slot itself.
        is_marked: whether to say on the inputs when they will have been read.
        is_queued: whether it stands in line.
        is_warmup: whether it only prepares slots.
        is_revoked: whether the model was closed under a lease.
        slot: the slot that it was granted, until the slot is free again.
        origin: the caller's current stream, when inputs or results are on the device.
        ready: events that the inputs carry.
        record_readers: makes who reads a lease's buffers gate their next use, for when it is taken from its holder.
        results: device results of the caller's own.
        times: what happened when; None where nobody observes.
        span: what an observer keeps with it.
    """

    __slots__ = (
        "arguments", "bound", "future", "is_lease", "is_marked", "is_queued", "is_revoked", "is_warmup", "kind",
        "origin", "ready", "record_readers", "results", "shapes", "slot", "span", "specs", "times",
    )  # fmt: skip

    def __init__(
        self,
        future: asyncio.Future[Any],
        arguments: Sequence[Argument],
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        *,
        is_lease: bool,
    ) -> None:
        self.future = future
        self.specs = specs
        self.arguments = arguments
        self.shapes = shapes
        self.bound: dict[int, torch.Tensor] = {}
        self.kind = kind
        self.is_lease = is_lease
        self.record_readers: Callable[[], None] | None = None
        self.is_marked = False
        self.is_queued = False
        self.is_warmup = False
        self.is_revoked = False
        self.slot: Slot | None = None
        self.origin: Stream | None = None
        self.ready: list[Event] = []
        self.results: list[torch.Tensor] = []
        self.times: Times | None = None
        self.span: Any = None

    @property
    def key(self) -> Key:
        """What tells the program that it needs from a slot's others."""
        return self.shapes, tuple([(i, tensor.data_ptr()) for i, tensor in self.bound.items()]) if self.bound else ()

    def order(self, slot: Slot) -> None:
        """Make the slot's stream wait for what the device inputs depend on, and for who had the results' memory before."""
        if self.origin is not None:
            follow(slot, self.origin)
            for event in self.ready:
                slot.stream.wait(event)

    def host_inputs(self) -> Sequence[int]:
        """The inputs that need staging memory; for a lease any may."""
        if self.is_lease:
            return range(len(self.shapes))
        for argument in self.arguments:  # asking costs less than listing does, and of a device caller's there are none
            if argument.host is not None:
                return [i for i, argument in enumerate(self.arguments) if argument.host is not None]
        return ()

    # What a batch, which is many callers' request, does otherwise...

    def granted(self) -> None:
        """It has its slot. A batch decides only now who is in it."""

    def mark_consumed(self, stream: Stream) -> None:
        """Say on the inputs when they will have been read, where somebody wants to know."""
        if self.is_marked:
            mark_consumed(self.arguments, stream.record())

    def allocate_results(self, device: Device, program: Program) -> None:
        """Device memory for results; `order` says when the slot's stream may write it."""
        assert self.origin is not None
        spare, program.spare = program.spare, None
        if spare is not None and spare[0] == self.origin.handle:
            self.results = spare[1]
        else:
            self.results = allocate(device, self.origin, program.outputs)

    def allocate_spare(self, device: Device, program: Program, *, expect: bool) -> None:
        """The same for whoever is next, while the device is at work: mostly that is the same caller again.

        And if told to `expect` that one, what the next launch would do to copy these results out. That is worth it where the
        device would stand still meanwhile, for want of another launch of this model: 4 to 7 us less of each call of 50 to
        200 us on an H200. Beside other launches it would only cost the loop more.
        """
        if self.results and program.captured and self.origin is not None:
            spare = allocate(device, self.origin, program.outputs)
            program.spare = self.origin.handle, spare
            if expect:
                program.expect(list(zip(spare, program.outputs, strict=True)))

    def parts(self, program: Program, outputs: Sequence[T]) -> Sequence[T]:
        """What each result is copied from, of the program's outputs or views of them."""
        return outputs

    def pack(self, program: Program, results: Sequence[object]) -> Any:
        """What the future is resolved with."""
        return program.names.pack(results)


class Slot:
    """What one slot consists of; its state is in the machine.

    Attributes:
        index: its number.
        stream: its own, on which all its work runs in order.
        event: the produce event of requests: one request at a time, and never recorded before its last wait ended. Leases
            hand their events out, so each of their launches has a new one.
        mark: recorded on a caller's stream and waited for at once.
        lane: its stream's line at the hub; one for all slots whose launches run one after the other.
        on_done: what the hub calls when a request's produce event is complete.
        gates: events of consumers, which the next launch waits for, on the device.
        turn: recorded when a launch has ended but for its copies, where launches of several slots go one after the other.
        predecessor: the turn that the next launch waits for.
        request: who has it now.
        program: what it runs for that request.
        launches: of the present lease; tells its last launch from earlier ones.
        is_forgotten: the present lease was garbage collected without having been left.
    """

    __slots__ = (
        "event", "gates", "index", "is_forgotten", "lane", "launches", "mark", "on_done", "predecessor", "program",
        "request", "stream", "turn",
    )  # fmt: skip

    on_done: Callable[[BaseException | None], None]

    def __init__(self, index: int, device: Device, lane: Lane, *, overlap: bool = True) -> None:
        self.index = index
        self.event = device.event()
        self.mark = device.event()
        self.turn = None if overlap else device.event()
        self.predecessor: Event | None = None
        self.stream = device.stream()  # last: what is not made need not be closed
        self.lane = lane
        self.gates: list[Event] = []
        self.request: Request | None = None
        self.program: Program | None = None
        self.launches = 0
        self.is_forgotten = False


def copy_in(request: Request, program: Program) -> None:
    """Copy host inputs into staging memory: a plain copy, by this thread."""
    for i, argument in enumerate(request.arguments):
        if argument.host is not None:
            view = program.input_views[i]
            assert view is not None
            argument.write(view)


def submit_request(device: Device, slot: Slot, request: Request, program: Program) -> None:
    """Everything that one request puts on its slot's stream; its host inputs are staged.

    Raises:
        DeviceError: the device broke.
        Exception: the program runs without a graph, and raised. Part of the work may be on the stream.
    """
    stream = slot.stream
    if slot.gates:
        _open_gates(slot)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, argument in enumerate(request.arguments):
        if argument.tensor is not None:
            if i not in request.bound:
                before += argument.copies(program.inputs[i])
        elif not device.unified:
            before.append((program.inputs[i], program.staged_input(i)))
    if program.captured:
        if request.kind is DEVICE:
            request.allocate_results(device, program)
        request.order(slot)
        program.launch(before, _copies_out(device, request, program), slot.predecessor, slot.turn)
        request.mark_consumed(stream)
    else:
        request.order(slot)
        program.launch(before, (), slot.predecessor, slot.turn)
        request.mark_consumed(stream)
        if request.kind is DEVICE:
            request.allocate_results(device, program)  # only now: the shapes may depend on the data
            request.order(slot)
        for destination, source in _copies_out(device, request, program):
            stream.copy(destination, source)
    stream.record(slot.event)


def submit_lease(
    device: Device,
    slot: Slot,
    program: Program,
    event: Event,
    consumers: Iterable[Stream],
    from_host: Collection[int],
    kind: Kind,
) -> None:
    """Everything that one launch of a lease puts on its slot's stream.

    Args:
        device: the model's.
        slot: the leased slot.
        program: what it runs.
        event: recorded last.
        consumers: streams that wrote the inputs or read the outputs; the launch waits for them.
        from_host: inputs that were written to staging memory.
        kind: whether results go to staging memory too.

    Raises: as `submit_request`.
    """
    for stream in consumers:
        follow(slot, stream)
    if slot.gates:
        _open_gates(slot)
    before: Copies = ()
    if from_host and not device.unified:
        before = [(program.inputs[i], program.staged_input(i)) for i in from_host]
    to_host = kind is not DEVICE and not device.unified
    if program.captured:
        program.launch(before, _staged_out(program) if to_host else (), slot.predecessor, slot.turn)
    else:
        program.launch(before, (), slot.predecessor, slot.turn)
        for destination, source in _staged_out(program) if to_host else ():
            slot.stream.copy(destination, source)
    slot.stream.record(event)


def pass_turn(slot: Slot) -> None:
    """Where launches go one after the other, let the next go when what is on the stream has ended, and the predecessor."""
    if slot.turn is not None:
        if slot.predecessor is not None:  # what is there may not have waited for it, and who comes next waits for this alone
            slot.stream.wait(slot.predecessor)
        slot.stream.record(slot.turn)


def follow(slot: Slot, stream: Stream) -> None:
    """Make the slot's stream wait, on the device, for what `stream` was given so far."""
    if not stream.query():  # asking costs less than ordering does, and mostly it is
        stream.record(slot.mark)
        slot.stream.wait(slot.mark)


def has_passed(device: Device, gate: Event) -> bool:
    """Whether a consumer is done reading.

    Raises:
        DeviceError: the device broke.
    """
    try:
        return device.query(gate)
    except DeviceError:
        raise
    except Exception as error:
        _ignore(error)
        return True


def await_gates(gates: Sequence[Event]) -> None:
    """Block until the consumers are done reading: for worker threads.

    Raises:
        DeviceError: the device broke.
    """
    for gate in gates:
        try:
            gate.synchronize()
        except DeviceError:
            raise
        except Exception as error:
            _ignore(error)


def retire(program: Program, gates: Sequence[Event]) -> None:
    """Free a program once its last readers are done. Blocks: for worker threads."""
    await_gates(gates)
    program.close()


def keep_for_ever(what: object) -> None:
    """Never free what a device may still write to: a leak is better than a dangling pointer."""
    _kept.append(what)


def _ignore(error: Exception) -> None:
    # The consumer's own failure, which is its own business: it reads no more, and that is all a gate is about.
    _log.debug("a consumer failed: %r", error)


def _open_gates(slot: Slot) -> None:
    while slot.gates:  # not a plain loop: while a worker thread does this for a lease, the lease may end and add gates
        slot.stream.wait(slot.gates[0])
        del slot.gates[0]  # only now: a gate whose wait failed must still hold the next launch


def _copies_out(device: Device, request: Request, program: Program) -> Copies:
    if request.kind is DEVICE:
        # Strict: a result without a part would be memory that nobody wrote, handed to a caller.
        return list(zip(request.results, request.parts(program, program.outputs), strict=True))
    return () if device.unified else _staged_out(program)


def _staged_out(program: Program) -> Copies:
    if not program.captured:
        program.stage((), outputs=True)  # on a worker thread, then; a launch without a graph may have changed a shape
    copies = []
    for staged, output in zip(program.staged_outputs, program.outputs, strict=True):
        assert staged is not None
        copies.append((staged, output))
    return copies


def allocate(device: Device, origin: Stream, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Device memory for copies of `outputs`, allocated in the order of the caller's stream.

    The allocator takes memory back in the order of the stream that was current when it handed it out. So that must be the
    caller's, who uses and drops the results: on any other one, memory could be handed out again while the caller's last
    kernels read it.
    """
    if origin.handle == device.current_stream().handle:
        return _empty(device, outputs)
    return device.call(origin, partial(_empty, device, outputs))


def _empty(device: Device, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if torch.is_inference_mode_enabled():  # some other task's, maybe: see `tensors.own`
        with torch.inference_mode(False):
            return _empty(device, outputs)
    return [device.empty(output.shape, output.dtype) for output in outputs]
