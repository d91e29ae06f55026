"""The same model behind three kinds of server, sent the same raw frames by the same clients.

    python -m benchmarks serving --part side_by_side [--device host|cuda] [--model NAME] [--litserve PYTHON] [--seconds 3]
        [--limit SECONDS]

A plain FastAPI endpoint that calls the model in a thread pool, LitServe with and without batches, and aiotrt in FastAPI with
and without batches; in processes of their own, started anew for each round, behind uvicorn with the same loop and parser.
Each has the best engine that it can use. On the host the model is PP-OCR's recogniser, in ONNX Runtime for all. On CUDA it
is torchvision's ResNet-50, or with `--model detector` its RetinaNet from pixels to boxes, in FP16 and in CUDA graphs for
all: each thread of the pool takes one of several graphs, and each of LitServe's processes has graphs for its batches.

First each server's settings are tuned on this machine: of its candidates those win that answer the most requests a second to
32 connections, and among those within 5 % of that, the one that answers most to a single connection. Then come several
rounds, in an order that is turned round each time. The loads: 1, 8 and 32 connections that ask again as soon as they are
answered; and requests at random moments, the same for all, 70 % as many a second as the server in the middle can answer at
its best: how long each takes counts from the moment when a request is due, and a server that cannot keep up shows it there.

Where time is short, no round begins that would end after `--limit` seconds. A third of it is for the tuning, in which each
server has as many of its candidates tried as the others. There is always one of each. The results say what was tried.

The bars: aiotrt without batches is ahead of the others without, and with batches of all others, in requests a second and in
p99; and every answer is the right one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.measure import as_record, finish, loops
from benchmarks.rows import MEETS, Row, verdict
from benchmarks.serving_rivals.clients import Clients, Load
from benchmarks.serving_rivals.contenders import MISSING, OURS, Contender, contenders, interpreter, same_server, versions
from benchmarks.serving_rivals.known import Known
from benchmarks.serving_rivals.trial import Seen, Trials
from benchmarks.tables import as_text, tables_of

__all__ = ["Clock", "compare", "judge", "measure", "overall"]

PART: Final = "side_by_side"
MOST: Final = 32  # connections
NEAR: Final = 0.95  # of the most requests a second, among which the answers to one connection decide
SHARE: Final = 0.7  # of the best of the server in the middle, for requests at random moments
MOMENTS: Final = 300  # at the least: of fewer there is no 99th percentile worth the name
ROUNDS: Final = 3


def measure(
    *, device: str, model: str, litserve: str | None, seconds: float, limit: float, quick: bool, folder: Path | None
) -> int:
    """Run it; returns the exit status.

    Args:
        device: "host" or "cuda".
        model: of `work.MODELS`.
        litserve: an interpreter that has LitServe; None for this one.
        seconds: how long each load lasts.
        limit: no round is begun that would end after so many seconds, and no candidates after a third of them.
        quick: one short round, with the first candidate of each.
        folder: for the results; None for none.
    """
    results = compare(device, model, litserve, seconds, limit, quick=quick)
    name = f"serving-side-by-side{'-detector' if model == 'detector' else ''}-{device}"
    if folder is not None:
        is_whole = not results["failed"] and not results["unreached"]
        print(finish(name, results, folder, is_whole=is_whole))
    show(as_record(name, results))
    return 1 if results["failed"] or results["wrong"] else 0


def compare(device: str, model: str, litserve: str | None, seconds: float, limit: float, *, quick: bool) -> dict[str, Any]:
    """All of it; for the arguments see `measure`."""
    began = time.monotonic()
    found = interpreter(litserve)
    installed = versions() if found is None else found[1]
    server = same_server(versions(), installed)
    results: dict[str, Any] = {
        "device": device, "quick": quick, "versions": installed, "server": server, "idle_lag": {},
        "limit": limit, "skipped": {}, "unreached": [], "failed": {}, "wrong": {}, "tuning": {}, "open": {}, "rows": [],
    }  # fmt: skip
    field = [who for who in contenders(device) if found is not None or who.program != "litserve"]
    if found is None:
        results["skipped"]["LitServe"] = f"{MISSING}; --litserve takes an interpreter that has it"
    with tempfile.TemporaryDirectory() as place:
        file = None
        if model == "reader":
            from benchmarks.serving_model import reader  # needs onnx and scikit-image, which no other model does

            file = reader(Path(place) / "reader.onnx")
        with Clients(Known(model, file, device), "uvloop" if "uvloop" in loops() else "asyncio") as clients:
            trials = Trials(
                model, device, file, clients, server, {} if found is None else {"litserve": found[0]}, Path(place),
                0.2 if quick else 0.5,
            )  # fmt: skip
            results["rows"] = _rounds(trials, field, results, seconds, began, limit, quick=quick)
        results["failed"] = trials.failed
        results["wrong"] = {f"{model}, {who}": wrong for who, wrong in trials.wrong.items() if wrong}
    judge(results["rows"])
    return results | {"seconds": time.monotonic() - began, "verdict": overall(results["rows"])}


def _rounds(
    trials: Trials, field: Sequence[Contender], results: dict[str, Any], seconds: float, began: float, limit: float, *,
    quick: bool,
) -> list[Row]:  # fmt: skip
    """The rows of one model."""
    tuned: dict[str, Mapping[str, Any]] = {}
    best: dict[str, float] = {}
    every: dict[str, list[tuple[Mapping[str, Any], list[Seen]]]] = {who.name: [] for who in field}
    loads = [Load(_connections(n), seconds / 3, n) for n in (MOST, 1)]
    clock = Clock(began)
    for number, candidates in enumerate(zip_longest(*(who.candidates[: 1 if quick else None] for who in field))):
        if number and not clock.has_time(limit / 3):
            results["unreached"].append(f"{trials.model}: candidates after the first {number}")
            break
        pairs = [(who, settings) for who, settings in zip(field, candidates, strict=True) if settings is not None]
        for (who, settings), seen in zip(pairs, trials.of(pairs, loads), strict=True):
            if seen:
                every[who.name].append((settings, seen))
        clock.step()
    for who in field:
        tried = every[who.name]
        results["tuning"][f"{trials.model}, {who.name}"] = [
            {"settings": settings, "rates": [one.run.rate for one in seen]} for settings, seen in tried
        ]
        if tried:
            most = best[who.name] = max(seen[0].run.rate for _, seen in tried)
            near = [(settings, seen) for settings, seen in tried if seen[0].run.rate >= NEAR * most]
            tuned[who.name] = max(near, key=lambda one: one[1][1].run.rate)[0]
    if not tuned:
        return []
    rate = results["open"][trials.model] = SHARE * statistics.median_low(best.values())
    count = max(2, round(rate * 0.5)) if quick else max(MOMENTS, round(rate * 1.5 * seconds))
    moments = np.cumsum(np.random.default_rng(1).exponential(1 / rate, count)).tolist()
    loads = [Load(_connections(n), seconds, n) for n in ((1, 8) if quick else (1, 8, MOST))]
    loads.append(Load(f"{rate:.0f} requests/s at random moments", moments=moments))
    there = [who for who in field if who.name in tuned]
    visits: dict[str, list[list[Seen]]] = {who.name: [] for who in there}
    for number in range(1 if quick else ROUNDS):
        if number and not clock.has_time(limit):
            results["unreached"].append(f"{trials.model}: rounds after the first {number}")
            break
        turn = there if number % 2 == 0 else there[::-1]
        for who, visit in zip(turn, trials.of([(who, tuned[who.name]) for who in turn], loads), strict=True):
            if visit:
                visits[who.name].append(visit)
        clock.step()
    return [
        _row(trials, who, load, tuned[who.name], [visit[i] for visit in visits[who.name]])
        for i, load in enumerate(loads)
        for who in there
        if visits[who.name]
    ]


class Clock:
    """Tells whether another step fits into a limit, if it takes as long as the last one.

    Args:
        began: since when the limit counts, by `time.monotonic`.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._last = time.monotonic()
        self._took = 0.0

    def step(self) -> None:
        """End a step."""
        now = time.monotonic()
        self._took, self._last = now - self._last, now

    def has_time(self, limit: float) -> bool:
        """Whether another step would end within so many seconds."""
        return time.monotonic() - self._began + self._took <= limit


