"""A JPEG in, boxes out: decoding, preprocessing and detection run on the GPU, or on the CPU where there is none.

python examples/fastapi_detect_gpu.py
curl -H "Content-Type: image/jpeg" --data-binary @photo.jpg http://127.0.0.1:8000/detect

`Cells` stands in for a network, so that nothing is downloaded: it finds the brightest cells of a grid. With a detector of
the YOLO family only `Cells` and `best` change.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from fastapi import Depends, FastAPI
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import serving
from aiotrt.preprocess import Letterbox, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELL = 32
LETTERBOX = Letterbox(640, fill=0)


class Cells(torch.nn.Module):
    """Scores of all cells, from (1, 3, 640, 640)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), CELL)[0, 0]


def best(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """The boxes of the three best cells, in pixels of the letterbox. Captured in the graph, as the preprocessing is."""
    found, index = scores.flatten().topk(3)
    left, upper = index % scores.shape[1] * CELL, index // scores.shape[1] * CELL
    return {"boxes": torch.stack([left, upper, left + CELL, upper + CELL], 1).float(), "scores": found}


def load_detector() -> aiotrt.Model:
    network = Cells().eval().to(DEVICE)
    example = padded(torch.zeros(1080, 1920, 3, dtype=torch.uint8, device=DEVICE))
    return aiotrt.load(network, preprocess=LETTERBOX, postprocess=best, outputs="torch", warmup=[example])


class Box(BaseModel):
    """Left, upper, right and lower edge, in pixels of the image, and how bright it is there."""

    edges: tuple[float, float, float, float]
    score: float


app = FastAPI(lifespan=serving.lifespan(detector=load_detector))
serving.install(app)
Detector = Annotated[aiotrt.Model, Depends(serving.get("detector"))]
Photo = Annotated[torch.Tensor, Depends(serving.image_body(device=True, max_bytes=10 << 20, max_pixels=20_000_000))]


@app.post("/detect", openapi_extra=serving.image_request)
async def detect(photo: Photo, detector: Detector) -> list[Box]:
    async with asyncio.timeout(2):
        found = await detector(*padded(photo))  # one graph for each size of canvas, and not of photograph
    boxes = LETTERBOX.boxes(found["boxes"], torch.tensor(photo.shape[:2]))
    pairs = zip(boxes.tolist(), found["scores"].tolist(), strict=True)
    return [Box(edges=tuple(edges), score=score) for edges, score in pairs]


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, timeout_graceful_shutdown=30)
