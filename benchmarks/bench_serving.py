"""What the server does under load, in processes of their own.

    python -m benchmarks serving [--part attacks|overload|overload_grpc|protocols|shared_memory] [--seconds 600] [--quick]
        [--out DIR]
    python -m benchmarks serving --part side_by_side [--device host|cuda] [--model NAME] [--litserve PYTHON] [--seconds 3]
        [--limit SECONDS] [--quick] [--out DIR]

`overload`, over HTTP, and `overload_grpc`: see `bench_serving_overload`; `protocols`, HTTP and gRPC by turns: see
`bench_serving_protocols`; `shared_memory`: see `bench_serving_shared_memory`; `side_by_side`: see
`bench_serving_side_by_side`; `attacks`: see `bench_serving_attacks`. They take what `aiotrt[serving]` needs, aiohttp, onnx
and the demo's models; on CUDA torchvision and not the last two.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_serving_side_by_side
from benchmarks.measure import RESULTS
from benchmarks.serving_rivals.work import MODELS

__all__ = ["main"]

PARTS = ("attacks", "overload", "overload_grpc", "protocols", "shared_memory", "side_by_side")


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="overload", help="what to measure (overload)")
    parser.add_argument("--seconds", type=float, help="how long the overload lasts (600), or each load of the others (3)")
    parser.add_argument("--device", choices=["host", "cuda"], default="host", help="where the model runs, side by side")
    parser.add_argument("--model", choices=MODELS, help="side by side: reader, or on CUDA resnet50")
    parser.add_argument("--limit", type=float, help="side by side: seconds until the last round ends (no limit)")
    parser.add_argument("--litserve", metavar="PYTHON", help="an interpreter that has LitServe, where this one has not")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works; no results")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    arguments = parser.parse_args(words)
    quick, folder = arguments.quick, arguments.out or (None if arguments.quick else RESULTS)
    device = arguments.device
    model = arguments.model or ("resnet50" if device == "cuda" else "reader")
    if device == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no CUDA device here")
        return 0
    if device == "cuda" and model == "reader":
        parser.error("the reader is a model of the host's device")
    # The parts are imported where they are run: on CUDA neither onnx nor the demo's packages are needed.
    if arguments.part == "attacks":
        from benchmarks import bench_serving_attacks

        return bench_serving_attacks.measure(quick=quick, folder=folder)
    if arguments.part == "shared_memory":
        from benchmarks import bench_serving_shared_memory

        return bench_serving_shared_memory.measure(quick=quick, folder=folder)
    if arguments.part == "protocols":
        from benchmarks import bench_serving_protocols

        seconds = arguments.seconds or (0.4 if quick else 3.0)
        return bench_serving_protocols.measure(seconds=seconds, quick=quick, folder=folder)
    if model == "reader":
        from examples import ocr

        try:
            ocr.detector_file()
        except FileNotFoundError as error:
            print(f"skipped: {error}")
            return 0
    if arguments.part == "side_by_side":
        seconds = arguments.seconds or (0.4 if quick else 3.0)
        return bench_serving_side_by_side.measure(
            device=device, model=model, litserve=arguments.litserve, seconds=seconds, limit=arguments.limit or math.inf,
            quick=quick, folder=folder,
        )  # fmt: skip
    if device != "host":
        parser.error("the overload is of the host's device")
    from benchmarks import bench_serving_overload

    return bench_serving_overload.measure(
        seconds=arguments.seconds or (5.0 if quick else 600.0),
        quick=quick,
        folder=folder,
        is_grpc=arguments.part == "overload_grpc",
    )
