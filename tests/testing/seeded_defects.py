"""Seeded defects: each statement that acts in the runtime is taken out, one at a time, and a law must fail.

    python -m tests.testing.seeded_defects            # all of them, which takes some minutes; writes docs/seeded-defects.md
    python -m tests.testing.seeded_defects --check    # each under the schedule that found it last time; see below
    python -m tests.testing.seeded_defects --only executor.py:181

The list is not written down anywhere: it is what stands in the files of `RUNTIME`, so a wait, a gate, a wake-up or a
hand-over that is added tomorrow is on it. A statement that acts is one that calls something, awaits something, or changes an
attribute or an item. Attributes set in `__init__` are left out: without them nothing runs at all.

`--check` is for a test run. It takes from the page which schedule found each defect, tries that one first, and looks
further only where it does not do; it fails if a defect is found by no law and not explained in `EXPLAINED`, and if an
explanation is for a statement that is not there.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from tests.testing.explained import EXPLAINED
from tests.testing.mutation import Mutation, applied, deletions, instrumented
from tests.testing.portfolio import ON_THE_HOST, DoesNotEndError, Law, laws, outcome, story

__all__ = ["RUNTIME", "kind_of", "mutations"]

RUNTIME: Final = (
    "submission", "requests", "executor", "lease", "buffers", "handshake", "completion", "graphs", "slots", "model",
    "mapping",
)  # fmt: skip
PAGE: Final = Path(__file__).parents[2] / "docs" / "seeded-defects.md"

#: Of a law that has no end of schedules, how many are run to see what it reaches.
LOOKED_AT: Final = 6
#: How long to look for a law that finds a defect, in seconds: in a full run, and in a check.
PATIENCE: Final = {"full": 60.0, "check": 8.0}

#: What a statement is for, by what stands in it; the first that fits. The rest are steps from one of these to the next.
KINDS: Final = (
    ("log", r"_log\.|_ignore\("),
    ("count", r"counters\.|\.count\(|self\.(polls|wakes) \+="),
    ("warning", r"warnings\.warn"),
    ("check", r"\bcheck\w*\(|_check_\w+\(written|_check_broadcast|_check_written|_check_preprocessed|\.settle\("),
    ("wait", r"\.wait\((?!\[)|\.order\(|follow\(|synchronize\(|await_gates|prepare_thread|hold\.open"),
    ("gate", r"gates|_open_gates|consum|_state\.take|ready_events|bound_inputs|when_passed|_events"),
    ("event", r"\.record\(|mark_consumed|_trt_|carry\(|_event = "),
    ("keep-alive", r"keep_for_ever|_kept|closer|close\(|retire|slot\.request|_remove\(|nbytes|holders|evict"),
    ("wake-up", (r"set_result|set_exception|reject|call_soon|call_exception|\bwatch\(|_arm|_enlist|on_done|then\(|told\("
                 r"|passed|_report|_check_idle|_fail|fail\(|break_down|lost_track|await |\.set\(|_poll|_look|_soon|heap"
                 r"|cancel|forget|done\(|_idle|replays|lane|error")),
    ("hand-over", (r"move\(|withdraw|abandon|_serve|begin|_granted|queued|release|discard|_left|launches|_line|_free"
                   r"|states\[|leave|reclaim|drop|refuse|closing|is_|resume|slot\b|_tickets|_gone|_is_closed|popleft|users")),
)  # fmt: skip


def mutations() -> list[Mutation]:
    """One for each statement that acts."""
    every = [mutation for name in RUNTIME for mutation in deletions(importlib.import_module(f"aiotrt.{name}"))]
    return [mutation for mutation in every if not mutation.place.name.endswith(("__init__", "__setattr__"))]


def kind_of(mutation: Mutation) -> str:
    """What the statement is for, in a word."""
    text = mutation.place.text
    return next((kind for kind, pattern in KINDS if re.search(pattern, text)), "step")


@dataclass(frozen=True)
class Key:
    """What tells a statement from others, wherever its line is."""

    file: str
    function: str
    text: str
    nth: int  # of those that are alike in one function

    def __str__(self) -> str:
        return f"{self.file} {self.function}: {self.text}" + (f" ({self.nth + 1})" if self.nth else "")


def keys(todo: Sequence[Mutation]) -> list[Key]:
    """One for each."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for mutation in todo:
        place = mutation.place
        alike = place.file.removeprefix("aiotrt/"), place.name, place.text
        found.append(Key(*alike, seen[alike]))
        seen[alike] += 1
    return found


