"""All orders of events at the slot machine alone: equal states are gone on from once, so ways are counted and not run."""

from __future__ import annotations

from typing import Any

from aiotrt.runtime.slots import TABLE, Grant, Slots, State
from aiotrt.runtime.slots import Event as Move

__all__ = ["line"]


def line(requests: int) -> dict[str, int]:
    """All ways in which two slots can serve some requests that come in any order, hold, let go, give up and lose a slot.

    Returns:
        How many ways there are, and how many states and steps were looked at to count them.
    """
    ways: dict[Any, int] = {}
    steps = 0

    def go(slots: Slots, phase: tuple[str, ...], moves: tuple[int, ...]) -> int:
        nonlocal steps
        key = tuple(slots.states), tuple(slots._free), tuple(_standing(slots)), phase, moves
        if key in ways:
            return ways[key]
        total = 0
        for what in _possible(slots, phase, moves):
            steps += 1
            total += go(*_after(slots, phase, moves, what))
        ways[key] = total or 1  # nothing is left to happen: one way has ended
        if not total:
            assert not slots.waiting or all(state is State.BROKEN for state in slots.states), "they wait for ever"
        return ways[key]

    total = go(Slots(2), ("away",) * requests, (0,) * requests)
    return {"ways": total, "states": len(ways), "steps": steps}


def _standing(slots: Slots) -> list[int]:
    return list(slots._queue)


def _possible(slots: Slots, phase: tuple[str, ...], moves: tuple[int, ...]) -> list[tuple[str, int, Move | None]]:
    found: list[tuple[str, int, Move | None]] = []
    for i, where in enumerate(phase):
        if where == "away":
            found.append(("come", i, None))
        elif where == "in line":
            found.append(("leave", i, None))
        elif where.startswith("slot"):
            state = slots.states[int(where[4:])]
            for move in TABLE[state]:
                again = move in (Move.LAUNCH, Move.PREPARE)
                if not again or moves[i] < 2:  # who launches for ever is no other case than who launches twice
                    found.append(("move", i, move))
    return found


def _after(
    slots: Slots, phase: tuple[str, ...], moves: tuple[int, ...], what: tuple[str, int, Move | None]
) -> tuple[Slots, tuple[str, ...], tuple[int, ...]]:
    kind, i, move = what
    slots = _copied(slots)
    where, count = list(phase), list(moves)
    waiting = _standing(slots)
    grant: Grant | None = None
    if kind == "come":
        grant = slots.request(i)
        where[i] = "in line"
        assert grant is None or not waiting, "served before those who wait"
        waiting.append(i)
    elif kind == "leave":
        slots.withdraw(i)
        where[i] = "gone"
    else:
        assert move is not None
        slot = int(phase[i][4:])
        grant = slots.move(slot, move)
        count[i] += move in (Move.LAUNCH, Move.PREPARE)
        if grant is not None or slots.states[slot] in (State.FREE, State.BROKEN):
            where[i] = "gone"
            count[i] = 0
    if grant is not None:
        assert grant.ticket == waiting[0], "somebody jumped the line"
        where[grant.ticket] = f"slot{grant.slot}"
    owners = [w for w in where if w.startswith("slot")]
    taken = [state for state in slots.states if state not in (State.FREE, State.BROKEN)]
    assert len(set(owners)) == len(owners) == len(taken), "a slot with two owners, or with none"
    assert not (slots.waiting and State.FREE in slots.states), "somebody waits, and a slot is free"
    assert slots.waiting == where.count("in line"), "the line is not who waits in it"
    return slots, tuple(where), tuple(count)


def _copied(slots: Slots) -> Slots:
    other: Slots = Slots(len(slots.states), slots.max_waiting)
    other.states = list(slots.states)
    other._free = list(slots._free)
    for ticket in _standing(slots):
        other._queue[ticket] = True
    other._counted = len(other._queue)
    return other
