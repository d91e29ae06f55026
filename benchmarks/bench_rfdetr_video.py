"""What does aiotrt come from, and what became of it: RF-DETR instance segmentation over a video, every way.

    python -m benchmarks rfdetr_video --limit 270 [--device cuda] [--quick]
    python -m benchmarks rfdetr_video --limit 270 --video film.mp4 --weights rf-detr-seg-nano.pth

All 250 frames of bikes.mp4, or the first 300 of another film, from memory. RF-DETR-Seg-Nano at 312 px, with fixed random
weights unless a checkpoint is named, as a TensorRT-RTX engine in FP16 and as an exported torch program in FP16 and FP32.
Each frame is resized, normalised, inferred, and its best 32 detections come to the host with boxes, confidences, classes
and masks at the video's size. Ways, in order:

- torch loop: op by op, one stream, blocking until each frame's results are on the host
- enqueue: TensorRT without a graph, synchronised after the engine and after the results
- graph, synchronised: the engine in a graph; input and outputs copied, and the stream synchronised for each frame: what the
  origin did before its change
- graph, zero copy: preprocessing writes the graph's input, postprocessing reads its outputs on a stream of its own, ordered
  by events; nothing is synchronised but the results: what the origin's change did
- whole graph: preprocessing, engine and postprocessing in one graph, blocking; no overlap
- aiotrt: `video.Pipeline` with 1, 2 and 3 slots; `model.map`; four sources at once; and with frames decoded meanwhile

One run over all frames warms up, and five are measured, of as many frames as take long enough, without keeping results. A
last one at the same speed keeps them, and they are compared. The bars:

- every frame that was sent has come back, with the same bits as by the first way of its engine: boxes, confidences, classes
  and the MD5 of every mask
- aiotrt with 3 slots has 1.5 times the rate of "graph, synchronised", and in FP16 six times that of torch's loop
- with 3 slots the GPU is busy for 90 % of the time, since the frames are there
- the loop's lag stays under 2 ms in p99, over all runs

What limits a way is named: the device, the loop's thread, or decoding.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

import aiotrt
from aiotrt import video
from aiotrt.devices import Device, open_device
from aiotrt.video import rfdetr
from benchmarks.clips import Clip, Digest, GpuShare, clip, digest
from benchmarks.measure import NO_OVERLAP, Heartbeat, Spread, Usage, busiest
from benchmarks.rfdetr_loops import BLOCKING, EAGER, ENQUEUE, SYNCHRONISED, WHOLE, ZERO_COPY, Engine, TensorRT, Torch
from benchmarks.rows import Bench, Part, Row, Run, verdict

__all__ = ["RFDETR_VIDEO"]

#: So many frames of each source, begun anew at the film's end.
Pass: TypeAlias = Callable[[int], Awaitable["Passed"]]

MAP: Final = "aiotrt map, 3 slots"
SEVERAL: Final = "aiotrt, 3 slots, 4 sources"
DECODED: Final = "aiotrt, 3 slots, decoding"
DECODED_SEVERAL: Final = "aiotrt, 3 slots, decoding 4 sources"
TOP: Final = 32  # detections of each frame
RUNS: Final = 5
LAG: Final = 2e-3  # seconds, of the loop at most, in p99
BUSY: Final = 0.9  # of the time, that the GPU is at work at least
TENSORRT: Final = "TensorRT FP16"
FP16: Final = "torch FP16"
FP32: Final = "torch FP32"


def aiotrt_way(slots: int) -> str:
    """Its name."""
    return f"aiotrt, {slots} slot{'s' * (slots > 1)}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Frames in memory at most, measured runs, and about how many seconds each."""

    frames: int
    runs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Passed:
    """What one pass gave.

    Attributes:
        results: which frame of the film each is of, and what was found on it.
        seconds: how long each took, where one is done after the other.
        stages: mean seconds of a frame in each stage of a pipeline.
        limited_by: what a pipeline says of itself.
    """

    results: Sequence[tuple[int, Any]]
    seconds: Sequence[float] = ()
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limited_by: str | None = None


