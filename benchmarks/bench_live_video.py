"""Do live sources keep their rate and order beside others that stall, break and are slow? For real, for as long as it may.

    python -m benchmarks live_video [--limit SECONDS]      (ten minutes: --limit 760)

Eight live sources at 30 frames a second, looped files where PyAV is installed: one stalls after a second, one breaks every
few seconds and comes back after half a second, and one has a sink that sleeps for a tenth of a second each time. Through
RF-DETR in FP16 on CUDA; on the host, the mean of each frame. Every frame must be accounted for, and memory be flat.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch

import aiotrt
from aiotrt import video
from aiotrt.video import rfdetr
from benchmarks.bench_rfdetr_video import StandIn
from benchmarks.clips import Clip, clip
from benchmarks.measure import Heartbeat, Spread, Usage
from benchmarks.rows import Bench, Part, Row, Run, verdict

__all__ = ["LIVE_VIDEO"]

FPS: Final = 30
SOURCES: Final = tuple(f"camera {i}" for i in range(8))
STALLS, BREAKS, SLOW = SOURCES[1:4]
STALLS_AFTER: Final = 30  # frames
BREAKS_AFTER: Final = 90  # frames, each time
NAP: Final = 0.1  # seconds, of the slow sink
GROWTH: Final = 32 << 20  # bytes that a process may grow while its allocators settle


class Checks:
    """What a sink can see: whether a source's frames come in order, and none twice."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.is_in_order = True

    def __call__(self, result: video.Result) -> None:
        name, index = result.frame.source, result.frame.index
        self.is_in_order &= index > self.last.get(name, -1)
        self.last[name] = index


def live_video(bench: Bench) -> Iterator[Row]:
    """One run, on the fastest loop there is."""
    seconds = 2.0 if bench.quick else 0.8 * bench.limit
    film = clip(90)
    loop = bench.loops[-1]
    with tempfile.TemporaryDirectory() as folder:
        for _ in bench.each("live_video", [f"{seconds:.0f} s"]):
            path = _film(film, Path(folder)) if importlib.util.find_spec("av") is not None else None
            row = bench.run(loop, _lived(bench, film, path, seconds, loop))
            if row is not None:
                yield row


async def _lived(bench: Bench, film: Clip, path: Path | None, seconds: float, loop: str) -> Row:
    """All eight for so long."""
    checks = Checks()

    async def sleeps(result: video.Result) -> None:
        checks(result)
        await asyncio.sleep(NAP)

    def looped(name: str) -> video.Source:
        frames: Any = path if path is not None else film.frames
        return video.open(frames, name=name, loop=True, realtime=True, fps=None if path is not None else FPS)

    made: dict[str, video.SourceLike] = {name: looped(name) for name in SOURCES}
    back = video.Backoff(first=0.5)
    made[STALLS] = video.open(lambda: _camera(film, STALLS_AFTER, stalls=True), live=True, reconnect=back)
    made[BREAKS] = video.open(lambda: _camera(film, BREAKS_AFTER, stalls=False), live=True, reconnect=back)
    sinks: dict[str, video.SinkLike] = {name: sleeps if name == SLOW else checks for name in SOURCES}
    async with _model(bench, film) as model:
        with Usage() as usage:
            async with (
                Heartbeat() as heartbeat,
                video.Pipeline(model, made, sinks, listener=lambda report: None) as pipeline,
            ):
                await asyncio.sleep(seconds / 4)  # until caches are full and allocators know what is wanted
                middle, before = pipeline.status(), _resident()
                began = time.perf_counter()
                await asyncio.sleep(seconds * 3 / 4)
                end, after = pipeline.status(), _resident()
                measured = time.perf_counter() - began
        status = pipeline.status()
    sources = {}
    for name, found in status.sources.items():
        (sink,) = found.sinks
        sources[name] = {
            "fps": (end.sources[name].completed - middle.sources[name].completed) / measured,
            "frames": found.frames,
            "completed": found.completed,
            "dropped": found.dropped,
            "sink_drops": sink.drops,
            "reports": found.reports,
            # Each frame has one result, one failure or one drop, and each result one delivery or one drop.
            "is_exact": found.frames == found.completed + found.failed + found.dropped
            and found.completed == sink.delivered + sink.failed + sink.drops,
        }
    device = status.sources[SOURCES[0]].latency["device"]
    latency = Spread(device.p50, device.p99, device.worst, device.count)
    run = Run(latency, status.completed / usage.seconds, usage.cpu, usage.others)
    facts = {
        "film": film.says,
        "decoded": path is not None,
        "seconds": seconds,
        "sources": sources,
        "is_in_order": checks.is_in_order,
        "growth": after - before,
    }
    return Row("live_video", loop, "pipeline", {"sources": len(SOURCES)}, None, [run], lag=heartbeat.spread, facts=facts)


def _model(bench: Bench, film: Clip) -> aiotrt.Model:
    """RF-DETR on CUDA; on the host, where 240 frames a second are too many for any network, the mean of each frame."""
    if bench.device == "host":
        return aiotrt.load(_mean, device="host", slots=3, warmup=[film.frames[0]])
    network: object
    try:
        network, dtype = rfdetr.exported(rfdetr.network(), "cuda", torch.float16), torch.float16
    except aiotrt.MissingDependencyError as error:
        bench.skipped["RF-DETR"] = f"{error}; three convolutions in its place"
        network, dtype = StandIn().eval().cuda(), torch.float32
    return aiotrt.load(
        network,
        device="cuda",
        slots=3,
        preprocess=video.Preprocess(rfdetr.SIZE, dtype),
        postprocess=video.Postprocess(*film.frames[0].shape[:2]),
        warmup=[film.frames[0]],
    )


def _mean(frame: torch.Tensor) -> torch.Tensor:
    return frame[::4, ::4].float().mean()


async def _camera(film: Clip, count: int, *, stalls: bool) -> AsyncIterator[Any]:
    """Frames at their rate, and then either none ever again or an error."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for i in range(count):
        await asyncio.sleep(begin + i / FPS - loop.time())
        yield film.frames[i % len(film.frames)]
    if stalls:
        await asyncio.Event().wait()
    raise ConnectionError("the cable")


def _film(film: Clip, folder: Path) -> Path:
    """The frames as a file of their rate."""
    import av

    path = folder / "film.mp4"
    with av.open(os.fspath(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "bf": "0"})
        stream.height, stream.width = film.frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i, image in enumerate(film.frames):
            frame: Any = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def _resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """The healthy ones keep their rate, all their order; every frame is accounted for; memory is flat."""
    for row in rows:
        misses = [] if row.facts["is_in_order"] else ["frames came out of order"]
        for name, source in row.facts["sources"].items():
            if not source["is_exact"]:
                misses.append(f"{name} has frames that are not accounted for")
            if name not in (STALLS, BREAKS) and abs(source["fps"] / FPS - 1) > 0.03:
                misses.append(f"{name} had {source['fps']:.1f} frames a second")
            if name not in (STALLS, BREAKS) and source["dropped"] > 0.01 * source["frames"]:
                misses.append(f"{name} dropped {source['dropped']} of {source['frames']} frames")
        if row.facts["growth"] > GROWTH:
            misses.append(f"memory grew by {row.facts['growth'] / 2**20:.0f} MiB")
        row.verdict = verdict(misses)


LIVE_VIDEO: Final[Part] = Part("live_video", "eight live sources, of which some misbehave", live_video, judge)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["live_video", *sys.argv[1:]]))
