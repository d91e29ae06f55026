"""``aiotrt verify``: check on this machine that an engine and aiotrt work together as documented."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiotrt.cli.tables import open_console, show
from aiotrt.errors import InputError
from aiotrt.run import run as run_coroutine
from aiotrt.selftest import Options, Outcome, Progress, Report, Result, verify
from aiotrt.selftest.latency import ROWS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["parse_ranges", "parse_shapes", "register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt verify detector.engine
      at the smallest, usual and largest shapes of each profile

  aiotrt verify detector.onnx --device host --shape x=1x3x320x320
      with ONNX Runtime, on a machine without a GPU; several --shape x=... make several sets of shapes

  aiotrt verify encoder.engine --range input_ids=0:30521 --require-graph --json
      for CI: token numbers up to 30521, and running without a graph counts as a failure

The exit status is 0 if no check failed, 1 if a check failed or the file cannot be loaded, 2 for wrong arguments.
"""
_COLOURS: Final = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.NOT_APPLICABLE: "yellow"}
_COLUMNS: Final = ("min", "max", "mean", "median", "p90", "p95", "p99")


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "verify",
        help="check on this machine that an engine runs correctly",
        description="Load an engine and check on this machine what aiotrt promises: capture, bit-identical results with\n"
        "and without a graph, the order of readers and writers, cancellation, constant memory. Then measure.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("file", metavar="ENGINE", type=Path, help="an .engine, .plan or .onnx file")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or host (default: auto)")
    parser.add_argument("--slots", metavar="N", type=_count(1), default=2, help="default: 2")
    parser.add_argument(
        "--shape",
        metavar="NAME=1x3x320x320",
        action="append",
        default=[],
        help="a shape to verify at, instead of the profiles'",
    )
    parser.add_argument(
        "--range",
        metavar="NAME=LOW:HIGH",
        action="append",
        default=[],
        help="the range of an input's random values, bounds included",
    )
    parser.add_argument("--inputs", metavar="N", type=_count(1), default=8, help="random inputs for each shape (default: 8)")
    parser.add_argument("--seed", metavar="N", type=_count(0), default=0, help="seed of the random inputs (default: 0)")
    parser.add_argument(
        "--replays", metavar="N", type=_count(1), default=10_000, help="replays of the endurance check (default: 10000)"
    )
    parser.add_argument("--cancellations", metavar="N", type=_count(1), default=200, help="calls to cancel (default: 200)")
    parser.add_argument(
        "--duration", metavar="SECONDS", type=_positive, default=3.0, help="duration of the latency measurement (default: 3)"
    )
    parser.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=_positive,
        default=0.01,
        help="allowed difference of a nondeterministic engine, as a share of an output's largest value (default: 0.01)",
    )
    parser.add_argument("--require-graph", action="store_true", help="fail if anything runs without a graph")
    parser.add_argument(
        "--runtime",
        choices=["tensorrt", "tensorrt_rtx", "tensorrt_lean"],
        help="the runtime (default: the one that can read the file)",
    )
    parser.add_argument("--sha256", metavar="HEX", help="checksum of the file; a file with another one is not loaded")
    parser.add_argument("--allow-host-code", action="store_true", help="run host code inside the engine, if you trust it")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify the engine, and print a report."""
    console = None if arguments.json else open_console()  # fails without rich, so do it before minutes of work
    options = Options(
        arguments.file,
        device=arguments.device,
        slots=arguments.slots,
        runtime=arguments.runtime,
        sha256=arguments.sha256,
        allow_host_code=arguments.allow_host_code,
        shapes=parse_shapes(arguments.shape),
        ranges=parse_ranges(arguments.range),
        inputs=arguments.inputs,
        seed=arguments.seed,
        replays=arguments.replays,
        cancellations=arguments.cancellations,
        duration=arguments.duration,
        tolerance=arguments.tolerance,
        require_graph=arguments.require_graph,
    )
    with _progress(bar=not arguments.quiet and sys.stderr.isatty()) as progress:
        report = run_coroutine(verify(options, progress))
    if console is None:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(console, report)
    return 0 if report.passed else 1


def parse_shapes(entries: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """Parse shapes such as ``x=1x3x320x320``; an input may have several.

    Raises:
        InputError: an entry has another form.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        if not name or not re.fullmatch(r"\d+(x\d+)*", text):
            raise InputError(f"--shape {entry!r}: expected NAME=SHAPE as in x=1x3x320x320")
        shapes.setdefault(name, []).append(tuple(map(int, text.split("x"))))
    return shapes


def parse_ranges(entries: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Parse ranges such as ``input_ids=0:30521``, at most one for each input.

    Raises:
        InputError: an entry has another form, or an input is given twice.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            name = ""
            low = high = 0.0
        if not name or not math.isfinite(low) or not math.isfinite(high):
            raise InputError(f"--range {entry!r}: expected NAME=SMALLEST:LARGEST as in input_ids=0:30521")
        if name in ranges:
            raise InputError(f"--range: input {name!r} is given twice")
        ranges[name] = low, high
    return ranges


def _count(least: int) -> Any:
    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    count.__name__ = "number"  # argparse's messages contain this name
    return count


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


class _Silence:
    """Progress without a display."""

    def begin(self, name: str) -> None:
        """Do nothing when a check begins."""

    def advance(self, fraction: float) -> None:
        """Do nothing when a check advances."""

    def end(self, result: Result) -> None:
        """Do nothing when a check ends."""


@contextlib.contextmanager
def _progress(*, bar: bool) -> Iterator[Progress]:
    """Show a bar on standard error for each check; the bars are removed at the end."""
    if not bar or importlib.util.find_spec("rich") is None:  # rich is optional with --json
        yield _Silence()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        class Bars(_Silence):
            def begin(self, name: str) -> None:
                self.task = bars.add_task(name, total=1.0)

            def advance(self, fraction: float) -> None:
                bars.update(self.task, completed=fraction)

            def end(self, result: Result) -> None:
                bars.update(self.task, completed=1.0)
                bars.stop_task(self.task)

        yield Bars()


def _show(console: Console, report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("check", "outcome", "s"):
        table.add_column(title, no_wrap=True, justify="right" if title == "s" else "left")
    table.add_column("", overflow="fold")
    for result in report.results:
        outcome = Text(result.outcome.value, style=_COLOURS[result.outcome])
        table.add_row(result.name, outcome, f"{result.seconds:.2f}", result.detail)
    latency = next((result for result in report.results if "throughput_qps" in result.figures), None)
    parts = [] if latency is None else ["", *_latency(latency.figures)]
    failed = sum(result.outcome is Outcome.FAILED for result in report.results)
    verdict = "all applicable checks passed" if report.passed else f"{failed} failed"
    show(console, table, *parts, "", Text(f"{report.file}: {verdict}", style="green" if report.passed else "bold red"))


def _latency(figures: Any) -> list[str | Table]:
    """Return the measurements as a table, in the layout of trtexec."""
    from rich.table import Table

    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in figures["shapes"].items())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("ms", no_wrap=True)
    for title in _COLUMNS:
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("", overflow="fold")
    for key, name in ROWS.items():
        row = figures[key]
        reason = "" if row is not None else f"not applicable: {figures['not_applicable'][key]}"
        table.add_row(name, *("-" if row is None else f"{row[column]:.4g}" for column in _COLUMNS), reason)
    return [f"Throughput: {figures['throughput_qps']:,.2f} qps ({shapes}; {figures['slots']} slots)", table]
