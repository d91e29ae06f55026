"""Mutants that nothing finds, and why: see `mutants`.

By file, function, change and the how manieth of those that are alike there, counted from 0.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EQUIVALENT"]

STOPS: Final = "any number that is not above zero means no spinning"
AS_LONG: Final = "whether a sleep of exactly the shortest is one makes no difference"
EITHER: Final = "of two that are equal, either will do"
ANY: Final = "set before it is read"

EQUIVALENT: Final[dict[tuple[str, str, str, int], str]] = {
    (
        "slots.py",
        "Line.leave",
        (
            "len(self._gone) * 2 > len(self._tickets) -> len(self._gone) * 2 >= len(self._tickets)"
            ", in: if len(self._gone) * 2 > len(self._tickets):"
        ),
        0,
    ): "when to sweep: a ticket earlier is no worse",
    ("prediction.py", "Lateness.__init__", "1 -> 2, in: buckets = len(SLEEPS) + 1", 0): "one bucket that is never used",
    ("slots.py", "Slots.request", "at > 0 -> at >= 0, in: if at > 0:", 0): "looks for the best of one",
    ("slots.py", "Slots.request", "0 -> -1, in: if at > 0:", 0): "looks for the best of one",
    (
        "slots.py",
        "Slots.request",
        "1 -> 2, in: at = next((i for i in range(at, -1, -1) if self._free[i] in prefer), at)",
        0,
    ): ("looks once more at the last slot in the list, which it has looked at first"),
    (
        "prediction.py",
        "Estimate.between",
        "0.0 -> -1.0, in: if self.seconds == 0.0 or not (was_trusted or self.is_trusted):",
        0,
    ): ("an estimate of nothing is never trusted"),
    (
        "prediction.py",
        "Estimate.between",
        (
            "seconds < self.seconds -> seconds <= self.seconds"
            ", in: self.seconds += (0.3 if seconds < self.seconds else 0.1) * (seconds - self.seconds)"
        ),
        0,
    ): "a share of nothing",
    (
        "prediction.py",
        "Estimate.at_most",
        "seconds < self.seconds -> seconds <= self.seconds, in: if seconds < self.seconds:",
        0,
    ): EITHER,
    (
        "prediction.py",
        "Estimate._see",
        "seconds < self._since -> seconds <= self._since, in: if seconds < self._since:",
        0,
    ): EITHER,
    (
        "prediction.py",
        "Estimate.at_most",
        "4 -> 5, in: self._shorter = min(self._shorter + 1, 4)",
        0,
    ): "the step is at its bound before",
    ("poller.py", "_Pending.__init__", "0.0 -> -1.0, in: self.looked = 0.0", 0): ANY,
    ("poller.py", "Hub.__init__", "0.0 -> 1.0, in: self._slept = 0.0", 0): ANY,
    ("poller.py", "Hub.__init__", "0.0 -> -1.0, in: self._slept = 0.0", 0): ANY,
    (
        "poller.py",
        "Hub._poll",
        "self._clock() - now > TURN -> self._clock() - now >= TURN, in: if number and self._clock() - now > TURN:",
        0,
    ): "whether just so long is too long makes no difference",
    (
        "poller.py",
        "Hub._poll",
        "later - now > TURN -> later - now >= TURN, in: self._arm(later, was_long=later - now > TURN)",
        0,
    ): "whether just so long is too long makes no difference",
    (
        "poller.py",
        "Hub._arm",
        (
            "0.0 -> -1.0, in: self._soon = self._loop.call_later(0.0, self._spin_once) if was_long else "
            "self._loop.call_soon(self._spin_once)"
        ),
        0,
    ): "what was due a second ago is due now",
    (
        "poller.py",
        "Hub._look",
        "started < lane.last_done -> started <= lane.last_done, in: if started < lane.last_done:",
        0,
    ): EITHER,
    (
        "poller.py",
        "Hub._look",
        (
            "0.0 < estimate.seconds < ran -> 0.0 < estimate.seconds <= ran"
            ", in: lane.late = ran - estimate.seconds if 0.0 < estimate.seconds < ran else 0.0"
        ),
        0,
    ): "what ran for just as long as estimated is late by nothing, both ways",
    (
        "poller.py",
        "Hub._first_look",
        ("0.0 -> -1.0, in: return next_look(now, now, now, self._spin if self.progress is PREDICT else 0.0)"),
        0,
    ): STOPS,
    (
        "poller.py",
        "Hub._next_look",
        ("now < predicted -> now <= predicted, in: if head.looks == 1 and now < predicted and (not self._spin):"),
        0,
    ): "at the predicted time both say the same",
    ("poller.py", "Hub._next_look", "0.0 -> -1.0, in: return next_look(now, started, started, 0.0)", 0): STOPS,
    ("poller.py", "Hub._next_look", "0.0 -> -1.0, in: return min(aim, next_look(now, started, started, 0.0))", 0): STOPS,
    (
        "poller.py",
        "Hub._next_look",
        "aim > now + SHORTEST_SLEEP -> aim >= now + SHORTEST_SLEEP, in: if aim > now + SHORTEST_SLEEP:",
        0,
    ): AS_LONG,
    (
        "poller.py",
        "Hub._next_look",
        "aim > now + SHORTEST_SLEEP -> aim >= now + SHORTEST_SLEEP, in: if aim > now + SHORTEST_SLEEP:",
        1,
    ): AS_LONG,
    ("poller.py", "Hub._next_look", "0.0 -> -1.0, in: return max(predicted, next_look(now, now, now, 0.0))", 0): STOPS,
    (
        "poller.py",
        "_patrol",
        (
            "0.0 -> -1.0, in: return min(now + PATROL, max(started + head.stalled + head.hang_timeout, "
            "next_look(now, started, started, 0.0)))"
        ),
        0,
    ): STOPS,
    ("executor.py", "Executor.__init__", "1 -> 2, in: self._workers = self.device.workers(slots + 1)", 0): (
        "how many threads there are is nobody's promise: more of them cost, and with fewer some jobs wait"
    ),
    ("executor.py", "Executor.__init__", "1 -> 0, in: self._workers = self.device.workers(slots + 1)", 0): (
        "how many threads there are is nobody's promise: more of them cost, and with fewer some jobs wait"
    ),
    (
        "executor.py",
        "Executor._enter",
        (
            "len(self.slots) > 1 -> len(self.slots) >= 1"
            ", in: prefer = self.cache.holders(request.key) if len(self.slots) > 1 else ()"
        ),
        0,
    ): "looks for the best of one",
    (
        "executor.py",
        "Executor._enter",
        ("1 -> 0, in: prefer = self.cache.holders(request.key) if len(self.slots) > 1 else ()"),
        0,
    ): "looks for the best of one",
    (
        "executor.py",
        "Executor.launched",
        "slot.launches += 1 -> slot.launches -= 1",
        0,
    ): "launches are told apart by equality",
    (
        "executor.py",
        "Executor.__init__",
        "1 -> 0, in: self._overlap = overlap or slots == 1",
        0,
    ): "one slot's launches are in order anyway: it only costs more to say so",
    (
        "executor.py",
        "Executor.submit",
        "True -> False, in: for argument, spec in zip(arguments, specs, strict=True):",
        0,
    ): "there is an argument for each, as `parse` has checked",
    ("executor.py", "Executor.launched", "1 -> 2, in: slot.launches += 1", 0): "launches are told apart by equality",
    ("executor.py", "_count_fork", "_forks += 1 -> _forks -= 1", 0): "only whether it is another number counts",
    ("executor.py", "_count_fork", "1 -> 2, in: _forks += 1", 0): "only whether it is another number counts",
}
