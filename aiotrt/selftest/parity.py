"""Check that everything is captured, and that graphs give bit-identical results to the same engine without graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiotrt.model import Model
from aiotrt.selftest.bench import Bench, Tensors, as_tensors, compare, together, within
from aiotrt.selftest.report import CheckFailed, Finding, NotApplicable

__all__ = ["capture", "parity"]


async def capture(bench: Bench) -> Finding:
    """Capture every case on every slot, and report the reason if a case cannot be captured."""
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(bench.cases):
        await bench.model.warmup(case.named)
        programs = bench.programs(case)
        rows.append(
            {
                "case": case.label,
                "shapes": {name: list(shape) for name, shape in case.named.items()},
                "captured": all(program.captured for program in programs),
                "bytes": sum(program.nbytes for program in programs),
                "fallbacks": sorted({reason for program in programs for reason in program.fallbacks}),
            }
        )
        bench.progress((i + 1) / len(bench.cases))
    figures = {"cases": rows, "slots": bench.options.slots}
    without = [row for row in rows if not row["captured"]]
    total = sum(row["bytes"] for row in rows)
    if not without:
        kind = "recorded calls, the host device's substitute for graphs" if bench.device.unified else "graphs"
        return Finding(f"{len(rows) * bench.options.slots} {kind}: {_list(rows)}; {total / 1e6:,.1f} MB", figures)
    reasons = "; ".join(dict.fromkeys(reason for row in without for reason in row["fallbacks"]))
    message = f"{len(without)} of {len(rows)} shapes run without a graph ({_list(without)}): {reasons}"
    if bench.options.require_graph:
        raise CheckFailed(message, figures)
    raise NotApplicable(message, figures)


@dataclass
class _Seen:
    """Differences of one output so far."""

    is_deterministic: bool = True
    difference: str | None = None  # the first difference, bit for bit
    beyond: str | None = None  # the first difference beyond the tolerance


async def parity(bench: Bench) -> Finding:
    """Compare each slot's graph bit for bit with the engine without a graph, for random inputs of every case.

    Each input runs twice without a graph. An output in which the two runs differ is compared with a tolerance instead.
    """
    options = bench.options
    names = bench.outputs
    seen = [_Seen() for _ in names]
    total = len(bench.cases) * options.inputs
    async with bench.plain() as plain:
        for done in range(total):
            case, number = bench.cases[done // options.inputs], done % options.inputs
            inputs = bench.inputs(case, number)
            first, second = await _run(plain, inputs), await _run(plain, inputs)
            # One call for each slot; all slots are free, so each gets one.
            calls = together(bench.model(*inputs) for _ in range(options.slots))
            for i, got in enumerate(await within(calls, "a call")):
                _compare(seen, as_tensors(got), first, second, options.tolerance, f"{case}, input {number}, call {i}")
            bench.progress((done + 1) / total)
    bench.nondeterministic = {i for i, output in enumerate(seen) if not output.is_deterministic}
    inexact = [names[i] for i in sorted(bench.nondeterministic)]
    figures = {
        "cases": len(bench.cases),
        "inputs": options.inputs,
        "not_repeatable": inexact,
        "tolerance": options.tolerance,
    }
    for name, output in zip(names, seen, strict=True):
        difference = output.difference if output.is_deterministic else output.beyond
        if difference is not None:
            noise = "" if output.is_deterministic else "; the engine is not deterministic here, even without a graph"
            raise CheckFailed(f"output {name!r} with a graph, compared with none: {difference}{noise}", figures)
    plural = "s" * (len(bench.cases) != 1)
    compared = f"{total} random inputs over {len(bench.cases)} set{plural} of shapes, on each of {options.slots} slots"
    if inexact:
        exact = "all others bit for bit" if len(inexact) < len(names) else "none bit for bit"
        detail = (
            f"{compared}: the engine is not deterministic without a graph in {', '.join(map(repr, inexact))}, compared "
            f"within {options.tolerance:g} of the largest value; {exact}"
        )
    else:
        detail = f"{compared}: equal bit for bit, and repeatable without a graph"
    if bench.model.statistics().replays == 0:
        raise NotApplicable(f"nothing was captured; runs without graphs: {detail}", figures)
    return Finding(detail, figures)


async def _run(model: Model, inputs: Tensors) -> Tensors:
    results = as_tensors(await within(model(*inputs), "a call without a graph"))
    return tuple(tensor.clone() for tensor in results)  # a copy, which a later overwrite of the results does not change


def _compare(seen: list[_Seen], got: Tensors, first: Tensors, second: Tensors, tolerance: float, where: str) -> None:
    for output, a, b, c in zip(seen, got, first, second, strict=True):
        if compare(c, b) is not None:
            output.is_deterministic = False
        difference = compare(a, b)
        if difference is None:
            continue
        output.difference = output.difference or f"{where}: {difference}"
        beyond = compare(a, b, tolerance)
        if beyond is not None:
            output.beyond = output.beyond or f"{where}: {beyond}"


def _list(rows: list[dict[str, Any]]) -> str:
    shapes = [", ".join(f"{name} {tuple(shape)}" for name, shape in row["shapes"].items()) for row in rows]
    return " | ".join(shapes[:4]) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "")
