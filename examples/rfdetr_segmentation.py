"""RF-DETR instance segmentation over a video, from the decoder to an annotated file, all of the model in one graph.

    python examples/rfdetr_segmentation.py street.mp4 [WEIGHTS.pth | MODEL.onnx | MODEL.engine]

Without weights, RF-DETR-Seg-Nano of the package rfdetr has random ones, and says so: what it finds means nothing then.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import video
from aiotrt.video import rfdetr


async def main(film: Path, given: Path | None) -> None:
    async with video.open(film) as frames:
        height, width, _ = (await anext(frames)).shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32

    is_engine = given is not None and given.suffix in (".onnx", ".engine", ".plan")
    source: Any = given if is_engine else rfdetr.exported(rfdetr.network(given), device, dtype)

    # Random weights are never sure of anything: show the best of what they make up.
    threshold = 0.5 if given is not None else 0.0
    after = video.Postprocess(height, width, top=32 if given is not None else 5)

    def found(output: Any) -> video.Detections:
        return video.detections(output, (height, width), threshold=threshold)

    out = film.with_name(f"{film.stem}-found.mp4")
    sinks = [video.VideoFile(out, video.Annotator(found)), video.JsonLines(out.with_suffix(".jsonl"), found_json(found))]
    async with (
        aiotrt.load(source, slots=3, preprocess=video.Preprocess(rfdetr.SIZE, dtype), postprocess=after) as model,
        video.Pipeline(model, film, [*sinks, video.Progress()]) as pipeline,
    ):
        await pipeline.wait()
        (status,) = pipeline.status().sources.values()
        print(f"{out}: {status.completed} frames, {status.fps:.1f} a second, {status.dropped} dropped")
        for stage, latency in status.latency.items():
            print(f"  {stage:8}{1e3 * latency.p50:8.2f} ms, p99 {1e3 * latency.p99:.2f} ms")


def found_json(found: Any) -> Any:
    return lambda output: video.jsonable(found(output))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        aiotrt.run(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
    except aiotrt.AiotrtError as error:
        sys.exit(str(error))
