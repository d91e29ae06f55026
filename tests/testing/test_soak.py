"""The soak itself, for some seconds on the host: it passes, and it finds wrong results, leaks and hangs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.testing.soak import ENOUGH, LIMITS, growth, leaks
from tests.testing.soak_callers import Images, Rows, Work, difference

ROOT = Path(__file__).parents[2]
#: What the soak runs under, to be broken while it runs.
BROKEN = """
import sys
from unittest import mock
from aiotrt.completion.hub import Hub
from tests.testing import soak

with mock.patch({target!r}, {replacement}):
    sys.exit(soak.main(sys.argv[1:]))
"""


def soaked(*arguments: str, broken: tuple[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "tests.testing.soak"]
    if broken is not None:
        target, replacement = broken
        start = ["-c", BROKEN.format(target=target, replacement=replacement)]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.proof
@pytest.mark.serial
def test_it_passes_and_says_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    ended = soaked("--seconds", "15", "--out", str(out))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads(out.read_text())
    assert summary["passed"]
    assert summary["seconds"] < 15
    counts = summary["counts"]
    assert all(counts[way] for way in ("call", "lease", "replay", "map", "chain", "cancelled", "opened")), counts
    assert counts["results checked"] > 100
    assert len(summary["at_rest"]) >= ENOUGH
    assert summary["growth"]["resident"] < LIMITS["resident"]


def test_a_device_that_is_not_there_is_said_in_one_line() -> None:
    ended = soaked("--device", "cuda:99")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "device 'cuda:99'" in line


@pytest.mark.proof
@pytest.mark.serial
def test_a_result_that_changes_later_is_found() -> None:
    ended = soaked("--seconds", "20", broken=("aiotrt.runtime.executor.own", "lambda view, dtype, kind: view"))
    assert ended.returncode == 1, ended.stdout
    assert "MismatchError" in ended.stderr, ended.stderr


@pytest.mark.proof
@pytest.mark.serial
@pytest.mark.parametrize(
    ("seconds", "patience", "why"),
    [("20", "1", "somebody waits for more than 1 s"), ("6", "50", "it is not over in time")],
    ids=["out of patience", "out of time"],
)
def test_a_hang_is_found_and_the_waiters_are_named(seconds: str, patience: str, why: str) -> None:
    lost = "lambda hub: poll(hub) if next(polls) < 500 else None"
    broken = ("aiotrt.completion.hub.Hub._poll", f"(lambda poll, polls: {lost})(Hub._poll, iter(range(10**9)))")
    started = time.monotonic()
    ended = soaked("--seconds", seconds, "--patience", patience, broken=broken)
    assert ended.returncode == 1, ended.stdout
    assert f"hang: {why}" in ended.stderr, ended.stderr
    assert "call for" in ended.stderr
    assert "in_flight" in ended.stderr
    assert time.monotonic() - started < float(seconds) + 5  # the interpreter's own start and end


@pytest.mark.parametrize("work", [Rows("rows"), Images("images")], ids=lambda work: work.name)
def test_results_of_other_requests_are_told_apart(work: Work) -> None:
    mine = work.sample(4, 7, random.Random(0))
    assert difference(mine.expected, mine) is None
    assert difference(work.sample(4, 8, random.Random(0)).expected, mine) is not None
    assert difference(work.sample(3, 7, random.Random(0)).expected, mine) is not None
    assert difference(mine.expected[:1], mine) is not None
    changed = [array.copy() for array in mine.expected]
    changed[-1].flat[-1] += 1
    assert difference(changed, mine) is not None
    assert all(
        np.array_equal(array, np.round(array)) and array.max() < 2**24
        for array in work.sample(64, 399_999, random.Random(0)).expected
    )


@pytest.mark.parametrize("name", LIMITS)
def test_growth_is_found_and_fluctuation_is_not(name: str) -> None:
    limit = LIMITS[name]
    chance = random.Random(0)
    flat = [{name: 10 * limit + chance.randrange(limit)} for _ in range(40)]
    warming_up = [{name: i * limit} for i in range(5)]
    assert not leaks(growth([*warming_up, *flat]))
    growing = [{name: reading[name] + i * limit // 10} for i, reading in enumerate(flat)]
    assert leaks(growth(growing))
