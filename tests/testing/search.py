"""Looks for laws that fail when the runtime is changed, in worker processes, and remembers which did.

The memory is `reports/found.json`: for each change the law that found it, the schedule, and how many schedules were tried
until then. A later run tries that schedule first, so it takes a small part of the time. Without the file, everything is
searched.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from tests.testing.mutation import REMOVED, Mutation, applied, instrumented
from tests.testing.portfolio import (
    PROCESSOR_LIMIT,
    REAL_LIMIT,
    DoesNotEndError,
    Law,
    laws,
    outcome,
    prepare,
    story,
)
from tests.testing.reports import REPORTS, write_report

__all__ = ["Finding", "Key", "Memory", "Pool", "keys", "look", "recall", "search"]

FOUND: Final = REPORTS / "found.json"
#: Of a law that has no end of schedules, how many are run to see what it reaches.
LOOKED_AT: Final = 6
#: Where the law is known that finds a change: by how many times longer than without the change it may run before it counts
#: as one that does not end, and the least seconds of processor time, and of real time, for that.
LONGER: Final = 5.0
KNOWN_PROCESSOR_LIMIT: Final = 0.5
KNOWN_REAL_LIMIT: Final = 2.0
#: Seconds of real time that a search may take for each second of its patience, because laws that wait use no processor.
REAL_PER_PATIENCE: Final = 6.0
#: Seconds without an answer after which a worker process is given up.
SILENCE: Final = 90.0
#: Laws that reach a function in another process, where that is not seen.
ELSEWHERE: Final = {
    "_count_fork": "a_child_process_is_refused",
    "Executor.is_forked": "a_model_that_a_child_process_inherits_is_left_alone_there",
}


@dataclass(frozen=True)
class Key:
    """What tells a change from others, wherever its line is."""

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
        alike = Path(place.file).name, place.name, place.text if mutation.what == REMOVED else mutation.what
        found.append(Key(*alike, seen[alike]))
        seen[alike] += 1
    return found


@dataclass
class Finding:
    """What became of one change."""

    law: str = ""  # that found it; none did if this is empty
    seed: int = 0
    how: str = ""
    schedules: int = 0  # that were tried
    seconds: float = 0.0  # of processor time
    real: float = 0.0  # seconds
    reached: int = 0  # laws that reach it, where that was looked at


class Memory:
    """The law and the schedule that found each change, in a file. Empty if the file is missing.

    Args:
        section: name of the set of changes within the file.
        path: the file.
    """

    def __init__(self, section: str, path: Path = FOUND) -> None:
        self._section = section
        self._path = path
        self._found: dict[str, list[Any]] = self._all().get(section, {})

    def __len__(self) -> int:
        return len(self._found)

    def _all(self) -> dict[str, dict[str, list[Any]]]:
        found: dict[str, dict[str, list[Any]]] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        )
        return found

    def __contains__(self, key: Key) -> bool:
        return str(key) in self._found

    def __getitem__(self, key: Key) -> tuple[str, int, int]:
        """The law's name, the seed, and the number of schedules tried until then."""
        law, seed, schedules = self._found[str(key)]
        return law, seed, schedules

    def clear(self) -> None:
        """Forget this section. The file changes with the next `keep`."""
        self._found = {}

    def keep(self, names: Sequence[Key], findings: dict[int, Finding]) -> None:
        """Store these findings in place of older ones, and drop changes that no longer exist.

        Args:
            names: every change of the section.
            findings: the ones that were tried, by index in `names`.
        """
        known = dict(self._found)
        for i, finding in findings.items():
            known[str(names[i])] = [finding.law, finding.seed, finding.schedules] if finding.law else []
        found = {str(name): known[str(name)] for name in names if known.get(str(name))}
        sections = self._all() | {self._section: found}
        lines = []
        for name, section in sorted(sections.items()):
            entries = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
            lines.append(f"{json.dumps(name)}: {{\n{entries}\n}}")
        write_report(self._path, "{\n" + ",\n".join(lines) + "\n}\n")
        self._found = found


# Worker processes...


