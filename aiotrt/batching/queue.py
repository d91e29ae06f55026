"""The decisions of dynamic batching: which items go into the next batch, are dropped, or may wait; and a batch's size.

Rule 1: every such decision is made in this file.
Rule 2: this file touches no device, no tensor, no event loop and no clock: times are arguments and decisions are results, so
that all of it can be tested by enumeration.

Theory of operation. Each item that waits is an `Entry`. Entries of one *group* can be stacked (equal shapes); each has a
priority class, 0 being the most urgent. `Queue.take` is called for a batch only when a slot is free: entries gather while
the device is busy, and wait no longer than that unless `max_delay` allows it.

The next batch is that of the oldest entry of the most urgent class, filled up with others of its group, urgent ones first,
then older ones. A class whose oldest entry was passed over by `patience` batches goes before more urgent ones once. So no
group starves, since heads are taken in order of arrival, and no class does: the oldest entry of a class is passed over at
most ``patience`` times plus once per other class.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

from aiotrt.errors import InputError

__all__ = ["Batching", "Entry", "Overload", "Pace", "Plan", "Queue", "choose_sizes", "padded"]

Overload = Literal["wait", "reject", "drop_oldest", "latest"]


@dataclass(frozen=True)
class Batching:
    """How single items become batches; for ``load(..., batching=Batching())``.

    Callers pass single items and get single results. **An item has no batch axis**: items are stacked on a new axis 0, and
    results are split on axis 0, so the engine must take its inputs, and give all of its outputs, with the batch as their
    first dimension. A batch is launched as soon as a slot is free, with the items that wait then; while all slots are busy,
    items gather. It is padded to one of `sizes`, by repeating its last item, so that the number of graphs is bounded.

    Attributes:
        max_size: how many items a batch may have.
        max_delay: seconds that a batch which is not full may be held although a slot is free. 0 is best nearly always.
        sizes: what batches are padded to, instead of the powers of two up to `max_size` and `max_size` itself. No batch has
            more items than the largest.
        overload: what happens to an item that comes when `max_queue` items wait. "reject": it gets `QueueFullError`. "wait":
            it waits outside the queue until there is a place in it; the queue always has places for a full batch.
            "drop_oldest": the oldest item of the least urgent class gets `QueueFullError`, and the new item its place.
            "latest": like "drop_oldest", but never more than one full batch waits.
        priorities: how many classes there are. A call's ``priority=`` is 0, the most urgent, to ``priorities - 1``.
        patience: how many batches may pass over the oldest item of a class in favour of more urgent ones.
        shed: whether a call with a deadline is refused at once when, at the measured pace, its result would come too late. A
            call that finds a free slot is never refused.
        stack: False to stack nothing: inputs and results are those of a call without batching, each call runs by itself, and
            `lease` is refused. Only deadlines, priorities, `overload` and `shed` apply. `max_size` is 1 then.

    Raises:
        InputError: a value is out of range.
    """

    max_size: int = 16
    max_delay: float = 0.0
    sizes: Sequence[int] | None = None
    overload: Overload = "reject"
    priorities: int = 2
    patience: int = 8
    shed: bool = True
    stack: bool = True

    def __post_init__(self) -> None:
        for name in ("max_size", "priorities", "patience"):
            if not _is_count(getattr(self, name)):
                raise InputError(f"batching: {name} must be an integer of at least 1, got {getattr(self, name)!r}")
        delay: object = self.max_delay
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < math.inf:
            raise InputError(f"batching: max_delay must be a number of seconds of at least 0, got {delay!r}")
        if self.overload not in get_args(Overload):
            raise InputError(f"batching: overload must be one of {', '.join(get_args(Overload))}, got {self.overload!r}")
        if self.sizes is not None:
            sizes = tuple(self.sizes)
            if not sizes or not all(map(_is_count, sizes)):
                raise InputError(f"batching: sizes must be integers of at least 1, got {self.sizes!r}")
            object.__setattr__(self, "sizes", tuple(sorted(set(sizes))))  # a copy: the caller may change its list
        for name in ("shed", "stack"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"batching: {name} must be True or False, got {getattr(self, name)!r}")
        if not self.stack:
            if self.sizes is not None:
                raise InputError(f"batching: with stack=False there are no batches, and so no sizes={self.sizes!r}")
            object.__setattr__(self, "max_size", 1)


def choose_sizes(batching: Batching, least: int = 1, most: int | None = None) -> tuple[int, ...]:
    """Return the sizes that batches are padded to, ascending.

    Args:
        batching: the options.
        least: the smallest batch that the engine takes.
        most: the largest; None for no limit.

    Raises:
        InputError: the engine takes none of these.
    """
    limit = batching.max_size if most is None else min(batching.max_size, most)
    if batching.sizes is not None:
        sizes = [size for size in batching.sizes if least <= size and (most is None or size <= most)]
    else:
        limit = max(limit, least)  # smaller batches are padded up to the smallest that the engine takes
        sizes = [1 << i for i in range(limit.bit_length()) if least <= 1 << i <= limit]
        if limit not in sizes and (most is None or limit <= most):
            sizes.append(limit)
    if not sizes:
        raise InputError(
            f"batching: sizes={batching.sizes} has none that the engine takes: "
            f"batches of {least} to {'any number' if most is None else most}"
        )
    # A size above the first that holds a full batch would never be used.
    return tuple(sizes[: bisect.bisect_left(sizes, limit) + 1])


def padded(count: int, sizes: Sequence[int]) -> int:
    """Return the smallest of `sizes` that holds `count` items."""
    return sizes[bisect.bisect_left(sizes, count)]


class Entry(Protocol):
    """What the queue needs to know of an item that waits. Items are compared by identity.

    Attributes:
        group: entries whose groups are equal can be stacked.
        priority: its class.
        arrival: when it came.
        deadline: from when on its result is useless; None for never.
        due: until when it may be held back; `Queue.add` sets it.
        is_bounded: whether it counts against `max_waiting`, and may be dropped for a newer one; `Queue.add` sets it.
        place: where it waits: "queue"; "door" for outside the queue, until there is a place in it; None when it does not.
    """

    @property
    def group(self) -> Hashable:  # noqa: D102
        ...

    priority: int
    arrival: float
    deadline: float | None
    due: float
    is_bounded: bool
    place: Literal["queue", "door"] | None


E = TypeVar("E", bound=Entry)


class Plan(NamedTuple, Generic[E]):
    """What `Queue.take` decided.

    Attributes:
        items: the items of the batch, the one that it was made for first; empty for no batch.
        size: what the batch is padded to; 0 for no batch.
        expired: the items that were dropped because their deadline has passed.
        until: if there is no batch, when to call `take` again; None if a new item must come first.
    """

    items: list[E]
    size: int
    expired: list[E]
    until: float | None


class Queue(Generic[E]):
    """The entries that wait, in order.

    Args:
        batching: the options.
        sizes: what batches are padded to, ascending.
        max_waiting: how many may wait (while all slots are busy); None for no bound.
    """

    def __init__(self, batching: Batching, sizes: Sequence[int], max_waiting: int | None) -> None:
        self.sizes = tuple(sizes)
        self.limit = min(batching.max_size, self.sizes[-1])
        if batching.overload == "latest":
            max_waiting = self.limit if max_waiting is None else min(max_waiting, self.limit)
        elif batching.overload == "wait" and max_waiting is not None:
            max_waiting = max(max_waiting, self.limit)  # else entries that wait outside could never fill a batch
        self.max_waiting = max_waiting
        self._bounded = 0  # how many entries in the queue count against `max_waiting`
        self._delay = batching.max_delay
        self._overload = batching.overload
        self._queue: _Lines[E] = _Lines(batching.priorities, batching.patience)
        self._door: _Lines[E] = _Lines(batching.priorities, batching.patience)  # entries that wait for a place in the queue
        self._groups: dict[Hashable, list[OrderedDict[E, None]]] = {}

    def __len__(self) -> int:
        return self._queue.count + self._door.count

    def __iter__(self) -> Iterator[E]:
        yield from self._queue
        yield from self._door

    def ahead(self, priority: int) -> int:
        """Return how many of the entries that wait go before a new one of this class."""
        return self._queue.ahead(priority) + self._door.ahead(priority)

    @property
    def groups(self) -> int:
        """How many groups are waiting in the queue."""
        return len(self._groups)

    def add(self, entry: E, *, bounded: bool = True, spare: int = 0) -> list[E]:
        """Add a new entry; if the queue is full, `overload` says what happens.

        Args:
            entry: the entry.
            bounded: whether `max_waiting` applies to the entry, and it counts against that.
            spare: how many more entries may wait now: one for each free slot, which is about to take it.

        Returns:
            The entries that were dropped for it.

        Raises:
            OverflowError: there is no place for it. Nothing changed.
        """
        entry.is_bounded = bounded
        entry.due = entry.arrival + self._delay
        if entry.deadline is not None:
            # Half of its time is left for running: an item held until its deadline would expire while the device is idle.
            entry.due = min(entry.due, entry.arrival + max(0.0, entry.deadline - entry.arrival) / 2)
        dropped: list[E] = []
        if bounded and self._is_full(spare):
            if self._overload == "wait":
                entry.place = "door"
                self._door.add(entry)
                return dropped
            if self._overload == "reject":
                raise OverflowError
            victim = self._queue.last()
            if victim is None or victim.priority < entry.priority:
                raise OverflowError
            self._leave(victim)
            dropped.append(victim)
        self._enter(entry)
        return dropped

    def put_back(self, entry: E) -> None:
        """Let an entry that was taken wait again, as the first of its class. No bound applies."""
        entry.place = "queue"
        self._bounded += entry.is_bounded
        self._queue.add(entry)
        self._queue.move_to_front(entry)
        line = self._line(entry)
        line[entry] = None
        line.move_to_end(entry, last=False)

    def head(self, now: float, *, hold: bool = True) -> tuple[E, int] | None:
        """Return the entry that the next batch is made for, and how many entries that batch has; None for no batch now."""
        entry = self._head(now, hold)
        return None if entry is None else (entry, min(self.limit, sum(map(len, self._groups[entry.group]))))

    def remove(self, entry: E) -> None:
        """Remove `entry`, wherever it waits; nothing happens if it does not wait."""
        if entry.place == "door":
            entry.place = None
            self._door.remove(entry)
        elif entry.place == "queue":
            self._leave(entry)
            self._admit()

    def clear(self) -> list[E]:
        """Remove all entries, and return them in order."""
        everybody = list(self)
        for entry in everybody:
            entry.place = None
        self._bounded = 0
        self._queue.clear()
        self._door.clear()
        self._groups.clear()
        return everybody

    def take(self, now: float, *, is_gone: Callable[[E], bool] = lambda _: False, hold: bool = True) -> Plan[E]:
        """Choose the items of the next batch, for a slot that is free.

        Args:
            now: the time.
            is_gone: whether an entry has ended although it was not removed yet. Such entries are dropped.
            hold: whether a batch that is not full may be held back for `max_delay`.
        """
        expired: list[E] = []
        items: list[E] = []
        heads = self._queue.heads()
        while not items and (head := self._head(now, hold)) is not None:
            for entry in self._fill(head):
                self._leave(entry)
                if is_gone(entry):
                    continue
                if entry.deadline is not None and entry.deadline <= now:
                    expired.append(entry)
                else:
                    items.append(entry)
                if len(items) == self.limit:
                    break
            self._admit()
        if items:
            self._queue.served(heads)
            return Plan(items, padded(len(items), self.sizes), expired, None)
        return Plan([], 0, expired, min((entry.due for entry in self._queue), default=None))

    def _is_full(self, spare: int) -> bool:
        if self.max_waiting is None:
            return False
        others = len(self._queue) - self._bounded  # entries that do not count; they take free slots too
        return self._bounded >= self.max_waiting + max(0, spare - others)

    def _enter(self, entry: E) -> None:
        entry.place = "queue"
        self._bounded += entry.is_bounded
        self._queue.add(entry)
        self._line(entry)[entry] = None

    def _line(self, entry: E) -> OrderedDict[E, None]:
        """Return the entries of the same group and class."""
        lines = self._groups.get(entry.group)
        if lines is None:
            lines = self._groups[entry.group] = [OrderedDict() for _ in range(self._queue.classes)]
        return lines[entry.priority]

    def _leave(self, entry: E) -> None:
        entry.place = None
        self._bounded -= entry.is_bounded
        self._queue.remove(entry)
        lines = self._groups[entry.group]
        del lines[entry.priority][entry]
        if not any(lines):  # without this the groups of all shapes ever seen would stay
            del self._groups[entry.group]

    def _admit(self) -> None:
        while len(self._door) and not self._is_full(0):
            heads = self._door.heads()
            entry = next(self._door.by_turn())
            self._door.remove(entry)
            self._door.served(heads)
            self._enter(entry)

    def _head(self, now: float, hold: bool) -> E | None:
        """Return the entry that the next batch is made for."""
        held: set[Hashable] = set()
        for entry in self._queue.by_turn():
            if not hold or not self._delay or (entry.group not in held and self._is_ready(entry.group, now)):
                return entry
            held.add(entry.group)
        return None

    def _is_ready(self, group: Hashable, now: float) -> bool:
        lines = self._groups[group]
        return sum(map(len, lines)) >= self.limit or any(entry.due <= now for line in lines for entry in line)

    def _fill(self, head: E) -> Iterator[E]:
        """Yield the head and the entries of its group. Each must leave the queue before the next one is requested."""
        lines = self._groups[head.group]
        yield head  # first, whatever its class: one that has waited too long must not be crowded out of its own batch
        for line in lines:
            while line:
                yield next(iter(line))


class Pace:
    """Predicts when a new item would have its result, from how long batches take from their slot to their results.

    Under overload each item that is admitted has just enough time, so a wrong prediction means a result that comes too late,
    for which the device has worked. If batches take longer for a while, all of them do, so single batches do not show how
    wrong the average may be: a margin is learned from whole waits, one for each class, because less urgent items are
    overtaken. A wait that was longer than predicted widens the margin; any other narrows it, `_LATE` times less. So,
    whatever the distribution of times, about one wait in `_LATE` is longer than predicted, as long as the margin needed is
    within bounds (this is adaptive conformal inference, Gibbs and Candes 2021).

    A single outlier is ignored: it was a stall, or a capture. Two in a row are believed, and then nothing is predicted until
    a third agrees. Nothing is predicted while a slot is free either: items that find one show whether times have changed.

    Args:
        slots: how many batches may be under way at once.
        limit: how many items a batch may have.
        classes: how many priority classes there are.
    """

    def __init__(self, slots: int, limit: int, classes: int = 1) -> None:
        self._slots = slots
        self._limit = limit
        self._mean = 0.0
        self._margins = [_MARGIN] * classes  # one for each class, as a share of the average
        self._is_known = False  # whether the average is of times that agreed
        self._strange = 0  # outliers in a row
        self._running: dict[int, float] = {}  # when each running batch began; the oldest first
        self._begun = 0

    def begin(self, now: float) -> int:
        """Record that a batch has its slot. Returns the batch's number for `end`."""
        self._begun += 1
        self._running[self._begun] = now
        return self._begun

    def end(self, number: int, now: float | None) -> None:
        """Record that a batch's results are there at `now`; None if there will be none, and nothing is learned."""
        began = self._running.pop(number)
        if now is None:
            return
        seconds = now - began
        if self._mean / _AGREE <= seconds <= self._mean * _AGREE:
            self._is_known, self._strange = True, 0
            self._mean += _WEIGHT * (seconds - self._mean)
        elif self._mean and not self._strange:
            self._strange = 1
        else:
            self._is_known, self._strange = False, 0
            self._mean = seconds

    def seconds(self, ahead: int, free: int, now: float, priority: int = 0) -> float:
        """Return in how many seconds a new item would have its result; 0.0 if that is unknown.

        Args:
            ahead: how many items go before it.
            free: how many slots are free.
            now: the time.
            priority: the new item's class.
        """
        batches = ahead // self._limit - free  # that go before it, without those that go at once
        if batches < 0 or not self._is_known:
            return 0.0
        began = next(iter(self._running.values()), now)
        # Slots become free one after the other, spread over the time that each is busy.
        turns = 1 + batches / self._slots
        return max(began + self._mean - now, 0.0) + turns * self._mean * (1 + self._margins[priority])

    def waited(self, priority: int, *, longer: bool) -> None:
        """Record the end of a wait of this class that `seconds` had predicted, and whether it was longer than that."""
        margin = self._margins[priority] + (_STEP if longer else -_STEP / _LATE)
        self._margins[priority] = min(max(margin, 0.0), _MOST)