class Bed:
    """One engine, and everything it is measured with.

    Attributes:
        engine: as the blocking ways use it; None on the host.
        source: as `aiotrt.load` takes it.
        expected: each frame's digest, by the first way that was measured.
        keeps_results: whether a pass keeps what the frames gave. Not while it is measured: several GB of new memory a second
            would slow it down, and make the loop late.
    """

    def __init__(self, name: str, source: Any, engine: Engine, dtype: torch.dtype, film: Clip, device: Device) -> None:
        self.name = name
        self.source = source
        self.engine = engine
        self.film = film
        self.device = device
        height, width = film.frames[0].shape[:2]
        self.before = video.Preprocess(rfdetr.SIZE, dtype)
        self.after = video.Postprocess(height, width, top=TOP)
        self.expected: list[Digest] = []
        self.gpu_seconds: float | None = None
        self.fallbacks: set[str] = set()
        self.keeps_results = True

    def kept(self, result: Any) -> Any:
        """The result, or None where results are not kept."""
        return result if self.keeps_results else None

    def agrees(self, results: Sequence[tuple[int, Any]]) -> bool:
        """Whether they are what the first way gave. The first way's are kept: they must be of every frame."""
        digests = [(index, digest(found)) for index, found in results]
        if not self.expected:
            self.expected = [found for _, found in sorted(digests, key=lambda entry: entry[0])]
            assert len(self.expected) == len(self.film.frames)
        return all(found == self.expected[index] for index, found in digests)

    def is_complete(self, results: Sequence[tuple[int, Any]], count: int, sources: int) -> bool:
        """Whether there is a result for each frame of each source, and not one more."""
        length = len(self.film.frames)
        return Counter(index for index, _ in results) == Counter([i % length for i in range(count)] * sources)


def rfdetr_video(bench: Bench) -> Iterator[Row]:
    """Every way with every engine."""
    is_cuda = bench.device == "cuda"
    plan = Plan(12 if bench.quick else 300, RUNS, 0.1 if bench.quick else 0.6) if is_cuda else Plan(2, 1, 0.0)
    if not is_cuda and not bench.quick:
        plan = Plan(4, RUNS, 0.0)
    film = clip(plan.frames, bench.video)
    device = open_device(bench.device)
    loop = bench.loops[-1]
    names = (TENSORRT, FP16, FP32) if is_cuda else (FP32,)
    with tempfile.TemporaryDirectory() as folder:
        for name in bench.each("engine", names):
            started = time.monotonic()
            made = _bed(bench, name, film, device, Path(folder))
            if made is None:
                continue
            bed, says = made
            gc.collect()
            gc.freeze()  # as `aiotrt serve` does: a full collection of all that torch has stops the loop for 0.3 s
            facts = {"network": says, "film": film.says, "prepared_seconds": time.monotonic() - started}
            for way, opened, sources in bench.each("rfdetr_video", list(_ways(bed, bench))):
                row = bench.run(loop, _measured(bed, way, opened, sources, plan, loop, facts))
                if row is not None:
                    yield row
            del bed, made
            gc.unfreeze()
            if is_cuda:
                torch.cuda.empty_cache()


def _bed(bench: Bench, name: str, film: Clip, device: Device, folder: Path) -> tuple[Bed, str] | None:
    """The engine, or None and a word about why there is none."""
    says = f"RF-DETR-Seg-Nano, {bench.weights.name if bench.weights else 'random weights'}"
    dtype = torch.float32 if name == FP32 else torch.float16
    try:
        try:
            network = rfdetr.network(bench.weights)
        except aiotrt.MissingDependencyError as error:
            if name == TENSORRT:
                raise
            network, says = StandIn().eval(), f"three convolutions in its place ({error})"
        if name == TENSORRT:
            if importlib.util.find_spec("tensorrt_rtx") is None:
                raise aiotrt.MissingDependencyError("tensorrt_rtx is not installed")
            path = _built(network, folder)
            return Bed(name, path, TensorRT(path), dtype, film, device), says
        program = rfdetr.exported(network, device.torch_device, dtype)
        return Bed(name, program, Torch(program.module(), device, dtype), dtype, film, device), says
    except aiotrt.MissingDependencyError as error:
        bench.skipped[name] = str(error)
    except Exception as error:  # one engine that cannot be made takes no other with it
        bench.failed[name] = f"{type(error).__name__}: {error}"
    return None


