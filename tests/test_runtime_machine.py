"""The whole runtime on the simulated GPU, driven by a Hypothesis machine; and the machine, tried where there is a defect."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from aiotrt.completion import hub as completion
from aiotrt.runtime import memory
from aiotrt.testing import DeadlockError, HazardError
from tests.machine.rules import Runtime
from tests.testing.mutation import Mutation, applied, deletions

Runtime.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)  # the same examples each time, so that a change is told by them; search on with derandomize=False and more of them
TestRuntime = pytest.mark.timeout(300)(Runtime.TestCase)

#: Statements without which the runtime is wrong: module, function, and how they begin.
DEFECTS = [
    ("runtime.launch", "open_gates", "slot.stream.wait("),
    ("runtime.request", "Request.order", "slot.follow(self.origin)"),
    ("runtime.launch", "submit_lease", "slot.stream.record(event)"),
    ("runtime.executor", "Executor._finish", "self.move(slot, COPIED, then=resolve)"),
    ("runtime.executor", "Executor._completed", "self.move(slot, COMPLETE)"),
    ("runtime.executor", "Executor.abandon", "self.machine.withdraw(request)"),
    ("runtime.executor", "Executor.break_down", "self.reject(request, error)"),
    ("runtime.hold", "Hold._record_readers", "self.slot.gates.append("),
    ("completion.hub", "Hub._poll", "self.is_polling = False"),
]

#: How the machine says that something is wrong. Which of them comes first for a defect is a matter of the order of things.
FOUND = (HazardError, DeadlockError, AssertionError)


@pytest.fixture
def _forget() -> Iterator[None]:
    """What a defect leaves behind, such as models that cannot be closed, is not held against the test."""
    yield
    memory._kept.clear()
    completion._hubs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def removed(module: str, function: str, start: str) -> Mutation:
    every = deletions(importlib.import_module(f"aiotrt.{module}"))
    (found,) = [m for m in every if m.place.name == function and m.place.text.startswith(start)]
    return found


class Searched(Runtime):
    """The same machine, with a seed of its own."""


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_forget")
@pytest.mark.interpreted
@pytest.mark.parametrize(("module", "function", "start"), DEFECTS, ids=[f"{d[1]}-{d[2]}" for d in DEFECTS])
def test_the_machine_finds_a_defect(module: str, function: str, start: str) -> None:
    """In one of many short searches, each of which finds the rarest of these every other time.

    One long search would be a matter of luck: what Hypothesis tries comes from what it tried before, so that a search which
    begins badly goes on so (500 programs of 25 steps found the first of these in three runs of four).
    """
    short = settings(
        max_examples=40,
        stateful_step_count=50,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with applied(removed(module, function, start)), pytest.raises(FOUND):
        for number in range(60):
            run_state_machine_as_test(seed(number)(Searched), settings=short)
