"""The suite: every part alone or all in one go, in a bounded time.

    python -m benchmarks [PART...] [--device auto|host|cuda] [--quick] [--out DIR] [--limit SECONDS] [--video FILE]
    python -m benchmarks plot [FILE...] [--out DIR]
    python -m benchmarks table [--results DIR] [--docs FILE...]
    python -m benchmarks serving ...
    python -m benchmarks targets [--only GROUP...] [--loop LOOP]
    python -m benchmarks calls

Each part writes `<part>-<device>.json`, and is given a time after which it begins nothing new. What it did not come to is
said among its results, and those of such a run, or of one in which something failed, or that was interrupted, are
`<part>-<device>-partial.json` and leave the last whole ones as they were. Several parts run in a process each, so that none
meets what another left behind, and one that fails or hangs takes no other with it. `plot` and `table` read those files, and
nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import plots, tables
from benchmarks.clips import VIDEO, WEIGHTS
from benchmarks.measure import HEARTBEAT, PARTIAL, RESULTS, Spread, as_record, finish, idle_lag, run_on, write
from benchmarks.parts import PARTS, is_judged
from benchmarks.rows import Bench, Part, Row
from benchmarks.waits import NOT_LIKE_FOR_LIKE

__all__ = ["GRACE", "INTERRUPTED", "NAMES", "Teller", "bounded", "main", "seconds_of", "unwritable"]

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = (
    ROOT / "docs" / "internals" / "performance.md", ROOT / "docs" / "internals" / "video.md", ROOT / "README.md",
)  # fmt: skip
TENSORRT_LIMIT: Final = 300.0  # seconds, as `Part.limit`
GRACE: Final = 45.0  # seconds more until a part that hangs is stopped, and says where
COMMAND_LIMIT: Final = 590.0  # seconds until `targets` or `calls` is stopped if it hangs
INTERRUPTED: Final = 130  # exit status, as a shell has it
INTERRUPTION: Final = "interrupted"
SAID: Final = 10.0  # seconds between two words on how far it is, where there is no terminal
SAVED: Final = 5.0  # seconds between two writings of what there is so far

TENSORRT: Final = "tensorrt"  # has rows of its own
NAMES: Final = (*PARTS, TENSORRT)
NEXT_TO: Final = ("completion", "throughput")  # where the baselines are


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    is_alone = words is None  # then the process is the suite's own, and may be ended
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] in ("calls", "targets"):
        main_of = importlib.import_module(f"benchmarks.{words[0]}").main
        with bounded(COMMAND_LIMIT) if is_alone else contextlib.nullcontext():
            return int(main_of(words[1:]))
    command = {"plot": plot, "table": table, "serving": serving}.get(words[0]) if words else None
    return measure(words, is_alone=is_alone) if command is None else command(words[1:])


def measure(words: Sequence[str], *, is_alone: bool) -> int:
    """Run parts."""
    about = "\n".join(f"  {name:14}{part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"parts:\n{about}\n  {TENSORRT:14}real engines, beside TensorRT by itself\n\n"
        "or: plot, table, serving, targets, calls",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all of them if none is named")
    parser.add_argument("--part", action="append", default=[], choices=NAMES, help="the same")
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="one short run of each, to see that it works; figures say nothing"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results; otherwise benchmarks/results, or none if quick"
    )
    parser.add_argument(
        "--limit", type=seconds_of, metavar="SECONDS",
        help="after which a part begins nothing new; by default what each takes: "
        + ", ".join(f"{part.name} {part.limit:.0f}" for part in PARTS.values()),
    )  # fmt: skip
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
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU here; --device host runs without one")
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None and (why := unwritable(folder)):
        parser.error(f"--out {folder}: {why}")
    limits = {name: arguments.limit or (PARTS[name].limit if name in PARTS else TENSORRT_LIMIT) for name in names}
    if len(names) == 1:
        limit = limits[names[0]]
        with bounded(limit + GRACE) if is_alone else contextlib.nullcontext():
            return run(
                names[0], device, quick=arguments.quick, folder=folder, limit=limit, video=arguments.video,
                weights=arguments.weights,
            )  # fmt: skip
    failed = []
    for name in names:
        options = [name, "--device", device, "--limit", str(limits[name]), *(["--quick"] if arguments.quick else [])]
        if folder is not None:
            options += ["--out", str(folder.absolute())]
        for option, file in (("--video", arguments.video), ("--weights", arguments.weights)):
            options += [option, str(file.absolute())] if file is not None else []
        started = time.monotonic()
        try:
            status = subprocess.run(
                [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, timeout=limits[name] + GRACE + 15, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        except KeyboardInterrupt:  # the part has had it too, and said what it has
            return INTERRUPTED
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
    tell = Teller(limit)
    bench = Bench(device, quick=quick, limit=limit, tell=tell, video=video, weights=weights)
    file = f"{name}-{device}"
    save = (lambda results: write(f"{file}{PARTIAL}", results, folder)) if folder is not None else (lambda results: None)
    rows, results = collect(part, bench, save)
    tell("")
    if folder is not None:
        print(finish(file, results, folder, is_whole=bench.is_whole))
    show(as_record(file, results), rows, bench)
    return INTERRUPTED if INTERRUPTION in bench.failed else 1 if bench.failed else 0


def collect(part: Part, bench: Bench, save: Callable[[dict[str, Any]], object]) -> tuple[list[Row], dict[str, Any]]:
    """The part's rows with their verdicts, and its results; saved now and then, so that a hang leaves what was there."""
    started = saved = time.monotonic()
    idle: dict[str, Spread] = {}
    rows: list[Row] = []

    def results() -> dict[str, Any]:
        if is_judged(part, bench.device):
            part.judge(rows, idle)
        return {
            "device": bench.device,
            "quick": bench.quick,
            "limit": bench.limit,
            "seconds": time.monotonic() - started,
            "heartbeat": HEARTBEAT,
            "idle_lag": idle,
            "skipped": bench.skipped,
            "unreached": bench.unreached,
            "failed": bench.failed,
            "rows": rows,
        }

    try:
        idle |= {loop: run_on(loop, idle_lag(0.1 if bench.quick else 1.0)) for loop in bench.loops}
        for row in part.rows(bench):
            rows.append(row)
            if time.monotonic() - saved > SAVED:
                save(results())
                saved = time.monotonic()
    except KeyboardInterrupt:  # what was measured before is worth keeping
        bench.failed[INTERRUPTION] = "by the keyboard"
    except Exception:
        bench.failed[f"{part.name}, the rest"] = traceback.format_exc()
    return rows, results()


