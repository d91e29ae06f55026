"""Carries out dynamic batching on the event loop: takes items, submits batches to the executor, hands out results.

`queue` decides, `batch` copies, and this file does what needs the loop. An item waits for the end of the loop iteration in
which it comes, so that a burst becomes one batch. Then, if a slot is free, the waiting items are submitted. If none is, the
request of one empty batch waits in the executor's queue, and is filled with the items that wait when it gets its slot. So a
batch is decided at the last moment, by the event that freed its slot; a timer is used only for `max_delay`.

Rules as in `executor`: the loop's thread only, and no `await` between two halves of a change.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiotrt.batching.batch import Batch
from aiotrt.batching.group import Group
from aiotrt.batching.item import Item
from aiotrt.batching.queue import Batching, Pace, Queue, choose_sizes
from aiotrt.batching.stacked import check_stackable
from aiotrt.errors import DeadlineError, EngineError, InputError, OverloadedError, QueueFullError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.handshake import ready_events
from aiotrt.runtime.request import Request
from aiotrt.runtime.route import Route
from aiotrt.runtime.slots import FREE
from aiotrt.tensors import DEVICE, NUMPY, Argument, InputSpecs, Kind, Shapes, Signature, Specs, TensorSpec
from aiotrt.tensors.input_specs import remember

__all__ = ["Gatherer", "ItemCounters"]


#: The signature of an empty batch.
NO_SPECS: Final = Signature(())


@dataclass
class ItemCounters:
    """Counts of what happened to items so far."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    expired: int = 0
    padding: int = 0  # rows that held no item
    batches: Counter[int] = field(default_factory=Counter)  # by their number of items


