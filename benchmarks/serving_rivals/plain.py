"""A plain FastAPI endpoint that calls the model in a thread pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response

from benchmarks.serving_rivals.work import OCTETS, READY, Job, decode, encode

__all__ = ["application"]


def application(job: Job) -> FastAPI:
    """As many calls at once as the settings' `at_once`, with `threads` for each."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        yield {"run": job.run(), "limiter": CapacityLimiter(job.settings["at_once"])}

    app = FastAPI(lifespan=lifespan)

    @app.get(READY)
    async def ready() -> Response:
        return Response()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        pixels, number = decode(await request.body(), job.shape)
        state = request.state
        outputs, checksums = await to_thread.run_sync(state.run, pixels[None], number[None], limiter=state.limiter)
        return Response(encode(outputs[0], checksums[0]), media_type=OCTETS)

    return app
