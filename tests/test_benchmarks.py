"""The benchmarks run, on the host device and in a hurry; what they write can be read, judged, tabulated and drawn."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

from aiotrt.errors import MissingDependencyError
from benchmarks import bench_stages, bench_tensorrt, plots, suite, tables, waits
from benchmarks.bench_completion import COMPLETION, THROUGHPUT
from benchmarks.bench_endurance import ENDURANCE
from benchmarks.bench_host_input import AIOTRT, HOST_INPUT, JUDGED, LOOP
from benchmarks.bench_jitter import JITTER, beside
from benchmarks.bench_loop_lag import LOOP_LAG
from benchmarks.bench_scaling import SCALING
from benchmarks.bench_stages import CudaProbe, Stamps
from benchmarks.measure import HEARTBEAT, RESULTS, Heartbeat, Spread, as_record, busiest, drive, run_on, write, write_record
from benchmarks.networks import NETWORKS, Network
from benchmarks.parts import PARTS as ALL
from benchmarks.rows import MEETS, Entry, Plan, Row, Run, measure, measure_in_turns
from benchmarks.stored import LIMIT, packed, unpacked
from benchmarks.waits import CALL, EXECUTOR, FLOOR, POLLER

DOCS = Path(__file__).parents[1] / "docs"
PARTS = [name for name in ALL if name != "loop_lag"]  # whose rows on the host device are its own
#: The parts that a plain run measures too. The proof measures all.
PLAIN = {"stages", "pipeline", "endurance", "tensorrt"}

#: What every file has, and every row.
FILE = {"benchmark": str, "date": str, "machine": dict, "device": str, "quick": bool, "idle_lag": dict, "rows": list}
SPREAD = {"p50": float, "p99": float, "worst": float, "count": int}
ROW = {
    "part": str, "loop": str, "way": str, "setting": dict, "runs": int, "samples": int, "facts": dict, "verdict": str,
    "latency": dict, "overhead": dict, "rate": float, "cpu": float, "cpu_seconds": float, "spread": dict,
}  # fmt: skip


def check(record: dict[str, Any]) -> None:
    has(record, FILE)
    assert not record["failed"]
    assert {"cpu", "cores", "os", "python", "torch", "aiotrt", "gpu"} <= record["machine"].keys()
    for row in record["rows"]:
        has(row, ROW)
        assert row["device_seconds"] is None or row["device_seconds"] > 0
        assert row["rate"] > 0
        assert 1 <= row["samples"] * row["runs"] <= row["latency"]["count"]
        assert {"device_seconds", "ceiling", "others", "lag"} <= row.keys()
        assert {"p50", "p99", "rate", "cpu"} <= row["spread"].keys()
        for spread in (row["latency"], row["overhead"], *([row["lag"]] if row["lag"] else [])):
            has(spread, SPREAD)
        for low, high in row["spread"].values():
            assert low <= high


def has(found: dict[str, Any], wanted: dict[str, type]) -> None:
    for name, kind in wanted.items():
        assert isinstance(found[name], kind), name


def quickly(name: str, folder: Path, *more: str) -> int:
    return suite.main([name, "--device", "host", "--quick", "--out", str(folder), *more])


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in PLAIN else pytest.mark.proof) for name in PARTS])
def test_a_part_runs_and_writes_what_can_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickly(name, tmp_path) == 0
    record = tables.load(tmp_path / f"{name}-host.json")
    check(record)
    assert record["rows"]
    assert {row["loop"] for row in record["rows"]} - {"none"} <= {"asyncio", "uvloop"}
    printed = capsys.readouterr().out
    for table in tables.tables_of(record):
        assert tables.as_text(table) in printed
        assert all(len(line) == len(table.headings) for line in table.rows)


@pytest.mark.proof
def test_the_loops_lag_on_the_host_device(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    assert quickly("loop_lag", tmp_path) == 0
    assert os.sched_getaffinity(0) == before
    if (path := tmp_path / "loop_lag-host.json").exists():  # it takes the demo's model
        assert [len(table.rows) for table in tables.tables_of(tables.load(path))] == [3]


@pytest.mark.proof
def test_several_parts_run_in_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["stages", "tensorrt", "--device", "host", "--quick", "--out", str(tmp_path)]) == 0
    check(tables.load(tmp_path / "stages-host.json"))
    printed = capfd.readouterr().out
    assert "== stages: " in printed
    assert "skipped: tensorrt takes CUDA" in printed


def test_a_network_that_is_missing_or_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the TensorRT part, as far as it goes without a GPU: which packages are there differs from machine to machine."""
    pytest.importorskip("tensorrt_rtx", reason="the version that is written down is this package's")

    def missing(_: Path) -> Path:
        raise ModuleNotFoundError("No module named 'timm'")

    def no_builder(_: Path) -> Path:
        raise MissingDependencyError("to build an engine takes TensorRT")

    def broken(_: Path) -> Path:
        raise RuntimeError("the exporter gave up")

    def network(name: str, onnx: Callable[[Path], Path]) -> Network:
        return Network(name, onnx, np.float32, None, (), ((1, 3),), (1, 3))

    networks = [network("vit", missing), network("resnet50", no_builder), network("rfdetr", broken)]
    assert list(NETWORKS) == ["detector", "recogniser", "resnet50", "vit", "rfdetr"]
    monkeypatch.setattr(bench_tensorrt, "NETWORKS", {entry.name: entry for entry in networks})
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("benchmarks.measure.machine", dict)
        with pytest.raises(SystemExit) as caught:
            bench_tensorrt.main(["--quick", "--out", str(tmp_path)])
    assert caught.value.code == "FAILED: rfdetr: RuntimeError: the exporter gave up\n"
    record = tables.load(tmp_path / "tensorrt-partial.json")
    assert record["skipped"] == {
        "vit": {"all": "vit: No module named 'timm'"},
        "resnet50": {"all": "resnet50: to build an engine takes TensorRT"},
    }
    assert record["failed"] == {"rfdetr": "RuntimeError: the exporter gave up"}
    assert "not measured: vit, all: vit: No module named 'timm'" in capsys.readouterr().out


