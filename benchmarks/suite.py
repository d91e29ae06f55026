"""The suite: every part alone or all in one go, in a bounded time.

    python -m benchmarks [PART...] [--device auto|host|cuda] [--quick] [--out DIR] [--limit SECONDS] [--video FILE]
    python -m benchmarks plot [FILE...] [--out DIR]
    python -m benchmarks table [--results DIR] [--docs FILE...]
    python -m benchmarks serving ...

Each part writes its results as soon as it has them, `<part>-<device>.json`, and is given a time after which it begins
nothing new; what it did not come to is among its results. Several parts run in a process each, so that none meets what
another left behind, and one that fails or hangs takes no other with it. `plot` and `table` read those files, and nothing
else.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import plots, tables
from benchmarks.bench_completion import COMPLETION, THROUGHPUT
from benchmarks.bench_endurance import ENDURANCE
from benchmarks.bench_host_input import HOST_INPUT
from benchmarks.bench_jitter import JITTER
from benchmarks.bench_live_video import LIVE_VIDEO
from benchmarks.bench_loop_lag import LOOP_LAG
from benchmarks.bench_pipeline import PIPELINE
from benchmarks.bench_rfdetr_video import RFDETR_VIDEO
from benchmarks.bench_scaling import SCALING
from benchmarks.bench_stages import STAGES
from benchmarks.clips import VIDEO, WEIGHTS
from benchmarks.measure import RESULTS, as_record, idle_lag, run_on, write
from benchmarks.rows import Bench, Part, Row
from benchmarks.waits import NOT_LIKE_FOR_LIKE

__all__ = ["NAMES", "main"]

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = (ROOT / "docs" / "performance.md", ROOT / "docs" / "video.md", ROOT / "README.md")
LIMIT: Final = 55.0  # seconds for a part, after which it begins nothing new
GRACE: Final = 45.0  # seconds more until a part that hangs is stopped, and says where
SAVED: Final = 5.0  # seconds between two writings of what there is so far

PARTS: Final = {
    part.name: part
    for part in (
        COMPLETION,
        STAGES,
        THROUGHPUT,
        HOST_INPUT,
        JITTER,
        SCALING,
        LOOP_LAG,
        PIPELINE,
        RFDETR_VIDEO,
        LIVE_VIDEO,
        ENDURANCE,
    )
}
TENSORRT: Final = "tensorrt"  # has rows of its own
NAMES: Final = (*PARTS, TENSORRT)
NEXT_TO: Final = ("completion", "throughput")  # where the baselines are


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    is_alone = words is None  # then the process is the suite's own, and may be ended
    words = sys.argv[1:] if words is None else list(words)
    command = {"plot": plot, "table": table, "serving": serving}.get(words[0]) if words else None
    return measure(words, is_alone=is_alone) if command is None else command(words[1:])


def measure(words: Sequence[str], *, is_alone: bool) -> int:
    """Run parts."""
    about = "\n".join(f"  {name:12}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"parts:\n{about}\n  {TENSORRT:12}real engines, beside TensorRT by itself\n\nor: plot, table, serving",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all of them if none is named")
    parser.add_argument("--part", action="append", default=[], choices=NAMES, help="the same")
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="one short run of each, to see that it works; figures say nothing"
    )
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help=f"seconds after which a part begins nothing new ({LIMIT:.0f})"
    )
    parser.add_argument(
        "--video", type=Path, metavar="FILE", default=os.environ.get(VIDEO) or None,
        help=f"a video, or frames as .npy or .npz, in place of bikes.mp4; or by the environment, {VIDEO}",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", default=os.environ.get(WEIGHTS) or None,
        help=f"a checkpoint of RF-DETR-Seg-Nano, in place of random weights; or by the environment, {WEIGHTS}",
    )  # fmt: skip
    arguments = parser.parse_args(words)
    for file in (arguments.video, arguments.weights):
        if file is not None and not file.is_file():
            parser.error(f"{file}: there is no such file")
    names = [*arguments.parts, *arguments.part] or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(NAMES)}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "host"
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if len(names) == 1:
        with _bounded(arguments.limit + GRACE) if is_alone else contextlib.nullcontext():
            return run(
                names[0], device, quick=arguments.quick, folder=folder, limit=arguments.limit, video=arguments.video,
                weights=arguments.weights,
            )  # fmt: skip
    failed = []
    for name in names:
        options = [name, "--device", device, "--limit", str(arguments.limit), *(["--quick"] if arguments.quick else [])]
        if folder is not None:
            options += ["--out", str(folder.absolute())]
        for option, file in (("--video", arguments.video), ("--weights", arguments.weights)):
            options += [option, str(file.absolute())] if file is not None else []
        started = time.monotonic()
        try:
            status = subprocess.run(
                [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, timeout=arguments.limit + GRACE + 15, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        print(f"== {name}: {time.monotonic() - started:.0f} s{f', FAILED with {status}' if status else ''}\n", flush=True)
        if status:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(
    name: str,
    device: str,
    *,
    quick: bool,
    folder: Path | None,
    limit: float,
    video: Path | None = None,
    weights: Path | None = None,
) -> int:
    """Run one part here; returns the exit status."""
    options = [*(["--quick"] if quick else []), *(["--out", str(folder)] if folder is not None else [])]
    if name == TENSORRT or (name == "loop_lag" and device == "host"):
        if name == TENSORRT and device == "host":
            print("skipped: tensorrt takes CUDA")
            return 0
        module = "bench_tensorrt" if name == TENSORRT else "host_loop_lag"
        try:
            main_of: Any = importlib.import_module(f"benchmarks.{module}").main
        except ImportError as error:  # of what only this part takes
            print(f"skipped: {name}: {error}")
            return 0
        main_of([*options, "--limit", str(limit)] if name == TENSORRT else options)
        return 0
    part = PARTS[name]
    bench = Bench(device, quick=quick, limit=limit, tell=_tell, video=video, weights=weights)
    file = f"{name}-{device}"
    save = (lambda results: write(file, results, folder)) if folder is not None else (lambda results: None)
    rows, results = collect(part, bench, save)
    _tell("")
    if folder is not None:
        print(f"results: {write(file, results, folder)}")
    show(as_record(file, results), rows, bench)
    return 1 if bench.failed else 0


def collect(part: Part, bench: Bench, save: Callable[[dict[str, Any]], object]) -> tuple[list[Row], dict[str, Any]]:
    """The part's rows with their verdicts, and its results; saved now and then, so that a hang leaves what was there."""
    started = saved = time.monotonic()
    idle = {loop: run_on(loop, idle_lag(0.1 if bench.quick else 0.5)) for loop in bench.loops}
    rows: list[Row] = []

    def results() -> dict[str, Any]:
        if bench.device == "cuda" or part in (ENDURANCE, LIVE_VIDEO):
            part.judge(rows, idle)  # the bars are a GPU's, but for memory that grows and frames that are lost anywhere
        return {
            "device": bench.device,
            "quick": bench.quick,
            "seconds": time.monotonic() - started,
            "idle_lag": idle,
            "skipped": bench.skipped,
            "failed": bench.failed,
            "rows": rows,
        }

    try:
        for row in part.rows(bench):
            rows.append(row)
            if time.monotonic() - saved > SAVED:
                save(results())
                saved = time.monotonic()
    except Exception:  # what was measured before is worth keeping
        bench.failed[f"{part.name}, the rest"] = traceback.format_exc()
    return rows, results()


