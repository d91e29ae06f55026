"""A FastAPI endpoint that awaits a model of aiotrt."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import Depends, FastAPI, Request, Response

import aiotrt
from aiotrt import serving
from aiotrt.batching.queue import Batching
from benchmarks.serving_rivals.work import OCTETS, READY, Job, decode, encode, network

__all__ = ["application"]

Model = Annotated[aiotrt.Model, Depends(serving.get("model"))]


def application(job: Job) -> FastAPI:
    """With the settings' `slots`, and `threads` on the host; with `max_batch` in batches, of `sizes` if they are there."""
    settings = job.settings
    is_batched = "max_batch" in settings
    item = np.zeros(job.shape, np.uint8), np.zeros((), np.int64)

    def load() -> aiotrt.Model:
        return aiotrt.load(
            job.file or network(job.model, job.device),
            device=job.device,
            slots=settings["slots"],
            threads=settings.get("threads", 1),
            batching=Batching(max_size=settings["max_batch"], sizes=settings.get("sizes")) if is_batched else None,
            warmup=[item if is_batched else tuple(array[None] for array in item)],
        )

    app = FastAPI(lifespan=serving.lifespan(model=load))

    @app.get(READY)
    async def ready(model: Model) -> Response:
        return Response()

    @app.post("/predict")
    async def predict(request: Request, model: Model) -> Response:
        pixels, number = decode(await request.body(), job.shape)
        if is_batched:
            output, checksum = await model(pixels, number)
        else:
            (output,), (checksum,) = await model(pixels[None], number[None])
        return Response(encode(output, checksum), media_type=OCTETS)

    return app