def test_stages_add_up(tmp_path: Path) -> None:
    quickly("stages", tmp_path)
    for row in tables.load(tmp_path / "stages-host.json")["rows"]:
        facts = row["facts"]
        assert list(facts["stages"]) == list(bench_stages.NAMES)
        assert all(seconds >= 0 for seconds in facts["stages"].values())
        assert sum(facts["stages"].values()) == pytest.approx(facts["await"], abs=2e-8)


def test_no_time_means_no_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickly("completion", tmp_path, "--limit", "1e-9") == 0
    record = tables.load(tmp_path / "completion-host-partial.json")
    assert not record["rows"]
    assert record["unreached"] == ["completion, us: 1000"]
    assert "not come to in 0 s (--limit): completion, us: 1000" in capsys.readouterr().out


def test_half_a_run_leaves_the_last_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickly("stages", tmp_path) == 0
    whole = (tmp_path / "stages-host.json").read_text()
    assert quickly("stages", tmp_path, "--limit", "1e-9") == 0
    assert "stages-host.json is left as it was" in capsys.readouterr().out
    assert (tmp_path / "stages-host.json").read_text() == whole

    def pressed(bench: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(ALL, "stages", replace(ALL["stages"], rows=pressed))
        assert quickly("stages", tmp_path) == suite.INTERRUPTED
    assert tables.load(tmp_path / "stages-host-partial.json")["failed"] == {"interrupted": "by the keyboard"}
    assert (tmp_path / "stages-host.json").read_text() == whole
    assert quickly("stages", tmp_path) == 0
    assert not (tmp_path / "stages-host-partial.json").exists()
    assert not [*tmp_path.glob("*.tmp")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "-50"], "-50 must be a number of seconds above 0"),
        (["--limit", "soon"], "invalid seconds_of value: 'soon'"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: "),
        (["--device", "cuda"], "torch sees no NVIDIA GPU here; --device host runs without one"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main(["completion", "--quick", *words])
    assert says in capsys.readouterr().err


def test_a_way_that_fails_is_told_and_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(lines: Sequence[waits.Line]) -> Any:
        raise RuntimeError("of all days")

    monkeypatch.setitem(waits._WAITS, POLLER, broken)
    assert quickly("completion", tmp_path) == 1
    record = tables.load(tmp_path / "completion-host-partial.json")
    assert {f"completion, 1000 us: {loop}, {POLLER}" for loop in ("asyncio", "uvloop")} == record["failed"].keys()
    prototypes = {way for way in waits.PROTOTYPES if waits.unavailable(way, "host") is None}
    others = {FLOOR, EXECUTOR, "sleep(0)", "sleep(1 ms)", CALL, "aiotrt lease"}
    assert {row["way"] for row in record["rows"]} == others | prototypes
    assert "of all days" in capsys.readouterr().out


def test_a_part_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["speed"])
    assert "there is no part 'speed'; there are completion, " in capsys.readouterr().err


def test_the_documentation_says_what_the_results_say() -> None:
    text = (suite.ROOT / "docs" / "internals" / "performance.md").read_text(encoding="utf-8")
    marks = tables.MARK.findall(text)
    assert {"serving-overload", "serving-side-by-side-host", "serving-side-by-side-cuda"} <= set(marks)
    assert tables.filled(text) == text, "python -m benchmarks table"


# Verdicts...


def row(
    part: str, way: str, setting: Mapping[str, float | str], latency: float, *,
    loop: str = "uvloop", p99: float | None = None, rate: float = 1e3, cpu: float = 0.01, ceiling: float | None = None,
    device: float | None = 1e-3, lag: float | None = None, facts: dict[str, Any] | None = None,
) -> Row:  # fmt: skip
    run = Run(Spread(latency, latency if p99 is None else p99, latency, 10), rate, cpu, None)
    late = [] if lag is None else [Spread(lag, lag, lag, 10)]
    return Row.measured(part, loop, way, setting, device, [run] * 5, ceiling=ceiling, lags=late, facts=facts)


IDLE = {loop: Spread(1e-4, 2e-4, 3e-4, 10) for loop in ("asyncio", "uvloop")}


def test_completion_is_judged_by_the_floor_and_the_executor() -> None:
    at = {"us": 1000}
    beside = [row("completion", FLOOR, at, 1.010e-3, cpu=1), row("completion", EXECUTOR, at, 1.200e-3, cpu=1)]
    good = row("completion", CALL, at, 1.018e-3)
    slow = row("completion", CALL, at, 1.060e-3, p99=1.2e-3, cpu=0.2)
    said = (
        "misses: 50.0 us over the floor, not 10; 20% of a core, not 9%; p99 200 us, not 100; "
        "0.30 of the executor's overhead, not a quarter; 0.20 of the executor's CPU, not a tenth"
    )
    for found, wanted in ((good, MEETS), (slow, said)):
        COMPLETION.judge([*beside, found], IDLE)
        assert found.verdict == wanted
    assert not any(other.verdict for other in beside)


def test_throughput_is_judged_by_the_ceiling() -> None:
    rows = [
        row("throughput", CALL, {"us": us, "slots": slots, "awaiters": 64}, 1e-3, rate=rate, ceiling=50e3, loop=loop)
        for us, slots, rate, loop in (
            (50, 2, 49_600, "asyncio"), (50, 2, 49_000, "asyncio"), (50, 4, 41_000, "uvloop"), (50, 4, 30_000, "uvloop"),
            (50, 4, 30_000, "asyncio"), (200, 4, 48_000, "uvloop"), (200, 4, 45_000, "uvloop"), (200, 8, 1, "uvloop"),
        )
    ]  # fmt: skip
    THROUGHPUT.judge(rows, IDLE)
    assert [found.verdict for found in rows] == [
        MEETS, "misses: 98.0% of the ceiling, not 99%", MEETS, "misses: 30,000 awaits/s, not 40,000",
        "", MEETS, "misses: 90.0% of the ceiling, not 95%", "",
    ]  # fmt: skip


def test_host_inputs_are_judged_by_the_blocking_loop() -> None:
    one: dict[str, float | str] = {"bytes": JUDGED, "memory": "pageable", "slots": 1}
    four = {**one, "slots": 4}
    rows = [
        row("host_input", LOOP, one, 200e-6, loop="none"),
        row("host_input", LOOP, four, 200e-6, loop="none", rate=5e3, ceiling=10e3),
        row("host_input", AIOTRT, one, 203e-6),
        row("host_input", AIOTRT, one, 230e-6, loop="asyncio"),
        row("host_input", AIOTRT, four, 1e-3, rate=9e3, ceiling=10e3),
        row("host_input", AIOTRT, four, 1e-3, rate=4e3, ceiling=10e3, cpu=2, loop="asyncio"),
        row("host_input", AIOTRT, {**one, "memory": "pinned"}, 1.0),
    ]
    HOST_INPUT.judge(rows, IDLE)
    assert [found.verdict for found in rows] == [
        "", "", MEETS, "misses: 30.0 us over the blocking loop, not 5", MEETS,
        "misses: 0.80 of the blocking loop's rate; 40% of the ceiling, not 80%; 200% CPU, not 150%", "",
    ]  # fmt: skip


def timed(p50: float, p99: float) -> Run:
    return Run(Spread(p50, p99, max(p50, p99), 400), 1e3, 0.1, None)


def test_the_default_is_judged_by_interval() -> None:
    interval = [timed(30e-6, 30e-6)] * 5
    for latency, wanted in (
        ((31e-6, 31e-6), MEETS),
        ((40e-6, 20e-6), "misses: p50 10.0 us worse than interval, give or take 0.0"),
    ):
        facts: dict[str, Any] = dict(beside([timed(*latency)] * 5, interval))
        rows = [row("jitter", "interval", {"scenario": "bimodal"}, 30e-6)]
        rows.append(row("jitter", "predict", {"scenario": "bimodal"}, latency[0], facts=facts))
        JITTER.judge(rows, IDLE)
        assert [found.verdict for found in rows] == ["", wanted]


def test_what_differs_by_chance_is_not_worse() -> None:
    """The same minutes are slow for both, so it is their differences that count."""

    def of(times: Sequence[float]) -> list[Run]:
        return [timed(1e-6 * us, 1e-6 * us) for us in times]

    interval = of((30, 90, 40, 60, 50))
    for times, is_worse in (
        ((38, 97, 49, 68, 58), True),  # by 8 each time, whatever the minute
        ((70, 80, 45, 61, 20), False),
        ((29, 88, 39, 60, 49), False),
    ):
        predict = row("jitter", "predict", {"scenario": "drifting"}, 50e-6, facts=dict(beside(of(times), interval)))
        JITTER.judge([predict], IDLE)
        assert predict.verdict.startswith("misses: p50 8.0 us worse") is is_worse
        assert (predict.verdict == MEETS) is not is_worse


def test_scaling_is_judged_by_the_cheapest_before_it() -> None:
    rows = [
        row("scaling", CALL, {"axis": "waiters", "n": n}, 1e-3, cpu=cpu)
        for n, cpu in ((1, 0.1), (16, 0.05), (64, 0.058), (256, 0.065))
    ]
    SCALING.judge(rows, IDLE)
    assert [found.verdict for found in rows] == ["", MEETS, MEETS, "misses: 1.30 times the CPU of 16, not 1.2"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_heartbeat_begins_when_all_awaiters_have(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds make their first request in one turn of the loop, which is late by all of them."""
    order: list[str] = []

    class Beat(Heartbeat):
        async def __aenter__(self) -> Self:
            order.append("beat")
            return await super().__aenter__()

    async def request() -> None:
        order.append("request")
        await asyncio.sleep(0.001)

    monkeypatch.setattr("benchmarks.rows.Heartbeat", Beat)
    plan = Plan(runs=2, seconds=0.01, least=4, warm=4, lag=0.01)
    run_on(loop, measure(request, plan, awaiters=256, count=256))
    assert order.index("beat") == 256 * (1 + plan.runs + 1)  # those that warm up, those of the runs, and each one's first


def test_lag_is_judged_by_the_idle_loop() -> None:
    rows = [row("loop_lag", CALL, {"us": 20}, 1e-3, lag=lag) for lag in (3e-4, 9e-4)]
    LOOP_LAG.judge(rows, IDLE)
    assert [found.verdict for found in rows] == [MEETS, "misses: p99 700 us over the idle loop's"]


def test_lag_is_judged_by_the_idle_loop_beside_it_and_not_where_that_was_late_itself() -> None:
    rows = [
        row("loop_lag", CALL, {"us": 20}, 1e-3, lag=3e-4, facts={"idle_lag": {"p50": 0.0, "p99": idle}})
        for idle in (5e-5, 2e-4, 1.4e-3)
    ]
    LOOP_LAG.judge(rows, IDLE)
    assert [found.verdict for found in rows] == [
        "misses: p99 250 us over the idle loop's", MEETS,
        "unknown: the idle loop was 1400 us late itself",
    ]  # fmt: skip


def test_memory_must_not_grow() -> None:
    rows = [
        row(
            "endurance",
            CALL,
            {"phase": "awaits"},
            1e-3,
            facts={"is_complete": complete, "growth": {"rss": rss, "device": device}},
        )
        for complete, rss, device in ((True, 1 << 20, 0), (True, 1 << 24, 1 << 21), (False, 1 << 30, 1 << 30))
    ]
    ENDURANCE.judge(rows, IDLE)
    assert [found.verdict for found in rows] == [
        MEETS, "misses: device memory grew by 2.0 MiB; resident memory grew by 16.0 MiB, not 8", "",
    ]  # fmt: skip


# How it is measured...


@pytest.mark.serial
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_heartbeat_sees_what_holds_up_every_turn(loop: str) -> None:
    """By less than the loop's own timers can tell: what is held up so waits for one turn or two."""
    held = 0.4e-3

    async def busy() -> list[float]:
        async with Heartbeat() as heartbeat:
            for _ in range(200):
                until = time.perf_counter() + held
                while time.perf_counter() < until:
                    pass
                await asyncio.sleep(0)
        return heartbeat.lags

    assert np.median(run_on(loop, busy())) > held / 2


@pytest.mark.serial
def test_the_heartbeat_counts_every_beat_of_a_loop_that_is_blocked() -> None:
    async def blocked() -> list[float]:
        async with Heartbeat() as heartbeat:
            await asyncio.sleep(0)
            until = time.perf_counter() + 50e-3
            while time.perf_counter() < until:
                pass
        return heartbeat.lags

    lags = run_on("asyncio", blocked())
    assert len(lags) >= 49
    assert sum(lag > 25e-3 for lag in lags) >= 24


@pytest.mark.parametrize(("awaiters", "count", "made"), [(1, 7, 7), (64, 5000, 5000), (64, 10, 64), (3, 7, 7)])
def test_as_many_requests_as_are_asked_for(awaiters: int, count: int, made: int) -> None:
    async def request() -> None:
        pass

    assert len(asyncio.run(drive(request, awaiters, count))) == made


def test_ways_take_turns_and_one_that_fails_is_left_out() -> None:
    turns: list[str] = []

    @asynccontextmanager
    async def way(name: str, lasts: int) -> AsyncIterator[Callable[[], Any]]:
        async def request() -> None:
            if turns.count(name) >= lasts:
                raise RuntimeError("enough")
            turns.append(name)

        if not lasts:
            raise RuntimeError("not here")
        yield request

    failed: dict[str, str] = {}
    lasts = {"a": 10**6, "b": 10**6, "c": 20, "d": 0}
    ways = {name: Entry(way(name, turns), 10, 3 if name == "b" else 1) for name, turns in lasts.items()}
    plan = Plan(3, 0.01, 10, 4, 1e-3)
    measured = asyncio.run(measure_in_turns(ways, plan, lambda name, error: failed.__setitem__(name, str(error))))
    assert failed == {"c": "enough", "d": "not here"}
    assert {name: len(runs) for name, (runs, _) in measured.items()} == {"a": 3, "b": 3}
    assert all(len(lags) == 1 for _, lags in measured.values())
    order = [name for name, _ in itertools.groupby(name for name in turns if name != "c")]
    assert order == ["a", "b"] * 5  # warmed, three runs, and the lag


# Tables and plots, from stored results...


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with small results."""
    folder = tmp_path / "results"
    single = [
        row("completion", way, {"us": us}, us * 1e-6 + over, device=us * 1e-6, lag=3e-4)
        for us in (100, 1000)
        for way, over in ((FLOOR, 5e-6), (CALL, 8e-6))
    ]
    single[-1].verdict = "misses: by a bar of long ago"  # judged anew when it is read
    many = [
        row("throughput", CALL, {"us": 50, "slots": 2, "awaiters": awaiters}, 1e-3, rate=rate, ceiling=2e4, lag=3e-4)
        for awaiters, rate in ((1, 8e3), (64, 1.9e4))
    ]
    for name, rows in (("completion-cuda", single), ("throughput-cuda", many)):
        results = {
            "device": "cuda", "quick": False, "heartbeat": HEARTBEAT, "idle_lag": IDLE, "failed": {}, "rows": rows,
            "skipped": {"numba async_done": "it is not installed"}, "unreached": ["completion, us: 5000"],
        }  # fmt: skip
        write(name, results, folder)
        check(tables.load(folder / f"{name}.json"))
    return folder


def test_tables_are_written_between_the_marks(stored: Path, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    marks = "".join(
        f"<!-- table {name} -->\nold figures\n<!-- end of table -->\n"
        for name in ("completion-cuda", "throughput-cuda", "jitter-cuda", "not-like-for-like")
    )
    document.write_text(f"Before.\n\n{marks}\nAfter.\n")
    options = ["--results", str(stored), "--docs", str(document)]
    assert suite.main(["table", "--check", *options]) == 1
    assert "old figures" in document.read_text()
    assert suite.main(["table", *options]) == 0
    text = document.read_text()
    assert text.startswith("Before.\n\n<!-- table completion-cuda -->\n\n")
    assert text.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "old figures" not in text
    assert "| way | 100 us | 1,000 us |\n| --- | ---: | ---: |\n" in text
    assert f"| {CALL} | 8.0±0.0 / worst 8.0 (1.0 %) | 8.0±0.0 / worst 8.0 (1.0 %) |" in text
    assert "The bars: meets 2 of 2 bars." in text
    assert "Not there:\n\n- numba async_done: it is not installed\n- completion, us: 5000: there was no time\n" in text
    assert "| 2, 64, aiotrt call | 19,000±0.0 (95 %) |" in text
    assert "*Not measured yet: there is no `benchmarks/results/jitter-cuda.json`.*" in text
    assert "- `synchronize` blocks the loop" in text
    assert suite.main(["table", "--check", *options]) == 0


def test_the_summary_has_what_was_measured_of_it(stored: Path, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("<!-- table summary -->\n<!-- end of table -->")
    options = ["--results", str(stored), "--docs", str(document)]
    assert suite.main(["table", *options]) == 0
    assert "not measured yet; aiotrt on uvloop:" in document.read_text()
    record = tables.load(stored / "completion-cuda.json")
    wanted = ("synchronize", "executor", "aiotrt call", "aiotrt lease")
    single = [row | {"way": way, "setting": {"us": 1000}} for row, way in zip(record["rows"], wanted, strict=True)]
    better = json.loads(json.dumps(single[0])) | {"loop": "asyncio", "device_seconds": single[0]["device_seconds"] + 2e-6}
    better["latency"]["p50"] += 1e-6
    record["machine"]["gpu"] = "A GPU"
    (stored / "completion-cuda.json").write_text(json.dumps(record | {"rows": [*single, better]}))
    assert suite.main(["table", *options]) == 0
    text = document.read_text()
    assert "A GPU, " in text
    said = (
        "| one awaiter, 1 ms of work: us over the device's time (CPU) | synchronize: 5.0 (1.0 %); executor: 8.0 (1.0 %) | "
    )
    assert f"{said}aiotrt call: 5.0 (1.0 %); aiotrt lease: 8.0 (1.0 %) |" in text
    assert "RF-DETR" not in text


def test_the_heading_says_how_much_the_processors_pace_differed(stored: Path) -> None:
    record = tables.load(stored / "completion-cuda.json")
    assert "the same Python" not in tables.heading_of(record)
    for row, paces in zip(record["rows"], [(40e-6, 50e-6), (60e-6, 90e-6)], strict=False):
        row["spread"]["pace"] = paces
    assert "; the same Python took up to 2.2 times as long in one run as in another" in tables.heading_of(record)


def test_the_summary_names_a_gpu_once(stored: Path, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("<!-- table summary -->\n<!-- end of table -->")
    record = tables.load(stored / "completion-cuda.json")
    record["machine"]["gpu"] = "A GPU"
    row = record["rows"][0] | {"facts": {"is_right": True}}
    for name, setting, ways, date in (
        ("completion-cuda", {"us": 1000}, ("synchronize", "executor", "aiotrt call", "aiotrt lease"), "2026-11-29"),
        ("pipeline-cuda", {}, ("torch", "torch in threads", "graph, no overlap", "aiotrt, 3 slots"), "2026-11-28"),
    ):
        rows = [row | {"way": way, "setting": setting, "part": name.removesuffix("-cuda")} for way in ways]
        (stored / f"{name}.json").write_text(json.dumps(record | {"benchmark": name, "rows": rows, "date": date}))
    assert suite.main(["table", "--results", str(stored), "--docs", str(document)]) == 0
    assert "\nA GPU, 2026-11-28 and 2026-11-29; aiotrt on uvloop:\n" in document.read_text()


def test_lags_of_the_loops_own_timers_are_left_out(stored: Path) -> None:
    path = stored / "throughput-cuda.json"
    record = tables.load(path)
    del record["heartbeat"]
    record |= {"benchmark": "loop_lag-cuda", "rows": [row | {"loop": loop} for row in record["rows"] for loop in IDLE]}
    path.write_text(json.dumps(record))
    found = tables.load(path)
    assert {row["loop"]: (row["lag"] is None, row["verdict"]) for row in found["rows"]} == {
        "asyncio": (False, MEETS), "uvloop": (True, ""),
    }  # fmt: skip
    (table,) = tables.tables_of(found)
    assert table.rows[0] == ["50 us, 1, aiotrt call", "0.10 (8,000)", "- (8,000)"]
    assert tables.missing_of(found)[-1].startswith("lag on uvloop: measured with the loop's own timers")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"benchmark": "completion-cuda", "rows": [{"setting": 1}]}'])
def test_a_damaged_file_is_named(text: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored / "completion-cuda.json"
    path.write_text(text)
    document = tmp_path / "performance.md"
    document.write_text("<!-- table completion-cuda -->\n<!-- end of table -->")
    for words in (
        ["plot", str(path), "--out", str(tmp_path / "plots")],
        ["table", "--results", str(stored), "--docs", str(document)],
    ):
        assert suite.main(words) == 1
        assert f"{path} cannot be read as results (" in capsys.readouterr().out
    assert document.read_text() == "<!-- table completion-cuda -->\n<!-- end of table -->"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["table", "--results", "/nowhere"], "--results /nowhere: there is no such folder"),
        (["table", "--docs", "/nowhere.md"], "--docs /nowhere.md: there is no such file"),
    ],
)
def test_tables_of_nothing(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(words)
    assert says in capsys.readouterr().err


def test_the_documentation_has_the_tables_of_the_stored_results() -> None:
    assert suite.main(["table", "--check"]) == 0, "python -m benchmarks table"


def test_plots_come_from_the_files_alone(stored: Path, tmp_path: Path) -> None:
    files = [*map(str, sorted(stored.glob("*.json")))]
    drawn = []
    for out in (tmp_path / "once", tmp_path / "again"):
        assert suite.main(["plot", *files, "--out", str(out)]) == 0
        drawn.append({path.name: path.read_text() for path in out.iterdir()})
    assert set(drawn[0]) == {f"{what}-cuda-uvloop.svg" for what in ("latency", "cpu", "lag", "throughput")}
    assert drawn[0] == drawn[1]
    assert suite.main(["plot", *files, "--loop", "asyncio", "--out", str(tmp_path / "none")]) == 0
    assert not [*(tmp_path / "none").iterdir()]


@pytest.mark.parametrize("part", ["completion", "throughput"])
def test_the_documentation_has_the_plots_of_the_stored_results(part: str, tmp_path: Path) -> None:
    record = tables.load(RESULTS / f"{part}-cuda.json")
    drawn = {path.name for path in plots.draw([record], tmp_path, ["uvloop"])}
    text = (DOCS / "internals" / "performance.md").read_text()
    for plot in plots.PLOTS[part]:
        picture = DOCS / "images" / f"{plot.__name__}-cuda-uvloop.svg"
        assert (f"(../images/{picture.name})" in text) is picture.exists() is (picture.name in drawn)
        if picture.exists():
            assert plots.described(record) in picture.read_text(), (
                "python -m benchmarks plot --loop uvloop --out docs/images"
            )


def test_plots_without_matplotlib(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert suite.main(["plot", str(stored / "completion-cuda.json"), "--out", str(tmp_path / "plots")]) == 1
    assert "plots need matplotlib" in capsys.readouterr().out


# What takes a GPU, as far as it goes without one...


def test_every_call_of_the_driver_exists() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in (
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuEventSynchronize",
        "cuEventDestroy",
        "cuStreamSynchronize",
        "cuLaunchHostFunc",
    ):
        assert callable(getattr(driver, name))
    assert int(driver.CUhostFn(4096)) == 4096
    flags = driver.CUevent_flags
    assert flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value == 3


def test_the_host_callback_wakes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    library, why = waits._notify()
    if why is not None:
        pytest.skip(why)

    class Driver:
        """Calls the C function from the stream's thread, as the driver does from one of its own."""

        CUhostFn = int

        @staticmethod
        def cuLaunchHostFunc(stream: Any, function: int, data: int) -> tuple[int]:  # noqa: N802  # the driver's name
            assert function
            stream.run(lambda: library.notify(data))
            return (0,)

    monkeypatch.setattr(waits, "_cuda", lambda: SimpleNamespace(driver=Driver))
    work = waits.Work("host", 1e-3)

    async def run() -> None:
        lines = [waits.Line(work.device, work.function) for _ in range(2)]
        for line in lines:
            stream: Any = line.stream
            stream.driver = stream
        async with waits._WAITS[waits.CALLBACK](lines) as requests:
            for _ in range(3):
                await asyncio.wait_for(asyncio.gather(*(request() for request in requests)), 10)
        for line in lines:
            line.close()

    asyncio.run(run())


def test_the_devices_clock_is_put_beside_the_hosts() -> None:
    # The device's clock began at 100 s of the host's and goes 50 ppm fast; an anchor is seen 2 to 12 us around its time.
    probe = CudaProbe.__new__(CudaProbe)

    def device(host: float) -> float:
        return (host - 100) * (1 + 50e-6)

    at = [100 + 0.001 * i for i in range(300)]
    probe._anchors = [device(host) for host in at]
    probe._earliest = [host - 2e-6 - 3e-6 * (i % 3) for i, host in enumerate(at)]
    probe._latest = [host + 2e-6 + 3e-6 * (i % 2) for i, host in enumerate(at)]
    probe._times = [(device(host + 100e-6), device(host + 300e-6)) for host in at]
    taken = [Stamps() for _ in at]
    error = probe.finish(taken)
    assert error < 3e-6
    for host, stamps in zip(at, taken, strict=True):
        assert stamps.begun == pytest.approx(host + 100e-6, abs=error + 1e-6)
        assert stamps.ended - stamps.begun == pytest.approx(200e-6, abs=1e-7)


def test_every_baseline_says_what_is_not_alike() -> None:
    assert set(waits.BASELINES) <= set(waits.NOT_LIKE_FOR_LIKE)
    assert set(waits.PROTOTYPES) <= set(waits.NOT_LIKE_FOR_LIKE)
    assert set(waits.BASELINES) == set(waits._WAITS)
    for way in (waits.TORCH, waits.CALLBACK, waits.NUMBA, waits.EXECUTOR_ASLEEP):
        assert waits.unavailable(way, "host") == "it takes CUDA"
    if importlib.util.find_spec("numba") is None:
        assert "cannot be imported" in (waits.unavailable(waits.NUMBA, "cuda") or "")


@pytest.mark.parametrize(
    ("shares", "gpu", "limited_by", "stage"),
    [
        ({"loop": 0.5, "device": 0.9, "decode": 0.6}, 0.7, "source", "decode"),
        ({"loop": 0.7, "device": 0.9, "decode": 0.6}, 0.7, "source", "decode"),
        ({"loop": 0.5, "device": 0.9, "decode": 0.0}, 0.7, "source", "loop"),
        ({"loop": 0.5, "decode": 0.8}, 0.7, "models", "loop"),  # a device that is idle for a third of the time
        ({"loop": 0.3}, 0.82, "models", "loop"),
        ({"loop": 0.5, "decode": 0.8}, 0.7, "sinks", "sinks"),
        ({"loop": 0.5, "decode": 0.8}, 0.95, "source", "device"),
        ({"loop": 0.5, "device": 0.9, "decode": 0.6}, 0.73, None, "decode"),  # an older file
        ({"loop": 0.7, "device": 1.05, "decode": 0.3}, 0.65, None, "loop"),  # alone, the device's would take longer
        ({"loop": 0.7, "device": 0.5}, 0.95, None, "device"),
        ({"loop": 0.99, "device": 0.93}, None, None, "device"),  # the loop polls
        ({"loop": 0.3, "device": 0.4, "decode": 0.95}, None, None, "decode"),
        ({"loop": 0.3}, None, None, "loop"),
    ],
)
def test_the_stage_that_limits(shares: dict[str, float], gpu: float | None, limited_by: str | None, stage: str) -> None:
    assert busiest(shares, gpu, limited_by) == stage


def test_a_record_is_plain() -> None:
    record = as_record("x", {"rows": [row("completion", CALL, {"us": 1}, 1e-3)]})
    assert json.loads(json.dumps(record)) == record


# Stored results...


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_file_is_small_and_has_what_a_reader_needs(path: Path) -> None:
    assert path.stat().st_size <= LIMIT
    record = tables.load(path)
    assert {"benchmark", "date", "machine", "quick"} <= record.keys()
    assert {"cpu", "cores", "os", "python", "torch", "aiotrt", "gpu"} <= record["machine"].keys()
    assert tables.tables_of(record)
    for row in record.get("rows", ()):
        assert row["runs"] >= 1
        assert row["rate"] > 0
        has(row["lag" if "over_idle" in row else "latency"], SPREAD)
        assert "rate" in row["spread"]


def test_a_summary_has_medians_and_the_spread_of_the_runs() -> None:
    # Powers of two, so that the figures are exact.
    runs = [
        Run(Spread(0.25 * n, 0.5 * n, 0.75 * n, 100 * n), 64 / n, 0.125 * n, others, 0.5 * n)
        for n, others in ((1, 0.5), (4, None), (2, 1.5))
    ]
    lags = [Spread(0.25, 0.25 * n, 2.0, 10) for n in (1, 4, 2)]
    found = Row.measured("completion", "uvloop", CALL, {"us": 1}, 0.125, runs, lags=lags)
    assert (found.runs, found.samples, found.others) == (3, 100, 1.0)
    assert found.latency == Spread(0.5, 1.0, 3.0, 700)
    assert found.overhead == Spread(0.375, 0.875, 2.875, 700)
    assert (found.rate, found.cpu, found.lag) == (32.0, 0.25, Spread(0.25, 0.5, 2.0, 30))
    assert found.spread == {
        "p50": (0.25, 1.0), "p99": (0.5, 2.0), "rate": (16.0, 64.0), "cpu": (0.125, 0.5), "lag": (0.25, 1.0),
        "pace": (0.5, 2.0),
    }  # fmt: skip
    (written,) = as_record("x", {"rows": [found]})["rows"]
    again = Row.of(written)
    assert again.latency == found.latency
    assert again.lag == found.lag
    assert as_record("x", {"rows": [again]})["rows"] == [written]


def test_a_written_file_gives_the_tables_and_the_pictures_of_the_run(tmp_path: Path) -> None:
    rows = [
        row("completion", way, {"us": us}, us * 1e-6 + over / 3, device=us * 1e-6, lag=3e-4)
        for us in (100, 1000)
        for way, over in ((FLOOR, 5e-6), (CALL, 8e-6))
    ]
    results = {"device": "cuda", "idle_lag": IDLE, "heartbeat": HEARTBEAT, "rows": rows}
    shown, path = as_record("completion-cuda", results), write("completion-cuda", results, tmp_path)
    read = tables.load(path)
    assert tables.tables_of(shown) == tables.tables_of(read)
    assert tables.heading_of(shown) == tables.heading_of(read)
    for plot in plots.PLOTS["completion"]:
        assert plot(shown, shown["rows"]) == plot(read, read["rows"])
    again = write_record(json.loads(path.read_text()) | {"rows": read["rows"]}, tmp_path / "again.json")
    assert tables.load(again) == read


def test_the_rows_of_real_engines_are_summaries_too(tmp_path: Path) -> None:
    spread = Spread(1e-3, 2e-3, 3e-3, 50)
    runs = [bench_tensorrt.Run(spread, rate, 0.5, 0.25) for rate in (900.0, 1100.0, 1000.0)]
    rows = [
        bench_tensorrt.Row("vit", CALL, 2, awaiters, ceiling, 5e-5, spread, wrong=False, **bench_tensorrt.summary_of(runs))
        for awaiters, ceiling in ((1, None), (64, 2000.0))
    ]
    results = {"quick": False, "loop": "uvloop", "awaiters": 64, "idle_lag": spread, "rows": rows}
    record = tables.load(write("tensorrt", results, tmp_path))
    assert [(found["runs"], found["spread"]["rate"]) for found in record["rows"]] == [(3, [900.0, 1100.0])] * 2
    (table,) = tables.tables_of(record)
    assert table.rows == [[CALL, "50.0 us"], [f"{CALL}, 2 slots", "1,000/s (50 %)"]]
    assert "medians of 3 runs; other programs used 0.2 cores meanwhile" in tables.heading_of(record)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"a": 1, "b": {"x": 1.5}}],
        [{"a": 1, "b": {"x": 1.5, "y": 2}}, {"a": 1, "b": None}, {"a": 1, "b": {"x": 0.25, "y": [1, 2]}}],
        [{"a": 1, "b": {"x": 1}}, {"a": 2, "b": {"y": 1}}],
        [{"a": 1, "b": [1]}, {"a": 2, "b": {"x": 1}}],
        [{"a": 1}, {"b": 1}],
    ],
)
def test_rows_that_are_packed_come_back(rows: list[dict[str, Any]]) -> None:
    assert unpacked(json.loads(json.dumps(packed(rows)))) == rows


def test_a_written_file_has_a_line_for_each_row_and_no_needless_digits(tmp_path: Path) -> None:
    rows = [row("completion", CALL, {"us": us}, 1e-3 / 3) for us in (1, 2, 3)]
    path = write("completion-cuda", {"device": "cuda", "idle_lag": IDLE, "rows": rows}, tmp_path)
    text = path.read_text()
    assert sum(line.startswith("[") for line in text.splitlines()) == 3
    assert "0.000333333," in text
    assert json.loads(text)["rows"]["same"]["way"] == CALL