def show(record: dict[str, Any], rows: Sequence[Row], bench: Bench) -> None:
    """What is worth reading: what was left out, what is not alike, the tables, and the bars."""
    for what, how in bench.failed.items():
        print(f"FAILED: {what}:\n{how}")
    for what, why in bench.skipped.items():
        print(f"not measured: {what}: {why}")
    part = str(record["benchmark"]).partition("-")[0]
    if part in NEXT_TO:
        print("not like for like:")
        for way, what in NOT_LIKE_FOR_LIKE.items():
            if any(row.way == way for row in rows):
                print(f"  {way}: {what}")
    for table_ in tables.tables_of(record):
        print(f"\n{tables.as_text(table_)}")
    print(f"\n{tables.heading_of(record)}")
    for line in tables.misses_of(record):
        print(line)


def plot(words: Sequence[str]) -> int:
    """Draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=plots.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results; by default all there are")
    parser.add_argument("--out", type=Path, default=RESULTS / "plots", help="folder for the plots")
    parser.add_argument("--loop", action="append", default=[], help="draw this event loop's only; may be repeated")
    arguments = parser.parse_args(words)
    records = [tables.load(path) for path in arguments.files or sorted(RESULTS.glob("*.json"))]
    try:
        drawn = plots.draw(records, arguments.out, arguments.loop)
    except plots.MissingMatplotlibError as error:
        print(error)
        return 1
    print(
        "\n".join(map(str, drawn))
        or "nothing to draw: there are no results of completion or throughput, or none on this loop"
    )
    return 0


def serving(words: Sequence[str]) -> int:
    """Load a server: minutes, and packages that no other part takes."""
    from benchmarks.bench_serving import main as main_of

    return main_of(words)


def table(words: Sequence[str]) -> int:
    """Fill in the documentation's tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks table", description=(tables.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the results")
    parser.add_argument("--docs", type=Path, nargs="*", default=list(DOCS), help="files with marks")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if anything would change")
    arguments = parser.parse_args(words)
    changed = 0
    for path in arguments.docs:
        text = path.read_text(encoding="utf-8")
        if (new := tables.filled(text, arguments.results)) == text:
            continue
        changed += 1
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
        print(f"{'out of date' if arguments.check else 'written'}: {path}")
    if not changed:
        print("up to date")
    return 1 if changed and arguments.check else 0


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End the process, with every thread's stack, if the block takes longer: what hangs in a driver hears no signal."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)
