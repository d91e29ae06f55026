"""What a test run explores of all schedules, and that the search finds what is wrong."""

from __future__ import annotations

import importlib

import pytest

from tests.testing import schedules
from tests.testing.mutation import applied, deletions
from tests.testing.orders import line

#: Seconds that a test run searches for, with two processes.
BUDGET = 20.0


def test_the_orders_of_the_slot_machine_are_all_legal() -> None:
    figures = line(3)
    assert figures["ways"] > figures["steps"] > figures["states"] > 1000


@pytest.mark.proof
@pytest.mark.timeout(240)
def test_a_budget_of_schedules_is_explored(capsys: pytest.CaptureFixture[str]) -> None:
    figures = schedules.search("small", BUDGET, 2, report=lambda text: None)
    with capsys.disabled():
        rate = figures["per_processor_second"]
        print(f"\n{figures['distinct']:,} distinct schedules of small programs, {rate:,} a second of one processor")
    assert figures["distinct"] > 0.9 * figures["runs"] > 0
    assert 0 < figures["classes"] <= figures["distinct"]


def test_equal_seeds_are_equal_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "RUNS", 20)
    first, again, other = schedules.small_block(1), schedules.small_block(1), schedules.small_block(2)
    assert first == again
    assert not set(first.schedules) & set(other.schedules)


def test_programs_on_two_devices_are_right_under_many_schedules() -> None:
    found = schedules.several_block(0, runs=150)
    assert len(set(found.schedules)) > 100


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("module", "function", "start"),
    [
        ("runtime.launch", "open_gates", "slot.stream.wait("),
        ("runtime.launch", "submit_lease", "slot.stream.record(event)"),
    ],
)
def test_the_search_finds_a_defect(module: str, function: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "RUNS", 200)
    every = deletions(importlib.import_module(f"aiotrt.{module}"))
    (mutation,) = [m for m in every if m.place.name == function and m.place.text.startswith(start)]
    with applied(mutation), pytest.raises(AssertionError):
        schedules.small_block(0)