@dataclass
class Finding:
    """What became of one mutation."""

    law: str = ""  # that found it; none did if this is empty
    seed: int = 0
    how: str = ""
    schedules: int = 0  # that were tried
    seconds: float = 0.0
    reached: int = 0  # laws that reach the statement, where that was looked at


@dataclass(frozen=True)
class Job:
    """What a worker process does next: try these (law, seed) against this mutation, or see what this law reaches."""

    mutation: int = -1
    trials: list[tuple[int, int]] = field(default_factory=list)
    patience: float = 60.0
    law: int = -1


# Worker processes...


def _serve(connection: Connection, fds: Sequence[int]) -> None:
    """Do jobs until there are none."""
    warnings.simplefilter("ignore")
    logging.disable()
    for fd in fds:
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # a runtime that does wrong says so in many ways
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    every, todo = laws(), mutations()
    gc.collect()
    gc.freeze()
    connection.send("ready")
    while (job := connection.recv()) is not None:
        connection.send(_reach(every[job.law], todo) if job.law >= 0 else _try(every, todo[job.mutation], job))


def _try(every: list[Law], mutation: Mutation, job: Job) -> Finding:
    start = time.perf_counter()
    finding = Finding()
    for law, seed in job.trials:
        with applied(mutation):
            error = outcome(every[law], seed)
        finding.schedules += 1
        finding.seconds = time.perf_counter() - start
        if error is not None:
            finding.law, finding.seed, finding.how = every[law].name, seed, story(error)
            # Torn out of the middle of something: what it leaves must not be held against the next mutation.
            assert not isinstance(error, DoesNotEndError) or outcome(every[law], seed) is None
            break
        if finding.seconds > job.patience:
            break
    return finding


def _reach(law: Law, todo: list[Mutation]) -> tuple[list[tuple[int, set[int]]], float] | str:
    """Which statements it reaches, by seed, and the seconds that a schedule takes; or why that cannot be said."""
    start = time.perf_counter()
    reached = []
    seeds = range(LOOKED_AT if law.schedules is None else law.schedules)
    for seed in seeds:
        seen: set[int] = set()
        with instrumented(todo, seen.add):
            error = outcome(law, seed)
        if error is not None:
            return f"{law.name} fails with seed {seed} on a runtime that was not changed: {error!r}"
        reached.append((seed, seen))
    return reached, (time.perf_counter() - start) / len(seeds)


class _Pool:
    """Worker processes that are replaced when they fall silent."""

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(count)]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, (1, 2)), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def run(self, jobs: Sequence[Job], *, silence: float = 90.0) -> Iterator[tuple[Job, Any]]:
        """Do them all; None for one whose worker was killed, or died."""
        todo = list(reversed(jobs))
        doing: dict[Connection, tuple[Job, float]] = {}
        ready: set[Connection] = getattr(self, "_ready", set())
        self._ready = ready
        while todo or doing:
            for _, connection in self._workers:
                if connection in ready and connection not in doing and todo:
                    job = todo.pop()
                    connection.send(job)
                    doing[connection] = job, time.monotonic()
            for sent in wait([connection for _, connection in self._workers], timeout=1.0):
                assert isinstance(sent, Connection)
                connection = sent
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = None
                    self._replace(connection)
                if connection in doing:
                    yield doing.pop(connection)[0], answer
                else:
                    ready.add(connection)
            for connection, (job, since) in list(doing.items()):
                if time.monotonic() - since > silence:
                    del doing[connection]
                    self._replace(connection)
                    yield job, None

    def _replace(self, dead: Connection) -> None:
        for i, (process, connection) in enumerate(self._workers):
            if connection is dead:
                process.kill()
                connection.close()
                self._ready.discard(connection)
                self._workers[i] = self._start()

    def close(self) -> None:
        """End them."""
        for process, connection in self._workers:
            process.kill()
            connection.close()


