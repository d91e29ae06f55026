"""A plain FastAPI endpoint that calls the model in a thread pool; on CUDA each call takes one of as many graphs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response

from benchmarks.serving_rivals.work import OCTETS, READY, Job, decode, encode

__all__ = ["application"]


def application(job: Job) -> FastAPI:
    """As many calls at once as the settings' `at_once`; on the host with `threads` for each."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        with ThreadPoolExecutor(job.settings["at_once"]) as pool:
            yield {"run": job.run(), "pool": pool}

    app = FastAPI(lifespan=lifespan)

    @app.get(READY)
    async def ready() -> Response:
        return Response()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        pixels, number = decode(await request.body(), job.shape)
        state, loop = request.state, asyncio.get_running_loop()
        outputs, checksums = await loop.run_in_executor(state.pool, state.run, pixels[None], number[None])
        return Response(encode(outputs[0], checksums[0]), media_type=OCTETS)

    return app
