"""Defects that once survived the tests: each is put into the live runtime, and the laws named for it must fail.

    python -m tests.testing.known_defects         # a table: defect, law, device, how the law failed, seconds
    python -m tests.testing.known_defects gate    # the defects whose name contains this

A defect is a change of the runtime's source text (`mutation.rewritten`), compiled into the live functions for the time of
one run. When the runtime is restructured and a text is no longer there, the run stops with a `StaleEditError` that names it:
restate the defect where that decision is made now.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiotrt import lease
from aiotrt.runtime import executor, hold, slots
from aiotrt.runtime import programs as graphs
from tests import test_cancellation, test_laws_of_estimates, test_laws_of_handover, test_laws_of_slots, test_lease
from tests.testing.mutation import rewritten
from tests.testing.portfolio import Law, outcome, story

__all__ = ["DEFECTS", "REAL_LIMIT", "Defect", "Edit", "Trial", "main"]

#: Seconds of processor time, and of real time, within which a law must have failed.
PROCESSOR_LIMIT: Final = 5.0
REAL_LIMIT: Final = 10.0


@dataclass(frozen=True)
class Edit:
    """One change of the runtime's source text.

    Attributes:
        module: the module that it stands in.
        name: the qualified name of the function.
        before: text that stands exactly once in that function.
        after: what replaces it.
    """

    module: types.ModuleType
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Trial:
    """A law that finds a defect.

    Attributes:
        device: where it runs: "simulated" and "host" are in virtual time, "host, real time" is not, and "none" is for laws
            of the slot machine alone.
        law: the test, which is called as a function.
        arguments: its parameters.
    """

    device: str
    law: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The test's name, with its parameters."""
        chosen = [str(value) for key, value in self.arguments.items() if key not in ("where", "device")]
        return self.law.__name__ + (f"[{', '.join(chosen)}]" if chosen else "")

    def run(self) -> BaseException | None:
        """Try the law once. Returns how it failed, or None."""

        def law(_: int) -> None:
            result = self.law(**self.arguments)
            if inspect.iscoroutine(result):
                asyncio.run(result)

        return outcome(Law(self.name, self.law.__module__, law), 0, PROCESSOR_LIMIT, REAL_LIMIT)


