"""Verify an engine: load the model, run every check, close it, and report."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import aiotrt
from aiotrt.engines.base import Engine
from aiotrt.errors import InputError
from aiotrt.model import Model
from aiotrt.selftest.bench import Bench, Options
from aiotrt.selftest.cases import check_ranges, combine, find_cases
from aiotrt.selftest.endurance import cancellation, endurance
from aiotrt.selftest.instruments import describe, memory
from aiotrt.selftest.latency import latency
from aiotrt.selftest.laws import callers, completion, consumers, inputs
from aiotrt.selftest.parity import capture, parity
from aiotrt.selftest.report import CheckFailed, Finding, NotApplicable, Outcome, Report, Result

__all__ = ["CHECKS", "Progress", "verify"]

_log: Final = logging.getLogger("aiotrt")

#: The checks between "load" and "close", in order.
CHECKS: Final[dict[str, Callable[[Bench], Awaitable[Finding]]]] = {
    "capture": capture,
    "parity": parity,
    "results wait for the device": completion,
    "consumers are waited for": consumers,
    "inputs are waited for": inputs,
    "callers are kept apart": callers,
    "cancellation": cancellation,
    "endurance": endurance,
    "latency": latency,
}
#: Seconds that closing may take; nothing runs on the device then.
CLOSES_WITHIN: Final = 30.0


class Progress(Protocol):
    """An object that is notified of the progress."""

    def begin(self, name: str) -> None:
        """Record that a check begins."""
        ...

    def advance(self, fraction: float) -> None:
        """Record the progress of the present check, from 0 to 1."""
        ...

    def end(self, result: Result) -> None:
        """Record that a check ended."""
        ...


async def verify(options: Options, progress: Progress) -> Report:
    """Verify an engine, end to end. A check that fails does not raise: it is in the report.

    If cancelled, the model is closed without waiting for work on the device.

    Args:
        options: the engine, and the thoroughness of the checks.
        progress: notified of every check.

    Raises:
        InputError: a shape or range does not fit the model, or one is missing.
        EngineError, MissingDependencyError, UsageError: the model cannot be loaded; see `aiotrt.load`.
    """
    report = Report(str(options.file), options.seed)

    def add(result: Result) -> None:
        report.results.append(result)
        progress.end(result)

    progress.begin("load")
    started = time.perf_counter()
    model = await _open(options, graphs=True)
    try:
        bench = _bench(model, options, progress)
        add(_loaded(bench, time.perf_counter() - started))
        for name, check in CHECKS.items():
            progress.begin(name)
            add(await _run(name, check, bench))
    except BaseException:
        await model.aclose(drain=False)
        raise
    progress.begin("close")
    add(await _run("close", _close, bench))
    return report


def _load(options: Options, *, graphs: bool) -> Model:
    return aiotrt.load(
        options.file,
        device=options.device,
        slots=options.slots if graphs else 1,
        graphs=graphs,
        max_queue=None,
        graph_cache_entries=4096,
        runtime=options.runtime,
        sha256=options.sha256,
        allow_host_code=options.allow_host_code,
        # Used only to build an ONNX file for a GPU, with a profile for each set of shapes.
        profiles=combine(options.shapes) or None,
    )


async def _open(options: Options, *, graphs: bool) -> Model:
    model = _load(options, graphs=graphs)
    try:
        return await model
    except InputError as error:
        if options.shapes or options.file.suffix.lower() != ".onnx":
            raise
        raise InputError(f"{error}; with this command, give the shapes with --shape NAME=1x3x320x320") from error


def _bench(model: Model, options: Options, progress: Progress) -> Bench:
    assert model._executor is not None
    engine, specs = model._executor.recipe.engine, model.inputs
    assert specs is not None, "files declare their inputs"
    file = str(options.file)
    check_ranges(file, specs, options.ranges)
    cases, usual = find_cases(file, specs, getattr(engine, "profiles", ()), options.shapes)
    return Bench(model, lambda: _load(options, graphs=False), cases, usual, options, progress.advance)


def _loaded(bench: Bench, seconds: float) -> Result:
    engine: Engine = bench.executor.recipe.engine
    specs = {"inputs": bench.model.inputs or (), "outputs": getattr(engine, "outputs", ())}
    runtime = getattr(engine, "runtime", type(engine).__name__)
    facts = describe(bench.device)
    figures: dict[str, Any] = {
        "runtime": runtime,
        "written_by": str(engine.plan) if hasattr(engine, "plan") else None,
        "device": facts,
        **{kind: [str(spec) for spec in found] for kind, found in specs.items()},
        "profiles": [str(profile) for profile in getattr(engine, "profiles", ())],
        "cases": [str(case) for case in bench.cases],
        "slots": bench.options.slots,
        "memory": vars(memory(bench.device)),
    }
    where = facts["name"]
    if "gpu" in facts:
        where += f", {facts['gpu']}, driver {facts['driver']} (CUDA {facts['cuda_of_driver']})"
    written = f", written by {figures['written_by']}" if figures["written_by"] else ""
    takes, gives = (", ".join(figures[kind]) for kind in specs)
    detail = f"{runtime}{written}, on {where}, in {seconds:.2f} s; takes {takes}; gives {gives}"
    return Result("load", Outcome.PASSED, detail, seconds, figures)


async def _run(name: str, check: Callable[[Bench], Awaitable[Finding]], bench: Bench) -> Result:
    _log.debug("verify: %s", name)
    started = time.perf_counter()
    try:
        broken = bench.executor.broken
        if broken is not None and check is not _close:
            raise NotApplicable(f"the model broke before: {broken}")
        finding = await check(bench)
        outcome, detail, figures = Outcome.PASSED, finding.detail, finding.figures
    except NotApplicable as reason:
        outcome, detail, figures = Outcome.NOT_APPLICABLE, str(reason), reason.figures
    except CheckFailed as failure:
        outcome, detail, figures = Outcome.FAILED, str(failure), failure.figures
    except Exception as error:  # an unexpected error fails this check; the others still run
        _log.debug("verify: %s raised", name, exc_info=True)
        outcome, detail, figures = Outcome.FAILED, f"raised {type(error).__name__}: {error}", {}
    return Result(name, outcome, detail, time.perf_counter() - started, figures)


async def _close(bench: Bench) -> Finding:
    """Close the model, which must release everything in time."""
    try:
        async with asyncio.timeout(CLOSES_WITHIN):
            await bench.model.aclose()
    except TimeoutError as error:
        raise CheckFailed(f"the model was not closed after {CLOSES_WITHIN:g} s: {bench.model!r}") from error
    left = memory(bench.device)
    detail = "" if left.allocated is None else f"; torch's allocator has {left.allocated:,} bytes left on the device"
    return Finding(f"the model is closed{detail}", {"memory": vars(left)})
