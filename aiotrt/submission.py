"""What goes on a slot's stream, and in which order: the device calls of a request and of a lease.

Rule 1: nothing here decides or waits. The executor and the lease say when, and own the slot while this runs, on the loop's
thread or, for programs without a graph, on a worker's.
Rule 2: the order is always the same. Wait for the consumers of what the slot held before; wait for the caller's stream;
copy in; launch; copy out; and last of all record the produce event, so that it covers everything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import torch

from aiotrt.completion import Lane
from aiotrt.devices import Device, Event, Stream
from aiotrt.errors import DeviceError
from aiotrt.graphs import Program
from aiotrt.handshake import mark_consumed, wants_consumed
from aiotrt.tensors import Argument, Key, Kind, Shapes, Specs

__all__ = [
    "Request",
    "Slot",
    "allocate",
    "await_gates",
    "copy_in",
    "follow",
    "has_passed",
    "keep_for_ever",
    "retire",
    "submit_lease",
    "submit_request",
]

T = TypeVar("T")

_log: Final = logging.getLogger("aiotrt")
_kept: Final[list[object]] = []


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
        is_queued: whether it stands in line.
        is_warmup: whether it only prepares slots.
        is_revoked: whether the model was closed under a lease.
        slot: the slot that it was granted, until the slot is free again.
        origin: the caller's current stream, when inputs or results are on the device.
        ready: events that the inputs carry.
        results: device results of the caller's own.
    """

    __slots__ = (
        "arguments", "bound", "future", "is_lease", "is_queued", "is_revoked", "is_warmup", "kind", "origin", "ready",
        "results", "shapes", "slot", "specs",
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
        self.is_queued = False
        self.is_warmup = False
        self.is_revoked = False
        self.slot: Slot | None = None
        self.origin: Stream | None = None
        self.ready: list[Event] = []
        self.results: list[torch.Tensor] = []

    @property
    def key(self) -> Key:
        """What tells the program that it needs from a slot's others."""
        return self.shapes, tuple([(i, tensor.data_ptr()) for i, tensor in self.bound.items()]) if self.bound else ()

    def order(self, slot: Slot) -> None:
        """Make the slot's stream wait for what the device inputs depend on."""
        if self.origin is not None:
            follow(slot, self.origin)
            for event in self.ready:
                slot.stream.wait(event)

    def host_inputs(self) -> Sequence[int]:
        """The inputs that need staging memory; for a lease any may."""
        if self.is_lease:
            return range(len(self.shapes))
        return [i for i, argument in enumerate(self.arguments) if argument.host is not None]

    # What a batch, which is many callers' request, does otherwise...

    def granted(self) -> None:
        """It has its slot. A batch decides only now who is in it."""

    def mark_consumed(self, stream: Stream) -> None:
        """Say on the inputs when they will have been read, where somebody wants to know."""
        if self.origin is not None and wants_consumed(self.arguments):
            mark_consumed(self.arguments, stream.record())

    def allocate_results(self, device: Device, slot: Slot, program: Program) -> None:
        """Device memory for results, which the slot's stream may write from now on."""
        assert self.origin is not None
        self.results = allocate(device, self.origin, program.outputs)
        follow(slot, self.origin)  # which may still use what was in the results' memory before

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
        lane: its stream's line at the hub.
        gates: consumer-done events that the next launch waits for, on the device.
        request: who has it now.
        program: what it runs for that request.
        launches: of the present lease; tells its last launch from earlier ones.
        is_forgotten: the present lease was garbage collected without having been left.
    """

    __slots__ = ("event", "gates", "index", "is_forgotten", "lane", "launches", "mark", "program", "request", "stream")

    def __init__(self, index: int, device: Device) -> None:
        self.index = index
        self.stream = device.stream()
        self.event = device.event()
        self.mark = device.event()
        self.lane = Lane()
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
    _open_gates(slot)
    request.order(slot)
    for i, argument in enumerate(request.arguments):
        if argument.tensor is not None:
            if i not in request.bound:
                for destination, source in argument.copies(program.inputs[i]):
                    stream.copy(destination, source)
        elif not device.unified:
            stream.copy(program.inputs[i], program.staged_input(i))
    program.launch()
    request.mark_consumed(stream)
    if request.kind is Kind.DEVICE:
        # Only now: the device is busy meanwhile; and without a graph the shapes may depend on the data.
        request.allocate_results(device, slot, program)
        for result, output in zip(request.results, request.parts(program, program.outputs), strict=True):
            stream.copy(result, output)
    elif not device.unified:
        _copy_out(stream, program)
    stream.record(slot.event)


def submit_lease(
    device: Device,
    slot: Slot,
    program: Program,
    event: Event,
    consumers: Iterable[Stream],
    from_host: Iterable[int],
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
    _open_gates(slot)
    if not device.unified:
        for i in from_host:
            slot.stream.copy(program.inputs[i], program.staged_input(i))
    program.launch()
    if kind is not Kind.DEVICE and not device.unified:
        _copy_out(slot.stream, program)
    slot.stream.record(event)


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


def _copy_out(stream: Stream, program: Program) -> None:
    if not program.captured:
        program.stage((), outputs=True)  # on a worker thread, then; a launch without a graph may have changed a shape
    for staged, output in zip(program.staged_outputs, program.outputs, strict=True):
        assert staged is not None
        stream.copy(staged, output)


def allocate(device: Device, origin: Stream, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Device memory for copies of `outputs`, allocated in the order of the caller's stream.

    The allocator takes memory back in the order of the stream that was current when it handed it out. So that must be the
    caller's, who uses and drops the results: on any other one, memory could be handed out again while the caller's last
    kernels read it.
    """

    def empty() -> list[torch.Tensor]:
        return [device.empty(output.shape, output.dtype) for output in outputs]

    is_current = origin.handle == device.current_stream().handle
    return empty() if is_current else device.call(origin, empty)
