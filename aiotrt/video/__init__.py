"""Video: every frame awaited, from the decoder to the sink.

::

    async with aiotrt.load(network, preprocess=..., postprocess=..., slots=3) as model:
        async with video.Pipeline(model, {"door": "rtsp://...", "film": "film.mp4"}, JsonLines("found.jsonl")) as pipeline:
            await pipeline.wait()

    async with video.open("film.mp4") as frames:
        async for frame in frames:
            frame.time, frame.image  # seconds, and (height, width, 3) bytes, RGB

Decoding and encoding take PyAV: ``pip install 'aiotrt[video]'``. Sources that are iterables take nothing.
"""

from __future__ import annotations

from aiotrt.video.detection import Detections, Postprocess, Preprocess, detections
from aiotrt.video.drawing import Annotator
from aiotrt.video.encoding import VideoFile
from aiotrt.video.frames import Frame
from aiotrt.video.pipeline import Pipeline
from aiotrt.video.policies import Policy
from aiotrt.video.reports import Kind, Report, SourceError
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
    "VideoFile",
    "ViewerStatus",
    "WebSockets",
    "detections",
    "jsonable",
    "open",
]
