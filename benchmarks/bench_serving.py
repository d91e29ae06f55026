"""What the server does under load, in processes of their own.

    python -m benchmarks serving [--part overload] [--seconds 600] [--quick] [--out DIR]

`overload`: see `bench_serving_overload`. Takes what `aiotrt[serving]` needs, aiohttp, onnx and the demo's models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_serving_overload import measure
from benchmarks.measure import RESULTS
from examples import ocr

__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["overload"], default="overload", help="what to measure (overload)")
    parser.add_argument("--seconds", type=float, help="how long the overload lasts (600)")
    parser.add_argument("--quick", action="store_true", help="five seconds, to see that it works; no results")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    arguments = parser.parse_args(words)
    try:
        ocr.detector_file()
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return 0
    seconds = arguments.seconds or (5.0 if arguments.quick else 600.0)
    return measure(seconds=seconds, quick=arguments.quick, folder=arguments.out or (None if arguments.quick else RESULTS))
