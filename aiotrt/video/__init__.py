"""Video: frames from files, cameras and streams through models to sinks, in asyncio.

::

    async with aiotrt.load(network, preprocess=..., postprocess=..., slots=3) as model:
        sources = {"door": "rtsp://...", "street": "street.mp4"}
        async with video.Pipeline(model, sources, video.JsonLines("found.jsonl")) as pipeline:
            await pipeline.wait()

    async with video.open("street.mp4") as frames:
        async for frame in frames:
            frame.time, frame.image  # seconds, and (height, width, 3) bytes, RGB

Decoding and encoding need PyAV: ``pip install 'aiotrt[video]'``. Sources that are iterables need no extra package.
"""

from __future__ import annotations

from aiotrt.video.detection import Detections, Postprocess, Preprocess, detections
from aiotrt.video.drawing import Annotator
from aiotrt.video.encoding import VideoFile
from aiotrt.video.frames import Frame
from aiotrt.video.pipeline import Pipeline
from aiotrt.video.policies import Policy
from aiotrt.video.reports import Kind, Report, SourceError, UnsupportedError
from aiotrt.video.sinks import Callback, JsonLines, Progress, Result, Sink, SinkLike, Threaded, jsonable
from aiotrt.video.sources import Backoff, Source, SourceLike, SourceState, open  # noqa: A004
from aiotrt.video.status import Latency, PipelineStatus, SinkStatus, SourceStatus
from aiotrt.video.watching import Mjpeg, ViewerStatus, WebSockets

__all__ = [
    "Annotator",
    "Backoff",
    "Callback",
    "Detections",
    "Frame",
    "JsonLines",
    "Kind",
    "Latency",
    "Mjpeg",
    "Pipeline",
    "PipelineStatus",
    "Policy",
    "Postprocess",
    "Preprocess",
    "Progress",
    "Report",
    "Result",
    "Sink",
    "SinkLike",
    "SinkStatus",
    "Source",
    "SourceError",
    "SourceLike",
    "SourceState",
    "SourceStatus",
    "Threaded",
    "UnsupportedError",
    "VideoFile",
    "ViewerStatus",
    "WebSockets",
    "detections",
    "jsonable",
    "open",
]
