"""JPEG files of 1080p to an HTTP endpoint with a detector: Pillow in threads against decoding on the GPU; both with aiotrt.

    python -m benchmarks.bench_jpeg_endpoint [--device host|cuda] [--model detector|tiny] [--connections 32] [--seconds 5]
        [--quick] [--json] [--out DIR]

The server is FastAPI behind uvicorn, in a process of its own for each way and round: `image_body`'s decoder in host memory,
and the same with `device=`. The model is a letterbox and torchvision's RetinaNet with ResNet-50, of 640 pixels, captured
together, in FP16 on CUDA; `tiny` is a network to try things with. Clients and measures are those of `serving --part
side_by_side`: each answer must be that of its request. The bar: five times the requests per second, and less CPU for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response

import aiotrt
from aiotrt import serving
from aiotrt.decoding import decode_image
from aiotrt.preprocess import Letterbox
from aiotrt.serving.images import decode_off_loop
from benchmarks.bench_decoding import photographs
from benchmarks.measure import RESULTS, Spread, as_record, finish, loops
from benchmarks.serving_processes import free_port, started, used
from benchmarks.serving_rivals.clients import Clients, Load
from benchmarks.serving_rivals.known import ITEMS, Known
from benchmarks.serving_rivals.work import LAG, READY, Heart

__all__ = ["main"]

WAYS: Final = ("Pillow in threads", "decoded on the device")
ROUNDS: Final = 3
SIZE: Final = 640
COUNT: Final = 20  # boxes
START: Final = 120.0  # seconds that a server has until it is ready
FASTER: Final = 5.0  # the bar


class Photographs(Known):
    """Files, each different, and what every answer must be like."""

    def __init__(self, width: int, height: int, count: int) -> None:
        files = photographs(width, height, count)
        self.bodies = [files[number % count] for number in range(ITEMS)]
        self.sums = [0] * ITEMS

    def is_output(self, data: bytes, item: int) -> bool:
        """Whether these are scores, best first."""
        scores = np.frombuffer(data, np.float32)
        return len(scores) == COUNT and bool(np.isfinite(scores).all() and (np.diff(scores) <= 0).all())


def serve(arguments: argparse.Namespace) -> None:
    """Be the server, until a signal ends it."""
    is_cuda = arguments.device == "cuda"
    letterbox = Letterbox(SIZE, dtype=torch.float16 if is_cuda else torch.float32)

    def load() -> aiotrt.Model:
        network = _network(arguments.model).eval().to("cuda" if is_cuda else "cpu", letterbox.dtype)
        frame = np.zeros((arguments.height, arguments.width, 3), np.uint8)
        warmup = torch.from_numpy(frame).to("cuda") if is_cuda and arguments.serve else frame
        return aiotrt.load(network, device=arguments.device, preprocess=letterbox, outputs="numpy", slots=3, warmup=[warmup])

    app = FastAPI(lifespan=serving.lifespan(model=load))

    @app.get(READY)
    async def ready() -> Response:
        return Response()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        body = await request.body()
        image: Any  # decoded as `image_body` does; not by it, since the body's end is the request's number
        if arguments.serve:
            image = await decode_image(body, arguments.device)
        else:
            image = await decode_off_loop(body, 50_000_000, "RGB")
        scores = await serving.models_of(request)["model"](image)
        return Response(scores.tobytes() + body[-8:], media_type="application/octet-stream")

    app.add_middleware(Heart)
    loop: Any = arguments.loop
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, loop=loop, access_log=False, log_level="warning")


def _network(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if name == "tiny":
        return torch.nn.Sequential(_Tiny(), _Best())
    from benchmarks.serving_rivals.detector import Detector

    return torch.nn.Sequential(Detector(SIZE, COUNT), _Scores())


class _Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.mean(1), 64).flatten()


class _Best(torch.nn.Module):
    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().topk(COUNT).values


class _Scores(torch.nn.Module):
    def forward(self, found: torch.Tensor) -> torch.Tensor:
        return found[0, :, 0].float()


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        data: bytes = response.read()
    return data


def visit(way: int, arguments: argparse.Namespace, clients: Clients, log: Path, seconds: float, wrong: Counter[str]) -> Any:
    """Start a server, ask it, and end it.

    Raises:
        RuntimeError: it did not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {"serve": way, "port": port, "device": arguments.device, "model": arguments.model, "loop": arguments.loop}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    size = f"{arguments.width}x{arguments.height}"
    with started(
        ["-m", "benchmarks.bench_jpeg_endpoint", *words, "--size", size], log, cuda=arguments.device == "cuda"
    ) as process:
        _until_ready(process, url, log)
        load = Load(f"{arguments.connections} connections", seconds, arguments.connections)
        start = time.perf_counter() + min(2.0, seconds)
        answers = clients.ask(url, load, start)
        time.sleep(max(0.0, start - time.perf_counter()))
        _get(url + LAG)  # the lags before do not count
        before = used(process.pid)
        asked = answers()
        after = used(process.pid)
        lags = json.loads(_get(url + LAG))["lags"]
    wrong.update(asked.wrong)
    length = asked.end - start
    return {
        "rate": len(asked.took) / length,
        "latency": asdict(Spread.of(asked.took)),
        "cpu": (after.cpu - before.cpu) / length,
        "cpu_seconds": (after.cpu - before.cpu) / len(asked.took),
        "memory": after.memory,
        "client_cpu": max(asked.cpu) / length,
        "lag": asdict(Spread.of(lags)),
    }


