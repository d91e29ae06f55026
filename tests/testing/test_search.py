"""The memory of the defect search, and the closing line and exit status of its scripts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.testing import campaign, search
from tests.testing.campaign import Campaign
from tests.testing.mutation import Mutation, deletions
from tests.testing.reports import REPORTS, write_report
from tests.testing.search import Finding, Key, Memory

pytestmark = pytest.mark.interpreted

FIRST, SECOND, THIRD = (Key("slots.py", "Slots.request", text, 0) for text in ("one()", "two()", "three()"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A memory in a folder that does not exist yet."""
    return tmp_path / "reports" / "found.json"


def test_a_memory_without_a_file_is_empty(path: Path) -> None:
    memory = Memory("statements", path)
    assert len(memory) == 0
    assert FIRST not in memory
    assert not path.exists()


def test_a_memory_keeps_what_was_found(path: Path) -> None:
    Memory("statements", path).keep([FIRST, SECOND], {0: Finding("a law", 3, schedules=7), 1: Finding()})
    memory = Memory("statements", path)
    assert memory[FIRST] == ("a law", 3, 7)
    assert SECOND not in memory
    assert len(Memory("mutants", path)) == 0


def test_a_memory_keeps_other_sections_and_changes_that_were_not_tried(path: Path) -> None:
    Memory("mutants", path).keep([THIRD], {0: Finding("a unit test", 0, schedules=1)})
    Memory("statements", path).keep([FIRST, SECOND], {0: Finding("a law", 3, schedules=7)})
    Memory("statements", path).keep([FIRST, SECOND], {1: Finding("another law", 1, schedules=2)})
    memory = Memory("statements", path)
    assert memory[FIRST] == ("a law", 3, 7)
    assert memory[SECOND] == ("another law", 1, 2)
    assert Memory("mutants", path)[THIRD] == ("a unit test", 0, 1)


def test_a_memory_forgets_changes_that_are_gone_or_no_longer_found(path: Path) -> None:
    everything = {i: Finding("a law", i, schedules=1) for i in range(3)}
    Memory("statements", path).keep([FIRST, SECOND, THIRD], everything)
    Memory("statements", path).keep([SECOND, THIRD], {1: Finding()})
    memory = Memory("statements", path)
    assert len(memory) == 1
    assert memory[SECOND] == ("a law", 1, 1)


def test_a_cleared_memory_leaves_the_file_until_it_is_kept(path: Path) -> None:
    Memory("statements", path).keep([FIRST], {0: Finding("a law", 3, schedules=7)})
    memory = Memory("statements", path)
    memory.clear()
    assert FIRST not in memory
    assert FIRST in Memory("statements", path)


def test_a_report_replaces_the_last_one(path: Path) -> None:
    for text in ("first", "second"):
        write_report(path, text)
    assert path.read_text(encoding="utf-8") == "second"
    assert [*path.parent.iterdir()] == [path]


def test_reports_are_ignored_by_git() -> None:
    root = REPORTS.parent
    assert f"/{REPORTS.name}/" in (root / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert search.FOUND.parent == campaign.PAGE.parent == REPORTS


class NoPool:
    """Takes the place of the worker processes."""

    def __init__(self, *_: object) -> None: ...

    def close(self) -> None: ...


def few() -> list[Mutation]:
    """Two changes."""
    return list(deletions(importlib.import_module("aiotrt.runtime.slots")))[:2]


@pytest.mark.parametrize("is_found", [True, False])
def test_a_campaign_from_nothing_remembers_and_ends_with_a_summary(
    is_found: bool, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patience: list[dict[int, float]] = []

    def look(pool: object, todo: object, memory: Memory, seconds: dict[int, float], findings: dict[int, Finding]) -> None:
        assert len(memory) == 0
        patience.append(seconds)
        findings[0] = Finding("a law", 3, schedules=7)
        if is_found:
            findings[1] = Finding("another law", 0, schedules=1)

    monkeypatch.setattr(campaign, "Pool", NoPool)
    monkeypatch.setattr(campaign, "look", look)
    monkeypatch.setattr(campaign, "Memory", lambda section: Memory(section, path))
    monkeypatch.setattr(sys, "argv", ["seeded_defects", "--check", "--processes", "1", "--patience", "5"])
    status = Campaign("statements", few, {}, lambda *_: {}).main("A campaign.")
    *complaints, summary = capsys.readouterr().out.splitlines()
    assert patience == [{0: 5.0, 1: 5.0}]
    assert status == (0 if is_found else 1)
    assert len(complaints) == status
    assert summary.startswith(f"statements: 2 changes, {2 - status} found, 0 explained, {status} complaints; ")
    assert len(json.loads(path.read_text(encoding="utf-8"))["statements"]) == 2 - status
