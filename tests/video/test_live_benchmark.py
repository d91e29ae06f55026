"""What the benchmark of live sources counts by itself, and what its bars say of figures that miss them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from aiotrt.video import Frame, Result
from aiotrt.video.frames import Held
from benchmarks.bench_live_video import BREAKS, GROWTH, SLOW, SOURCES, STALLS, Checks, judge
from benchmarks.measure import Spread
from benchmarks.rows import Row, Run

SPREAD = Spread(1e-3, 2e-3, 0.08, 100)
WHY = "and dropped 0 of 1800; the loop was late by up to 80 ms, and other programs used 1.5 cores"


def healthy() -> dict[str, Any]:
    source = {
        "fps": 30.0, "results": 30.0, "frames": 1800, "completed": 1800, "dropped": 0, "sink_drops": 0, "reports": {},
        "is_exact": True,
    }  # fmt: skip
    sources = {name: copy.deepcopy(source) for name in SOURCES}
    sources[STALLS] |= {"fps": 0.0, "results": 0.0, "frames": 30}
    sources[BREAKS] |= {"fps": 26.0, "reports": {"lost": 17, "reconnected": 17}}
    sources[SLOW] |= {"fps": 10.0, "sink_drops": 1200}
    return {
        "film": "a film",
        "seconds": 60.0,
        "measured": 45.0,
        "sources": sources,
        "is_in_order": True,
        "growth": 9 << 20,
        "device_growth": 0,
    }


def said(facts: dict[str, Any]) -> str:
    row = Row.measured(
        "live_video", "uvloop", "pipeline", {"sources": 8}, None, [Run(SPREAD, 220, 0.2, 1.5)], lags=[SPREAD], facts=facts
    )
    judge([row], {})
    return row.verdict


def test_a_good_run_meets_the_bars() -> None:
    assert said(healthy()) == "meets"
    last_break = healthy()
    last_break["sources"][BREAKS]["reports"] = {"lost": 18, "reconnected": 17}
    assert said(last_break) == "meets"


@pytest.mark.parametrize(
    ("name", "fact", "value", "says"),
    [
        (None, "is_in_order", False, "misses: frames came out of order"),
        (None, "growth", GROWTH, "misses: memory grew by 32 MiB"),
        (STALLS, "is_exact", False, f"misses: {STALLS} has frames that are not accounted for"),
        (None, "device_growth", GROWTH, "misses: what is in use on the device grew by 32 MiB"),
        (BREAKS, "reports", {}, f"misses: {BREAKS} never broke"),
        (BREAKS, "reports", {"lost": 1}, f"misses: {BREAKS} broke 1 times, and came back 0 times"),
        (BREAKS, "reports", {"lost": 9, "reconnected": 7}, f"misses: {BREAKS} broke 9 times, and came back 7 times"),
        (SOURCES[0], "fps", 29.3, f"misses: {SOURCES[0]} had 29.3 frames at its sink a second, {WHY}"),
        (SLOW, "results", 20.0, f"misses: {SLOW} had 20.0 results a second, {WHY}"),
    ],
)  # fmt: skip
def test_what_misses_a_bar_and_why(name: str | None, fact: str, value: Any, says: str) -> None:
    facts = healthy()
    (facts if name is None else facts["sources"][name])[fact] = value
    assert said(facts) == says


def test_sinks_see_what_comes_twice_or_too_late() -> None:
    def comes(checks: Checks, source: str, index: int) -> None:
        checks(Result(Frame(source, index, Held(np.zeros((1, 1, 3), np.uint8))), None))

    for order, is_in_order in (([0, 1, 5], True), ([0, 2, 1], False), ([0, 0], False)):
        checks = Checks()
        for index in order:
            comes(checks, "a", index)
            comes(checks, "b", 100 + index if is_in_order else 100 + len(order) + checks.got["b"])
        assert checks.is_in_order is is_in_order
        assert checks.got == {"a": len(order), "b": len(order)}