@dataclass(frozen=True)
class Defect:
    """A defect and the laws that find it.

    Attributes:
        name: a short name.
        what: what is wrong with it, in a sentence.
        edits: the changes that put it into the runtime.
        trials: the laws, at least one for each device where the defect can be seen.
    """

    name: str
    what: str
    edits: Sequence[Edit]
    trials: Sequence[Trial]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The runtime has this defect.

        Raises:
            StaleEditError: the runtime no longer has a text that the defect changes.
        """
        with contextlib.ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(rewritten(edit.module, edit.name, (edit.before, edit.after)))
            yield


def _on(devices: Sequence[str], law: Callable[..., Any], **arguments: Any) -> list[Trial]:
    return [Trial(device, law, {"where": device, **arguments}) for device in devices]


BOTH: Final = ("simulated", "host")

DEFECTS: Final = (
    Defect(
        "late gate",
        "leaving a lease adds the events that its readers assigned to the slot's gates after it has freed the slot",
        [
            Edit(
                hold,
                "Hold._record_readers",
                "        self.slot.gates += self._state.take()\n",
                "",
            ),
            Edit(
                hold,
                "Hold.leave",
                "            self.executor.end_lease(self.slot)\n",
                "            self.executor.end_lease(self.slot)\n            self.slot.gates += self._state.take()\n",
            ),
        ],
        _on(
            BOTH,
            test_laws_of_handover.test_a_lease_gates_the_request_that_waits_for_its_slot,
            says="assigns an event",
        ),
    ),
    Defect(
        "event used again",
        "an event that `launch` returned is recorded for a later launch as soon as it is complete",
        [
            Edit(
                hold,
                "Hold.launch",
                "            replay = self._take(is_given)\n            event = replay.event\n",
                "            replay = self._take(is_given)\n"
                "            last = self._last\n"
                "            if last and self._is_complete(last.event):\n"
                "                replay.event, replay.query, replay.confirm = last.event, last.query, last.confirm\n"
                "            event = replay.event\n",
            )
        ],
        [
            trial
            for then in ("launch", "replay")
            for trial in _on(
                BOTH, test_laws_of_handover.test_an_event_that_launch_returned_is_never_recorded_again, then=then
            )
        ],
    ),
    Defect(
        "shared estimate",
        "all programs of a slot share one estimate of their duration",
        [
            Edit(
                graphs,
                "Program.__init__",
                "self.estimate = Estimate()",
                "self.estimate = stream.__dict__.setdefault('estimate', Estimate())",
            )
        ],
        [
            *_on(BOTH, test_laws_of_estimates.test_a_hang_is_reported_with_what_this_shape_takes),
            Trial("simulated", test_laws_of_estimates.test_a_shape_is_polled_as_if_there_were_no_other),
        ],
    ),
    Defect(
        "turn kept",
        "with overlap=False, a launch that a worker submitted for a caller that has gone does not pass the turn on",
        [
            Edit(
                executor,
                "Executor._submitted",
                "                self.pass_turn(slot)\n",
                "                if state is not DRAINING:\n                    self.pass_turn(slot)\n",
            )
        ],
        [
            Trial(
                "simulated",
                test_laws_of_handover.test_a_worker_passes_the_turn_on_though_its_caller_has_gone,
                {"what": "call"},
            )
        ],
    ),
    Defect(
        "slot kept",
        "a lease that is cancelled in the loop iteration in which it was granted keeps its slot",
        [
            Edit(
                lease,
                "Lease.__aenter__",
                "            self._executor.abandon(request)\n            raise\n",
                "            if request.cancelled():\n                self._executor.abandon(request)\n            raise\n",
            )
        ],
        [
            *[
                trial
                for freed_by in ("call", "lease", "worker")
                for trial in _on(
                    BOTH,
                    test_laws_of_handover.test_a_lease_that_is_granted_and_cancelled_in_one_iteration_frees_its_slot,
                    freed_by=freed_by,
                )
            ],
            *_on(
                BOTH,
                test_laws_of_handover.test_a_cancellation_at_any_iteration_leaves_the_slot_to_the_next,
                kind="lease",
                woken="by the loop",
            ),
            Trial(
                "host, real time",
                test_lease.test_granted_and_cancelled_in_the_same_turn_loses_no_slot,
                {"device": "host"},
            ),
            Trial(
                "host, real time",
                test_cancellation.test_a_lease_that_is_prepared_and_cancelled_in_the_same_turn,
                {"device": "host"},
            ),
        ],
    ),
    Defect(
        "queue jumped",
        "a request in the queue that prefers the freed slot is served before earlier ones",
        [
            Edit(
                slots,
                "Slots.request",
                "        self._queue[ticket] = bounded\n",
                "        self._queue[ticket] = bounded\n"
                "        self.__dict__.setdefault('preferred', {})[id(ticket)] = prefer\n",
            ),
            Edit(
                slots,
                "Slots.move",
                "                ticket, counted = self._queue.popitem(last=False)\n",
                "                preferred = self.__dict__.get('preferred', {})\n"
                "                first = next(iter(self._queue))\n"
                "                ticket = next((t for t in self._queue if slot in preferred.get(id(t), ())), first)\n"
                "                counted = self._queue.pop(ticket)\n",
            ),
        ],
        [
            Trial(
                "none", test_laws_of_slots.test_a_freed_slot_goes_to_the_first_in_line_whatever_others_prefer, {"freed": 0}
            ),
            *_on(BOTH, test_laws_of_handover.test_a_request_does_not_pass_earlier_ones_because_a_slot_suits_it),
        ],
    ),
)


def main(arguments: Sequence[str]) -> int:
    """Print the table. Returns 1 if a law does not find its defect, or fails without it."""
    rows = [("defect", "found by", "device", "how it failed", "seconds")]
    wrong = 0
    for defect in DEFECTS:
        if not all(part in defect.name for part in arguments):
            continue
        for trial in defect.trials:
            clean = trial.run()
            with defect.applied():
                start = time.perf_counter()
                error = trial.run()
                seconds = time.perf_counter() - start
            how = "NOT FOUND" if error is None else story(error)
            if clean is not None:
                how = f"FAILS WITHOUT THE DEFECT: {story(clean)}"
            wrong += error is None or clean is not None
            rows.append((defect.name, trial.name, trial.device, how, f"{seconds:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows) - 1 - wrong} of {len(rows) - 1} trials find their defect")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
