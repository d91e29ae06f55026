"""A page in, its text out: PP-OCR's detector, and its recogniser for each line that it finds, behind FastAPI.

python examples/fastapi_read.py
curl -H "Content-Type: image/png" --data-binary @page.png http://127.0.0.1:8000/text

Two models on one device, chained by `await`. The lines of all pages that are being read share the recogniser's batches.
"""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import onnxruntime
import uvicorn
from fastapi import Depends, FastAPI
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import serving
from examples import ocr
from examples.fastapi_ocr import prepare

Detector = Annotated[aiotrt.Model, Depends(serving.get("detector"))]
Recogniser = Annotated[aiotrt.Model, Depends(serving.get("recogniser"))]
Page = Annotated[ocr.Pixels, Depends(serving.image_body(max_bytes=10 << 20, max_pixels=4_000_000))]

FILE: Final = ocr.detector_file().with_name("ch_PP-OCRv4_rec_infer.onnx")
LETTERS: Final = onnxruntime.InferenceSession(FILE).get_modelmeta().custom_metadata_map["character"].split("\n")
HEIGHT: Final = 48  # of a line, as the recogniser takes it; widths are multiples of 64, so that few shapes share batches

app = FastAPI(
    lifespan=serving.lifespan(
        detector=lambda: aiotrt.load(ocr.detector_file(), max_queue=64),
        recogniser=lambda: aiotrt.load(FILE, batching=aiotrt.Batching(max_size=8, overload="wait")),
    )
)
serving.install(app)
app.mount("/status", serving.status_page())


@app.post("/text", openapi_extra=serving.image_request)
async def text(page: Page, detector: Detector, recogniser: Recogniser) -> list[str]:
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        output = await detector(await asyncio.to_thread(prepare, page))
        crops = await asyncio.to_thread(cut, page, output)
        outputs = [group.create_task(recogniser(crop)) for crop in crops]  # in batches; if one fails, none is waited for
    return [read(task.result()) for task in outputs]


def cut(page: ocr.Pixels, output: ocr.Floats) -> list[ocr.Floats]:
    """Each line of text by itself, straightened, from top to bottom."""
    image, crops = Image.fromarray(page), []
    for line in ocr.find_lines(output):
        a, b, c, d = line.corners
        width = max(round(HEIGHT * math.dist(a, b) / max(math.dist(a, d), 1)), 1)
        upright = image.transform((width, HEIGHT), Image.Transform.QUAD, (*a, *d, *c, *b), Image.Resampling.BICUBIC)
        crop = np.zeros((3, HEIGHT, width + -width % 64), np.float32)
        crop[..., :width] = np.asarray(upright, np.float32).transpose(2, 0, 1) / 127.5 - 1
        crops.append(crop)
    return crops


def read(output: ocr.Floats) -> str:
    """The most probable letter at each place: 0 is none, and the same one twice in a row is one."""
    best = output.argmax(axis=1)
    changes = best[np.flatnonzero(np.diff(best, prepend=0))]
    return "".join(LETTERS[i - 1] if i <= len(LETTERS) else " " for i in changes if i)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, timeout_graceful_shutdown=30)