# The list...


def search(pool: _Pool, todo: list[Mutation], which: list[int], every: list[Law], patience: float) -> dict[int, Finding]:
    """Look for a law that finds each of these, among those that reach it, the quick ones first."""
    reached: dict[int, list[tuple[int, float, int, int]]] = {i: [] for i in which}
    for job, answer in pool.run([Job(law=i) for i in range(len(every))], silence=600.0):
        if not isinstance(answer, tuple):
            print("LEFT OUT ", answer or f"{every[job.law].name} ended its process")
            continue
        seeds, cost = answer
        rank: Counter[int] = Counter()
        for seed, seen in seeds:
            for i in seen & reached.keys():
                # One schedule of each law, then the second one of each; laws made for a file come first.
                law = every[job.law]
                mine = law.module.removeprefix("test_") in todo[i].place.file
                late = f"tests.{law.module}" in ON_THE_HOST
                reached[i].append((1000 * late + rank[i] - mine, cost, job.law, seed))
                rank[i] += 1
        if every[job.law].schedules is None:  # it may reach more than it did in those few
            for i, count in rank.items():
                reached[i] += [(count + n, cost, job.law, LOOKED_AT + n) for n in range(10 * LOOKED_AT)]
    jobs = [Job(i, [(law, seed) for *_, law, seed in sorted(reached[i])], patience) for i in which]
    findings = {}
    for job, answer in pool.run(jobs):
        findings[job.mutation] = answer or Finding("(all of them)", 0, "the process hangs or dies", 1)
        findings[job.mutation].reached = len({law for law, _ in job.trials})
        if not findings[job.mutation].law:
            print("...", todo[job.mutation], flush=True)
    return findings


def remembered(every: list[Law]) -> dict[Key, tuple[int, int]]:
    """From the page: which law and seed found what."""
    by_name = {law.name: i for i, law in enumerate(every)}
    found = {}
    if PAGE.exists():
        file = ""
        for line in PAGE.read_text(encoding="utf-8").splitlines():
            if line.startswith("## "):
                file = line.removeprefix("## ").strip("`")
            cells = [cell.strip() for cell in line.replace("\\|", "\0").split("|")[1:-1]]
            if len(cells) == 6 and cells[3].startswith("`") and "@" in cells[4]:
                name, _, seed = cells[4].strip("`").rpartition("@")
                function, nth = re.fullmatch(r"`(.*?)`(?: \((\d+)\))?", cells[1]).groups()  # type: ignore[union-attr]
                key = Key(file, function, cells[3].strip("`").strip().replace("\0", "|"), int(nth or 1) - 1)
                if name in by_name:
                    found[key] = by_name[name], int(seed)
    return found


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(prog="python -m tests.testing.seeded_defects", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="try first what found each last time; write nothing")
    parser.add_argument("--only", default="", help="those whose file:line, function or text contains this")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    start = time.perf_counter()
    every, todo = laws(), mutations()
    names = keys(todo)
    which = [i for i, m in enumerate(todo) if options.only in str(m)]
    pool = _Pool(options.processes)
    findings: dict[int, Finding] = {}
    try:
        if options.check:
            findings = recall(pool, names, which, every)
            which = [i for i in which if i not in findings and names[i] not in explanations()]
        if which:
            patience = PATIENCE["check" if options.check else "full"]
            findings.update(search(pool, todo, which, every, patience))
    finally:
        pool.close()
    unknown = [str(key) for key in explanations() if key not in set(names)]
    missed = [i for i, finding in sorted(findings.items()) if not finding.law and names[i] not in explanations()]
    stale = [i for i, finding in sorted(findings.items()) if finding.law and names[i] in explanations()]
    took = time.perf_counter() - start
    if not options.check and not options.only:
        PAGE.write_text(page(todo, names, findings, len(every), took), encoding="utf-8")
    for i in missed:
        print(f"NOT FOUND  {todo[i].place}  ({findings[i].reached} laws reach it, {findings[i].schedules} schedules tried)")
    for i in stale:
        print(f"FOUND, though it is explained as harmless  {todo[i].place}  by {findings[i].law}: {findings[i].how}")
    for name in unknown:
        print(f"EXPLAINED, and not there  {name}")
    found = sum(bool(finding.law) for finding in findings.values())
    schedules = sum(finding.schedules for finding in findings.values())
    explained = sum(key in explanations() for key in names)
    print(
        f"{len(todo)} statements: {found} found by {len(every)} laws under {schedules} schedules, {len(missed)} not found, "
        f"{explained} explained; {took:.0f} s"
    )
    return bool(missed or unknown)


