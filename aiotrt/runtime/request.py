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
    """The times of a request, or of an item of a batch, that an observer gets.

    Attributes:
        entered: when it was submitted; this and the next two are readings of `time.perf_counter`.
        granted: when it left the queue: it had its slot, or its place in a batch. 0.0 until then.
        seen: when it was seen to be complete on the device. 0.0 until then, and always for an item.
        ran: how many seconds it ran until then, as the hub saw it.
        late: how many of these seconds may have passed after it was complete.
    """

    __slots__ = ("entered", "granted", "late", "ran", "seen")

    def __init__(self, entered: float) -> None:
        self.entered = entered
        self.granted = self.seen = self.ran = self.late = 0.0


class Items(Protocol):
    """The items of many callers that one request runs, as the executor sees them. It calls them on the loop's thread.

    Attributes:
        left: how many items still wait for their results.
    """

    left: int

    def fill(self, request: Request, slot: Slot) -> bool:
        """Choose the items, now that the request has its slot. True if their inputs are in place for `_replay`."""

    def allocate(self, device: Device, program: Program) -> Copies:
        """Allocate each item's device results in the order of its own stream; return the copies from the outputs to them."""

    def handed_out(self, results: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        """Divide the device results of a request among the items."""

    def copied(self, program: Program, views: Sequence[Array]) -> Sequence[Sequence[object]]:
        """Copy each item's part of these host views of the outputs; none for items that have ended.

        A worker may call this.
        """

    def settle(self, results: Sequence[object], error: BaseException | None) -> None:
        """Give each item its result, or the error."""


class Request(Waiter):
    """A caller's request: to run these arguments, or to lease a slot that is prepared for these shapes.

    Awaiting it gives the packed results, or for a lease None when the slot is claimed and prepared.

    Attributes:
        route: the recognised signature, while the request takes the short path.
        values: on the short path, the inputs as the caller gave them.
        arguments: on the long way, the checked inputs; they, and so the caller's memory, live until the slot is done with
            the request.
        specs: what the inputs were checked against.
        shapes: the shapes of the inputs.
        bound: inputs that the graph reads in place.
        kind: what the results should be.
        is_lease: whether the caller wants the slot itself.
        marked: inputs that get an event which is complete when they have been read.
        is_queued: whether it waits in the queue.
        is_warmup: whether it only prepares slots.
        is_revoked: whether the model was closed while this lease was held.
        slot: the slot that it was granted, until the slot is free again.
        origin: the caller's current stream, when inputs or results are on the device.
        origins: the current streams of a batch's other callers.
        batch: the items of many callers that this request runs; None if it is one caller's request.
        ready: events that the slot's stream waits for before it reads device inputs.
        record_readers: records the consumer events of a lease, for when the model takes the slot from its holder.
        results: device results, which belong to the caller.
        times: when what happened to it; None without an observer.
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
        # As in `Waiter` and `Pending`, without two more calls for each request. Their other attributes (`query`, `confirm`,
        # `on_done`, `estimate`, `hang_timeout`) come from the slot and its program, and are set at the launch.
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
        """The key of the program that it needs, among those of a slot."""
        bound = tuple([(i, tensor.data_ptr()) for i, tensor in self.bound.items()]) if self.bound else ()
        return self.shapes, bound, self.specs

    def order(self, slot: Slot) -> None:
        """Make the slot's stream wait for what the device inputs depend on, and for the last use of the results' memory."""
        if self.origin is not None:
            slot.follow(self.origin)
            for origin in self.origins:
                slot.follow(origin)
            for event in self.ready:
                slot.stream.wait(event)

    def host_inputs(self) -> Sequence[int]:
        """Return the indices of the inputs that need staging memory; for a lease all, since any may."""
        if self.is_lease:
            return range(len(self.shapes))
        for argument in self.arguments:  # a check costs less than a list, and a caller with device inputs needs no list
            if argument.host is not None:
                return [i for i, argument in enumerate(self.arguments) if argument.host is not None]
        return ()


class Slot:
    """The parts of one slot; its state is in the machine.

    Attributes:
        index: its index.
        stream: its own stream, on which all its work runs in order.
        event: the produce event of requests: for one request at a time, and never recorded before its last wait ended.
            Leases hand their events out, so each of their launches has a new one.
        query: whether the last record of `event` is complete, at the least cost; see `Device.probe`.
        confirm: whether it is complete, called when `query` raises; it raises what that error means.
        when_complete: takes a callback, and calls it on any thread when `event` is complete; None if the device must be
            polled.
        mark: recorded on a caller's stream and waited for at once.
        lane: the hub's lane for its stream; one for all slots whose launches run one after the other.
        on_done: what the hub calls when a request's produce event is complete.
        gates: consumer events that the next launch waits for, on the device.
        turn: an event that is recorded when a launch has ended except for its copies, where launches of several slots run
            one after the other; None where they may overlap.
        predecessor: the `turn` of another slot that the next launch waits for.
        request: the request that has the slot now.
        program: what it runs for that request.
        launches: how many launches the present lease made; its last launch has this number.
        is_forgotten: whether the present lease was garbage collected without having been left.
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
        self.stream = device.stream()  # after the events: if one of them fails, there is no stream to close
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
        """Make the slot's stream wait, on the device, for the work submitted to `stream` so far."""
        if not stream.query():  # a query costs less than recording and waiting, and mostly the stream is idle
            stream.record(self.mark)
            self.stream.wait(self.mark)