def _until_ready(process: Any, url: str, log: Path) -> None:
    end = time.perf_counter() + START
    while time.perf_counter() < end and process.poll() is None:
        try:
            _get(url + READY)
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the server was not ready:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    quick = arguments.quick
    visits: dict[int, list[Any]] = {0: [], 1: []}
    wrong: Counter[str] = Counter()
    known = Photographs(arguments.width, arguments.height, 4 if quick else 32)
    with tempfile.TemporaryDirectory() as place, Clients(known, arguments.loop) as clients:
        for number in range(1 if quick else ROUNDS):
            for way in (0, 1) if number % 2 == 0 else (1, 0):
                log = Path(place) / f"{number}-{way}"
                log.write_bytes(b"")
                visits[way].append(visit(way, arguments, clients, log, 0.5 if quick else arguments.seconds, wrong))
    medians = [statistics.median(one["rate"] for one in visits[way]) for way in visits]
    costs = [statistics.median(one["cpu_seconds"] for one in visits[way]) for way in visits]
    meets = medians[1] >= FASTER * medians[0] and costs[1] < costs[0]
    return {
        "device": arguments.device,
        "model": arguments.model,
        "quick": quick,
        "size": [arguments.width, arguments.height],
        "bytes": statistics.fmean(map(len, known.bodies)),
        "connections": arguments.connections,
        "loop": arguments.loop,
        "wrong": wrong,
        "ways": [{"way": name, "rate": medians[way], "rounds": visits[way]} for way, name in enumerate(WAYS)],
        "faster": medians[1] / medians[0],
        "verdict": "meets" if meets else f"misses: {medians[1] / medians[0]:.1f} times the rate, not {FASTER:g}",
    }


def show(results: Mapping[str, Any]) -> None:
    """Print a table."""
    size = f"{results['bytes'] / 1e3:.0f} kB a file"
    print(f"{results['device']}, {results['model']}, {results['connections']} connections, {size}")
    print(f"{'':24}{'requests/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'cores':>7}{'ms CPU':>8}{'lag p99 ms':>12}")
    for row in results["ways"]:
        one = sorted(row["rounds"], key=lambda one: float(one["rate"]))[len(row["rounds"]) // 2]
        print(
            f"{row['way']:24}{row['rate']:11.1f}{1e3 * one['latency']['p50']:9.1f}{1e3 * one['latency']['p99']:9.1f}"
            f"{one['cpu']:7.2f}{1e3 * one['cpu_seconds']:8.2f}{1e3 * one['lag']['p99']:12.2f}"
        )
    print(f"{results['faster']:.2f} times the rate; wrong answers: {sum(results['wrong'].values())}; {results['verdict']}")


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_jpeg_endpoint")
    parser.add_argument("--device", choices=["host", "cuda"], default="cuda" if torch.cuda.is_available() else "host")
    parser.add_argument("--model", choices=["detector", "tiny"], default="detector", help="tiny needs no torchvision")
    parser.add_argument("--size", default="1920x1080", help="of the images (1920x1080)")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (5)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works; no results")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    parser.add_argument("--loop", default="uvloop" if "uvloop" in loops() else "asyncio", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.width, arguments.height = map(int, arguments.size.split("x"))
    if arguments.serve is not None:
        serve(arguments)
        return 0
    results = compare(arguments)
    name = f"jpeg-endpoint-{arguments.device}"
    record = as_record(name, results)
    print(json.dumps(record)) if arguments.json else show(record)
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None:
        print(finish(name, results, folder, is_whole=not results["wrong"]), file=sys.stderr)
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