class Gatherer:
    """The items of one open model.

    Args:
        executor: runs the batches.
        specs: makes the object that checks items, from the specs of items if they are known.
        batching: the options.
        max_queue: how many items may wait while all slots are busy; None for no bound.

    Raises:
        InputError: the engine takes none of the sizes.
        EngineError: the engine has an input without a batch axis.
    """

    def __init__(
        self,
        executor: Executor,
        specs: Callable[[Specs | None], InputSpecs],
        batching: Batching,
        max_queue: int | None,
    ) -> None:
        declared = executor.specs.specs
        self._executor = executor
        self._batching = batching
        if batching.stack:
            self.specs = specs(None if declared is None else _of_items(executor.recipe.engine.name, declared))
            self.sizes = choose_sizes(batching, *_extents(declared or ()))
        else:
            self.specs, self.sizes = executor.specs, (1,)
        self.counters = ItemCounters()
        self._usual = 0 if batching.priorities == 1 else 1  # so that a call can be more urgent than calls without a priority
        self._item: type[Item] = Item
        self._queue: Queue[Item] = Queue(batching, self.sizes, max_queue)
        self._pace = Pace(len(executor.slots), self._queue.limit, batching.priorities)
        self._loop = executor.loop
        self._groups: dict[Hashable, Group] = {}
        self._group: Group | None = None  # of the previous item, if its route may recognise the next one
        self._open: Batch | None = None  # its request is in the executor's queue
        self._soon: asyncio.Handle | None = None
        self._held: asyncio.TimerHandle | None = None
        self._listen()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many items fill a batch in every slot and one batch that waits."""
        return (len(self._executor.slots) + 1) * self._queue.limit

    # Coming in...

    def submit(
        self,
        values: Sequence[object],
        named: Mapping[str, object],
        *,
        deadline: float | None = None,
        priority: int | None = None,
        bounded: bool = True,
    ) -> Item:
        """Check an item and queue it.

        Raises:
            InputError: the item does not fit, or has too many dimensions to be stacked. Nothing was submitted, as with all
                errors below.
            DeadlineError: `deadline` has passed already.
            OverloadedError: at the measured pace, `deadline` will have passed before the result is there.
            QueueFullError: `bounded` is true, and the queue is full.
            ModelClosedError, ModelBrokenError, UsageError: as for `Executor.submit`.
        """
        executor = self._executor
        if asyncio._get_running_loop() is not self._loop or executor.closing or executor.broken is not None:
            executor.check_usable()
        group = self._group
        arguments: Sequence[Argument] = ()
        if group is None or named or group.route is None or not group.route.matches(values):
            group, arguments = self._recognise(values, named)
            values = [argument.tensor if argument.host is None else argument.host for argument in arguments]
        priority = self._usual if priority is None and deadline is None else self._check(deadline, priority)
        now = self._loop.time()
        item = self._item(self._loop, group, values, arguments, priority, now, None if deadline is None else now + deadline)
        if group.on_device:
            item.origin = executor.device.current_stream()
            item.ready = ready_events(arguments)
        if deadline is not None:
            if deadline <= 0:
                self.counters.submitted += 1
                self.counters.expired += 1
                raise self._too_late(item)
            if self._batching.shed:
                self._check_pace(item, deadline)
        self._add(item, bounded)
        self.counters.submitted += 1
        if executor.observer is not None:
            executor.observe(item)
        if deadline is not None and deadline < math.inf:
            item.timer = self._loop.call_at(now + deadline, self._ring, item)
        if self._open is None:
            self._pump_soon()
        return item

    def _recognise(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[Group, list[Argument]]:
        """Check every input of an item, and remember the signature if the next item may have it too."""
        executor = self._executor
        self.learn()
        specs, leaves = self.specs.recognise(values, named)
        arguments, shapes, kind = self.specs.check(specs, leaves)
        places = self._places(arguments) if kind is DEVICE else ()
        key = shapes, places, executor.outputs or kind, specs
        group = self._groups.get(key)
        if group is None:
            if self._batching.stack:
                check_stackable(arguments, specs)
            group = self._new_group(arguments, specs, shapes, executor.outputs or kind)
            remember(self._groups, key, group)
        if group.route is None and group.batched in executor.specs.accepted and Route.suits(leaves, arguments, group.device):
            group.route = Route(leaves, arguments, specs, shapes, kind, {}, group.device, self.specs.holds)
        self._group = None if named or specs.structure is not None else group
        return group, arguments

    def _places(self, arguments: Sequence[Argument]) -> Hashable:
        """Return where each input is, if any is on a device: items can be stacked if these are equal."""
        return tuple([argument.tensor is None for argument in arguments])

    def _new_group(self, arguments: Sequence[Argument], specs: Specs, shapes: Shapes, kind: Kind) -> Group:
        return Group(self._executor, arguments, specs, shapes, kind, stack=self._batching.stack)

    def _listen(self) -> None:
        self._executor.on_failure.append(self._fail)

    def abandon(self, item: Item) -> None:
        """Abandon an item whose caller no longer waits; nothing happens if it has ended, or its loop was closed."""
        if self._executor.loop.is_closed():
            return
        if self._withdraw(item):
            self._given_up(item)

    def learn(self) -> None:
        """Derive the specs of items from the first batch that the engine has accepted."""
        accepted = self._executor.specs.specs
        if self.specs.specs is None and accepted is not None:
            self.specs.settle(_of_items(self._executor.recipe.engine.name, accepted))

    def seal(self) -> None:
        """If signatures are fixed, allow only items of the signatures that the engine has accepted in batches."""
        if self._batching.stack:
            for signature in self._executor.specs.accepted:
                self.specs.settle(_of_items(self._executor.recipe.engine.name, signature))
        self.specs.seal()

    def stacked(self, specs: Specs, shapes: Shapes) -> list[tuple[Specs, Shapes, int | None]]:
        """Return the specs and shapes of batches of these items, with each size of a batch; None if nothing is stacked."""
        if not self._batching.stack:
            return [(specs, shapes, None)]
        return [(specs.batched(), tuple((size, *shape) for shape in shapes), size) for size in self.sizes]

    def _check(self, deadline: object, priority: object) -> int:
        try:
            if deadline is not None and (
                isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or math.isnan(deadline)
            ):
                raise InputError(f"deadline must be a number of seconds or None, got {deadline!r}")
        except OverflowError:
            raise InputError("deadline must be a number of seconds or None, got an integer too large for one") from None
        classes = self._batching.priorities
        if priority is None:
            return self._usual
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority < classes:
            raise InputError(f"priority must be an integer from 0, the most urgent, to {classes - 1}, got {priority!r}")
        return priority

    def _check_pace(self, item: Item, deadline: float) -> None:
        seconds = self._pace.seconds(self._queue.ahead(item.priority), self._free(), item.arrival, item.priority)
        if seconds > 0.0:
            item.expected = item.arrival + seconds
        if seconds > deadline:
            self.counters.rejected += 1
            raise OverloadedError(
                f"{self._executor.recipe.engine.name}: {len(self._queue)} items wait, and a result is expected in "
                f"{seconds:.3g} s, which is after deadline={deadline:.3g} s; call again later",
                seconds=seconds - deadline,
            )

    def _add(self, item: Item, bounded: bool) -> None:
        try:
            dropped = self._queue.add(item, bounded=bounded, spare=self._free())
        except OverflowError:
            if self._free():  # items that came earlier in this loop iteration take the slot, and make room
                self.pump()
            try:
                dropped = self._queue.add(item, bounded=bounded, spare=self._free())
            except OverflowError:
                self.counters.rejected += 1
                raise self._full("call again later") from None
        for victim in dropped:
            self.counters.rejected += 1
            _stop(victim)
            if not victim.is_done:
                victim.reject(self._full("a newer call took this one's place"))
                self._executor.hub.finish(victim)

    # Going out...

    def _free(self) -> int:
        return self._executor.machine.count(FREE)

    def _pump_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._turn)

    def _turn(self, is_first: bool = True) -> None:
        """Pump in this loop iteration, or in the next one where callers of the last batch are still to be woken."""
        self._soon = None
        if is_first and self._executor.hub.finished:
            self._soon = self._loop.call_soon(self._turn, False)
        else:
            self.pump()

    def pump(self) -> None:
        """Submit batches of the waiting items, or an empty batch if no slot is free."""
        executor = self._executor
        while self._open is None and len(self._queue):
            request = Request(self._loop, (), NO_SPECS, (), NUMPY)
            request.batch = batch = Batch(self._granted, self._settle, stack=self._batching.stack)
            prefer: Container[int] = ()
            try:
                if not self._free():
                    self._open = batch
                elif not self._assemble(request, batch):
                    return
                else:
                    prefer = batch.group.route_of(batch.size).holders
                executor.admit(request, prefer)
            except BaseException as error:
                if not request.is_queued and request.slot is None:  # its items have left the queue: they must end here
                    executor.reject(request, executor.explain(error, "before it was launched"))
                if not isinstance(error, Exception):  # an interrupt, after which the loop may go on
                    self._pump_soon()
                    raise

    def _granted(self, request: Request, batch: Batch) -> None:
        """Fill an empty batch that got its slot."""
        self._open = None
        try:
            is_launched = self._assemble(request, batch)
        except BaseException:  # an interrupt: the executor fails this batch, but other items still wait
            self._pump_soon()
            raise
        if is_launched:
            self.pump()
        else:  # all items have left
            request.cancel()
            self._loop.call_soon(self._abandon, request)  # not now: the executor is just granting the slot

    def _assemble(self, request: Request, batch: Batch) -> bool:
        """Choose the items of this batch; False if there are none."""
        now = self._loop.time()
        plan = self._queue.take(now, is_gone=self._is_gone, hold=not self._executor.closing)
        if plan.items:
            # First, since the items have left the queue: after an interrupt they must end with their batch.
            for item in plan.items:
                item.request = request
            batch.number = self._pace.begin(now)
            batch.items, batch.size, batch.group = plan.items, plan.size, plan.items[0].group
            batch.left = len(plan.items)
        for item in plan.expired:
            self._expire(item)
        if self._held is not None:
            self._held.cancel()
            self._held = None
        if not plan.items:
            if plan.until is not None:
                self._held = self._loop.call_at(plan.until, self._release)
            return False
        if self._batching.stack:
            self.counters.batches[len(plan.items)] += 1
            self.counters.padding += plan.size - len(plan.items)
        if self._executor.observer is not None:
            moment = time.perf_counter()
            for item in plan.items:
                if item.times is not None:
                    item.times.granted = moment
        return True

    def _release(self) -> None:
        self._held = None
        self.pump()

    def _is_gone(self, item: Item) -> bool:
        """Whether an item was cancelled before its task could run, or was changed while it waited and no longer fits."""
        if item.is_done:
            self._given_up(item)
            return True
        route = item.group.route
        if item.arguments or route is None or route.still_matches(item.values):
            return False
        got = tuple([tuple(value.shape) for value in item.values])
        name = self._executor.recipe.engine.name
        refusal = f"{name}: an input was changed while its item waited: expected shapes {item.group.shapes}, got {got}"
        self._end(item, None, InputError(refusal))
        return True

    # Ending...

    def _settle(self, batch: Batch, results: Sequence[object], error: BaseException | None) -> None:
        """End a batch, and the items that have not left it."""
        if batch.items:  # a failed batch teaches nothing: it may have been much quicker than others
            self._pace.end(batch.number, self._loop.time() if error is None else None)
        elif self._open is batch:  # interrupted before it had its slot: the items still wait, for another batch
            self._open = None
            self._pump_soon()
        for i, item in enumerate(batch.items):
            if item.request is None:
                continue
            item.request = None
            if item.is_done:
                self._given_up(item)
            else:
                self._end(item, None if error is not None else results[i], error)

    def _end(self, item: Item, result: object, error: BaseException | None) -> None:
        if item.timer is not None:
            _stop(item)
        if error is None:
            self.counters.completed += 1
            if item.expected is not None:
                self._pace.waited(item.priority, longer=self._loop.time() > item.expected)
            item.resolve(result)
        else:
            self.counters.failed += 1
            item.reject(error)
        self._executor.hub.finish(item)

    def _given_up(self, item: Item) -> None:
        """Record a cancelled item. If its expected completion had passed, count that as an under-estimate."""
        self.counters.cancelled += 1
        _stop(item)
        if item.expected is not None and self._loop.time() > item.expected:
            self._pace.waited(item.priority, longer=True)

    def _withdraw(self, item: Item) -> bool:
        """Remove the item from the queue or its batch; False if it has ended."""
        request = item.request
        if item.place is not None:
            self._queue.remove(item)
        elif request is not None:
            item.request = None
            batch = request.batch
            assert isinstance(batch, Batch)
            batch.left -= 1
            if batch.left == 0 and request.cancel():  # no caller waits for the batch
                self._pace.end(batch.number, None)
                self._abandon(request)
        else:
            return False
        return True

    def _abandon(self, request: Request) -> None:
        """Abandon the request of a batch for which no caller waits."""
        self._executor.abandon(request)

    def _expire(self, item: Item) -> None:
        self.counters.expired += 1
        if not item.is_done:
            if item.expected is not None:
                self._pace.waited(item.priority, longer=True)
            item.reject(self._too_late(item))
            self._executor.hub.finish(item)

    def _ring(self, item: Item) -> None:
        """Expire an item whose deadline has passed."""
        assert item.deadline is not None
        if self._loop.time() < item.deadline:  # a loop's timers may fire early, by the resolution of its clock
            item.timer = self._loop.call_at(item.deadline, self._ring, item)
        elif self._withdraw(item):
            if item.is_done:  # cancelled, and its task has not run yet
                self._given_up(item)
            else:
                self._expire(item)

    def _fail(self, error: BaseException) -> None:
        """Fail all waiting items, because the executor broke or was closed without waiting."""
        self._open = None
        for item in self._queue.clear():
            if item.is_done:
                _stop(item)
                self.counters.cancelled += 1
            else:
                self._end(item, None, error)
        self.close()

    def close(self) -> None:
        """Cancel what is scheduled on the loop."""
        for handle in (self._soon, self._held):
            if handle is not None:
                handle.cancel()
        self._soon = self._held = None

    # Helpers...

    def _full(self, hint: str) -> QueueFullError:
        return QueueFullError(
            f"{self._executor.recipe.engine.name}: {len(self._queue)} items wait, and no more may "
            f"(max_queue and Batching.overload={self._batching.overload!r}); {hint}"
        )

    def _too_late(self, item: Item) -> DeadlineError:
        assert item.deadline is not None
        return DeadlineError(
            f"{self._executor.recipe.engine.name}: there was no result within deadline={item.deadline - item.arrival:.3g} s"
        )


def _stop(item: Item) -> None:
    """Stop the timer of an item that has ended, since it would keep the item alive until the deadline."""
    if item.timer is not None:
        item.timer.cancel()


def _of_items(name: str, specs: Specs) -> Specs:
    """Return the specs of the items whose batches have these specs."""
    for spec in specs:
        if spec.shape == ():
            raise EngineError(f"{name}: input {spec.name!r} has no extents, so it cannot be batched; load without batching=")
    return specs.unbatched()


def _extents(specs: Sequence[TensorSpec]) -> tuple[int, int | None]:
    """Return the smallest and the largest batch that all inputs allow."""
    fixed = [spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None]
    least = max([1, *fixed, *(spec.minimum[0] for spec in specs if spec.minimum)])
    most = min([*fixed, *(spec.maximum[0] for spec in specs if spec.maximum)], default=None)
    return least, most
