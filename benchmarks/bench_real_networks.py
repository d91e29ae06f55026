"""Does any network run as it is, right, and no slower than eager?

    python -m benchmarks.bench_real_networks [--only REGEX] [--part 1/3] [--device cuda] [--json FILE] [--quick]

Each network of `real_networks` is loaded as it is, called with new inputs of each of its signatures and compared with the
module called directly, bit for bit. Then calls of both take turns, each waiting for its result; the eager call is followed
by a synchronisation. A row is the median of the rounds. The last line says how many networks there were.

On the host device (``--device host``) the parity is the point; the times are those of the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

import aiotrt
from aiotrt.tensors import take_apart
from benchmarks.real_networks import ZOO, Call, Entry

__all__ = ["Result", "main", "measured", "table"]

LIMIT: Final = 120.0  # seconds for one network; torch.compile takes the longest
LIBRARIES: Final = ("timm", "torch_geometric", "torchaudio", "torchvision", "transformers")
TARGET: Final = 1.15  # times eager that a network without a graph may take


@dataclass(frozen=True)
class Result:
    """What was found of one network.

    Attributes:
        name: of the network.
        how: "graph", "no graph" or "failed"; "not installed" where its library is missing.
        parity: "bit for bit", or how far the results are from eager's.
        call: microseconds of an awaited call.
        eager: microseconds of a call of the module and a synchronisation.
        mebibytes: that its graphs keep.
        reason: why there is no graph, or what went wrong.
    """

    name: str
    how: str
    parity: str = ""
    call: float = 0.0
    eager: float = 0.0
    mebibytes: float = 0.0
    reason: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it ran, and right, and as fast as it should."""
        if self.how == "not installed":
            return True
        slow = self.how == "no graph" and self.call > TARGET * self.eager
        return self.how != "failed" and not self.parity.startswith("differs") and not slow


async def measured(entry: Entry, device: str, *, rounds: int, calls: int) -> Result:
    """Load one network, compare it and measure it."""
    where = torch.device("cpu" if device == "host" else device)
    torch.manual_seed(0)
    try:
        network = entry.make(where)
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:
            raise
        return Result(entry.name, "not installed", reason=str(error))
    eager = network.module() if isinstance(network, torch.export.ExportedProgram) else network
    async with aiotrt.load(network, device=device, slots=2) as model:
        parity = "bit for bit"
        for make in entry.calls:
            for _ in range(4):
                inputs = make(where)
                expected = _eager(eager, inputs)
                difference = compare(expected, await model(*inputs[0], **inputs[1]))
                if difference and not entry.is_exact:
                    again = compare(expected, _eager(eager, inputs))
                    difference = f"eager repeats itself no better ({again})" if again else difference
                parity = difference or parity
        inputs = entry.calls[0](where)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(await _ours(model, inputs, calls))
            theirs.append(_theirs(eager, inputs, calls, where))
        found = model.statistics()
    how = "no graph" if found.fallbacks else "graph"
    call, direct = statistics.median(ours), statistics.median(theirs)
    return Result(entry.name, how, parity, call, direct, found.graph_bytes / (1 << 20), "; ".join(found.fallbacks))


def compare(expected: object, got: object) -> str:
    """How results differ from what was expected; empty where they do not."""
    (structure, wanted), (other, found) = take_apart(expected), take_apart(got)
    if structure != other:
        return f"differs in structure: {type(got).__name__} for {type(expected).__name__}"
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"differs in shape or dtype: {b.dtype} {tuple(b.shape)} for {a.dtype} {tuple(a.shape)}"
        a, b = a.detach().cpu(), b.detach().cpu()
        if not torch.equal(a, b) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            worst = max(worst, float((a.double() - b.double()).abs().nan_to_num().max()))
    return f"differs by {worst:.2g}" if worst else ""


def _eager(network: Any, inputs: Call) -> Any:
    with torch.no_grad():
        # Of copies: a cache that is passed to the network itself would have grown.
        structure, tensors = take_apart(inputs)
        values, named = structure.build([tensor.clone() for tensor in tensors])
        return network(*values, **named)


async def _ours(model: aiotrt.Model, inputs: Call, calls: int) -> float:
    values, named = inputs
    await model(*values, **named)
    started = time.perf_counter()
    for _ in range(calls):
        await model(*values, **named)
    return 1e6 * (time.perf_counter() - started) / calls


def _theirs(network: Any, inputs: Call, calls: int, where: torch.device) -> float:
    structure, tensors = take_apart(inputs)
    copies = [structure.build(tensors) for _ in range(calls + 1)]  # not in the time: objects that the network may change
    synchronize: Any = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    with torch.no_grad():
        values, named = copies.pop()
        network(*values, **named)
        synchronize()
        started = time.perf_counter()
        for values, named in copies:
            network(*values, **named)
            synchronize()
    return 1e6 * (time.perf_counter() - started) / calls


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | runs as | results | us a call | us eager | times as fast | MiB | reason |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for one in results:
        faster = f"{one.eager / one.call:.2f}" if one.call else ""
        numbers = f"{one.call:,.0f} | {one.eager:,.0f} | {faster} | {one.mebibytes:,.1f}" if one.call else "| | |"
        reason = " ".join(one.reason.split()).replace("|", "/")[:160]
        lines.append(f"| {one.name} | {one.how} | {one.parity} | {numbers} | {reason} |")
    ran = [one for one in results if one.how != "not installed"]
    bad = [one.name for one in ran if not one.is_good]
    lines += [
        "",
        f"{len(ran)} networks: {sum(one.how == 'graph' for one in ran)} as a graph, {len(bad)} not as they should be",
    ]
    return "\n".join(lines + [f"- {name}" for name in bad])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run real networks with random weights as they are, beside eager.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "host")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="a regular expression that the name matches")
    parser.add_argument("--part", default="1/1", help="which part of how many, such as 2/3, where time is bounded")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--quick", action="store_true", help="measure only a little")
    given = parser.parse_args(arguments)
    part, parts = map(int, given.part.split("/"))
    entries = [entry for entry in ZOO if given.only.search(entry.name)]
    entries = entries[len(entries) * (part - 1) // parts : len(entries) * part // parts]
    rounds, calls = (1, 3) if given.quick else (5, 20)
    results = []
    for entry in entries:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = asyncio.run(asyncio.wait_for(measured(entry, given.device, rounds=rounds, calls=calls), LIMIT))
            except Exception as error:  # of whatever kind: the others are to be tried
                found = Result(entry.name, "failed", reason=f"{type(error).__name__}: {error}")
        results.append(found)
        times = f"{found.call:9,.0f} {found.eager:9,.0f} us"
        print(f"{found.how:13s} {found.name:45s} {found.parity:14s} {times}  {found.reason[:100]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("\n" + table(results))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")
    return 0 if all(one.is_good for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
