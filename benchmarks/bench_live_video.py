"""Do live sources keep their rate and order beside others that stall, break and are slow? For real, for as long as it may.

    python -m benchmarks live_video --limit 760 [--video FILE]      (ten minutes: four fifths of the limit)

Eight live sources at 30 frames a second, looped files where PyAV is installed: one stalls after a second, one breaks every
few seconds and comes back after half a second, and one has a sink that sleeps for a tenth of a second each time. Through
RF-DETR in FP16 on CUDA; on the host, the mean of each frame.

The bars, on both: the sinks of the undisturbed sources get 30 frames a second, within 2 %, and the slow sink's source has as
many results; all come in order; what the sinks and the cameras counted by themselves and what the status says is lost adds
up, frame by frame; the one that breaks comes back each time but perhaps the last; and from the first quarter of the time to
the last, neither the process nor what is in use on the device has grown by 32 MiB.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
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
BREAKS_AFTER: Final = 90  # frames, each time; in a hurry
BREAKS_SOON: Final = 15
NAP: Final = 0.1  # seconds, of the slow sink
RATE: Final = 0.02  # of the rate, that a source may be off it
GROWTH: Final = 32 << 20  # bytes
SAMPLED: Final = 0.25  # seconds between two looks at the memory


class Checks:
    """What sinks and cameras see by themselves, by source.

    Attributes:
        given: frames that a camera of our own has given.
        got: results that a sink has got.
        is_in_order: whether a source's frames came in order, and none twice.
    """

    def __init__(self) -> None:
        self.given: Counter[str] = Counter()
        self.got: Counter[str] = Counter()
        self.is_in_order = True
        self._last: dict[str, int] = {}

    def __call__(self, result: video.Result) -> None:
        name, index = result.frame.source, result.frame.index
        self.is_in_order &= index > self._last.get(name, -1)
        self._last[name] = index
        self.got[name] += 1


def live_video(bench: Bench) -> Iterator[Row]:
    """One run, on the fastest loop there is."""
    seconds = 2.0 if bench.quick else 0.8 * bench.limit
    film = clip(90, bench.video)
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
    breaks_after = BREAKS_SOON if bench.quick else BREAKS_AFTER
    made[STALLS] = video.open(lambda: _camera(film, checks, STALLS, STALLS_AFTER), live=True, reconnect=back)
    made[BREAKS] = video.open(lambda: _camera(film, checks, BREAKS, breaks_after), live=True, reconnect=back)
    sinks: dict[str, video.SinkLike] = {name: sleeps if name == SLOW else checks for name in SOURCES}
    async with _model(bench, film) as model:
        with Usage() as usage:
            async with video.Pipeline(model, made, sinks, listener=lambda report: None) as pipeline:
                first = await _memory(seconds / 4)
                on_device = _in_use(bench.device)
                before, began = pipeline.status(), time.perf_counter()
                async with Heartbeat() as heartbeat:
                    await asyncio.sleep(seconds / 2)
                lag = heartbeat.spread
                del heartbeat  # it has noted a number every 2 ms, which would be megabytes of the growth
                last = await _memory(seconds / 4)
                after, measured = pipeline.status(), time.perf_counter() - began
                grown_on_device = _in_use(bench.device) - on_device
        status = pipeline.status()
    sources = {}
    for name, found in status.sources.items():
        (sink,) = found.sinks
        (earlier,), (later,) = before.sources[name].sinks, after.sources[name].sinks
        sources[name] = {
            "fps": (later.delivered - earlier.delivered) / measured,  # what its sink got
            "results": (after.sources[name].completed - before.sources[name].completed) / measured,  # a second
            "frames": found.frames,
            "completed": found.completed,
            "dropped": found.dropped,
            "sink_drops": sink.drops,
            "reports": found.reports,
            # By two counts of which neither knows the other: what a sink got and what is said to be lost is all there was.
            "is_exact": found.frames == checks.got[name] + found.failed + found.dropped + sink.drops
            and checks.given.get(name, found.frames) == found.frames,
        }
    device = status.sources[SOURCES[0]].latency["device"]
    latency = Spread(device.p50, device.p99, device.worst, device.count)
    run = Run(latency, status.completed / usage.seconds, usage.cpu, usage.others)
    facts = {
        "film": film.says,
        "decoded": path is not None,
        "seconds": seconds,
        "measured": measured,
        "sources": sources,
        "is_in_order": checks.is_in_order,
        "growth": statistics.median(last) - statistics.median(first),
        "device_growth": grown_on_device,
    }
    return Row.measured("live_video", loop, "pipeline", {"sources": len(SOURCES)}, None, [run], lags=[lag], facts=facts)


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


async def _camera(film: Clip, checks: Checks, name: str, count: int) -> AsyncIterator[Any]:
    """So many frames at their rate, and then either none ever again or an error."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for i in range(count):
        await asyncio.sleep(begin + i / FPS - loop.time())
        checks.given[name] += 1
        yield film.frames[i % len(film.frames)]
    if name == STALLS:
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


async def _memory(seconds: float) -> list[int]:
    """Bytes of this process in memory, looked at now and then for so long."""
    found = []
    for _ in range(max(1, round(seconds / SAMPLED))):
        await asyncio.sleep(min(seconds, SAMPLED))
        found.append(_resident())
    return found


def _resident() -> int:
    """Bytes of this process in memory. With its garbage: to collect it here would stop the loop for several frames."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _in_use(device: str) -> int:
    """Bytes in use on the device, whoever uses them; 0 on the host."""
    if device == "host":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """The healthy ones keep their rate, all their order; every frame is accounted for; memory is flat."""
    for row in rows:
        misses = [] if row.facts["is_in_order"] else ["frames came out of order"]
        late = []
        for name, source in row.facts["sources"].items():
            if not source["is_exact"]:
                misses.append(f"{name} has frames that are not accounted for")
            what, rate = ("results", source["results"]) if name == SLOW else ("frames at its sink", source["fps"])
            allowed = RATE * FPS + 1 / row.facts["measured"]  # a frame more or less is where the time was cut
            if name not in (STALLS, BREAKS) and abs(rate - FPS) > allowed:
                late.append(f"{name} had {rate:.1f} {what} a second, and dropped {source['dropped']} of {source['frames']}")
        reports = row.facts["sources"][BREAKS]["reports"]
        lost, back = reports.get("lost", 0), reports.get("reconnected", 0)
        if not lost:
            misses.append(f"{BREAKS} never broke")
        elif back < max(1, lost - 1):  # the last time it may be on its way
            misses.append(f"{BREAKS} broke {lost} times, and came back {back} times")
        if late:
            others = row.others or 0.0
            worst = 0.0 if row.lag is None else 1e3 * row.lag.worst
            misses += [*late, f"the loop was late by up to {worst:.0f} ms, and other programs used {others:.1f} cores"]
        if row.facts["growth"] >= GROWTH:
            misses.append(f"memory grew by {row.facts['growth'] / 2**20:.0f} MiB")
        if row.facts["device_growth"] >= GROWTH:
            misses.append(f"what is in use on the device grew by {row.facts['device_growth'] / 2**20:.0f} MiB")
        row.verdict = verdict(misses)


LIVE_VIDEO: Final[Part] = Part("live_video", "eight live sources, of which some misbehave", live_video, judge)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["live_video", *sys.argv[1:]]))