def explanations() -> dict[Key, str]:
    """Why nothing finds the removal of these."""
    return {Key(file, function, text, nth): why for (file, function, text, nth), why in EXPLAINED.items()}


def recall(pool: _Pool, names: list[Key], which: list[int], every: list[Law]) -> dict[int, Finding]:
    """Those that are found by what found them last time."""
    known = remembered(every)
    jobs = [Job(i, [known[names[i]]]) for i in which if names[i] in known]
    findings = {job.mutation: answer for job, answer in pool.run(jobs) if answer is not None and answer.law}
    # What fails without any change finds nothing.
    for law, seed in sorted({known[names[i]] for i in findings}):
        error = outcome(every[law], seed)
        assert error is None, f"{every[law].name} fails with seed {seed} on a runtime that was not changed: {error!r}"
    return findings


def page(todo: list[Mutation], names: list[Key], findings: dict[int, Finding], laws: int, took: float) -> str:
    """docs/seeded-defects.md."""
    kinds = [kind_of(mutation) for mutation in todo]
    rows: dict[str, list[str]] = {}
    why = explanations()
    for i, mutation in enumerate(todo):
        place, finding, key = mutation.place, findings[i], names[i]
        nth = f" ({key.nth + 1})" if key.nth else ""
        if finding.law:
            by, how = f"`{finding.law}@{finding.seed}`", f"{finding.how}; {finding.schedules}, {finding.seconds:.2f} s"
        else:
            by, how = "**nothing**", why.get(key, "**not explained**")
        cells = [str(place.line), f"`{place.name}`{nth}", kinds[i], f"`{place.text}`", by, how]
        rows.setdefault(key.file, []).append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = Counter((kind, bool(findings[i].law)) for i, kind in enumerate(kinds))
    summary = [
        f"| {kind} | {table[kind, True] + table[kind, False]} | {table[kind, True]} | {table[kind, False]} |"
        for kind in dict.fromkeys([*(kind for kind, _ in KINDS), "step"])
        if table[kind, True] + table[kind, False]
    ]
    found = sum(table[kind, True] for kind in set(kinds))
    schedules = sum(finding.schedules for finding in findings.values() if finding.law)
    explained = len(EXPLAINED)
    lines = [
        "# Seeded defects",
        "",
        "Written by `python -m tests.testing.seeded_defects`; do not edit.",
        "",
        (
            "Each statement of the runtime that acts (that calls something, awaits something, or changes an attribute or an "
            "item) was taken out, one at a time, and the laws were run on what was left, under seeded schedules of the "
            "simulated GPU, until one failed."
        ),
        "",
        (
            f"**{len(todo)} statements, {found} found** by {laws} laws, {len(todo) - found} not; of those, {explained} are "
            f"explained. Those that were found took {schedules} schedules, {schedules / max(found, 1):.1f} each; the whole "
            f"run took {took:.0f} s on two processes."
        ),
        "",
        "| what it is for | statements | found | not |",
        "|---|---|---|---|",
        *summary,
        "",
        (
            "In the tables below: the law that failed, `@` its schedule, how it failed, how many schedules were tried until "
            "then, and how long that took."
        ),
    ]
    for file, body in rows.items():
        head = ["| line | in | for | removed | found by | how |", "|---|---|---|---|---|---|"]
        lines += ["", f"## `{file}`", "", *head, *body]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
