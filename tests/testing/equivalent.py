# ruff: noqa: E501
"""Mutants that nothing finds, and why: see `mutants`.

By file, function, change and the how manieth of those that are alike there, counted from 0.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EQUIVALENT"]

STOPS: Final = "any number that is not above zero means no spinning"
AS_LONG: Final = "whether a sleep of exactly the shortest is one makes no difference"
TOO_LONG: Final = "whether just so long is too long makes no difference"
PAST: Final = "what was due a moment ago is due now"
AGAIN: Final = "looks once more at the last slot in the list, which it has looked at first"
SAVES: Final = "saves calls of `_next_poll`, which says the same"
EITHER: Final = "of two that are equal, either will do"
ENDS: Final = "an error ends it, whatever is said of completion"
ANY: Final = "set before it is read"
JUST: Final = "at just this size both ways are as good"
HUNG: Final = "saves a call of `_hung`, which decides"

EQUIVALENT: Final[dict[tuple[str, str, str, int], str]] = {
    ("slots.py", "Slots.request", "1 -> 0, in: for i in range(at - 1, -1, -1):", 0): AGAIN,
    ("slots.py", "Slots.request", "1 -> 2, in: for i in range(at - 1, -1, -1):", 1): AGAIN,
    (
        "prediction.py",
        "Estimate.at_most",
        "seconds < self.seconds -> seconds <= self.seconds, in: if seconds < self.seconds:",
        0,
    ): EITHER,
    (
        "prediction.py",
        "Estimate.at_most",
        "4 -> 5, in: self._shorter = min(self._shorter + 1, 4)",
        0,
    ): "the step is at its bound before",
    (
        "prediction.py",
        "Estimate._see",
        "seconds < self._since -> seconds <= self._since, in: if seconds < self._since:",
        0,
    ): EITHER,
    ("hub.py", "Hub.__init__", "0.0 -> 1.0, in: self._slept = 0.0", 0): ANY,
    ("hub.py", "Hub.__init__", "0.0 -> -1.0, in: self._slept = 0.0", 0): ANY,
    ("hub.py", "Hub._poll", "now - start > TURN -> now - start >= TURN, in: if now - start > TURN:", 0): TOO_LONG,
    ("hub.py", "Hub._poll", "lane.due < earliest -> lane.due <= earliest, in: if lane.due < earliest:", 0): EITHER,
    (
        "hub.py",
        "Hub._poll",
        "now - start > TURN -> now - start >= TURN, in: self._arm(now, earliest, now - start > TURN)",
        0,
    ): TOO_LONG,
    ("hub.py", "Hub._confirmed", "False -> True, in: return (False, error)", 0): ENDS,
    (
        "hub.py",
        "Hub._hung",
        "ran <= head.hang_timeout -> ran < head.hang_timeout, in: if ran <= head.hang_timeout:",
        0,
    ): EITHER,
    (
        "hub.py",
        "Hub._first_poll",
        "0.0 -> -1.0, in: return now if self.progress is SPIN else next_look(now, now, now, 0.0)",
        0,
    ): STOPS,
    ("hub.py", "Hub._first_poll", "wait > 0.0 -> wait >= 0.0, in: return now + wait if wait > 0.0 else now", 0): PAST,
    (
        "hub.py",
        "Hub._next_poll",
        "0.0 -> -1.0, in: return now if self.progress is SPIN else next_look(now, started, started, 0.0)",
        0,
    ): STOPS,
    ("hub.py", "Hub._next_poll", "0.0 -> -1.0, in: return max(predicted, next_look(now, now, now, 0.0))", 0): STOPS,
    (
        "hub.py",
        "Hub._arm",
        "0.0 -> -1.0, in: self._soon = self._loop.call_later(0.0, self._poll) if was_long else self._loop.call_soon(self._poll)",
        0,
    ): PAST,
    (
        "hub.py",
        "_patrol",
        "0.0 -> -1.0, in: return min(patrol, max(started + stalled + head.hang_timeout, next_look(now, started, started, 0.0)))",
        0,
    ): STOPS,
    (
        "executor.py",
        "Executor.__init__",
        "1 -> 0, in: self._overlap = overlap or slots == 1",
        0,
    ): "one slot's launches are in order anyway: it only costs more to say so",
    (
        "executor.py",
        "Executor.__init__",
        "1 -> 2, in: self._workers = self.device.workers(slots + 1)",
        0,
    ): "how many threads there are is nobody's promise: more of them cost, and with fewer some jobs wait",
    (
        "executor.py",
        "Executor.__init__",
        "1 -> 0, in: self._workers = self.device.workers(slots + 1)",
        0,
    ): "how many threads there are is nobody's promise: more of them cost, and with fewer some jobs wait",
    (
        "executor.py",
        "Executor._submit_new",
        "True -> False, in: for argument, spec in zip(arguments, specs, strict=True):",
        0,
    ): "there is an argument for each, as `parse` has checked",
    (
        "executor.py",
        "Executor._submit_new",
        "route.nbytes <= COPY_ON_LOOP_BYTES -> route.nbytes < COPY_ON_LOOP_BYTES, in: if route.nbytes <= COPY_ON_LOOP_BYTES or (self._thread_bytes < inf and request.origin is None):",
        0,
    ): JUST,
    (
        "executor.py",
        "Executor._replay",
        "route.nbytes >= self._thread_bytes -> route.nbytes > self._thread_bytes, in: if route.nbytes >= self._thread_bytes and self._hand_over(slot, request, program):",
        0,
    ): JUST,
    (
        "executor.py",
        "Executor._replay",
        "route.nbytes > COPY_ON_LOOP_BYTES -> route.nbytes >= COPY_ON_LOOP_BYTES, in: if route.nbytes > COPY_ON_LOOP_BYTES:",
        0,
    ): JUST,
    (
        "executor.py",
        "Executor._hand_over",
        "route.nbytes <= COPY_ON_LOOP_BYTES -> route.nbytes < COPY_ON_LOOP_BYTES, in: if route.nbytes <= COPY_ON_LOOP_BYTES and (not self.machine.count(IN_FLIGHT)):",
        0,
    ): JUST,
    ("executor.py", "Executor._hand_over", "return False -> return None", 0): "None is false too",
    ("executor.py", "Executor._hand_over", "return False -> return None", 1): "None is false too",
    ("executor.py", "Executor._hand_over", "return False -> return None", 2): "None is false too",
    ("executor.py", "Executor._hand_over", "return False -> return None", 3): "None is false too",
    (
        "executor.py",
        "Executor._replay",
        "1 -> 2, in: cache.uses = program.used = cache.uses + 1",
        0,
    ): "only the order of uses counts",
    ("executor.py", "Executor._replay", "return True -> return None", 1): "the long way finds that its slot is broken",
    ("executor.py", "Executor._replay", "True -> False, in: return True", 1): "the long way finds that its slot is broken",
    ("executor.py", "Executor._detour", "return False -> return None", 0): "None is false too",
    ("executor.py", "Executor._stage", "0 -> 1, in: slot.launches = 0", 0): "launches are told apart by equality",
    ("executor.py", "Executor._stage", "0 -> -1, in: slot.launches = 0", 0): "launches are told apart by equality",
    ("executor.py", "Executor._stage", "0 -> -1, in: nbytes = 0", 0): "to copy no inputs does nothing",
    (
        "executor.py",
        "Executor._completed",
        "0 -> -1, in: packed = results[0] if names.is_bare else names.pack(results)",
        0,
    ): "of one result the first is the last",
    (
        "executor.py",
        "Executor._small_views",
        "sum([view.nbytes for view in views]) <= COPY_ON_LOOP_BYTES -> sum([view.nbytes for view in views]) < COPY_ON_LOOP_BYTES, in: return views if sum([view.nbytes for view in views]) <= COPY_ON_LOOP_BYTES else None",
        0,
    ): JUST,
    ("executor.py", "_count_fork", "_forks += 1 -> _forks -= 1", 0): "only whether it is another number counts",
    ("executor.py", "_count_fork", "1 -> 2, in: _forks += 1", 0): "only whether it is another number counts",
    (
        "prediction.py",
        "Estimate.between",
        "0.0 -> -1.0, in: if before == 0.0 or not (agrees or self.is_trusted):",
        0,
    ): "an estimate of nothing is never trusted",
    (
        "prediction.py",
        "Estimate.between",
        "seconds < before -> seconds <= before, in: if seconds < before:",
        0,
    ): "a share of nothing",
    ("prediction.py", "Lateness.__init__", "1 -> 2, in: buckets = BUCKETS + 1", 0): "one bucket that is never used",
    (
        "prediction.py",
        "Lateness.allowance",
        "wait > longest -> wait >= longest, in: while wait > longest and bucket < BUCKETS:",
        0,
    ): "the second loop goes back to the bucket before",
    (
        "hub.py",
        "Hub._notify",
        "True -> False, in: self._is_told = True",
        0,
    ): "the loop is called for each lane, and the first call finds all of them",
    ("hub.py", "Hub._poll", "now >= lane.spin_until -> now > lane.spin_until, in: if now >= lane.spin_until:", 0): SAVES,
    ("hub.py", "Hub._poll", "0 -> -1, in: earliest = lanes[0].due", 0): "of several, all are compared",
    (
        "hub.py",
        "Hub._poll",
        "len(lanes) > 1 -> len(lanes) >= 1, in: if len(lanes) > 1:",
        0,
    ): "to compare one with itself does nothing",
    ("hub.py", "Hub._poll", "1 -> 0, in: if len(lanes) > 1:", 0): "to compare one with itself does nothing",
    ("hub.py", "Hub._confirmed", "False -> True, in: return (False, failure)", 0): ENDS,
    (
        "hub.py",
        "Hub._incomplete",
        "started < lane.last_done -> started <= lane.last_done, in: if started < lane.last_done:",
        0,
    ): EITHER,
    (
        "hub.py",
        "Hub._incomplete",
        "now - started > timeout -> now - started >= timeout, in: if timeout is not None and (now - started > timeout or now - planned > STALL):",
        0,
    ): HUNG,
    (
        "hub.py",
        "Hub._incomplete",
        "now - started -> now + started, in: if timeout is not None and (now - started > timeout or now - planned > STALL):",
        0,
    ): HUNG,
    (
        "hub.py",
        "Hub._incomplete",
        "now - planned > STALL -> now - planned >= STALL, in: if timeout is not None and (now - started > timeout or now - planned > STALL):",
        0,
    ): HUNG,
    (
        "hub.py",
        "Hub._incomplete",
        "now - planned -> now + planned, in: if timeout is not None and (now - started > timeout or now - planned > STALL):",
        0,
    ): HUNG,
    (
        "hub.py",
        "Hub._next_poll",
        "wait > SHORTEST_SLEEP -> wait >= SHORTEST_SLEEP, in: if wait > SHORTEST_SLEEP:",
        0,
    ): AS_LONG,
    (
        "hub.py",
        "Hub._next_poll",
        "0.0 -> -1.0, in: return min(now + wait, next_look(now, started, started, 0.0))",
        0,
    ): STOPS,
    (
        "hub.py",
        "Hub._next_poll",
        "now < predicted -> now <= predicted, in: if not lane.is_polled and now < predicted and (not spin):",
        0,
    ): "at the predicted time both say the same",
    (
        "executor.py",
        "Executor._replay",
        "self._unified and slot.gates -> self._unified or slot.gates, in: if self._unified and slot.gates:",
        0,
    ): "the long way gives the same result",
    (
        "hub.py",
        "Hub._poll",
        "self.finished and self._waking is None -> self.finished or self._waking is None, in: if self.finished and self._waking is None:",
        0,
    ): "the loop makes a call that finds nobody to resume",
    (
        "hub.py",
        "Hub._poll",
        "self.finished and self._waking is None -> self.finished or self._waking is None, in: if self.finished and self._waking is None:",
        1,
    ): "those whom the poll before left to the loop are resumed by this poll instead, before all others",
    (
        "hub.py",
        "Hub._poll",
        "started > lane.last_done -> started >= lane.last_done, in: lane.started = started if started > lane.last_done else lane.last_done",
        0,
    ): "the two are the same then",
    (
        "hub.py",
        "Hub._poll",
        "start - self._left < IDLE -> start - self._left <= IDLE, in: if start - self._left < IDLE:",
        0,
    ): "exactly so long is as good a bound",
    (
        "hub.py",
        "Hub._wake",
        "self._clock() - start > WAKES -> self._clock() - start >= WAKES, in: if finished and self._clock() - start > WAKES:",
        0,
    ): "exactly so long is as good a bound",
    (
        "hub.py",
        "Hub._next_poll",
        "wait > SHORTEST_SLEEP -> wait >= SHORTEST_SLEEP, in: if wait > SHORTEST_SLEEP and (not spin or wait > LONGEST_SPIN or wait > SPIN_SHARE * estimate.seconds):",
        0,
    ): "a wait that short is shorter than any allowance",
    (
        "hub.py",
        "Hub._next_poll",
        "wait > LONGEST_SPIN -> wait >= LONGEST_SPIN, in: if wait > SHORTEST_SLEEP and (not spin or wait > LONGEST_SPIN or wait > SPIN_SHARE * estimate.seconds):",
        0,
    ): "exactly so long is as good a bound",
    (
        "hub.py",
        "Hub._next_poll",
        "wait > SPIN_SHARE * estimate.seconds -> wait >= SPIN_SHARE * estimate.seconds, in: if wait > SHORTEST_SLEEP and (not spin or wait > LONGEST_SPIN or wait > SPIN_SHARE * estimate.seconds):",
        0,
    ): "exactly so long is as good a bound",
    (
        "executor.py",
        "Executor.discard",
        "1 -> 2, in: self.device.workers(1).submit(release_when_idle, self, self.device)",
        0,
    ): "the pool has one job, so a second thread has nothing to do",
    (
        "hub.py",
        "Hub._poll",
        "pending and lane.due == -inf -> pending or lane.due == -inf, in: if pending and lane.due == -inf:",
        0,
    ): "the estimate learns before the callers are resumed and not after; a head that was not polled yet begins twice",
    (
        "hub.py",
        "_patrol",
        "started + stalled + head.hang_timeout >= patrol -> started + stalled + head.hang_timeout > patrol, in: if head.hang_timeout is None or started + stalled + head.hang_timeout >= patrol:",
        0,
    ): EITHER,
    (
        "hub.py",
        "_patrol",
        "started + stalled + head.hang_timeout -> started + stalled - head.hang_timeout, in: if head.hang_timeout is None or started + stalled + head.hang_timeout >= patrol:",
        0,
    ): "saves the calls below, which give the same result",
    (
        "hub.py",
        "_patrol",
        "started + stalled -> started - stalled, in: if head.hang_timeout is None or started + stalled + head.hang_timeout >= patrol:",
        0,
    ): "saves the calls below, which give the same result",
    (
        "executor.py",
        "Executor._replay",
        "program.estimate.seconds >= LONG -> program.estimate.seconds > LONG, in: if prepares and program.estimate.seconds >= LONG and (slot.when_complete is None):",
        0,
    ): "exactly so long is as good a bound",
}
