"""One queue for a model on several devices.

The queue is that of `batcher`, and each device has its own executor, which knows nothing of the others. An item goes to a
device only when a slot there is free; so no item is stuck behind a slow device. While no slot is free, the request of one
empty batch waits in each executor's queue, and the first that gets a slot takes the first item.

`placement` chooses among several free devices, and decides whether to wait for a busy one. A call that finds the queue empty
and a slot free is submitted directly to that device's executor, as on one device.

Rules as in `executor`: the loop's thread only, and no `await` between two halves of a change.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from aiotrt.batching.batch import Batch
from aiotrt.batching.batcher import NO_SPECS, Gatherer
from aiotrt.batching.item import Item
from aiotrt.batching.member import Member
from aiotrt.batching.placed import PlacedBatch, PlacedGroup, PlacedItem, PlacedRequest
from aiotrt.batching.queue import Batching, Pace, padded
from aiotrt.errors import AiotrtError, DeviceError, UsageError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.placement import choose, copy_seconds
from aiotrt.runtime.request import Request
from aiotrt.tensors import NUMPY, Argument, InputSpecs, Key, Kind, Shapes, Specs

__all__ = ["Dispatcher"]

#: The queue's options for a model without batching.
PLAIN: Final = Batching(stack=False, priorities=1, shed=False)
#: How many batches may wait for each device: if there are more, every device is needed, and a free slot takes the first.
LONG: Final = 4


class Dispatcher(Gatherer):
    """The calls of one open model on several devices.

    Args:
        executors: one for each device.
        specs: checks items.
        batching: the options; None for no batching.
        max_queue: how many calls or items may wait while all slots are busy; None for no bound.
        retry: whether a call from the host runs again, once, when the device that ran it broke.

    Attributes:
        members: the devices.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        specs: Callable[[Specs | None], InputSpecs],
        batching: Batching | None,
        max_queue: int | None,
        *,
        retry: bool,
    ) -> None:
        devices = [executor.device for executor in executors]
        self.members = [Member(i, executor, devices) for i, executor in enumerate(executors)]
        self._usable = list(self.members)
        self._retry = retry
        self._is_plain = batching is None
        super().__init__(executors[0], specs, batching or PLAIN, max_queue)
        self._item = PlacedItem
        if not self._batching.stack:
            # This batch is never submitted. It keeps `Gatherer.submit` from scheduling `pump` for the end of the iteration:
            # `_queued` pumps at once, since no item waits for others.
            self._open = Batch(self._granted, self._settle, stack=False)
        self._pace = Pace(sum(len(e.slots) for e in executors), self._queue.limit, self._batching.priorities)
        self._patience: asyncio.TimerHandle | None = None

    @property
    def lead(self) -> Executor:
        """The executor that represents the model: the first one that works, or the first if none does."""
        return self._executor

    @property
    def in_flight(self) -> int:
        """How many items keep all slots busy, while others wait: a batch for each device, or as many calls as slots."""
        slots = sum(len(member.executor.slots) for member in self._usable)
        return (slots + len(self._usable)) * self._queue.limit if self._batching.stack else 2 * slots

    # Coming in...

    def submit(
        self,
        values: Sequence[object],
        named: Mapping[str, object],
        *,
        deadline: float | None = None,
        priority: int | None = None,
        bounded: bool = True,
    ) -> Any:
        """Start a call or queue it. Returns the awaitable of its result. Raises as `Gatherer.submit` does."""
        if not self._is_plain:
            return self._queued(values, named, deadline=deadline, priority=priority, bounded=bounded)
        if deadline is not None or priority is not None:  # without batching, these are names of inputs like any other
            options = {"deadline": deadline, "priority": priority}
            named = {**named, **{name: value for name, value in options.items() if value is not None}}
        request = None if self._retry or len(self._queue) else self._direct(values, named)
        return self._queued(values, named, bounded=bounded) if request is None else request

    def _queued(self, values: Sequence[object], named: Mapping[str, object], **options: Any) -> Item:
        item = super().submit(values, named, **options)
        if not self._batching.stack:
            self.pump()
        return item

    def abandon(self, call: Any) -> None:
        """Like `Gatherer.abandon`, also for a request that went to an executor directly and not through the queue."""
        if isinstance(call, Item):
            super().abandon(call)
            return
        slot = call.slot
        for member in self.members:
            if slot is None or member.executor.slots[slot.index] is slot:
                member.executor.abandon(call)
                return

    def executor(self, name: str | None, key: Key) -> Executor:
        """Return the executor of the device `name`; for None that of the device where a request should finish first.

        Raises:
            UsageError: the model has no such device.
        """
        if name is None:
            return self._chosen(key, None)[0].executor
        for member in self.members:
            if member.executor.device.name == name:
                return member.executor
        names = ", ".join(member.executor.device.name for member in self.members)
        raise UsageError(f"device must be one of the model's ({names}), got {name!r}")

    def _direct(self, values: Sequence[object], named: Mapping[str, object]) -> Request | None:
        """Start a call on the device where it should finish first; None if it must be queued.

        It must be queued if waiting for a busy device is better, if its inputs are on several devices, or if they are on
        another device than the chosen one.
        """
        self._executor.check_usable()
        key: Key | None = None
        home: int | None = None
        for member in self._usable if not named else ():
            route = member.executor._route
            if route is not None and route.matches(values):
                key, home = route.key, member.index if route.on_device else None
                break
        if key is None:
            arguments, shapes, _, specs = self.specs.parse(values, named)
            homes = self._homes(arguments)
            if len(homes) > 1:
                return None
            key, home = (shapes, (), specs), homes[0] if homes else None
        chosen, seconds = self._chosen(key, home)
        if seconds or home not in (None, chosen.index):
            return None
        return chosen.executor.submit(values, named, bounded=False)

    def _homes(self, arguments: Iterable[Argument]) -> list[int]:
        """Return the indices of the devices that hold inputs, in the order of the inputs."""
        homes: dict[int, None] = {}
        for argument in arguments:
            if argument.tensor is not None:
                for member in self.members:
                    if member.executor.device.holds(argument.tensor):
                        homes[member.index] = None
                        break
        return list(homes)

    def _places(self, arguments: Sequence[Argument]) -> Hashable:
        """Like `Gatherer._places`, with the devices that hold inputs."""
        return super()._places(arguments), tuple(self._homes(arguments))

    def _new_group(self, arguments: Sequence[Argument], specs: Specs, shapes: Shapes, kind: Kind) -> PlacedGroup:
        homes = tuple(self._homes(arguments))
        return PlacedGroup(self.members, homes, arguments, specs, shapes, kind, stack=self._batching.stack)

    def _add(self, item: Item, bounded: bool) -> None:
        assert isinstance(item, PlacedItem)
        if item.group.on_device:
            for member in [self.members[i] for i in item.group.homes] or self._usable:
                item.origins[member.index] = member.executor.device.current_stream()
        super()._add(item, bounded)

    # Going out...

    def _free(self) -> int:
        return sum([member.free for member in self._usable])

    def _granted(self, request: Request, batch: Batch) -> None:
        """Fill an empty batch that got its slot, and submit others."""
        assert isinstance(batch, PlacedBatch)
        batch.member.open = None
        self.pump(request, batch.member)

    def pump(self, granted: Request | None = None, at: Member | None = None) -> None:
        """Submit batches of the waiting items to devices that are free, and an empty batch to each device that is not.

        Args:
            granted: the request of an empty batch that just got a slot.
            at: its device.
        """
        if granted is None and all(member.open is not None for member in self._usable):
            return  # no slot is free: a slot that becomes free takes the empty batch in its executor's queue
        while len(self._queue):
            member = self._next(at)
            if member is None:
                break
            if granted is not None and member is at:
                if not self._assemble(granted, _batch(granted)):
                    break
                granted = at = None
                continue
            request = self._request(member)
            batch = _batch(request)
            if not self._assemble(request, batch):
                break
            try:
                prefer = batch.group.route_of(batch.size).holders
            except Exception as error:  # its items have left the queue: they must end here
                member.executor.reject(request, member.executor.explain(error, "before it was launched"))
                continue
            self._admit(request, member, prefer)
        if len(self._queue):
            for member in self._usable:
                if member.open is None and not member.free and member is not at:
                    member.open = self._request(member)
                    self._admit(member.open, member, ())
        if granted is not None:
            granted.cancel()
            _batch(granted).member.empty += 1
            self._loop.call_soon(self._abandon, granted)  # not now: the executor is just granting the slot

    def _next(self, granted: Member | None) -> Member | None:
        """Return the device for the first item; None to let it wait.

        Args:
            granted: the device where an empty batch holds a slot that the item can have.
        """
        free = [member for member in self._usable if member is granted or (member.open is None and member.free)]
        if not free:
            return None
        now = self._loop.time()
        found = self._queue.head(now, hold=not self._executor.closing)
        if found is None:  # held for `max_delay`: `_assemble` sets the timer
            return free[0]
        item, count = found
        waiting = math.ceil(len(self._queue) / self._queue.limit)
        if waiting > LONG * len(self._usable):
            return granted or free[0]
        assert isinstance(item, PlacedItem)
        key, home = item.group.members[0].route_of(padded(count, self.sizes)).key, item.group.home
        chosen, seconds = self._chosen(key, home, waiting, granted)
        if not seconds:
            return chosen
        if item.patience is None:
            item.patience = now + seconds
        elif item.patience <= now:
            return self._chosen(key, home, 1, granted, free)[0]
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self._loop.call_at(item.patience, self._lose_patience)
        for member in free:
            self._build_ahead(member, key)
        return None

    def _lose_patience(self) -> None:
        self._patience = None
        self.pump()

    def _chosen(
        self,
        key: Key,
        home: int | None,
        waiting: int = 1,
        granted: Member | None = None,
        members: Sequence[Member] = (),
    ) -> tuple[Member, float]:
        """Return the device where a request is expected to finish first, and how long to wait for it if it is busy."""
        members = members or self._usable or self.members
        now = self._executor.hub.now()
        away = 0.0 if home is None else 2 * copy_seconds(_nbytes(key))
        prospects = [
            member.prospect(
                member.executor.cache.holders(key),
                0.0 if member.index == home else away,
                now,
                granted=member is granted,
            )
            for member in members
        ]
        index, seconds = choose(prospects, waiting)
        return members[index], seconds

    def _request(self, member: Member) -> PlacedRequest:
        """Return the request of an empty batch for this device."""
        request = PlacedRequest(self._loop, (), NO_SPECS, (), NUMPY)
        request.batch = PlacedBatch(member, self._granted, self._settle, stack=self._batching.stack)
        return request

    def _assemble(self, request: Request, batch: Batch) -> bool:
        if not super()._assemble(request, batch):
            return False
        assert isinstance(batch, PlacedBatch)
        assert isinstance(batch.group, PlacedGroup)
        batch.place(batch.group)
        return True

    def _admit(self, request: Request, member: Member, prefer: Container[int]) -> None:
        member.submitted += 1
        member.executor.admit(request, prefer)

    def _abandon(self, request: Request) -> None:
        member = _batch(request).member
        member.cancelled += 1
        member.executor.abandon(request)

    def _build_ahead(self, member: Member, key: Key) -> None:
        """Build the program whose absence keeps a request from this device, so that the next request can go there."""
        executor = member.executor
        if executor.closing or executor.cache.holders(key) or not member.try_ahead(key):
            return
        shapes, _, specs = key
        request = executor.lease(specs, shapes, executor.outputs or NUMPY, is_warmup=True)
        member.is_building = True

        def built(request: Request) -> None:
            member.is_building = False
            if not request.cancelled():
                request.exception()  # retrieved and ignored: a call that goes there gets the error
            executor.abandon(request)
            self.pump()

        request.add_done_callback(built)

    # Ending...

    def _settle(self, batch: Batch, results: Sequence[object], error: BaseException | None) -> None:
        if self._retry and isinstance(error, DeviceError) and self._others_work():
            for item in reversed(batch.items):
                assert isinstance(item, PlacedItem)
                if item.request is None or item.is_done or item.is_retried or item.group.home is not None:
                    continue
                item.request = item.patience = None
                item.is_retried = True
                self._queue.put_back(item)
            self._loop.call_soon(self.pump)  # not now: the executor is in the middle of breaking
        super()._settle(batch, results, error)

    def _others_work(self) -> bool:
        return any(member.executor.broken is None for member in self.members)

    def _listen(self) -> None:
        for member in self.members:
            member.executor.on_failure.append(partial(self._failed, member))

    def _failed(self, member: Member, error: AiotrtError) -> None:
        """Go on with the other devices after one broke; fail all items if none is left or the model is closed."""
        member.open = None
        if not isinstance(error, DeviceError) or not self._others_work():
            self._usable = []
            self._fail(error)
            return
        self._usable = [other for other in self._usable if other is not member]
        self._executor = self._usable[0].executor
        self._loop.call_soon(self.pump)

    def close(self) -> None:
        """Like `Gatherer.close`, and also cancel the timer of the first item's patience."""
        super().close()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _batch(request: Request) -> PlacedBatch:
    batch = request.batch
    assert isinstance(batch, PlacedBatch)
    return batch


def _nbytes(key: Key) -> int:
    return sum([math.prod(shape) * spec.dtype.itemsize for shape, spec in zip(key[0], key[2], strict=True)])
