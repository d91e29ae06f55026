"""The full proof: every test on every loop under every seed, defects put in, mutants, schedules and a soak; one table.

    python -m tests.proof                        # everything, one stage after the other; see `STAGES`
    python -m tests.proof --only tests soak      # these stages
    python -m tests.proof --list

Each stage's output goes to `reports/proof/NAME.log`. The exit status is 1 if a stage fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["STAGES", "Result", "Stage", "main", "run", "table"]

ROOT: Final = Path(__file__).parents[1]
LOGS: Final = ROOT / "reports" / "proof"


@dataclass(frozen=True)
class Stage:
    """One command of the proof.

    Attributes:
        name: its name.
        what: what it proves, in a few words.
        arguments: to the Python interpreter.
        summary: finds the line of its output that says how it ended; the last match counts.
    """

    name: str
    what: str
    arguments: tuple[str, ...]
    summary: str = r"\d+ (?:passed|failed|error).*"


class Result(NamedTuple):
    """How one stage ended."""

    stage: Stage
    passed: bool
    summary: str
    seconds: float


PYTEST: Final = ("-m", "pytest", "--proof", "-q")
STAGES: Final = (
    Stage(
        "tests", "all tests: every loop, every seed",
        (*PYTEST, "-m", "not gpu and not serial and not ray", "-n", "auto", "--dist", "worksteal"),
    ),
    Stage("serial", "tests that measure time", (*PYTEST, "-m", "serial and not gpu")),
    Stage("ray", "a deployment in Ray Serve, on a local Ray", ("-m", "pytest", "-q", "tests/serving/test_ray.py")),
    Stage("known defects", "defects that tests once missed", ("-m", "tests.testing.known_defects"), r"\d+ of \d+ .*"),
    Stage("seeded defects", "statements taken out", ("-m", "tests.testing.seeded_defects"), r"\w+: \d+ changes, .*"),
    Stage("mutants", "operators and constants changed", ("-m", "tests.testing.mutants"), r"\w+: \d+ changes, .*"),
    Stage("schedules", "orders of events", ("-m", "tests.testing.schedules", "--seconds", "300"), r"small: \{.*"),
    Stage("soak", "three minutes of load, results compared", ("-m", "tests.testing.soak", "--seconds", "180"), r".*\S.*"),
)  # fmt: skip


def run(stage: Stage, logs: Path) -> Result:
    """Run one stage to its end."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{stage.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, *stage.arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            check=False,
        ).returncode  # fmt: skip
    lines = re.findall(stage.summary, log.read_text(encoding="utf-8", errors="replace"))
    summary = lines[-1].strip("= ") if lines else f"no result; exit status {status}"
    return Result(stage, status == 0 and bool(lines), summary, time.monotonic() - start)


def table(results: Sequence[Result]) -> str:
    """What was proven, in Markdown."""
    rows = [
        f"| {result.stage.name} | {result.stage.what} | {'passed' if result.passed else '**FAILED**'} | {result.summary} "
        f"| {result.seconds / 60:.1f} min |"
        for result in results
    ]
    total = sum(result.seconds for result in results)
    head = ["| stage | what | | | time |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| | | | total | {total / 60:.1f} min |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=(__doc__ or "").split("\n")[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help="run these stages")
    parser.add_argument("--list", action="store_true", help="print the stages and exit")
    options = parser.parse_args(arguments)
    stages = [stage for stage in STAGES if stage.name in options.only]
    if options.list:
        for stage in stages:
            print(f"{stage.name:16} {stage.what}: python {' '.join(stage.arguments)}")
        return 0
    results = []
    for stage in stages:
        print(f"{stage.name} ...", flush=True)
        results.append(run(stage, LOGS))
        print(f"{stage.name}: {'passed' if results[-1].passed else 'FAILED'}: {results[-1].summary}", flush=True)
    text = table(results)
    (LOGS / "table.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