#: The weight of a new time in the average; and how many times longer or shorter than the average is no outlier yet.
_WEIGHT: Final = 0.1
_AGREE: Final = 4.0
#: The margin: at first; at most (with more, after a stall a few items would be admitted where many could be served); what
#: one wait that was longer than predicted adds to it; and how many other waits take that away again.
_MARGIN: Final = 0.25
_MOST: Final = 1.0
_STEP: Final = 0.02
_LATE: Final = 256


class _Lines(Generic[E]):
    """A first-come-first-served queue for each class, and the order of the classes. Entries are removed in constant time."""

    def __init__(self, classes: int, patience: int) -> None:
        self.classes = classes
        self._patience = patience
        self._lines: list[OrderedDict[E, None]] = [OrderedDict() for _ in range(classes)]
        self._passed = [0] * classes  # for each class: batches made since its oldest entry became the oldest
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[E]:
        for line in self._lines:
            yield from line

    def add(self, entry: E) -> None:
        self._lines[entry.priority][entry] = None
        self.count += 1

    def move_to_front(self, entry: E) -> None:
        self._lines[entry.priority].move_to_end(entry, last=False)

    def remove(self, entry: E) -> None:
        del self._lines[entry.priority][entry]
        self.count -= 1

    def clear(self) -> None:
        for line in self._lines:
            line.clear()
        self._passed = [0] * self.classes
        self.count = 0

    def ahead(self, priority: int) -> int:
        """Return how many entries there are of this class, and of more urgent ones."""
        return sum(map(len, self._lines[: priority + 1]))

    def last(self) -> E | None:
        """Return the entry to drop: the oldest of the least urgent class, of those that are bounded."""
        return next((entry for line in reversed(self._lines) for entry in line if entry.is_bounded), None)

    def by_turn(self) -> Iterator[E]:
        """Yield all entries, in the order in which batches are made for them."""
        overdue = [c for c, passed in enumerate(self._passed) if passed >= self._patience]
        overdue.sort(key=lambda c: -self._passed[c])
        for c in overdue:
            yield from self._lines[c]
        for c, line in enumerate(self._lines):
            if c not in overdue:
                yield from line

    def heads(self) -> list[E | None]:
        """Return the oldest entry of each class."""
        return [next(iter(line), None) for line in self._lines]

    def served(self, heads: Iterable[E | None]) -> None:
        """Record that a batch was made, before which `heads` were the oldest entries."""
        for c, (line, head) in enumerate(zip(self._lines, heads, strict=True)):
            self._passed[c] = self._passed[c] + 1 if head is not None and next(iter(line), None) is head else 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
