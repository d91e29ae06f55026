"""Clients that run the application without its lifespan, or without the lifespan's state."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request

import aiotrt
from aiotrt import serving

pytestmark = pytest.mark.asyncio


def application() -> FastAPI:
    app = FastAPI(
        lifespan=serving.lifespan(adder=lambda: aiotrt.load(lambda x: x + 1, device="host", warmup=np.zeros(3, np.float32)))
    )

    @app.get("/sum")
    async def add(request: Request) -> list[float]:
        model = await serving.get("adder")(request)
        result: list[float] = (await model(np.arange(3, dtype=np.float32))).tolist()
        return result

    return app


async def test_a_client_that_passes_no_state_finds_the_models() -> None:
    app = application()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client,
    ):
        assert (await client.get("/sum")).json() == [1.0, 2.0, 3.0]


async def test_an_application_that_is_started_twice_at_once_ends_twice() -> None:
    app = application()
    first, second = app.router.lifespan_context(app), app.router.lifespan_context(app)
    await first.__aenter__()
    await second.__aenter__()
    await first.__aexit__(None, None, None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/sum")).json() == [1.0, 2.0, 3.0]
    await second.__aexit__(None, None, None)
    assert not hasattr(app.state, "aiotrt")


async def test_a_client_that_runs_no_lifespan_is_told_so() -> None:
    app = application()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        with pytest.raises(aiotrt.UsageError, match=r"see that the lifespan runs: httpx\.ASGITransport does not run it"):
            await client.get("/sum")
    async with app.router.lifespan_context(app):
        pass
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        with pytest.raises(aiotrt.UsageError, match="no models here"):
            await client.get("/sum")