def show(record: dict[str, Any], rows: Sequence[Row], bench: Bench) -> None:
    """What is worth reading: what was left out, what is not alike, the tables, and the bars."""
    for what, how in bench.failed.items():
        print(f"FAILED: {what}:\n{how}")
    for what, why in bench.skipped.items():
        print(f"not measured: {what}: {why}")
    if bench.unreached:
        print(f"not come to in {bench.limit:.0f} s (--limit): {'; '.join(bench.unreached)}")
    part = str(record["benchmark"]).partition("-")[0]
    if part in NEXT_TO and rows:
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
    whole = (path for path in sorted(RESULTS.glob("*.json")) if not path.stem.endswith(PARTIAL))
    try:
        records = [tables.load(path) for path in arguments.files or whole]
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (tables.UnreadableError, OSError) as error:
        print(error)
        return 1
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
    if not arguments.results.is_dir():
        parser.error(f"--results {arguments.results}: there is no such folder")
    if missing := [path for path in arguments.docs if not path.is_file()]:
        parser.error(f"--docs {missing[0]}: there is no such file")
    try:
        texts = {path: path.read_text(encoding="utf-8") for path in arguments.docs}
        filled = {path: tables.filled(text, arguments.results) for path, text in texts.items()}
    except tables.UnreadableError as error:  # before any document is changed
        print(error)
        return 1
    changed = [path for path, text in texts.items() if filled[path] != text]
    for path in changed:
        if not arguments.check:
            path.write_text(filled[path], encoding="utf-8")
        print(f"{'out of date' if arguments.check else 'written'}: {path}")
    if not changed:
        print("up to date")
    if others := tables.of_other_code(arguments.results):
        print(f"measured with other code than this: {', '.join(others)}")
    return 1 if changed and arguments.check else 0


def seconds_of(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{word} must be a number of seconds above 0")
    return seconds


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written there; None if something can. Known before minutes are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """End the process, with every thread's stack, if the block takes longer: what hangs in a driver hears no signal."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Teller:
    """Says what is being measured, and for how long already: on a terminal in one line, elsewhere now and then."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._began = time.monotonic()
        self._said = -math.inf

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        says = f"{what} [{now - self._began:.0f} s, begins nothing new after {self._limit:.0f}]" if what else ""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{says}", end="", file=sys.stderr, flush=True)
        elif what and now - self._said > SAID:
            self._said = now
            print(says, file=sys.stderr, flush=True)
