"""JPEG files to tensors on a device: Pillow in threads against `aiotrt.decoding.Decoder`, with 1 and 32 callers.

    python -m benchmarks.bench_decoding [--device host|cuda] [--size 1920x1080] [--seconds 3] [--quick] [--json] [--out DIR]

Files of 1080p from scikit-image's photographs, at quality 90 with 4:2:0. Pillow's way is what a program does without aiotrt:
decode and copy to the device in `asyncio.to_thread`. The decoder runs with and without the GPU's JPEG engines. All ways have
turns in each of three rounds, and each row is the median of its rounds. Each result is complete on the device.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import skimage.data
import torch
from PIL import Image

from aiotrt.decoding import Decoder
from benchmarks.measure import RESULTS, Heartbeat, Spread, Usage, as_record, finish, idle_lag

__all__ = ["main", "photographs"]

Decode: TypeAlias = Callable[[bytes], Awaitable[torch.Tensor]]

CALLERS: Final = (1, 32)
ROUNDS: Final = 3
_NAMES: Final = ("astronaut", "chelsea", "coffee", "rocket")


def photographs(width: int, height: int, count: int) -> list[bytes]:
    """So many JPEG files of this size, all different."""
    files = []
    for number in range(count):
        pixels = np.roll(getattr(skimage.data, _NAMES[number % len(_NAMES)])(), 16 * number, axis=1)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def with_pillow(device: str) -> Decode:
    """Decode in a thread of the loop's pool."""

    def decode(data: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(data)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.to("cpu" if device == "host" else device)

    return lambda data: asyncio.to_thread(decode, data)


@asynccontextmanager
async def ways(device: str) -> AsyncIterator[dict[str, Decode]]:
    """All that are compared, by name."""
    async with AsyncExitStack() as stack:
        found: dict[str, Decode] = {"Pillow in threads": with_pillow(device)}
        found["Decoder"] = decoder = await stack.enter_async_context(Decoder(device))
        if decoder.library is not None:
            hardware = await stack.enter_async_context(Decoder(device, hardware=True))
            found["Decoder, JPEG engines"] = hardware
        yield found


async def run(decode: Decode, files: Sequence[bytes], callers: int, seconds: float) -> dict[str, Any]:
    """Decode for so many seconds from so many callers."""
    took: list[float] = []
    end = 0.0

    async def caller(first: int) -> None:
        number = first
        while True:
            began = time.perf_counter()
            await decode(files[number % len(files)])
            took.append((now := time.perf_counter()) - began)
            number += callers
            if now >= end:
                return

    await asyncio.gather(*map(caller, range(callers)))  # warm
    took.clear()
    end = time.perf_counter() + seconds
    with Usage() as usage:
        async with Heartbeat() as heartbeat:
            await asyncio.gather(*map(caller, range(callers)))
    return {
        "rate": len(took) / usage.seconds,
        "latency": Spread.of(took),
        "cpu": usage.cpu,
        "cpu_seconds": usage.cpu * usage.seconds / len(took),
        "others": usage.others,
        "lag": heartbeat.spread,
    }


async def compare(device: str, width: int, height: int, seconds: float, *, quick: bool) -> dict[str, Any]:
    """All of it."""
    files = photographs(width, height, 4 if quick else 32)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    results: dict[str, Any] = {
        "device": device, "quick": quick, "size": [width, height], "bytes": sum(map(len, files)) / len(files),
        "idle_lag": await idle_lag(),
    }  # fmt: skip
    async with ways(device) as found:
        for number in range(1 if quick else ROUNDS):
            names = list(found) if number % 2 == 0 else list(found)[::-1]
            for callers in CALLERS:
                for name in names:
                    runs.setdefault((name, callers), []).append(await run(found[name], files, callers, seconds))
        results["decoders"] = {
            name: {"library": way.library, "counts": way.counts, "reasons": way.reasons}
            for name, way in found.items()
            if isinstance(way, Decoder)
        }
    results["runs"] = [
        {"way": name, "callers": callers, "rate": statistics.median(one["rate"] for one in seen), "rounds": seen}
        for (name, callers), seen in runs.items()
    ]
    return results


def show(results: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{results['device']}, {results['size'][0]} x {results['size'][1]}, {results['bytes'] / 1e3:.0f} kB a file")
    print(f"{'':24}{'callers':>8}{'images/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'cores':>7}{'ms CPU':>8}{'lag p99 ms':>12}")
    for row in results["runs"]:
        one = sorted(row["rounds"], key=lambda one: float(one["rate"]))[len(row["rounds"]) // 2]
        latency, lag = one["latency"], one["lag"]
        print(
            f"{row['way']:24}{row['callers']:8}{row['rate']:10.1f}{1e3 * latency['p50']:9.2f}{1e3 * latency['p99']:9.2f}"
            f"{one['cpu']:7.2f}{1e3 * one['cpu_seconds']:8.2f}{1e3 * lag['p99']:12.2f}"
        )


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_decoding", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", choices=["host", "cuda"], default="cuda" if torch.cuda.is_available() else "host")
    parser.add_argument("--size", default="1920x1080", help="of the images (1920x1080)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run (3)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works; no results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    arguments = parser.parse_args(words)
    width, _, height = arguments.size.partition("x")
    seconds = 0.2 if arguments.quick else arguments.seconds
    results = asyncio.run(compare(arguments.device, int(width), int(height), seconds, quick=arguments.quick))
    name = f"decoding-{arguments.device}"
    record = as_record(name, results)
    print(json.dumps(record)) if arguments.json else show(record)
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None:
        print(finish(name, results, folder, is_whole=not arguments.quick), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
