"""What does a whole pipeline gain: camera frame in, resized and normalised, a network, its best five classes out?

    python -m benchmarks pipeline

A 1080p frame (240p on the host device) in the host's memory, of the caller's own; ResNet-50 at FP16, or a few convolutions
where torchvision is missing. Four ways, each from page-locked memory: torch as it is, blocking; the same in threads, one
stream each; one CUDA graph of all of it, blocking and without overlap; and aiotrt, with one slot and with three. All take
the same frames in turn, and must give each of them the classes that torch gives it.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import queue
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Final, TypeAlias

import numpy as np
import torch

import aiotrt
from aiotrt.devices import Device, open_device
from benchmarks.measure import Spread
from benchmarks.rows import Bench, Part, Row, measure, verdict
from benchmarks.waits import Line

__all__ = ["PIPELINE"]

Frame: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Best: TypeAlias = tuple[Any, Any]
Call: TypeAlias = Callable[[Frame], Any]

EAGER: Final = "torch"
THREADS: Final = "torch in threads"
GRAPH: Final = "graph, no overlap"
ONE: Final = "aiotrt, 1 slot"
THREE: Final = "aiotrt, 3 slots"
AWAITERS: Final = {EAGER: 1, THREADS: 3, GRAPH: 1, ONE: 1, THREE: 6}
SIDE: Final = 224
FRAMES: Final = 8  # different ones
TOLERANCE: Final = 5e-2  # of a probability, in half precision
ALIKE: Final = 4  # of the five classes: with random weights the last may change places with the sixth


class Pipeline:
    """The functions, and the network that they go round.

    Attributes:
        device: where.
        frames: what comes in, in turn; of other colours each, so that one's result is not another's.
        network: on the device.
        name: of the network.
    """

    def __init__(self, device_name: str) -> None:
        self.device: Device = open_device(device_name)
        is_cuda = not self.device.unified
        random, shape = np.random.default_rng(0), (1080, 1920, 3) if is_cuda else (240, 320, 3)
        noise = random.integers(0, 64, shape, np.uint8)
        self.frames: list[Frame] = [noise + random.integers(0, 192, 3, np.uint8) for _ in range(FRAMES)]
        self.dtype = torch.float16 if is_cuda else torch.float32
        torch.manual_seed(0)
        self.name, network = _network() if is_cuda else ("three convolutions", _convolutions())
        self.network = network.to(self.device.torch_device, self.dtype).eval()
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=self.device.torch_device).view(1, 3, 1, 1)
        self._deviation = torch.tensor([0.229, 0.224, 0.225], device=self.device.torch_device).view(1, 3, 1, 1)

    def before(self, frame: torch.Tensor) -> torch.Tensor:
        """Height, width, colour in bytes, to what the network takes."""
        image = frame.permute(2, 0, 1).unsqueeze(0).float() / 255
        image = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return ((image - self._mean) / self._deviation).to(self.dtype).contiguous()

    def after(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best five classes."""
        best = logits.float().softmax(1).topk(5)
        return best.values, best.indices

    def __call__(self, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return self.after(self.network(self.before(frame)))


class Eager:
    """torch as it is, on a stream of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        device = pipeline.device
        self._staged = device.pinned(pipeline.frames[0].shape, torch.uint8)
        self._stream: Any = None if device.unified else torch.cuda.Stream()

    def __call__(self, frame: Frame) -> Best:
        np.copyto(self._staged.numpy(), frame)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            values, indices = self._pipeline(self._staged.to(self._pipeline.device.torch_device, non_blocking=True))
            return values.cpu().numpy(), indices.cpu().numpy()


def pipeline(bench: Bench) -> Iterator[Row]:
    """Every way."""
    pipe = Pipeline(bench.device)
    eager = Eager(pipe)
    expected = [eager(frame) for frame in pipe.frames]
    plan = bench.plan(seconds=0.25, least=20)
    for loop, way in bench.each("pipeline", [(loop, way) for loop in bench.loops for way in AWAITERS]):

        async def run(way: str = way, loop: str = loop) -> Row:
            async with OPENED[way](pipe) as call:
                turn = itertools.cycle(pipe.frames)

                async def request() -> None:
                    await call(next(turn))

                started = asyncio.get_running_loop().time()
                for _ in range(5):
                    await request()
                each = (asyncio.get_running_loop().time() - started) / 5
                count = max(2 * AWAITERS[way], plan.count(each))
                runs, lags = await measure(request, plan, awaiters=AWAITERS[way], count=count)
                is_right = await right(call, pipe.frames, expected, AWAITERS[way])
            facts = {"network": pipe.name, "frame": list(pipe.frames[0].shape), "is_right": is_right}
            return Row.measured("pipeline", loop, way, {"awaiters": AWAITERS[way]}, None, runs, lags=lags, facts=facts)

        row = bench.run(loop, run())
        if row is not None:
            yield row


async def right(call: Call, frames: Sequence[Frame], expected: Sequence[Best], awaiters: int) -> bool:
    """Whether each frame gets its own classes, from so many callers at once."""
    found: dict[int, Any] = {}

    async def caller(i: int) -> None:
        for number in range(i, 4 * len(frames), awaiters):
            found[number] = await call(frames[number % len(frames)])

    await asyncio.gather(*map(caller, range(awaiters)))
    return all(agrees(got, expected[number % len(frames)]) for number, got in found.items())


def agrees(got: Any, expected: Best) -> bool:
    """Whether the best classes and their probabilities are the same, up to half precision's neighbours."""
    values, indices = (np.asarray(part) for part in got)
    common = np.intersect1d(indices, expected[1]).size
    return bool(np.allclose(values, expected[0], rtol=TOLERANCE, atol=0) and common >= ALIKE)


@asynccontextmanager
async def _eager(pipe: Pipeline) -> AsyncIterator[Call]:
    eager = Eager(pipe)

    async def call(frame: Frame) -> Best:
        return eager(frame)

    yield call


@asynccontextmanager
async def _threads(pipe: Pipeline) -> AsyncIterator[Call]:
    loop = asyncio.get_running_loop()
    free: queue.SimpleQueue[Eager] = queue.SimpleQueue()
    for _ in range(AWAITERS[THREADS]):
        free.put(Eager(pipe))

    def run(frame: Frame) -> Best:
        eager = free.get()
        try:
            return eager(frame)
        finally:
            free.put(eager)

    with ThreadPoolExecutor(AWAITERS[THREADS], initializer=pipe.device.prepare_thread) as pool:
        yield lambda frame: loop.run_in_executor(pool, run, frame)


@asynccontextmanager
async def _graph(pipe: Pipeline) -> AsyncIterator[Call]:
    device = pipe.device
    line = Line(device, pipe, torch.from_numpy(pipe.frames[0]).to(device.torch_device))
    staged = device.pinned(pipe.frames[0].shape, torch.uint8)
    results = [device.pinned(output.shape, output.dtype) for output in line.outputs]

    async def call(frame: Frame) -> Best:
        np.copyto(staged.numpy(), frame)
        line.stream.copy(line.input, staged)
        line.submit()
        for result, output in zip(results, line.outputs, strict=True):
            line.stream.copy(result, output)
        line.block()
        values, indices = (result.numpy().copy() for result in results)
        return values, indices

    yield call
    line.close()


def _aiotrt(slots: int) -> Callable[[Pipeline], AbstractAsyncContextManager[Call]]:
    @asynccontextmanager
    async def opened(pipe: Pipeline) -> AsyncIterator[Call]:
        async with aiotrt.load(
            pipe.network,
            device=pipe.device.name,
            slots=slots,
            preprocess=pipe.before,
            postprocess=pipe.after,
            warmup=[pipe.frames[0]],
        ) as model:
            yield model

    return opened


OPENED: Final[dict[str, Callable[[Pipeline], AbstractAsyncContextManager[Call]]]] = {
    EAGER: _eager,
    THREADS: _threads,
    GRAPH: _graph,
    ONE: _aiotrt(1),
    THREE: _aiotrt(3),
}


def _network() -> tuple[str, torch.nn.Module]:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        return "three convolutions (torchvision is not installed)", _convolutions()
    network: torch.nn.Module = models.resnet50(weights=None)
    return "ResNet-50", network


def _convolutions() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 7, stride=4), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=4), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 10, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    )  # fmt: skip


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Right results; with several slots, more frames than the graph without overlap."""
    for row in rows:
        misses = [] if row.facts["is_right"] else ["other classes than torch's"]
        if row.way == THREE:
            graph = next((other for other in rows if (other.loop, other.way) == (row.loop, GRAPH)), None)
            if graph is not None and row.rate < graph.rate:
                misses.append(f"{row.rate / graph.rate:.2f} of the rate without overlap")
        if misses or row.way in (ONE, THREE):
            row.verdict = verdict(misses)


PIPELINE: Final[Part] = Part("pipeline", "frame to classes, against torch and a graph without overlap", pipeline, judge, 120)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["pipeline", *sys.argv[1:]]))