def _connections(n: int) -> str:
    return "1 connection" if n == 1 else f"{n} connections"


def _row(trials: Trials, who: Contender, load: Load, settings: Mapping[str, Any], seen: Sequence[Seen]) -> Row:
    facts = {
        "settings": settings,
        "is_batched": who.is_batched,
        "is_open": not load.connections,
        "memory": statistics.median(one.memory for one in seen),
        "client_cpu": statistics.median(one.client for one in seen),
        "lag_spread": (min(one.lag.p99 for one in seen), max(one.lag.p99 for one in seen)),
    }
    return Row.measured(
        PART, trials.server["loop"], who.name, {"model": trials.model, "load": load.name}, None, [one.run for one in seen],
        lags=[one.lag for one in seen], facts=facts,
    )  # fmt: skip


def judge(rows: Sequence[Row]) -> None:
    """Fill in the verdicts of aiotrt's rows: by how much each other server is ahead of it, if any is."""
    for row in rows:
        others = [other for other in rows if other.setting == row.setting and not other.way.startswith(OURS)]
        if not row.way.startswith(OURS) or not others:
            continue
        # Without batches it is compared with those without: what batches are worth is not what it is to show.
        others = [other for other in others if row.facts["is_batched"] or not other.facts["is_batched"]]
        quickest = max(others, key=lambda other: other.rate)
        steadiest = min(others, key=lambda other: other.latency.p99)
        misses = {
            f"{row.rate / quickest.rate:.3f} of the requests a second of {quickest.way}": (
                not row.facts["is_open"] and row.rate < quickest.rate
            ),
            f"{row.latency.p99 / steadiest.latency.p99:.3f} of the p99 of {steadiest.way}": (
                row.latency.p99 > steadiest.latency.p99
            ),
        }
        row.verdict = verdict([what for what, is_missed in misses.items() if is_missed])