@dataclass(frozen=True)
class Job:
    """What a worker process does next: try these (law, seed), with a change or (-1) without; or see what a law reaches.

    Attributes:
        mutation: the number of the change.
        trials: numbers of laws, each with a seed.
        patience: seconds of processor time for all of them.
        usual: for how many seconds the one law that is tried runs without the change; None where that is not known.
        law: the number of the law that is looked at.
    """

    mutation: int = -1
    trials: list[tuple[int, int]] = field(default_factory=list)
    patience: float = math.inf
    usual: float | None = None
    law: int = -1

    @property
    def limits(self) -> tuple[float, float]:
        """Seconds of processor time and of real time after which a law does not end."""
        if self.usual is None:
            return PROCESSOR_LIMIT, REAL_LIMIT
        return max(KNOWN_PROCESSOR_LIMIT, LONGER * self.usual), max(KNOWN_REAL_LIMIT, LONGER * self.usual)


def _serve(connection: Connection, mutations: Callable[[], list[Mutation]]) -> None:
    """Do jobs until there are none."""
    warnings.simplefilter("ignore")
    logging.disable()
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # a runtime that does wrong says so in many ways
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    prepare()
    every, todo = laws(), mutations()
    gc.collect()
    gc.freeze()
    connection.send("ready")
    while (job := connection.recv()) is not None:
        connection.send(_reach(every[job.law], todo) if job.law >= 0 else _try(every, todo, job))


def _try(every: list[Law], todo: list[Mutation], job: Job) -> Finding:
    start, began = time.process_time(), time.perf_counter()
    finding = Finding()
    for law, seed in job.trials:
        with contextlib.nullcontext() if job.mutation < 0 else applied(todo[job.mutation]):
            error = outcome(every[law], seed, *job.limits)
            if isinstance(error, DoesNotEndError) and job.usual is None:
                error = outcome(every[law], seed)  # really? the machine may have stood still
        finding.schedules += 1
        finding.seconds = time.process_time() - start
        # A law that fails under this schedule whatever is changed finds nothing. And one that was torn out of the middle of
        # something runs once more: what it left must not be held against the next change.
        doubtful = job.mutation >= 0 and (job.usual is None or isinstance(error, DoesNotEndError))
        if error is not None and not (doubtful and outcome(every[law], seed) is not None):
            finding.law, finding.seed, finding.how = every[law].name, seed, story(error)
            break
        if finding.seconds > job.patience or time.perf_counter() - began > REAL_PER_PATIENCE * job.patience:
            break
    finding.real = time.perf_counter() - began
    return finding


def _reach(law: Law, todo: list[Mutation]) -> tuple[list[tuple[int, set[int]]], float] | str:
    """Which changes it reaches, by seed, and the seconds that a schedule takes; or why that cannot be said."""
    start = time.perf_counter()
    reached = []
    seeds = range(LOOKED_AT if law.schedules is None else law.schedules)
    for seed in seeds:
        seen: set[int] = set()
        with instrumented(todo, seen.update):
            error = outcome(law, seed)
        if error is not None:
            return f"{law.name} fails with seed {seed} on a runtime that was not changed: {error!r}"
        reached.append((seed, seen))
    return reached, (time.perf_counter() - start) / len(seeds)


class Pool:
    """Worker processes that are replaced when they fall silent.

    Args:
        count: how many.
        mutations: the changes that jobs speak of, by number; a function that another process can import.
    """

    def __init__(self, count: int, mutations: Callable[[], list[Mutation]]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._mutations = mutations
        self._ready: set[Connection] = set()
        self._workers = [self._start() for _ in range(count)]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._mutations), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def run(self, jobs: Sequence[Job], *, silence: float = SILENCE) -> Iterator[tuple[Job, Any]]:
        """Do them all; None for one whose worker was killed, or died."""
        todo = list(reversed(jobs))
        doing: dict[Connection, tuple[Job, float]] = {}
        while todo or doing:
            for _, connection in self._workers:
                if connection in self._ready and connection not in doing and todo:
                    job = todo.pop()
                    connection.send(job)
                    doing[connection] = job, time.monotonic()
            for sent in wait([connection for _, connection in self._workers], timeout=1.0):
                assert isinstance(sent, Connection)
                connection = sent
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionError):
                    answer = None
                    self._replace(connection)
                if connection in doing:
                    yield doing.pop(connection)[0], answer
                elif answer is not None:
                    self._ready.add(connection)
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
            process.join()
            connection.close()


