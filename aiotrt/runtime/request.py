"""A request, from its submission to its end, and the slot that it runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import torch

from aiotrt.completion.lane import Lane
from aiotrt.completion.waiter import Waiter
from aiotrt.devices import Copies, Device, Event, Stream
from aiotrt.runtime.programs import Program
from aiotrt.runtime.route import Route
from aiotrt.tensors import Argument, Key, Kind, Shapes, Specs
from aiotrt.tensors.conversion import Array

__all__ = ["Items", "Request", "Slot", "Times"]

_NONE: Final[Mapping[int, torch.Tensor]] = {}


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


class Items(Protocol):
    """What the executor asks of the items of many callers that one request is for. It calls these on the loop's thread.

    Attributes:
        left: how many of them still want their result.
    """

    left: int

    def fill(self, request: Request, slot: Slot) -> bool:
        """Decide which items go, now that the request has its slot. True: their inputs are in place for `_replay`."""

    def allocate(self, device: Device, program: Program) -> Copies:
        """Allocate each item's device results, in the order of its own stream: to where, and from which part of outputs."""

    def handed_out(self, results: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        """Divide the device results of a request."""

    def copied(self, program: Program, views: Sequence[Array]) -> Sequence[Sequence[object]]:
        """Copy each item's part of these host views of the outputs; nothing for one that left. A worker may call this."""

    def settle(self, results: Sequence[object], error: BaseException | None) -> None:
        """Give each item its result, or the error."""


class Request(Waiter):
    """What one caller asked for: to run these arguments, or to lease a slot that is prepared for these shapes.

    Awaiting it gives the packed results, or for a lease None when the slot is claimed and prepared.

    Attributes:
        route: the signature that was recognised, while this takes the short path.
        values: the inputs then, as the caller gave them.
        arguments: else the checked inputs; they, and so the caller's memory, live until the slot is done with the request.
        specs: what the inputs were checked against.
        shapes: of the inputs.
        bound: inputs that the graph shall read where they are.
        kind: what the results should be.
        is_lease: whether the caller wants the slot itself.
        marked: the inputs on which to say when they will have been read.
        is_queued: whether it stands in line.
        is_warmup: whether it only prepares slots.
        is_revoked: whether the model was closed under a lease.
        slot: the slot that it was granted, until the slot is free again.
        origin: the caller's current stream, when inputs or results are on the device.
        origins: those of a batch's other callers.
        batch: the items of many callers, which this request is for; None where it is one caller's.
        ready: events that the inputs carry.
        record_readers: makes who reads a lease's buffers gate their next use, for when it is taken from its holder.
        results: device results of the caller's own.
        times: what happened when; None where nobody observes.
        span: what an observer keeps with it.
    """

    __slots__ = (
        "arguments", "batch", "bound", "is_lease", "is_queued", "is_revoked", "is_warmup", "kind", "marked", "origin",
        "origins", "ready", "record_readers", "results", "route", "shapes", "slot", "span", "specs", "times", "values",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        arguments: Sequence[Argument],
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        *,
        is_lease: bool = False,
    ) -> None:
        # As `Waiter` and `Pending` do, without two more calls for each request. What they say of the event (`query`,
        # `confirm`, `on_done`, `estimate`, `hang_timeout`) is the slot's and its program's, and set when it is launched.
        self.submitted = self.notified = 0.0
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value = self._error = self._message = self._callback = self._context = self._others = None
        self.specs = specs
        self.arguments = arguments
        self.shapes = shapes
        self.bound: Mapping[int, torch.Tensor] = _NONE
        self.kind = kind
        self.is_lease = is_lease
        self.record_readers: Callable[[], None] | None = None
        self.marked: Sequence[Argument] = ()
        self.batch: Items | None = None
        self.is_queued = False
        self.is_warmup = False
        self.is_revoked = False
        self.slot: Slot | None = None
        self.origin: Stream | None = None
        self.origins: Sequence[Stream] = ()
        self.ready: Sequence[Event] = ()
        self.results: Sequence[torch.Tensor] = ()
        self.values: Sequence[Any] = ()
        self.route: Route | None = None
        self.times: Times | None = None
        self.span: Any = None

    @property
    def key(self) -> Key:
        """What tells the program that it needs from a slot's others."""
        bound = tuple([(i, tensor.data_ptr()) for i, tensor in self.bound.items()]) if self.bound else ()
        return self.shapes, bound, self.specs

    def order(self, slot: Slot) -> None:
        """Make the slot's stream wait for what the device inputs depend on, and for who had the results' memory before."""
        if self.origin is not None:
            slot.follow(self.origin)
            for origin in self.origins:
                slot.follow(origin)
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


class Slot:
    """What one slot consists of; its state is in the machine.

    Attributes:
        index: its number.
        stream: its own, on which all its work runs in order.
        event: the produce event of requests: one request at a time, and never recorded before its last wait ended. Leases
            hand their events out, so each of their launches has a new one.
        query: whether the last record of that event is complete, at the least cost; see `Device.probe`.
        confirm: likewise, and what an error of `query` means.
        when_complete: calls what it is given when it is, on any thread; None where the device must be polled.
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
        "confirm", "event", "gates", "index", "is_forgotten", "lane", "launches", "mark", "on_done", "predecessor",
        "program", "query", "request", "stream", "turn", "when_complete",
    )  # fmt: skip

    on_done: Callable[[BaseException | None], None]
    when_complete: Callable[[Callable[[], None]], None] | None

    def __init__(self, index: int, device: Device, lane: Lane, *, overlap: bool = True) -> None:
        self.index = index
        self.event = device.event()
        self.mark = device.event()
        self.turn = None if overlap else device.event()
        self.predecessor: Event | None = None
        self.stream = device.stream()  # last: what is not made need not be closed
        self.query = device.probe(self.event)
        self.confirm: Callable[[], bool] = partial(device.query, self.event)
        self.when_complete = partial(device.when_complete, self.event) if device.tells else None
        self.lane = lane
        self.gates: list[Event] = []
        self.request: Request | None = None
        self.program: Program | None = None
        self.launches = 0
        self.is_forgotten = False

    def follow(self, stream: Stream) -> None:
        """Make the slot's stream wait, on the device, for what `stream` was given so far."""
        if not stream.query():  # asking costs less than ordering does, and mostly it is
            stream.record(self.mark)
            self.stream.wait(self.mark)
