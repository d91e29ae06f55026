"""Compare decoding with PyAV on the CPU and with NVDEC on the GPU: live 720p streams through a detector.

    python -m benchmarks.bench_video_decoding --json
    python -m benchmarks.bench_video_decoding --streams 8 16 --seconds 20 --rounds 3

8 and 16 streams of 1280 by 720 H.264 at 30 frames a second, each paced as a camera, with the policy "latest", go through a
detector at 312 px: RF-DETR-Seg-Nano with random weights if rfdetr is installed, else torchvision's SSDlite. Both decoders
take turns in every round. The figures are of the whole process; those of the first second are left out:

- frames a second at the sinks, and drops
- CPU cores, which are the process's processor time over the wall time
- the age of a frame at its sink: the time since the frame was due. The schedule of a source is that of its earliest frame.
- the event loop's lag
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch

import aiotrt
from aiotrt import video
from aiotrt.video import rfdetr
from benchmarks.bench_rfdetr_video import StandIn
from benchmarks.clips import GpuShare
from benchmarks.measure import Heartbeat, Spread, Usage

__all__ = ["Measured", "main"]

FPS: Final = 30
SIZE: Final = (720, 1280)
WARM: Final = 1.0  # seconds that do not count


@dataclass(frozen=True)
class Measured:
    """The figures of one run. Ages and lags are in milliseconds."""

    decode: str
    streams: int
    frames_per_second: float
    cpu_cores: float
    other_cores: float | None
    drops: int
    age_p50: float
    age_p99: float
    lag_p99: float
    gpu_share: float | None
    reports: dict[str, int]


def write_stream(path: Path, seconds: float) -> Path:
    """Write an H.264 video of moving noise, as a camera's encoder does: no reordering, one keyframe a second."""
    import av

    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (SIZE[0] // 8 + 32, SIZE[1] // 8 + 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        options = {"preset": "veryfast", "bf": "0", "g": str(FPS), "b": "4M"}
        stream: Any = file.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(round(seconds * FPS)):
            top, left = 2 * i % 256, 3 * i % 256
            image = np.ascontiguousarray(coarse[top : top + SIZE[0], left : left + SIZE[1]])
            frame: Any = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


class SsdLite(torch.nn.Module):
    """torchvision's SSDlite without its suppression of overlaps, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import detection

        model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        self.backbone, self.head = model.backbone, model.head

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.head(list(self.backbone(x).values()))
        best = found["cls_logits"].softmax(-1)[0, :, 1:].amax(-1).topk(32)
        return found["bbox_regression"][0, best.indices], best.values


def load_detector(device: str, slots: int) -> tuple[aiotrt.Model, str]:
    """Load the detector on a device. Returns it with its name."""
    before, after = video.Preprocess(rfdetr.SIZE), None
    dtype = torch.float32 if device == "host" else torch.float16
    network: Any
    try:
        network, name = rfdetr.exported(rfdetr.network(), "cpu" if device == "host" else device, dtype), "RF-DETR-Seg-Nano"
        before, after = video.Preprocess(rfdetr.SIZE, dtype), video.Postprocess(*SIZE)
    except aiotrt.MissingDependencyError:
        try:
            network, name = SsdLite().eval(), "torchvision's SSDlite"
        except ImportError:
            network, name, after = StandIn().eval(), "three convolutions", video.Postprocess(*SIZE)
        if device != "host":
            network = network.to(device)
    frame = np.zeros((*SIZE, 3), np.uint8)
    model = aiotrt.load(network, device=device, slots=slots, preprocess=before, postprocess=after, warmup=[frame])
    return model, name


async def measure(model: aiotrt.Model, path: Path, decode: str, streams: int, seconds: float, device: str) -> Measured:
    """Run the streams for some seconds."""
    seen: list[tuple[str, float, float, float]] = []  # source, time, received, and when its sink got it

    def take(result: video.Result) -> None:
        frame = result.frame
        assert frame.time is not None
        seen.append((frame.source, frame.time, frame.received, time.perf_counter()))

    way = cast("Literal['cpu', 'gpu']", decode)
    sources = [video.open(path, name=f"camera {i}", realtime=True, loop=True, decode=way) for i in range(streams)]
    with GpuShare(wanted=device != "host") as gpu:
        async with video.Pipeline(model, sources, take, policy="latest", threads=4) as pipeline:
            await asyncio.sleep(WARM)
            seen.clear()
            dropped = pipeline.status().dropped
            async with Heartbeat() as heartbeat:
                with Usage() as usage:
                    await asyncio.sleep(seconds)
            counted = list(seen)
            status = pipeline.status()
    begins: dict[str, float] = {}
    for source, at, received, _ in counted:
        begins[source] = min(begins.get(source, received - at), received - at)
    ages = Spread.of([1e3 * (done - begins[source] - at) for source, at, _, done in counted] or [float("nan")])
    reports: dict[str, int] = {}
    for found in status.sources.values():
        for kind, count in found.reports.items():
            reports[kind] = reports.get(kind, 0) + count
    return Measured(
        decode, streams, len(counted) / usage.seconds, usage.cpu, usage.others, status.dropped - dropped, ages.p50, ages.p99,
        1e3 * heartbeat.spread.p99, gpu.share, reports,
    )  # fmt: skip


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; prints a line for each run to the standard error."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_stream(Path(folder) / "camera.mp4", arguments.seconds + WARM + 1)
        model, name = load_detector(arguments.device, arguments.slots)
        async with model:
            for streams in arguments.streams:
                for _ in range(arguments.rounds):
                    for decode in arguments.decode:
                        found = await measure(model, path, decode, streams, arguments.seconds, arguments.device)
                        print(_line(found), file=sys.stderr, flush=True)
                        results.append(asdict(found))
    where = torch.cuda.get_device_name() if arguments.device != "host" else "host"
    return {"detector": name, "device": where, "torch": torch.__version__, "seconds": arguments.seconds, "runs": results}


def _line(found: Measured) -> str:
    return (
        f"{found.decode} {found.streams:3} streams: {found.frames_per_second:6.1f} frames/s, {found.cpu_cores:5.2f} cores, "
        f"{found.drops} drops, age {found.age_p50:.1f} ms, p99 {found.age_p99:.1f} ms, lag p99 {found.lag_p99:.2f} ms"
    )


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_video_decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--device", default="cuda", help="of the detector: cuda or host")
    parser.add_argument("--decode", nargs="+", default=["cpu", "gpu"], choices=["cpu", "gpu"], help="in this order")
    parser.add_argument("--streams", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slots", type=int, default=3)
    arguments = parser.parse_args(words)
    found = aiotrt.run(run(arguments))
    if arguments.json:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