# Looking...


def look(pool: Pool, todo: list[Mutation], memory: Memory, patience: dict[int, float], findings: dict[int, Finding]) -> None:
    """Put down what finds each of these: what found it before; or else any law, if there are seconds to look for one."""
    every, names = laws(), keys(todo)
    recall(pool, names, list(patience), every, memory, findings)
    missing = {i: seconds for i, seconds in patience.items() if i not in findings and seconds > 0}
    print(f"{len(findings)} of {len(patience)} found by a remembered schedule; {len(missing)} to search for", flush=True)
    if missing:
        search(pool, todo, missing, every, findings)


def recall(
    pool: Pool, names: Sequence[Key], which: Sequence[int], every: list[Law], memory: Memory, findings: dict[int, Finding]
) -> None:
    """Put down those that are found by what found them before."""
    by_name = {law.name: i for i, law in enumerate(every)}
    known = {i: memory[names[i]] for i in which if names[i] in memory}
    trials = {i: (by_name[law], seed) for i, (law, seed, _) in known.items() if law in by_name}
    # What fails without any change finds nothing.
    sound: dict[tuple[int, int], float] = {}
    for job, answer in pool.run([Job(trials=[trial]) for trial in sorted(set(trials.values()))]):
        if answer is not None and not answer.law:
            sound[job.trials[0]] = answer.real
        else:
            law, seed = job.trials[0]
            print(f"LEFT OUT  {every[law].name} with seed {seed}, which fails on a runtime that was not changed")
    for job, answer in pool.run([Job(i, [trial], usual=sound[trial]) for i, trial in trials.items() if trial in sound]):
        if answer is None:
            answer = Finding(every[job.trials[0][0]].name, job.trials[0][1], "the process hangs or dies")
        if answer.law:
            answer.schedules = known[job.mutation][2]
            findings[job.mutation] = answer


def search(
    pool: Pool, todo: list[Mutation], patience: dict[int, float], every: list[Law], findings: dict[int, Finding]
) -> None:
    """Look for a law that finds each of these, among those that reach it, the quick ones first."""
    reached: dict[int, list[tuple[int, float, int, int]]] = {i: [] for i in patience}
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
                mine = Path(todo[i].place.file).stem in law.module
                reached[i].append((rank[i] - mine, cost, job.law, seed))
                rank[i] += 1
        if every[job.law].schedules is None:  # it may reach more than it did in those few
            for i, count in rank.items():
                reached[i] += [(count + n, cost, job.law, LOOKED_AT + n) for n in range(10 * LOOKED_AT)]
    for i in patience:
        elsewhere = ELSEWHERE.get(todo[i].place.name)
        reached[i] += [(-2, 0.0, number, 0) for number, law in enumerate(every) if law.name == elsewhere]
    jobs = [Job(i, [(law, seed) for *_, law, seed in sorted(reached[i])], seconds) for i, seconds in patience.items()]
    for job, answer in pool.run(jobs, silence=2 * SILENCE):
        if answer is None:
            answer = _one_by_one(pool, every, job)
        answer.reached = len({law for law, _ in job.trials})
        findings[job.mutation] = answer
        if not answer.law:
            print("...", todo[job.mutation], flush=True)


def _one_by_one(pool: Pool, every: list[Law], job: Job) -> Finding:
    """Try the schedules of a job singly, because one of them hangs or ends the process."""
    began = time.perf_counter()
    finding = Finding()
    for tried, (law, seed) in enumerate(job.trials, 1):
        ((_, answer),) = pool.run([Job(job.mutation, [(law, seed)])], silence=SILENCE / 3)
        if answer is None:
            return Finding(every[law].name, seed, "the process hangs or dies", tried)
        if answer.law:
            answer.schedules = tried
            return answer  # type: ignore[no-any-return]
        finding.schedules = tried
        finding.seconds += answer.seconds
        if finding.seconds > job.patience or time.perf_counter() - began > REAL_PER_PATIENCE * job.patience:
            break
    return finding