def _built(network: torch.nn.Module, folder: Path) -> Path:
    onnx = folder / "rfdetr.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.half().cpu(),
            (torch.zeros(1, 3, rfdetr.SIZE, rfdetr.SIZE, dtype=torch.float16),),
            onnx,
            input_names=["x"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return aiotrt.build(onnx, folder / "rfdetr.engine", runtime="tensorrt_rtx")


class StandIn(torch.nn.Module):
    """Outputs of RF-DETR's shapes from next to no work: to see that the benchmark runs where the package is missing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.boxes = torch.nn.Conv2d(3, 4, 32, stride=32)
        self.logits = torch.nn.Conv2d(3, 91, 32, stride=32)
        self.masks = torch.nn.Conv2d(3, 81, 4, stride=4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        boxes = self.boxes(x).flatten(2).transpose(1, 2).sigmoid()
        return boxes, self.logits(x).flatten(2).transpose(1, 2), self.masks(x)


# The ways...


def _ways(bed: Bed, bench: Bench) -> Iterator[tuple[str, Callable[[], contextlib.AbstractAsyncContextManager[Pass]], int]]:
    blocking = [EAGER, SYNCHRONISED, ZERO_COPY, WHOLE] if bed.name != TENSORRT else [ENQUEUE, SYNCHRONISED, ZERO_COPY, WHOLE]
    if bed.device.unified:
        blocking = [EAGER]
        bench.skipped["graphs by hand"] = "the host device has none of torch's"
    for way in blocking:
        yield way, functools.partial(_blocking, bed, way), 1
    for slots in (1, 2, 3):
        yield aiotrt_way(slots), functools.partial(_pipeline, bed, slots, 1, decode=False), 1
    yield MAP, functools.partial(_map, bed), 1
    yield SEVERAL, functools.partial(_pipeline, bed, 3, 4, decode=False), 4
    if bed.film.path is None:
        bench.skipped["decoding"] = f"{bed.film.says}: no file that can be decoded here"
    elif bed.name != FP32 or bed.device.unified:  # decoding is the same for all, and FP32's network is the slowest
        yield DECODED, functools.partial(_pipeline, bed, 3, 1, decode=True), 1
        yield DECODED_SEVERAL, functools.partial(_pipeline, bed, 3, 4, decode=True), 4


@contextlib.asynccontextmanager
async def _blocking(bed: Bed, way: str) -> AsyncIterator[Pass]:
    """Each frame on the loop's thread, which goes its turn between two."""
    call = BLOCKING[way](bed.engine, bed.before, bed.after, bed.film.frames[0])

    async def once(count: int) -> Passed:
        seconds, results = [], []
        for i in range(count):
            index = i % len(bed.film.frames)
            started = time.perf_counter()
            found = call(bed.film.frames[index])
            seconds.append(time.perf_counter() - started)
            results.append((index, bed.kept(found)))
            await asyncio.sleep(0)
        return Passed(results, seconds)

    yield once
    if bed.gpu_seconds is None and way == WHOLE:
        bed.gpu_seconds = call.gpu_seconds()


@contextlib.asynccontextmanager
async def _map(bed: Bed) -> AsyncIterator[Pass]:
    """`Model.map`, and nothing of `aiotrt.video`."""
    async with _loaded(bed, 3) as model:

        async def once(count: int) -> Passed:
            frames = itertools.islice(itertools.cycle(bed.film.frames), count)
            found = [bed.kept(result) async for result in model.map(frames)]
            return Passed([(i % len(bed.film.frames), result) for i, result in enumerate(found)])

        yield once


@contextlib.asynccontextmanager
async def _pipeline(bed: Bed, slots: int, sources: int, *, decode: bool) -> AsyncIterator[Pass]:
    """`video.Pipeline`."""
    async with _loaded(bed, slots) as model:

        async def once(count: int) -> Passed:
            results: list[tuple[int, Any]] = []

            def take(result: video.Result) -> None:
                results.append((result.frame.index % len(bed.film.frames), bed.kept(result.output)))

            def source() -> video.SourceLike:
                if decode:
                    return video.open(str(bed.film.path), loop=True, limit=count)
                return list(itertools.islice(itertools.cycle(bed.film.frames), count))

            inputs = {f"source {i}": source() for i in range(sources)}
            async with video.Pipeline(model, inputs, take, threads=4) as pipeline:
                await pipeline.wait()
            status = pipeline.status()
            return Passed(results, stages=_stages(status), limited_by=status.limited_by or None)

        yield once


def _stages(status: video.PipelineStatus) -> dict[str, float]:
    """Mean seconds of a frame in each stage, over the sources."""
    found: dict[str, list[float]] = {}
    for source in status.sources.values():
        for stage, latency in source.latency.items():
            found.setdefault(stage, []).append(latency.mean)
    return {stage: statistics.fmean(means) for stage, means in found.items()}


@contextlib.asynccontextmanager
async def _loaded(bed: Bed, slots: int) -> AsyncIterator[aiotrt.Model]:
    async with aiotrt.load(
        bed.source,
        device=bed.device.name,
        slots=slots,
        preprocess=bed.before,
        postprocess=bed.after,
        warmup=[bed.film.frames[0]],
    ) as model:
        yield model
        bed.fallbacks |= set(model.statistics().fallbacks)


# Measuring...


async def _measured(
    bed: Bed,
    way: str,
    opened: Callable[[], contextlib.AbstractAsyncContextManager[Pass]],
    sources: int,
    plan: Plan,
    loop: str,
    facts: Mapping[str, Any],
) -> Row:
    """One run over all frames that does not count, and the plan's."""
    length = len(bed.film.frames)
    async with opened() as once:
        started = time.perf_counter()
        passed = await once(length)
        taken = time.perf_counter() - started
        is_right, is_complete = bed.agrees(passed.results), bed.is_complete(passed.results, length, sources)
        compared = len(passed.results)
        if taken < 2 * plan.seconds:  # the first pass of all loads kernels, which may be most of so short a time
            started = time.perf_counter()
            await once(length)
            taken = time.perf_counter() - started
        count = max(min(12, length), round(plan.seconds / taken * length))
        if way in (DECODED, DECODED_SEVERAL) and not bed.film.is_whole:
            count = min(count, length)  # there is nothing to compare the film's other frames with
        runs, on_loop = [], []
        lags: list[float] = []
        del passed
        bed.keeps_results = False
        with GpuShare(wanted=not bed.device.unified) as gpu:
            for _ in range(plan.runs):
                busy = time.thread_time()
                async with Heartbeat() as heartbeat:
                    with Usage() as usage:
                        passed = await once(count)
                lags += heartbeat.lags
                on_loop.append((time.thread_time() - busy) / usage.seconds)
                frames = len(passed.results)
                each = passed.seconds or [usage.seconds / frames]
                runs.append(Run(Spread.of(each), frames / usage.seconds, usage.cpu, usage.others))
                is_complete = is_complete and bed.is_complete(passed.results, count, sources)
        bed.keeps_results = True
        again = await once(count)  # at full speed, where races would be
        is_right = is_right and bed.agrees(again.results)
        compared += len(again.results)
        del again
    fallbacks, bed.fallbacks = sorted(bed.fallbacks), set()
    row = Row.measured(
        "rfdetr_video", loop, way, {"engine": bed.name, "sources": sources}, None, runs, lags=[Spread.of(lags)],
        facts={
            **facts, "is_right": is_right, "is_complete": is_complete, "compared": compared, "fallbacks": fallbacks,
            "mean": statistics.fmean(run.rate for run in runs),
        },
    )  # fmt: skip
    shares = {"loop": statistics.median(on_loop)}
    if bed.gpu_seconds is not None:
        shares["device"] = row.rate * bed.gpu_seconds
        row.facts["gpu_seconds"] = bed.gpu_seconds
    if passed.stages:
        # A source decodes in one thread; four threads convert, and a slot is waited for meanwhile, which is the device's.
        shares["decode"] = row.rate / sources * passed.stages.get("decode", 0.0)
    row.facts |= {"shares": shares, "gpu_share": gpu.share, "stages": dict(passed.stages), "count": count}
    row.facts["limited_by"] = passed.limited_by
    row.facts["limit"] = NO_OVERLAP if way in BLOCKING else busiest(shares, gpu.share, passed.limited_by)
    return row


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """The bars: see the module."""
    rates = {(str(row.setting["engine"]), row.way): row.facts["mean"] for row in rows}
    for row in rows:
        engine, facts = str(row.setting["engine"]), row.facts
        misses = [] if facts["is_right"] else ["other bits than the first way's"]
        misses += [] if facts["is_complete"] else ["frames without a result, or with two"]
        misses += [f"runs without a graph: {reason}" for reason in facts["fallbacks"]]
        if row.way == aiotrt_way(3):
            # TensorRT has no torch loop of its own: torch's, in the same precision, is what one had before.
            eager = FP16 if engine == TENSORRT else engine
            for other, least in (((engine, SYNCHRONISED), 1.5), ((eager, EAGER), 1.0 if engine == FP32 else 6.0)):
                if other not in rates:
                    misses.append(f"nothing to compare with: {', '.join(other)} was not measured")
                elif facts["mean"] < least * rates[other]:
                    times = facts["mean"] / rates[other]
                    misses.append(f"{times:.2f} times the rate of {', '.join(other)}, and should be {least:g}")
        if row.way in (aiotrt_way(3), SEVERAL):
            if facts["gpu_share"] is None:
                misses.append("nothing saw how busy the GPU was")
            elif facts["gpu_share"] < BUSY:
                misses.append(f"the GPU was busy {facts['gpu_share']:.0%} of the time")
        if row.way.startswith("aiotrt") and row.lag is not None and row.lag.p99 > LAG:
            misses.append(f"the loop's lag was {1e3 * row.lag.p99:.1f} ms")
        if misses or row.way.startswith("aiotrt"):
            row.verdict = verdict(misses)


RFDETR_VIDEO: Final[Part] = Part(
    "rfdetr_video", "RF-DETR over a video, every way; where aiotrt comes from", rfdetr_video, judge, 300
)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["rfdetr_video", *sys.argv[1:]]))
