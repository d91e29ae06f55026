"""A page in, boxes around its lines of text out: PP-OCR's detector behind FastAPI, on a GPU or the host.

python examples/fastapi_ocr.py
curl -H "Content-Type: image/png" --data-binary @page.png http://127.0.0.1:8000/lines
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import serving
from examples import ocr

Detector = Annotated[aiotrt.Model, Depends(serving.get("detector"))]
Page = Annotated[ocr.Pixels, Depends(serving.image_body(max_bytes=10 << 20, max_pixels=4_000_000))]


class Line(BaseModel):
    """A line of text: the corners of its box, clockwise from its upper left, and how sure the detector is."""

    corners: list[tuple[float, float]]
    score: float


app = FastAPI(lifespan=serving.lifespan(detector=lambda: aiotrt.load(ocr.detector_file(), slots=2, max_queue=64)))
serving.install(app)  # /livez, /readyz, /metrics, errors as JSON, and calls whose client has gone are cancelled


@app.post("/lines", openapi_extra=serving.image_request)
async def lines(page: Page, detector: Detector) -> list[Line]:
    x = await asyncio.to_thread(prepare, page)
    async with asyncio.timeout(10):
        output = await detector(x)
    found = await asyncio.to_thread(ocr.find_lines, output)
    return [Line(corners=list(line.corners), score=line.score) for line in found]


def prepare(page: ocr.Pixels) -> ocr.Floats:
    height, width = (-extent % 32 for extent in page.shape[:2])  # the detector takes multiples of 32
    return ocr.normalise(np.pad(page, ((0, height), (0, width), (0, 0)), mode="edge"))


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, timeout_graceful_shutdown=30)