def overall(rows: Sequence[Row]) -> str:
    """Whether aiotrt is ahead, in a sentence."""
    judged = [row for row in rows if row.verdict]
    behind = [row for row in judged if row.verdict != MEETS]
    if not judged:
        return "nothing to compare"
    if not behind:
        return "aiotrt is ahead in throughput and p99"
    return f"aiotrt is ahead in throughput and p99 in {len(judged) - len(behind)} of {len(judged)} comparisons"


def show(record: Mapping[str, Any]) -> None:
    """What there is to say."""
    for what, how in record["failed"].items():
        print(f"FAILED: {what}:\n{how}")
    for what, why in record["skipped"].items():
        print(f"NOT MEASURED: {what}: {why}")
    for what in record["unreached"]:
        print(f"not come to in {record['limit']:.0f} s (--limit): {what}")
    print(f"uvicorn with {record['server']['http']} on {record['server']['loop']} for all; {record['seconds']:.0f} s")
    for name, tried in record["tuning"].items():
        print(f"tuned: {name}")
        for one in tried:
            many, single = one["rates"]
            print(f"  {many:7.1f} requests/s to {MOST} connections, {single:6.1f} to one: {one['settings']}")
    for table in tables_of(record):
        print(f"\n{as_text(table)}")
    others = [row["others"] for row in record["rows"] if row["others"] is not None]
    if others:
        print(f"\nother programs used {statistics.mean(others):.2f} cores on average, {max(others):.2f} in one row")
    print(f"wrong answers: {record['wrong'] or 'none'}")
    for row in record["rows"]:
        if row["verdict"]:
            print(f"{row['setting']['model']}, {row['setting']['load']}, {row['way']}: {row['verdict']}")
    print(record["verdict"])
