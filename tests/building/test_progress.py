"""The builder's progress: one number that never falls, and a way to stop it."""

from __future__ import annotations

import types
from typing import Any

import pytest

from aiotrt.building.progress import BuildProgress, Phases, make_monitor, reporter
from aiotrt.errors import InputError

TRT: Any = types.SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {}))


def test_nested_phases_make_one_number() -> None:
    phases = Phases()
    assert phases.start("build", None, 4) == BuildProgress("build", 0, 4, 0.0)
    assert phases.step("build", 0).fraction == 0.25
    assert phases.start("time", "build", 2).fraction == 0.25
    assert phases.step("time", 0).fraction == 0.375
    assert phases.step("time", 1).fraction == 0.5
    phases.finish("time")
    assert phases.step("build", 1) == BuildProgress("build", 2, 4, 0.5)
    assert phases.step("build", 3).fraction == 1.0


def test_the_number_never_falls_and_never_passes_one() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    phases.step("build", 1)
    assert phases.start("again", None, 10).fraction == 1.0  # a second tree of phases
    assert phases.step("again", 99).fraction == 1.0
    assert phases.step("never started", 0).fraction == 1.0
    assert phases.start("empty", "nowhere", 0).steps == 1


def test_cancel_stops_at_the_next_step() -> None:
    monitor = make_monitor(TRT, None)
    monitor.phase_start("build", None, 3)
    assert monitor.step_complete("build", 0)
    monitor.cancel()
    assert not monitor.step_complete("build", 1)
    monitor.phase_finish("build")


def test_what_the_callers_function_raises_stops_the_builder_and_is_kept() -> None:
    seen = []

    def report(progress: BuildProgress) -> None:
        seen.append(progress)
        if progress.step == 1:
            raise ZeroDivisionError

    monitor = make_monitor(TRT, report)
    monitor.phase_start("build", None, 3)
    assert not monitor.step_complete("build", 0)
    assert not monitor.step_complete("build", 1)
    assert isinstance(monitor.error, ZeroDivisionError)
    assert len(seen) == 2, "it is not called again"


def test_what_progress_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    for nothing in (None, False):
        with reporter(nothing, "x") as report:
            assert report is None
    with reporter(print, "x") as report:
        assert report is print
    with reporter(True, "x.engine") as report:
        assert report is not None
        report(BuildProgress("timing", 1, 2, 0.5))
    assert "x.engine" in capsys.readouterr().err
    with pytest.raises(InputError, match="progress must be"), reporter(3, "x"):  # type: ignore[arg-type]
        pass
