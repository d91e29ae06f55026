"""The targets are judged by what is written down, and measured and counted without a GPU as far as that goes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import benchmarks.prototype.build as builds
from benchmarks import calls, suite, tables, targets, waits
from benchmarks.bench_host_input import LOOP
from benchmarks.measure import Spread, as_record, loops, run_on, write
from benchmarks.prototype import plain_calls
from benchmarks.prototype.core import Waiter
from benchmarks.rows import Bench, Plan, Row, Run
from benchmarks.stored import LIMIT, unpacked
from benchmarks.target_lines import GROUPS, NATIVE, ONE, PYTHON, TO_THREAD, TargetLine, lines_of, prototypes_of
from benchmarks.waits import (
    CALL,
    EXECUTOR,
    FLOOR,
    LEASE,
    PROTOTYPE_CALL,
    PROTOTYPE_CALL_COMPILED,
    PROTOTYPE_LEASE,
    PROTOTYPES,
    SLEEP_0,
    Work,
)


def row(
    part: str, way: str, setting: Mapping[str, float | str], *, p50: float = 1e-3, p99: float = 0.0, rate: float = 1e3,
    cpu: float = 0.1, lag: float | None = None, facts: dict[str, Any] | None = None, loop: str = "uvloop",
) -> Row:  # fmt: skip
    run = Run(Spread(p50, max(p50, p99), max(p50, p99), 100), rate, cpu, None)
    late = [] if lag is None else [Spread(lag, lag, lag, 100)]
    return Row.measured(part, loop, way, setting, 1e-4, [run] * 3, lags=late, facts=facts)


def said(lines: list[TargetLine]) -> dict[str, str]:
    return {line.what: f"{line.figure} {line.goal} {line.verdict}" for line in lines}


# Judging...


def test_a_short_call_is_judged_by_the_prototype_the_executor_and_sleep_0() -> None:
    at: dict[str, float | str] = {"us": 100}
    rows = [
        row(ONE, CALL, at, p50=130e-6, p99=200e-6, rate=5000, cpu=0.5),
        row(ONE, LEASE, at, p50=113e-6, p99=120e-6, rate=5000, cpu=0.25),
        row(ONE, PROTOTYPE_CALL, at, p50=120e-6),
        row(ONE, PROTOTYPE_LEASE, at, p50=110e-6),
        row(ONE, EXECUTOR, at, p50=140e-6, p99=180e-6, rate=5000, cpu=1.0),
        row(ONE, SLEEP_0, at, rate=5000, cpu=1.0),
        row(ONE, FLOOR, at),
    ]
    assert said(lines_of(rows, PYTHON)) == {
        "call, 100 us: p50 over the prototype's": "10.0 us <= 7.0 us misses by 3.0 us",
        "call, 100 us: p50 over the executor's": "-10.0 us <= 0.0 us meets",
        "call, 100 us: p99 over the executor's": "20.0 us <= 0.0 us misses by 20.0 us",
        "call, 100 us: CPU, times the executor's": "0.50 <= 1.00 meets",
        "call, 100 us: CPU, times the sleep(0) loop's": "0.50 <= 1.00 meets",
        "lease, 100 us: p50 over the prototype's": "3.0 us <= 4.0 us meets",
        "lease, 100 us: p50 over the executor's": "-27.0 us <= 0.0 us meets",
        "lease, 100 us: p99 over the executor's": "-60.0 us <= 0.0 us meets",
        "lease, 100 us: CPU, times the executor's": "0.25 <= 1.00 meets",
        "lease, 100 us: CPU, times the sleep(0) loop's": "0.25 <= 1.00 meets",
    }


def test_a_compiled_build_is_judged_by_the_compiled_prototype() -> None:
    at: dict[str, float | str] = {"us": 20}
    rows = [
        row(ONE, CALL, at, p50=40e-6, cpu=0.13),
        row(ONE, PROTOTYPE_CALL, at, p50=20e-6),
        row(ONE, PROTOTYPE_CALL_COMPILED, at, p50=36e-6),
    ]
    assert said(lines_of(rows, NATIVE)) == {
        "call, 20 us: p50 over the prototype's": "4.0 us <= 5.0 us meets",
        "call, 20 us: CPU, times the prototype's": "1.30 <= 1.25 misses by 0.05",
    }
    assert set(prototypes_of(NATIVE)) | set(prototypes_of(PYTHON)) == set(PROTOTYPES)


def test_long_work_has_targets_of_its_own() -> None:
    at: dict[str, float | str] = {"us": 5000}
    rows = [row(ONE, LEASE, at, p50=5.01e-3, cpu=0.125), row(ONE, PROTOTYPE_LEASE, at, p50=5e-3)]
    for build in (PYTHON, NATIVE):
        rows[1].way = prototypes_of(build)[1]
        assert said(lines_of(rows, build)) == {
            "lease, 5,000 us: p50 over the prototype's": "10.0 us <= 8.0 us misses by 2.0 us",
            "lease, 5,000 us: CPU, times the prototype's": "1.25 <= 1.30 meets",
        }


def test_many_awaiters_are_judged_by_rate_and_by_cpu_for_an_await() -> None:
    at: dict[str, float | str] = {"us": 200, "slots": 4, "awaiters": 64}
    rows = [
        row("throughput", CALL, at, rate=800, cpu=0.1),
        row("throughput", PROTOTYPE_CALL, at, rate=1000, cpu=0.1),
        row("throughput", SLEEP_0, at, rate=800, cpu=1.0),
    ]
    assert said(lines_of(rows, PYTHON)) == {
        "64 awaiters, 4 slots, 200 us: rate, of the prototype's": "0.80 >= 0.85 misses by 0.05",
        "64 awaiters, 4 slots, 200 us: CPU, times the prototype's": "1.25 <= 1.30 meets",
        "64 awaiters, 4 slots, 200 us: CPU, times the sleep(0) loop's": "0.10 <= 1.00 meets",
        "64 awaiters, 4 slots, 200 us: rate, of the sleep(0) loop's": "1.00 >= 0.97 meets",
    }
    short = [row("throughput", way, {**at, "us": 50}) for way in (CALL, PROTOTYPE_CALL, SLEEP_0)]
    assert list(said(lines_of(short, PYTHON))) == ["64 awaiters, 4 slots, 50 us: rate, of the prototype's"]


def test_host_input_is_judged_by_the_blocking_loop() -> None:
    rows = []
    for size, slots, p50, rate in (
        (16 << 10, 1, 111e-6, 1.0), (6 << 20, 1, 9.0, 1.0), (64 << 10, 4, 1.0, 1.0), (1 << 20, 4, 1.0, 1290.0),
        (6 << 20, 4, 1.0, 2000.0),
    ):  # fmt: skip
        at: dict[str, float | str] = {"bytes": size, "slots": slots}
        rows += [row("host", LOOP, at, p50=100e-6), row("host", CALL, at, p50=p50, rate=rate)]
    assert said(lines_of(rows, PYTHON)) == {
        "host input, 16 KiB, 1 slots: p50 over the blocking loop's": "11.0 us <= 10.0 us misses by 1.0 us",
        "host input, 1,024 KiB, 4 slots: rate, of the blocking loop's": "1.29 >= 1.30 misses by 0.01",
        "host input, 6,144 KiB, 4 slots: rate, of the blocking loop's": "2.00 >= 2.00 meets",
    }


def test_lag_is_judged_by_the_idle_loop_unless_that_is_late_itself() -> None:
    rows = [
        row("lag", CALL, {"us": us, "slots": 4, "awaiters": 64}, lag=350e-6, facts={"idle_lag": {"p99": idle}})
        for us, idle in ((20, 100e-6), (50, 200e-6), (200, 900e-6))
    ]
    assert [line.verdict for line in lines_of(rows, PYTHON)] == [
        "misses by 50.0 us", "meets", "unknown: the idle loop was 900 us late itself",
    ]  # fmt: skip


def test_waiters_are_judged_by_the_worst_number_of_them_on_each_loop() -> None:
    rows = [
        row("waiters", CALL, {"n": n}, cpu=cpu, loop=loop)
        for loop, shares in (("asyncio", (0.4, 0.1, 0.115)), ("uvloop", (0.4, 0.1, 0.13)))
        for n, cpu in zip((1, 64, 1024), shares, strict=True)
    ]
    assert [(line.loop, line.figure, line.verdict) for line in lines_of(rows, PYTHON)] == [
        ("asyncio", "1.15", "meets"), ("uvloop", "1.30", "misses by 0.10"),
    ]  # fmt: skip


def test_the_host_device_is_judged_by_to_thread() -> None:
    rows = [
        row("threads", way, {"callers": callers}, facts={"loop_cpu": seconds})
        for callers, ours, theirs in ((1, 40e-6, 50e-6), (16, 80e-6, 40e-6))
        for way, seconds in ((CALL, ours), (TO_THREAD, theirs))
    ]
    assert [line.verdict for line in lines_of(rows, PYTHON)] == ["meets", "misses by 0.50"]


def test_what_has_nothing_beside_it_has_no_line() -> None:
    rows = [row(ONE, CALL, {"us": 20}), row("throughput", FLOOR, {"us": 50, "slots": 4}), row("host", CALL, {"bytes": 1})]
    rows += [
        row("threads", CALL, {"callers": 1}, facts={"loop_cpu": 1.0}),
        row("waiters", CALL, {"n": 1}),
        row("lag", CALL, {}),
    ]
    assert lines_of(rows, PYTHON) == []


def test_a_whole_run_is_stored_in_60_kb_and_gives_its_tables(tmp_path: Path) -> None:
    """As many rows as a run on CUDA has, with figures as long as they get."""
    long = 1.2345678e-3
    ones = [{"us": us} for us in targets.LENGTHS["cuda"]]
    many = [{"us": us, "slots": slots, "awaiters": 64} for us, slots in targets.MANY["cuda"]]
    sizes = [{"bytes": size, "slots": slots} for size in targets.SIZES["cuda"] for slots in (1, 4)]
    lags = [{"us": us, "slots": 4, "awaiters": 64} for us in targets.SATURATED["cuda"]]
    facts = {"idle_lag": {"p99": long}, "loop_cpu": long}
    parts: list[tuple[str, list[Any], list[str]]] = [
        (ONE, ones, [FLOOR, EXECUTOR, SLEEP_0, CALL, PROTOTYPE_CALL, LEASE, PROTOTYPE_LEASE]),
        ("throughput", many, [EXECUTOR, SLEEP_0, CALL, PROTOTYPE_CALL]),
        ("host", sizes, [LOOP, CALL]),
        ("lag", lags, [CALL]),
        ("waiters", [{"n": n} for n in targets.WAITERS["cuda"]], [CALL]),
        ("threads", [{"callers": n} for n in targets.CALLERS], [CALL, TO_THREAD]),
    ]
    rows = [
        row(part, way, at, p50=long, p99=2 * long, rate=12345.678, cpu=0.12345678, lag=long, facts=facts, loop=loop)
        for part, settings, ways in parts for loop in ("asyncio", "uvloop") for at in settings for way in ways
    ]  # fmt: skip
    lines = lines_of(rows, PYTHON)
    assert {line.group for line in lines} == set(GROUPS)
    bench = Bench("cuda", quick=False, limit=480, tell=lambda _: None)
    settings = targets.Settings(bench, Plan(7, 0.05, 100), GROUPS, [], 100)
    path = write("targets-cuda", targets.results_of(settings, PYTHON, rows, lines, 1.0), tmp_path)
    assert path.stat().st_size <= LIMIT
    record = tables.load(path)
    assert [table.title for table in tables.tables_of(record)] == [f"targets: {group}" for group in GROUPS]
    assert len(unpacked(record["figures"])) == len(rows)
    assert sum(len(table.rows) for table in tables.tables_of(record)) == len(lines) / 2
    assert path.read_text().count("\n") > len(rows) + len(lines)


# Measuring...


def test_the_host_device_has_one_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["targets", "--device", "host", "--quick", "--count", "4", "--out", str(tmp_path)]
    assert suite.main(words) == 0
    record = tables.load(tmp_path / "targets-host.json")
    lines = unpacked(record["lines"])
    assert {line["group"] for line in lines} == {"threads"}
    assert len(lines) == 2 * len(loops())
    printed = capsys.readouterr().out
    for table in tables.tables_of(record):
        assert tables.as_text(table) in printed
    assert f"meets {record['met']} of {len(lines)} targets" in printed


def test_groups_that_are_named_run_on_the_host_device(tmp_path: Path) -> None:
    only = [group for group in GROUPS if group != "threads"]
    words = ["targets", "--device", "host", "--quick", "--count", "2", "--loop", "asyncio", "--out", str(tmp_path)]
    assert suite.main([*words, "--only", *only]) == 0
    record = tables.load(tmp_path / "targets-host-partial.json")
    assert {line["group"] for line in unpacked(record["lines"])} == set(only)
    assert {row["loop"] for row in unpacked(record["figures"])} == {"asyncio"}


def test_a_way_that_fails_is_reported_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(lines: object) -> Any:
        raise RuntimeError("no threads today")

    monkeypatch.setitem(waits._WAITS, EXECUTOR, broken)
    monkeypatch.setattr(targets, "unavailable", lambda way, device: "there is no compiler")
    words = ["targets", "--device", "host", "--quick", "--count", "2", "--loop", "asyncio", "--only", "call"]
    assert suite.main([*words, "--out", str(tmp_path)]) == 1
    record = tables.load(tmp_path / "targets-host-partial.json")
    assert {row["way"] for row in unpacked(record["figures"])} == {FLOOR, SLEEP_0, CALL}
    assert list(record["failed"]) == [f"one: 1000 us, asyncio, {EXECUTOR}"]
    printed = capsys.readouterr().out
    assert "no threads today" in printed
    assert re.search(r"not measured: prototype call.*, prototype lease.*: there is no compiler", printed)


@pytest.mark.parametrize("words", [["--count", "0"], ["--device", "cuda"], ["--only", "speed"], ["--out", "/proc/nowhere"]])
@pytest.mark.parametrize("command", ["targets", "calls"])
def test_wrong_arguments(command: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main([command, *words])


# Counting...


def test_the_listing_of_calls_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["calls", "--device", "host", "--count", "5"]) == 0
    listed: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    way = ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(" calls"):
            way, _, total = line.removesuffix(" calls").rpartition(": ")
            totals[way] = int(total)
        elif line.startswith("  ") and way:
            listed.setdefault(way, []).append(int(line.split()[0]))
    assert set(totals) == {CALL, LEASE, calls.BATCHED, calls.HOST_CALL, PROTOTYPE_CALL, PROTOTYPE_LEASE}
    assert {way: sum(numbers) for way, numbers in listed.items()} == totals


@pytest.mark.parametrize("loop", list(loops()))
def test_calls_of_the_loop_and_of_the_benchmark_are_left_out(loop: str) -> None:
    def called() -> None:
        pass

    async def request() -> None:
        called()
        await asyncio.sleep(0)
        called()

    counted = run_on(loop, calls.profiled(request, 3, warm=1))
    assert counted.totals == [4, 4, 4]  # the coroutine begins and goes on
    assert sorted(counted.functions.values()) == [2, 2]


def test_the_summary_says_what_meets_its_target() -> None:
    counted = {CALL: calls.Counted([27, 28, 40], {}), LEASE: calls.Counted([25], {}), calls.BATCHED: calls.Counted([9], {})}
    table = calls.summary(counted, "cuda")
    assert [line[1:] for line in table.rows] == [
        ["28", "27 to 40", "<= 28", "meets"], ["25", "25 to 25", "<= 22", "misses by 3"], ["9", "9 to 9", "", ""],
    ]  # fmt: skip


# The prototype...


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.proof if way.endswith("compiled") else ()) for way in PROTOTYPES]
)
@pytest.mark.parametrize("loop", list(loops()))
@pytest.mark.timeout(240)  # compiling takes its time
def test_the_prototype_waits_for_the_work(way: str, loop: str) -> None:
    if why := waits.unavailable(way, "host"):
        pytest.skip(why)
    work = Work("host", 1e-3)
    work.function = lambda x: x + 1

    async def run() -> None:
        async with waits.opened(way, work, 2) as request:
            results = await asyncio.wait_for(asyncio.gather(*(request() for _ in range(7))), 10)
            for result in results:
                assert result is None or (isinstance(result, torch.Tensor) and torch.equal(result, work.example + 1))
            task = asyncio.ensure_future(request())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(request(), 10)

    run_on(loop, run())


def test_a_fault_while_polling_reaches_the_caller() -> None:
    from benchmarks.prototype.core import Model, Poller, Slot
    from benchmarks.prototype.plain_calls import LinuxSystem

    class Broken(Slot):
        def launch(self) -> int:
            return 0

        def query(self) -> bool:
            raise RuntimeError("the device is lost")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        system = LinuxSystem()
        poller = Poller(loop, system, system.descriptor)
        model = Model(loop, poller, [Broken(1e-4)], torch.zeros(1), lambda: None, lambda: True)
        with pytest.raises(RuntimeError, match="the device is lost"):
            await asyncio.wait_for(model.lease(), 10)
        with pytest.raises(ValueError, match=r"expected a contiguous torch.float32 of shape \(1,\) on cpu"):
            await model.call(torch.zeros(2))
        poller.close()
        system.close()

    asyncio.run(run())


def test_a_waiter_can_be_used_like_a_future() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop, None, False)
        waiter.value = 3
        loop.call_soon(waiter.finish)
        assert await asyncio.wait_for(asyncio.ensure_future(waiter), 10) == 3
        assert waiter.done()
        assert not waiter.cancelled()
        assert waiter.exception() is None
        assert not waiter.cancel()

    asyncio.run(run())


def test_the_plain_calls_use_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver: Any = pytest.importorskip("cuda.bindings.driver")
    called: list[Any] = []
    status = {"cuEventQuery": 600}

    class Driver:
        def __getattr__(self, name: str) -> Any:
            return getattr(driver, name)

        def __init__(self) -> None:
            for name, more in (
                ("cuGraphLaunch", ()), ("cuEventRecord", ()), ("cuEventQuery", ()), ("cuEventDestroy", ()),
                ("cuEventCreate", (driver.CUevent(7),)), ("cuCtxGetCurrent", (driver.CUcontext(8),)),
            ):  # fmt: skip
                setattr(self, name, self._function(name, more))

        def _function(self, name: str, more: tuple[Any, ...]) -> Any:
            def call(*given: Any) -> tuple[Any, ...]:
                called.append((name, *map(int, given)))
                return driver.CUresult(status.get(name, 0)), *more

            return call

        def cuGraphExecMemcpyNodeSetParams(self, graph: Any, node: Any, copy: Any, context: Any) -> tuple[Any]:  # noqa: N802
            called.append((int(node), int(copy.srcDevice), int(copy.dstDevice), copy.WidthInBytes, int(context)))
            return (driver.CUresult(0),)

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cast("Any", Driver()))
    slot = plain_calls.CudaSlot(1e-4, 1, 2)
    slot.set_copies(11, 12, 100, 200, 64, 32)
    called.clear()
    slot.copy_and_launch(300, 400)
    slot.copy_and_launch(300, 500)
    launch = [("cuGraphLaunch", 1, 2), ("cuEventRecord", 7, 2)]
    assert called == [(11, 300, 100, 64, 8), (12, 200, 400, 32, 8), *launch, (12, 200, 500, 32, 8), *launch]
    assert not slot.query()
    status["cuEventQuery"] = 0
    assert slot.query()
    status["cuEventQuery"] = 700
    with pytest.raises(RuntimeError, match="polling an event: the driver answered"):
        slot.query()
    status["cuGraphLaunch"] = 1
    with pytest.raises(RuntimeError, match="launching failed"):
        slot.launch()
    slot.close()


@pytest.mark.proof
@pytest.mark.timeout(240)
def test_the_compiled_calls_use_the_functions_they_are_given() -> None:
    """A stand-in for the driver, whose event completes when it is told to."""
    made = builds.compiled()
    if isinstance(made, str):
        pytest.skip(made)
    with pytest.raises(RuntimeError, match="call fill"):
        made.calls.CudaSlot(1e-4, 1, 2)
    called: list[Any] = []
    status = {"cuEventQuery": 600}

    def function(name: str, *arguments: Any) -> Any:
        def call(*given: Any) -> int:
            called.append((name, *given))
            if name == "cuGraphExecMemcpyNodeSetParams":
                words = ctypes.cast(given[2], ctypes.POINTER(ctypes.c_uint64))
                called[-1] = (name, given[1], words[6], words[17], words[22])  # source, destination, bytes
            return status.get(name, 0)

        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call)

    pointer = ctypes.c_void_p
    functions = {
        "cuGraphLaunch": function("cuGraphLaunch", pointer, pointer),
        "cuEventCreate": function("cuEventCreate", pointer, ctypes.c_uint),
        "cuEventDestroy_v2": function("cuEventDestroy_v2", pointer),
        "cuEventRecord": function("cuEventRecord", pointer, pointer),
        "cuEventQuery": function("cuEventQuery", pointer),
        "cuCtxGetCurrent": function("cuCtxGetCurrent", pointer),
        "cuGraphExecMemcpyNodeSetParams": function("cuGraphExecMemcpyNodeSetParams", pointer, pointer, pointer, pointer),
    }
    assert set(functions) == set(made.calls.NAMES)
    made.calls.fill({name: ctypes.cast(found, pointer).value for name, found in functions.items()})
    slot = made.calls.CudaSlot(1e-4, 1, 2)
    slot.set_copies(11, 12, 100, 200, 64, 32)
    called.clear()
    slot.copy_and_launch(300, 400)
    slot.copy_and_launch(300, 500)
    set_copy, launch = "cuGraphExecMemcpyNodeSetParams", [("cuGraphLaunch", 1, 2), ("cuEventRecord", None, 2)]
    assert called == [
        (set_copy, 11, 300, 100, 64),
        (set_copy, 12, 200, 400, 32),
        *launch,
        (set_copy, 12, 200, 500, 32),
        *launch,
    ]
    assert not slot.query()
    status["cuEventQuery"] = 0
    assert slot.query()
    status["cuEventQuery"] = 700
    with pytest.raises(RuntimeError, match="polling an event: the driver answered 700"):
        slot.query()
    status["cuGraphLaunch"] = 1
    with pytest.raises(RuntimeError, match="launching: the driver answered 1"):
        slot.launch()
    made.calls.fill(dict.fromkeys(made.calls.NAMES, 0))


def test_no_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    uncached = builds.compiled.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert uncached() == "Cython and setuptools cannot be imported"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: object())
        patch.setattr("shutil.which", lambda name: None)
        assert uncached() == "there is no C compiler"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: object())
        patch.setattr("shutil.which", lambda name: "cc")
        patch.setattr(builds, "SETUP", "raise SystemExit('nothing to do')")
        assert uncached() == "compiling failed: nothing to do"
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "darwin")
        assert uncached() == builds.plain.__wrapped__() == "it needs Linux's timerfd"


def test_every_call_of_the_driver_by_the_prototype_exists() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in (
        "cuCtxGetCurrent",
        "cuEventCreate",
        "cuEventDestroy",
        "cuEventQuery",
        "cuEventRecord",
        "cuGraphExecDestroy",
        "cuGraphExecMemcpyNodeSetParams",
        "cuGraphGetNodes",
        "cuGraphInstantiate",
        "cuGraphLaunch",
        "cuGraphMemcpyNodeGetParams",
        "cuGraphNodeGetType",
        "cuStreamQuery",
        "cuStreamSynchronize",
    ):
        assert callable(getattr(driver, name))
    assert int(driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY) == 1
    assert int(driver.CUresult.CUDA_ERROR_NOT_READY) == 600
    assert int(driver.CUmemorytype.CU_MEMORYTYPE_DEVICE) == 2
    copy = driver.CUDA_MEMCPY3D()
    copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.dstDevice, copy.WidthInBytes, copy.Height, copy.Depth = 1, 2, 3, 1, 1
    assert (int(copy.srcDevice), int(copy.dstDevice)) == (1, 2)


def test_a_run_says_which_build_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert targets.implementation() in (PYTHON, NATIVE)
    monkeypatch.setattr("aiotrt.__impl__", NATIVE, raising=False)
    assert targets.implementation() == NATIVE
    record = as_record("targets-host", {"quick": True})
    assert json.loads(json.dumps(record)) == record
