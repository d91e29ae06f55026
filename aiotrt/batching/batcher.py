"""Dynamic batching, carried out: items in, batches to the executor, results out.

`batching` decides, `stacking` copies. Here is what needs the loop. An item that comes waits for the end of this turn of the
loop, so that a burst becomes one batch. Then, if a slot is free, whoever waits goes. If none is, one empty batch stands in
the executor's line, as any caller would, and is filled with whoever waits when its turn comes. So a batch is decided at the
last moment, by the event that freed its slot, and no timer has a part in it, except where `max_delay` wants one.

Rules as in `executor`: the loop's thread only, and no `await` between two halves of a change.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from aiotrt.batching.batch import Batch, Call, Single, check_stackable
from aiotrt.batching.queue import Batching, Deadlines, Pace, Queue, choose_sizes
from aiotrt.errors import DeadlineError, EngineError, InputError, OverloadedError, QueueFullError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.handshake import ready_events
from aiotrt.runtime.slots import State
from aiotrt.tensors import InputSpecs, Kind, Shapes, Specs, TensorSpec

__all__ = ["Gatherer", "ItemCounters"]


@dataclass
class ItemCounters:
    """What happened so far to items, in numbers."""

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
        specs: checks items; from `item_specs`.
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
        self._queue: Queue[Call] = Queue(batching, self.sizes, max_queue)
        self._deadlines: Deadlines[Call] = Deadlines()
        self._pace = Pace(len(executor.slots), self._queue.limit, batching.priorities)
        self._loop = executor.loop
        self._open: Batch | None = None  # stands in the executor's line
        self._soon: asyncio.Handle | None = None
        self._held: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_due = math.inf  # uvloop's handles do not say, of what is due at once
        executor.on_failure.append(self._fail)

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many items keep all slots busy with full batches, and another batch gathering."""
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
    ) -> Call:
        """Check an item and let it wait.

        Raises:
            InputError: the item does not fit, or has too many extents to be stacked. Nothing was submitted; so too for all
                below.
            DeadlineError: `deadline` has passed already.
            OverloadedError: at the pace that was measured, it will have passed before the result is there.
            QueueFullError: `bounded`, and the queue is full.
            ModelClosedError, ModelBrokenError, UsageError: as for `Executor.submit`.
        """
        executor = self._executor
        executor.check_usable()
        self.learn()
        arguments, shapes, kind, specs = self.specs.parse(values, named)
        if self._batching.stack and specs is not self.specs.specs:  # else they have as many extents as those accepted before
            check_stackable(arguments, specs)
        priority = self._check(deadline, priority)
        now = self._loop.time()
        call = Call(
            self._loop,
            arguments,
            specs,
            executor.outputs or kind,
            group=(
                shapes,
                tuple([argument.tensor is None for argument in arguments]) if kind is Kind.DEVICE else (),
                executor.outputs or kind,
                None if specs is self.specs.specs else specs,  # before the first has been accepted, they may differ
            ),
            priority=priority,
            arrival=now,
            deadline=None if deadline is None else now + deadline,
        )
        if kind is Kind.DEVICE or call.kind is Kind.DEVICE:
            call.origin = executor.device.current_stream()
            call.ready = ready_events(arguments)
        if deadline is not None and deadline <= 0:
            self.counters.submitted += 1
            self.counters.expired += 1
            raise self._too_late(call)
        if deadline is not None and self._batching.shed:
            self._check_pace(call, deadline)
        self._add(call, bounded)
        self.counters.submitted += 1
        if executor.observer is not None:
            executor.observe(call)
        if call.deadline is not None:
            self._deadlines.add(call)
            self._set_alarm()
        self._wake()
        return call

    def abandon(self, call: Call) -> None:
        """The caller no longer waits; nothing happens if the call has ended, or its loop was closed."""
        if self._executor.loop.is_closed():
            return
        if call.place is not None:
            self._queue.remove(call)
        elif call.batch is not None:
            self._leave(call)
        else:
            return
        self._given_up(call)

    def learn(self) -> None:
        """Take over what the engine has accepted first, in batches."""
        accepted = self._executor.specs.specs
        if self.specs.specs is None and accepted is not None:
            self.specs.settle(_of_items(self._executor.recipe.engine.name, accepted))

    def seal(self) -> None:
        """If signatures are fixed: allow items of those that the engine has accepted in batches, and no others."""
        if self._batching.stack:
            for signature in self._executor.specs.accepted:
                self.specs.settle(_of_items(self._executor.recipe.engine.name, signature))
        self.specs.seal()

    def stacked(self, specs: Specs, shapes: Shapes) -> list[tuple[Specs, Shapes, int | None]]:
        """For items of these specs and shapes: those of each size of batch, and the size; None where nothing is stacked."""
        if not self._batching.stack:
            return [(specs, shapes, None)]
        return [(self._of_batches(specs), tuple((size, *shape) for shape in shapes), size) for size in self.sizes]

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
            return 0 if classes == 1 else 1  # so that a call can be more urgent than those that do not say
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority < classes:
            raise InputError(f"priority must be an integer from 0, the most urgent, to {classes - 1}, got {priority!r}")
        return priority

    def _check_pace(self, call: Call, deadline: float) -> None:
        seconds = self._pace.seconds(self._queue.ahead(call.priority), self._free(), call.arrival, call.priority)
        if seconds > 0.0:
            call.expected = call.arrival + seconds
        if seconds > deadline:
            self.counters.rejected += 1
            raise OverloadedError(
                f"{self._executor.recipe.engine.name}: {len(self._queue)} items wait, and a result is expected in "
                f"{seconds:.3g} s, which is after deadline={deadline:.3g} s; call again later",
                seconds=seconds - deadline,
            )

    def _add(self, call: Call, bounded: bool) -> None:
        try:
            dropped = self._queue.add(call, bounded=bounded, spare=self._free())
        except OverflowError:
            if self._free():  # those who came earlier in this turn take it, and make room
                self._pump()
            try:
                dropped = self._queue.add(call, bounded=bounded, spare=self._free())
            except OverflowError:
                self.counters.rejected += 1
                raise self._full("call again later") from None
        for victim in dropped:
            self.counters.rejected += 1
            self._deadlines.discard(victim)
            if not victim.is_done:
                victim.reject(self._full("a newer call took this one's place"))
                self._executor.hub.finish(victim)

    # Going out...

    def _free(self) -> int:
        return self._executor.machine.count(State.FREE)

    def _wake(self) -> None:
        if self._open is None and self._soon is None:
            self._soon = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._soon = None
        self._pump()

    def _pump(self) -> None:
        """Whoever waits goes, or stands in line by an empty batch."""
        while self._open is None and len(self._queue):
            kind = Batch if self._batching.stack else Single
            batch = kind(self._loop, self._granted, self._settle)
            if not self._free():
                self._open = batch
            elif not self._assemble(batch):
                return
            self._executor.admit(batch)

    def _granted(self, batch: Batch) -> None:
        self._open = None
        if self._assemble(batch):
            self._pump()
        else:  # everybody has left
            batch.cancel()
            self._loop.call_soon(self._executor.abandon, batch)  # not now: the executor is just granting it its slot

    def _assemble(self, batch: Batch) -> bool:
        """Fill it with whoever should go now; false if nobody should."""
        while True:
            plan = self._queue.take(self._loop.time(), is_gone=self._is_gone, hold=not self._executor.closing)
            for call in plan.expired:
                self._expire(call)
            if self._held is not None:
                self._held.cancel()
                self._held = None
            if not plan.items:
                if plan.until is not None:
                    self._held = self._loop.call_at(plan.until, self._release)
                return False
            try:
                batch.fill(plan.items, plan.size, self._of_batches(plan.items[0].specs))
                break
            except Exception as error:  # they are in no line any more: nobody else would tell them; whoever is next may go
                refusal = self._executor.explain(error, "while a batch was put together")
                for call in plan.items:
                    call.batch = batch
                    self._settle(call, None, refusal)
        number = self._pace.begin(self._loop.time())
        batch.add_done_callback(lambda batch: self._ended(number, batch))
        if self._batching.stack:
            self.counters.batches[len(plan.items)] += 1
            self.counters.padding += plan.size - len(plan.items)
        if self._executor.observer is not None:
            now = time.perf_counter()
            for call in plan.items:
                if call.times is not None:
                    call.times.granted = now
        return True

    def _ended(self, number: int, batch: Batch) -> None:
        # A batch that failed, or that nobody waits for any more, may have been much quicker than others.
        self._pace.end(number, None if batch.cancelled() or not batch.result() else self._loop.time())

    def _release(self) -> None:
        self._held = None
        self._pump()

    def _is_gone(self, call: Call) -> bool:
        """Whether it was cancelled and its task, which says so, has not run yet."""
        if not call.is_done:
            return False
        self._given_up(call)
        return True

    # Ending...

    def _settle(self, call: Call, result: object, error: BaseException | None) -> None:
        if call.batch is None:
            return  # it left
        call.batch = None
        if call.is_done:
            self._given_up(call)
            return
        self._deadlines.discard(call)
        if error is None:
            self.counters.completed += 1
            if call.expected is not None:
                self._pace.waited(call.priority, longer=self._loop.time() > call.expected)
            call.resolve(result)
            self._executor.hub.finish(call)
        else:
            self.counters.failed += 1
            call.reject(error)
            self._executor.hub.finish(call)

    def _given_up(self, call: Call) -> None:
        """Its caller was cancelled. If that was later than it was told to wait, it would have waited longer still."""
        self.counters.cancelled += 1
        self._deadlines.discard(call)
        if call.expected is not None and self._loop.time() > call.expected:
            self._pace.waited(call.priority, longer=True)

    def _leave(self, call: Call) -> None:
        """The batch goes on without it, and nobody waits for the last one's."""
        batch, call.batch = call.batch, None
        assert batch is not None
        batch.left -= 1
        if batch.left == 0:
            batch.cancel()
            self._executor.abandon(batch)

    def _expire(self, call: Call) -> None:
        self.counters.expired += 1
        self._deadlines.discard(call)
        if not call.is_done:
            if call.expected is not None:
                self._pace.waited(call.priority, longer=True)
            call.reject(self._too_late(call))
            self._executor.hub.finish(call)

    def _set_alarm(self) -> None:
        """One timer for all deadlines."""
        due = self._deadlines.next()
        if self._alarm is not None:
            if due == self._alarm_due:
                return
            self._alarm.cancel()
            self._alarm = None
        if due is not None and due < math.inf:
            self._alarm, self._alarm_due = self._loop.call_at(due, self._ring), due

    def _ring(self) -> None:
        self._alarm = None
        for call in self._deadlines.expired(self._loop.time()):
            if call.place is not None:
                self._queue.remove(call)
            elif call.batch is not None:
                self._leave(call)
            if call.is_done:  # cancelled, and its task has not run yet
                self._given_up(call)
            else:
                self._expire(call)
        self._set_alarm()

    def flush(self) -> None:
        """The model is closing: nothing is held back any more, and the executor's line knows of everybody who waits."""
        self._pump()

    def _fail(self, error: BaseException) -> None:
        """The executor broke, or was closed without waiting: so is everybody here."""
        self._open = None
        for call in self._queue.clear():
            self._deadlines.discard(call)
            if call.is_done:
                self.counters.cancelled += 1
            else:
                self.counters.failed += 1
                call.reject(error)
                self._executor.hub.finish(call)
        self.close()

    def close(self) -> None:
        """Let the loop go."""
        for handle in (self._soon, self._held, self._alarm):
            if handle is not None:
                handle.cancel()
        self._soon = self._held = self._alarm = None

    # Helpers...

    def _of_batches(self, specs: Specs) -> Specs:
        if not self._batching.stack:
            return specs
        return specs.batched()

    def _full(self, hint: str) -> QueueFullError:
        return QueueFullError(
            f"{self._executor.recipe.engine.name}: {len(self._queue)} items wait, and no more may "
            f"(max_queue and Batching.overload={self._batching.overload!r}); {hint}"
        )

    def _too_late(self, call: Call) -> DeadlineError:
        assert call.deadline is not None
        return DeadlineError(
            f"{self._executor.recipe.engine.name}: there was no result within deadline={call.deadline - call.arrival:.3g} s"
        )


def _of_items(name: str, specs: Specs) -> Specs:
    """What items must be, so that batches are this."""
    for spec in specs:
        if spec.shape == ():
            raise EngineError(f"{name}: input {spec.name!r} has no extents, so it cannot be batched; load without batching=")
    return specs.unbatched()


def _extents(specs: Sequence[TensorSpec]) -> tuple[int, int | None]:
    """The smallest and the largest batch that all inputs allow."""
    fixed = [spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None]
    least = max([1, *fixed, *(spec.minimum[0] for spec in specs if spec.minimum)])
    most = min([*fixed, *(spec.maximum[0] for spec in specs if spec.maximum)], default=None)
    return least, most
