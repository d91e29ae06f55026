"""Who goes into the next batch: by enumeration, and against a plain model under Hypothesis."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Hashable
from typing import Any, Literal
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import aiotrt
from aiotrt.batching.queue import Batching, Entry, Pace, Queue, choose_sizes, padded


class Item:
    def __init__(self, group: Hashable, priority: int, arrival: float, deadline: float | None = None) -> None:
        self.group = group
        self.priority = priority
        self.arrival = self.due = arrival
        self.deadline = deadline
        self.is_bounded = True
        self.place: Literal["queue", "door"] | None = None


def entry(group: Hashable = "a", priority: int = 0, arrival: float = 0.0, deadline: float | None = None) -> Item:
    return Item(group, priority, arrival, deadline)


def queue(max_waiting: int | None = None, **options: Any) -> Queue[Entry]:
    batching = Batching(**options)
    return Queue(batching, choose_sizes(batching), max_waiting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_size": 0}, "max_size must be an integer of at least 1, got 0"),
        ({"max_size": True}, "max_size must be an integer"),
        ({"max_delay": -1}, "max_delay must be a number of seconds of at least 0, got -1"),
        ({"max_delay": math.nan}, "max_delay"),
        ({"max_delay": math.inf}, "max_delay"),
        ({"max_delay": "1"}, "max_delay"),
        ({"sizes": []}, "sizes must be integers"),
        ({"sizes": [2, 0]}, "sizes must be integers"),
        ({"overload": "hope"}, "overload must be one of wait, reject, drop_oldest, latest, got 'hope'"),
        ({"priorities": 0}, "priorities"),
        ({"patience": 0}, "patience"),
        ({"shed": 1}, "shed must be True or False, got 1"),
        ({"stack": None}, "stack must be True or False, got None"),
        ({"stack": False, "sizes": [1]}, "with stack=False there are no batches"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(aiotrt.InputError, match=message):
        Batching(**options)


@pytest.mark.parametrize(
    ("options", "least", "most", "sizes"),
    [
        ({}, 1, None, (1, 2, 4, 8, 16)),
        ({"max_size": 1}, 1, None, (1,)),
        ({"max_size": 6}, 1, None, (1, 2, 4, 6)),
        ({"max_size": 16}, 1, 10, (1, 2, 4, 8, 10)),
        ({"max_size": 16}, 3, None, (4, 8, 16)),
        ({"max_size": 16}, 6, 6, (6,)),  # an engine for one size of batch
        ({"max_size": 4}, 6, 6, (6,)),  # which is larger than batches shall be: they are padded
        ({"max_size": 4}, 5, None, (5,)),
        ({"sizes": [8, 1, 3, 3]}, 1, None, (1, 3, 8)),
        ({"sizes": [1, 3, 8, 32], "max_size": 4}, 1, None, (1, 3, 8)),
        ({"sizes": [1, 8, 32]}, 2, 16, (8,)),
    ],
)
def test_sizes(options: dict[str, Any], least: int, most: int | None, sizes: tuple[int, ...]) -> None:
    assert choose_sizes(Batching(**options), least, most) == sizes


def test_where_nothing_is_stacked_a_batch_is_one_item() -> None:
    assert Batching(stack=False).max_size == Batching(stack=False, max_size=8).max_size == 1


def test_an_engine_that_takes_none_of_the_sizes() -> None:
    with pytest.raises(aiotrt.InputError, match=r"sizes=\(1, 2\) has none that the engine takes: batches of 4 to 8"):
        choose_sizes(Batching(sizes=[1, 2]), 4, 8)


@given(st.integers(1, 70), st.integers(1, 12), st.one_of(st.none(), st.integers(0, 70)))
def test_sizes_hold_every_batch_and_fit_the_engine(max_size: int, least: int, more: int | None) -> None:
    most = None if more is None else least + more
    sizes = choose_sizes(Batching(max_size=max_size), least, most)
    assert sorted(set(sizes)) == list(sizes)
    assert all(least <= size and (most is None or size <= most) for size in sizes)
    assert sizes[-1] >= min(max_size, most or max_size)
    assert len(sizes) <= 8  # however large: the number of graphs is bounded
    for count in range(1, sizes[-1] + 1):
        assert padded(count, sizes) == min(size for size in sizes if size >= count)


def test_first_come_first_served_between_groups() -> None:
    q = queue(max_size=2)
    items = [entry(group) for group in "abacbb"]
    for item in items:
        q.add(item)
    a, b, a2, c, b2, b3 = items
    assert [q.take(0.0).items for _ in range(5)] == [[a, a2], [b, b2], [c], [b3], []]
    assert q.groups == 0


def test_urgent_ones_first_and_the_rest_of_the_batch_is_for_anybody() -> None:
    q = queue(max_size=3)
    slow, other, urgent = entry("a", 1), entry("b", 1), entry("a", 0)
    for item in (slow, other, urgent):
        q.add(item)
    plan = q.take(0.0)
    assert (plan.items, plan.size) == ([urgent, slow], 2)
    assert q.take(0.0).items == [other]


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("same_group", [True, False])
def test_no_class_starves(patience: int, classes: int, same_group: bool) -> None:
    """Under any load of more urgent ones, the oldest of a class is passed over at most `patience` times and a few."""
    q = queue(max_size=2, priorities=classes, patience=patience)
    tail = [entry("t", classes - 1) for _ in range(3)]
    for item in tail:
        q.add(item)
    batches = 0
    waited = []
    while any(item.place for item in tail):
        for priority, _ in itertools.product(range(classes - 1), range(4)):
            q.add(entry("t" if same_group else priority, priority))
        before = {id(item) for item in tail if item.place}
        taken = q.take(0.0).items
        batches += 1
        if before - {id(item) for item in tail if item.place}:
            assert taken[0] in tail or same_group
            waited.append(batches)
            batches = 0
        assert batches <= patience + classes
    assert max(waited) <= patience + classes


def test_the_gone_and_the_expired_are_dropped_at_assembly() -> None:
    q = queue(max_size=2)
    items = [entry(deadline=deadline) for deadline in (None, 1.0, 2.0, None, 1.0, None)]
    for item in items:
        q.add(item)
    q.remove(items[3])
    plan = q.take(1.0, is_gone=lambda item: item is items[0])
    assert plan.items == [items[2], items[5]]
    assert plan.expired == [items[1], items[4]]
    assert len(q) == 0
    assert q.take(1.0) == ([], 0, [], None)


def test_a_batch_of_expired_ones_only_is_none() -> None:
    q = queue()
    items = [entry(deadline=1.0), entry("b", deadline=1.0)]
    for item in items:
        q.add(item)
    assert q.take(1.0) == ([], 0, items, None)


def test_max_delay_holds_a_batch_that_is_not_full() -> None:
    q = queue(max_size=2, max_delay=1.0)
    first, other = entry("a", arrival=0.0), entry("b", arrival=0.25)
    q.add(first)
    q.add(other)
    assert q.take(0.5) == ([], 0, [], 1.0)
    second = entry("b", arrival=0.75)
    q.add(second)
    assert q.take(0.75).items == [other, second], "a full one need not wait for one that is held"
    assert q.take(0.75).until == 1.0
    assert q.take(1.0).items == [first]
    q.add(entry(arrival=2.0))
    assert q.take(2.0, hold=False).items, "nothing is held when the model is closing"


def test_max_delay_leaves_half_of_the_time_to_the_deadline_for_running() -> None:
    q = queue(max_delay=1.0)
    q.add(entry(arrival=0.0, deadline=0.5))
    assert q.take(0.0).until == 0.25
    assert q.take(0.25).items


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_reject(spare: int) -> None:
    q = queue(2, overload="reject")
    for _ in range(2 + spare):
        assert q.add(entry(), spare=spare) == []
    late = entry()
    with pytest.raises(OverflowError):
        q.add(late, spare=spare)
    assert late.place is None
    assert len(q) == 2 + spare
    q.add(late, bounded=False)
    assert len(q) == 3 + spare


@pytest.mark.parametrize("overload", ["reject", "drop_oldest", "latest", "wait"])
def test_who_is_not_bounded_neither_counts_nor_makes_way(overload: Any) -> None:
    q = queue(2, overload=overload, max_size=2)
    others = [entry(priority=1) for _ in range(5)]
    first, second, third = entry(), entry(), entry()
    for item in (*others, first, second):
        assert q.add(item, bounded=item not in others) == []
        assert item.place == "queue"
    if overload == "wait":
        assert q.add(third) == []
        q.remove(others.pop())
        assert [item.place for item in q][-1] == "door"
        q.remove(first)
        assert [item.place for item in q][-1] == "queue"
    elif overload == "reject":
        with pytest.raises(OverflowError):
            q.add(third)
    else:
        assert q.add(third) == [first]
    assert all(other.place == "queue" for other in others)
    q.clear()
    for bounded in (False, False, False, True, True):
        assert q.add(entry(), bounded=bounded) == []
    assert [item.place for item in q] == ["queue"] * 5


def test_a_free_slot_is_for_those_who_are_not_bounded_too() -> None:
    q = queue(0, overload="reject", max_size=1)
    q.add(entry(), bounded=False)
    assert q.add(entry(), spare=2) == []
    with pytest.raises(OverflowError):  # one slot is left, and there is one who came before
        q.add(entry(), spare=2)


def test_drop_oldest_drops_the_oldest_of_the_least_urgent() -> None:
    q = queue(3, overload="drop_oldest")
    urgent, old, young = entry(priority=0), entry(priority=1), entry(priority=1)
    for item in (urgent, old, young):
        q.add(item)
    assert q.add(entry(priority=1)) == [old]
    assert old.place is None
    assert q.add(entry(priority=0)) == [young]
    for _ in range(1):
        q.add(entry(priority=0))
    with pytest.raises(OverflowError):
        q.add(entry(priority=1))
    assert q.add(entry(priority=0)) == [urgent]


def test_latest_keeps_the_next_batch_and_no_more() -> None:
    q = queue(100, overload="latest", max_size=2)
    items = [entry(arrival=i) for i in range(5)]
    assert [q.add(item) for item in items] == [[], [], [items[0]], [items[1]], [items[2]]]
    assert q.take(9.0).items == items[3:]


def test_wait_lets_in_by_class_and_in_order() -> None:
    q = queue(1, overload="wait", max_size=2)
    inside, later, urgent = [entry(), entry()], entry(priority=1), entry(priority=0)
    for item in (*inside, later, urgent):
        q.add(item)
    assert [item.place for item in (*inside, later, urgent)] == ["queue", "queue", "door", "door"]
    q.remove(inside[0])
    assert (later.place, urgent.place) == ("door", "queue")
    assert q.take(0.0).items == [inside[1], urgent]
    assert q.take(0.0).items == [later]


def test_who_leaves_the_door_is_gone_and_leaves_once() -> None:
    q = queue(1, overload="wait", max_size=1)
    inside, leaves, stays = entry(), entry(), entry()
    for item in (inside, leaves, stays):
        q.add(item)
    for _ in range(2):
        q.remove(leaves)
        assert leaves.place is None
        assert list(q) == [inside, stays]
    assert [q.take(0.0).items for _ in range(3)] == [[inside], [stays], []]


def test_no_class_starves_at_the_door() -> None:
    q = queue(1, overload="wait", max_size=1, patience=2)
    patient = entry(priority=1)
    for item in (entry(), patient, *[entry() for _ in range(10)]):
        q.add(item)
    for passed in range(4):
        assert patient.place == "door", passed
        q.take(0.0)
        if passed == 2:
            break
    assert patient.place == "queue"


def test_a_queue_that_was_cleared_is_as_new() -> None:
    q = queue(2, overload="wait", max_size=1, patience=1)
    for _ in range(2):
        items = [entry("a", 1), entry("b", 0), entry("c", 1), entry("d", 0)]
        for item in items:
            q.add(item)
        assert [item.place for item in items] == ["queue", "queue", "door", "door"]
        assert q.take(0.0).items == [items[1]], "nobody has been passed over yet"
        left = [item for item in items if item.place]
        assert sorted(map(id, q.clear())) == sorted(map(id, left))
        assert (len(q), list(q), q.groups) == (0, [], 0)
        assert not any(item.place for item in items)


def test_a_group_that_is_held_back_is_looked_at_once() -> None:
    q = queue(max_size=64, max_delay=1.0)
    for _ in range(50):
        q.add(entry())
    with mock.patch.object(Queue, "_is_ready", autospec=True, side_effect=Queue._is_ready) as looked:
        assert q.take(0.5).items == []
    assert looked.call_count == 1


def test_ten_thousand_shapes_leave_nothing_behind() -> None:
    q = queue(max_size=4)
    items = [entry(i % 2500) for i in range(10_000)]
    for item in items:
        q.add(item)
    for item in items[::3]:
        q.remove(item)
    while q.take(0.0).items:
        pass
    assert (len(q), q.groups, list(q)) == (0, 0, [])


@pytest.mark.parametrize("bounded", [True, False])
def test_who_is_put_back_is_the_first_of_its_class_and_counts_as_before(bounded: bool) -> None:
    q = queue(max_waiting=4, max_size=2)
    first, second, other, third = entry("a"), entry("a"), entry("b"), entry("a")
    for item in (first, second, other, third):
        q.add(item, bounded=bounded)
    assert q.take(0.0).items == [first, second]
    q.put_back(second)
    q.put_back(first)
    assert (list(q), q.groups, first.place) == ([first, second, other, third], 2, "queue")
    if bounded:
        with pytest.raises(OverflowError):
            q.add(entry("a"))
    else:
        q.add(last := entry("a"))
        q.remove(last)
    assert [q.take(0.0).items for _ in range(3)] == [[first, second], [other], [third]]
    assert (len(q), q.groups, q._bounded) == (0, 0, 0)


def test_a_group_of_its_own_can_be_put_back() -> None:
    q = queue(max_size=2)
    only = entry("a")
    q.add(only)
    assert q.take(0.0).items == [only]
    assert q.groups == 0
    q.put_back(only)
    assert q.take(0.0).items == [only]


class QueueMachine(RuleBasedStateMachine):
    """The queue against plain lists."""

    @initialize(
        max_size=st.integers(1, 4),
        overload=st.sampled_from(["wait", "reject", "drop_oldest", "latest"]),
        bound=st.one_of(st.none(), st.integers(0, 6)),
        delay=st.sampled_from([0.0, 2.0]),
        classes=st.integers(1, 3),
        patience=st.integers(1, 4),
    )
    def begin(self, max_size: int, overload: Any, bound: int | None, delay: float, classes: int, patience: int) -> None:
        self.options = Batching(
            max_size=max_size, overload=overload, max_delay=delay, priorities=classes, patience=patience
        )  # fmt: skip
        self.queue: Queue[Entry] = Queue(self.options, choose_sizes(self.options), bound)
        self.now = 0.0
        self.waiting: list[Entry] = []
        self.gone: set[int] = set()
        self.passed: dict[int, int] = {}

    @rule(
        group=st.integers(0, 2),
        priority=st.integers(0, 2),
        deadline=st.one_of(st.none(), st.integers(0, 6)),
        bounded=st.booleans(),
    )
    def add(self, group: int, priority: int, deadline: int | None, bounded: bool) -> None:
        item = entry(
            group, min(priority, self.options.priorities - 1), self.now, None if deadline is None else self.now + deadline
        )
        inside = [other for other in self.waiting if other.place == "queue" and other.is_bounded]
        bound = self.queue.max_waiting
        try:
            dropped = self.queue.add(item, bounded=bounded)
        except OverflowError:
            assert bounded
            assert bound is not None
            assert len(inside) >= bound
            assert self.options.overload != "wait"
            return
        self.waiting.append(item)
        for victim in dropped:
            assert self.options.overload in ("drop_oldest", "latest")
            worst = max(other.priority for other in inside)
            assert victim is next(other for other in inside if other.priority == worst), "the oldest of the least urgent"
            assert victim.priority >= item.priority
            self.waiting.remove(victim)

    @rule(pick=st.integers(0, 50))
    def remove(self, pick: int) -> None:
        if self.waiting:
            self.queue.remove(self.waiting.pop(pick % len(self.waiting)))

    @rule(pick=st.integers(0, 50))
    def go(self, pick: int) -> None:
        """Cancelled, and nobody has removed it yet."""
        if self.waiting:
            self.gone.add(id(self.waiting[pick % len(self.waiting)]))

    @rule(seconds=st.integers(0, 3))
    def later(self, seconds: int) -> None:
        self.now += seconds

    @rule(hold=st.booleans())
    def take(self, hold: bool) -> None:
        before = list(self.waiting)
        heads = self.heads()
        plan = self.queue.take(self.now, is_gone=lambda item: id(item) in self.gone, hold=hold)
        self.waiting = [item for item in before if item.place is not None]
        left = [item for item in before if item.place is None]
        assert {id(item) for item in left} >= {id(item) for item in (*plan.items, *plan.expired)}
        assert len({id(item) for item in plan.items}) == len(plan.items) <= self.options.max_size
        assert len({item.group for item in plan.items}) <= 1
        for item in left:
            expired = item.deadline is not None and item.deadline <= self.now
            if id(item) in self.gone:
                assert item not in plan.items
                assert item not in plan.expired
            elif expired:
                assert item in plan.expired
                assert item not in plan.items
            else:
                assert item in plan.items
                assert item not in plan.expired
        if not plan.items:
            assert plan.size == 0
            if not hold or self.options.max_delay == 0:
                assert not self.waiting, "a free slot, and somebody who waits"
            elif self.waiting:
                assert plan.until is not None
                assert plan.until > self.now
            return
        assert plan.size == padded(len(plan.items), self.queue.sizes)
        inside = [item for item in before if item in plan.items or item.place == "queue"]
        for one in plan.items[1:]:  # within a class and group, who came first goes first
            for other in inside:
                if other.place and (other.group, other.priority) == (one.group, one.priority):
                    assert before.index(other) > before.index(one) or other.place != "queue" or one.arrival <= other.arrival
        for priority, head in heads.items():
            self.passed[priority] = self.passed.get(priority, 0) + 1 if head.place == "queue" else 0
            if self.options.max_delay == 0 and hold is False:
                assert self.passed[priority] <= self.options.patience + self.options.priorities

    def heads(self) -> dict[int, Entry]:
        heads: dict[int, Entry] = {}
        for item in self.queue:
            if item.place == "queue":
                heads.setdefault(item.priority, item)
        return heads

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert {id(item) for item in self.queue} == {id(item) for item in self.waiting}
        assert len(self.queue) == len(self.waiting)
        inside = [item for item in self.waiting if item.place == "queue"]
        assert self.queue.groups == len({item.group for item in inside})
        bound = self.queue.max_waiting
        counted = sum(item.is_bounded for item in inside)
        assert self.queue._bounded == counted
        if bound is not None:
            assert counted <= bound
            if counted < bound:
                assert all(item.place == "queue" for item in self.waiting), "at the door, and there is a place"


QueueMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase


# --- shedding -----------------------------------------------------------------------------------------------------------


def test_the_queue_says_who_goes_before() -> None:
    line = queue(max_waiting=2, max_size=2, overload="wait", priorities=3)
    for priority in (1, 0, 2, 1, 1):
        line.add(entry(priority=priority))
    assert len(line) == 5, "two in the queue, and three at the door"
    assert [line.ahead(priority) for priority in range(3)] == [1, 4, 5]


def paced(slots: int, limit: int, *seconds: float) -> Pace:
    """Batches have taken this long, one after the other; it is now 0.0, and all slots have just been taken."""
    pace = Pace(slots, limit)
    for long in seconds:
        pace.end(pace.begin(-long), 0.0)
    for _ in range(slots):
        pace.begin(0.0)
    return pace


def test_a_result_is_expected_after_those_before_it() -> None:
    pace = paced(1, 4, *[0.1] * 200)
    for _ in range(20000):
        pace.waited(0, longer=False)
    assert pace.seconds(0, 0, 0.0) == pytest.approx(0.2), "the batch on the device, and its own"
    assert pace.seconds(3, 0, 0.04) == pytest.approx(0.16), "likewise, some time later"
    assert pace.seconds(4, 0, 0.0) == pytest.approx(0.3), "and one more before it"
    assert pace.seconds(0, 0, 5.0) == pytest.approx(0.1), "what is late may be there any moment"


def test_several_slots_become_free_in_turn() -> None:
    pace = paced(4, 1, *[0.1] * 200)
    expected = [0.1 + turns * 0.125 for turns in (1, 1.25, 2)]  # a quarter is the margin at first
    assert [pace.seconds(ahead, 0, 0.0) for ahead in (0, 1, 4)] == pytest.approx(expected)


def test_waits_that_were_longer_than_was_said_are_allowed_for() -> None:
    pace = paced(1, 1, *[0.1] * 200)
    before = pace.seconds(4, 0, 0.0)
    pace.waited(0, longer=True)
    after = pace.seconds(4, 0, 0.0)
    assert after == pytest.approx(before + 5 * 0.1 * 0.02), "a little, for each batch until then"
    for _ in range(256):
        assert pace.seconds(4, 0, 0.0) > before
        pace.waited(0, longer=False)
    assert pace.seconds(4, 0, 0.0) == pytest.approx(before), "so many that were not take it back"


@pytest.mark.parametrize(("longer", "each"), [(True, 0.2), (False, 0.1)])
def test_the_margin_has_bounds(longer: bool, each: float) -> None:
    pace = paced(1, 1, *[0.1] * 200)
    for _ in range(20000):
        pace.waited(0, longer=longer)
    assert pace.seconds(9, 0, 0.0) == pytest.approx(0.1 + 10 * each)
    pace.waited(0, longer=not longer)
    assert pace.seconds(9, 0, 0.0) != pytest.approx(0.1 + 10 * each), "and none of that is to be worked off first"


def test_each_class_has_a_margin_of_its_own() -> None:
    """Who is less urgent is overtaken: it must not be the urgent ones who are refused for it."""
    pace = Pace(1, 1, 2)
    for _ in range(3):
        pace.end(pace.begin(0.0), 0.1)
    pace.waited(1, longer=True)
    assert [pace.seconds(4, 0, 0.0, priority) for priority in (0, 1)] == pytest.approx([0.1 + 5 * 0.125, 0.1 + 5 * 0.127])


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("together", [1, 8, 40])
def test_whatever_waits_are_like_few_are_longer_than_was_said(spread: float, together: int) -> None:
    """One in 256, in the long run, though those of `together` are as wrong as each other."""
    choose, pace = random.Random(2), paced(1, 1, *[0.1] * 200)
    count = longer = 0
    while count < 400_000:
        took = 0.5 * choose.lognormvariate(0.05, spread)
        for _ in range(together):
            late = took > pace.seconds(4, 0, 0.1)  # the one on the device is about to end
            pace.waited(0, longer=late)
            count += 1
            longer += late
    assert 0.5 / 256 < longer / count < 1.5 / 256


def test_who_finds_a_free_slot_is_always_admitted() -> None:
    pace = Pace(2, 4)
    for _ in range(2):
        pace.end(pace.begin(0.0), 9.0)
    assert [pace.seconds(ahead, 2, 0.0) for ahead in (0, 3, 4, 7)] == [0.0] * 4
    assert pace.seconds(8, 2, 0.0) > 11.0


@pytest.mark.parametrize("times", [(), (0.1,), (3.0, 0.1), (3.0, 0.1, 0.1), (0.1, 0.1, 5.0, 5.0), (5.0, 5.0, 0.1, 0.1)])
def test_nothing_is_expected_before_two_times_agree(times: tuple[float, ...]) -> None:
    """In the beginning, after a capture, and after a change."""
    assert paced(1, 1, *times).seconds(1000, 0, 0.0) == 0.0


@pytest.mark.parametrize("strange", [0.001, 5.0])
def test_one_time_that_is_out_of_the_way_is_not_believed(strange: float) -> None:
    usual = paced(1, 1, 0.1, 0.1, 0.1).seconds(3, 0, 0.0)
    assert paced(1, 1, 0.1, 0.1, strange, 0.1).seconds(3, 0, 0.0) == pytest.approx(usual)
    assert paced(1, 1, 0.1, 0.1, 0.1, strange).seconds(3, 0, 0.0) == pytest.approx(usual)


def test_a_batch_that_failed_teaches_nothing_and_is_over() -> None:
    pace = paced(1, 1, 0.1, 0.1)
    before = pace.seconds(0, 0, 0.0)
    pace.end(3, None)
    assert pace.seconds(0, 0, 0.0) == before
    assert not pace._running


@pytest.mark.parametrize("change", [0.2, 0.6, 1.6, 5.0])
def test_the_pace_follows_a_change(change: float) -> None:
    pace = paced(1, 1, *[0.1] * 50)
    for _ in range(40):
        pace.end(pace.begin(0.0), 0.1 * change)
    assert pace._mean == pytest.approx(0.1 * change, rel=0.02)
    assert pace._is_known


def offered(
    load: float, deadline: float, *, slots: int, limit: int, shed: bool, spread: float = 0.03, phases: float = 0.0
) -> dict[str, float]:
    """What becomes of items that come at `load` times what a device can do, in times of what it can do.

    The device does one batch after the other, each in about 10 ms, of which the logarithms have that `spread`; besides, for
    20 to 80 ms at a time they all take longer or shorter by up to `phases`. Ten seconds are played, after one in which the
    pace is found out.
    """
    choose = random.Random(1)
    line, pace = queue(4096, max_size=limit), Pace(slots, limit)
    rate = limit / 0.01
    outcomes = {"in time": 0, "too late": 0, "refused": 0, "expired": 0}
    free, device = slots, 0.0
    until, phase = 0.0, 1.0
    expected: dict[Entry, float] = {}
    events: list[tuple[float, int, tuple[int, list[Entry]] | None]] = [(0.0, 0, None)]
    for number in itertools.count(1):
        if not events:
            break
        now, _, done = heapq.heappop(events)
        if done is not None:
            free += 1
            pace.end(done[0], now)
            for one in done[1]:
                assert one.deadline is not None
                outcomes["in time" if now <= one.deadline else "too late"] += one.arrival >= 1
                if one in expected:
                    pace.waited(0, longer=now > expected.pop(one))
        else:
            if now < 11:
                heapq.heappush(events, (now + choose.expovariate(rate * load), number, None))
            seconds = pace.seconds(line.ahead(0), free, now)
            if shed and seconds > deadline:
                outcomes["refused"] += now >= 1
            else:
                one = entry(arrival=now, deadline=now + deadline)
                line.add(one, spare=free)
                if seconds:
                    expected[one] = now + seconds
        while free and len(line):
            plan = line.take(now)
            for one in plan.expired:
                outcomes["expired"] += one.arrival >= 1
                if expected.pop(one, None):
                    pace.waited(0, longer=True)
            if plan.items:
                free -= 1
                if device >= until:
                    until, phase = device + choose.uniform(0.02, 0.08), choose.uniform(1 - phases, 1 + phases)
                device = max(device, now) + 0.01 * phase * choose.lognormvariate(0, spread)
                heapq.heappush(events, (device, -number, (pace.begin(now), plan.items)))
    return {name: count / (10 * rate) for name, count in outcomes.items()}


@pytest.mark.parametrize(
    ("slots", "limit", "deadline"), [(1, 4, 0.1), (1, 16, 0.05), (2, 4, 0.1), (2, 8, 0.05), (4, 1, 0.1)]
)
@pytest.mark.parametrize("load", [2.0, 5.0])
def test_under_overload_those_let_in_are_in_time(slots: int, limit: int, deadline: float, load: float) -> None:
    found = offered(load, deadline, slots=slots, limit=limit, shed=True)
    assert found["in time"] > 0.97
    assert found["too late"] + found["expired"] < 0.03
    # Without it the device is as busy, with what is too late already when it is done.
    assert offered(load, deadline, slots=slots, limit=limit, shed=False)["in time"] < 0.1


@pytest.mark.parametrize("slots", [1, 2])
def test_under_overload_where_times_vary_much_most_of_what_is_done_is_in_time(slots: int) -> None:
    found = offered(2.0, 0.1, slots=slots, limit=4, shed=True, spread=0.35)  # two of three within 7 to 14 ms
    assert found["in time"] > 0.9
    assert found["too late"] + found["expired"] < 0.03


@pytest.mark.parametrize("deadline", [0.06, 0.1])
@pytest.mark.parametrize("load", [2.0, 5.0])
def test_under_overload_in_phases_those_let_in_are_in_time(load: float, deadline: float) -> None:
    """What is wrong for one batch is wrong for the next, and so adds up over those that one waits for."""
    found = offered(load, deadline, slots=1, limit=8, shed=True, phases=0.15)
    assert found["in time"] > 0.95
    assert found["too late"] + found["expired"] < 0.01 * found["in time"]


def test_below_capacity_nobody_is_refused() -> None:
    found = offered(0.7, 0.1, slots=2, limit=8, shed=True)
    assert found["refused"] == found["too late"] == found["expired"] == 0
