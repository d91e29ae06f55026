"""What goes on a slot's stream, and in which order: the device calls of a request and of a lease.

Rule 1: nothing here decides or waits. The executor and the lease say when, and own the slot while this runs, on the loop's
thread or, for programs without a graph, on a worker's.
Rule 2: the order is always the same. Wait for the consumers of what the slot held before; wait for the caller's stream;
copy in; launch; copy out; and last of all record the produce event, so that it covers everything. Copies are passed to the
launch, which on CUDA has them in the graph. Where launches of several slots run one after the other, two events are passed
too: the previous launch's `turn`, to wait for, and this slot's own, to record. They order the computations, not the copies.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import torch

from aiotrt.devices import Copies, Device, Event, Stream
from aiotrt.errors import DeviceError
from aiotrt.runtime.handshake import mark_consumed
from aiotrt.runtime.memory import allocate
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot
from aiotrt.tensors import DEVICE, Kind, numpy_view

__all__ = [
    "await_gates",
    "copy_in",
    "fill",
    "has_passed",
    "open_gates",
    "pass_turn",
    "retire",
    "submit_lease",
    "submit_request",
]

_log: Final = logging.getLogger("aiotrt")


def copy_in(request: Request, program: Program) -> None:
    """Copy host inputs into staging memory: a plain copy, by this thread."""
    for i, argument in enumerate(request.arguments):
        if argument.host is not None:
            view = program.input_views[i]
            assert view is not None
            argument.write(view)


def fill(device: Device, slot: Slot, request: Request, inputs: Sequence[torch.Tensor]) -> None:
    """Copy a request's inputs into a new program's buffers, to warm it up with them. Blocks: for worker threads.

    Raises:
        DeviceError: the device broke.
    """
    request.order(slot)
    kept = []  # staging memory, until it was copied
    for i, argument in enumerate(request.arguments):
        if i in request.bound:
            continue
        if argument.tensor is not None:
            for destination, source in argument.copies(inputs[i]):
                slot.stream.copy(destination, source)
            continue
        staged = inputs[i] if device.unified else device.pinned(inputs[i].shape, inputs[i].dtype)
        argument.write(numpy_view(staged))
        if not device.unified:
            slot.stream.copy(inputs[i], staged)
            kept.append(staged)
    if kept:
        slot.stream.synchronize()


def submit_request(device: Device, slot: Slot, request: Request, program: Program) -> None:
    """Submit all work of one request to its slot's stream. Its host inputs are in staging memory already.

    Raises:
        DeviceError: the device broke.
        Exception: the program runs without a graph, and raised. Part of the work may be on the stream.
    """
    stream = slot.stream
    if slot.gates:
        open_gates(slot)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, argument in enumerate(request.arguments):
        if argument.tensor is not None:
            if i not in request.bound:
                before += argument.copies(program.inputs[i])
        elif not device.unified:
            before.append((program.inputs[i], program.staged_input(i)))
    after: Copies = ()
    if program.captured:
        after = _copies_out(device, request, program)
        request.order(slot)
        program.launch(before, after, slot.predecessor, slot.turn)
    else:
        request.order(slot)
        # Results are copied for the caller on this stream; on a unified device the loop copies them, later.
        program.launch(before, (), slot.predecessor, slot.turn, own=device.unified)
    if request.marked:
        mark_consumed(request.marked, stream.record())
    if not program.captured:
        after = _copies_out(device, request, program)  # only now: the shapes may depend on the data
        if request.kind is DEVICE:
            request.order(slot)
        for destination, source in after:
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
    """Submit all work of one launch of a lease to its slot's stream.

    Args:
        device: the model's device.
        slot: the leased slot.
        program: the program to launch.
        event: recorded last.
        consumers: streams that wrote the inputs or read the outputs; the launch waits for them.
        from_host: inputs that were written to staging memory.
        kind: whether results go to staging memory too.

    Raises: as `submit_request`.
    """
    for stream in consumers:
        slot.follow(stream)
    if slot.gates:
        open_gates(slot)
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
    """Where launches run one after the other, make the next wait for the work on this stream, and for the predecessor."""
    if slot.turn is not None:
        if slot.predecessor is not None:  # this stream may not have waited for it, and the next launch waits for `turn` only
            slot.stream.wait(slot.predecessor)
        slot.stream.record(slot.turn)


def has_passed(device: Device, gate: Event) -> bool:
    """Return whether a consumer is done reading.

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


def _ignore(error: Exception) -> None:
    # The consumer itself failed, which is not this model's error. It reads no more, so its event counts as complete.
    _log.debug("a consumer failed: %r", error)


def open_gates(slot: Slot) -> None:
    """Make the slot's next launch wait, on the device, for the consumers of the last one."""
    while slot.gates:  # not a `for` loop: while a worker thread does this for a lease, the lease may end and add events
        slot.stream.wait(slot.gates[0])
        del slot.gates[0]  # only now: if this wait failed, the next launch must still wait for the event


def _copies_out(device: Device, request: Request, program: Program) -> Copies:
    """Allocate the results, and return the copies to make.

    `Request.order` makes the slot's stream wait until it may write to device results.
    """
    if request.kind is not DEVICE:
        return () if device.unified else _staged_out(program)
    if request.batch is not None:
        copies = request.batch.allocate(device, program)
        request.results = [result for result, _ in copies]
        return copies
    assert request.origin is not None
    spare, program.spare = program.spare, None
    if spare is not None and spare[0] == request.origin.handle:
        request.results = spare[1]
    else:
        request.results = allocate(device, request.origin, program.outputs)
    return list(zip(request.results, program.outputs, strict=True))


def _staged_out(program: Program) -> Copies:
    if not program.captured:
        program.stage((), outputs=True)  # this is a worker thread then; a launch without a graph may have changed a shape
    copies = []
    for staged, output in zip(program.staged_outputs, program.outputs, strict=True):
        assert staged is not None
        copies.append((staged, output))
    return copies
