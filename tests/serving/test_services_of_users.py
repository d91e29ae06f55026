"""How users test services of their own without a GPU: what docs/testing.md shows."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from fastapi import Depends, FastAPI

import aiotrt
from aiotrt import serving
from aiotrt.testing import FaultInjector, HazardError, SimulatedDevice, run
from tests.tools import Affine, frame

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Starlette would rather have another HTTP client
    from fastapi.testclient import TestClient


AffineModel = Annotated[aiotrt.Model, Depends(serving.get("affine"))]


def make_app(device: str | aiotrt.Device, *, is_careful: bool = True) -> FastAPI:
    """A service with a model of its own, as users write it."""
    app = FastAPI(
        lifespan=serving.lifespan(affine=lambda: aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0, (3,))))
    )
    serving.install(app)
    last = torch.zeros(3)

    @app.post("/")
    async def answer(numbers: list[float], model: AffineModel) -> list[float]:
        result: np.ndarray[tuple[int], np.dtype[np.float32]] = await model(np.array(numbers, np.float32))
        return result.tolist()

    @app.post("/kept")
    async def keep(numbers: list[float], model: AffineModel) -> str:
        side = model.stream()
        async with model.lease(outputs="device") as slot:
            slot.inputs[0][...] = np.array(numbers, np.float32)
            side.wait(slot.launch())
            output = slot.outputs[0].tensor
            side.run(lambda: last.copy_(output))
            if is_careful:
                slot.consumed(side)
        return "kept"

    return app


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = make_app("host")
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.asyncio
async def test_a_fixture_of_pytest_asyncio_enters_the_lifespan(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*[client.post("/", json=[value] * 3) for value in range(8)])
    assert [answer.json() for answer in answers] == [[3 * value + 1] * 3 for value in range(8)]


@pytest.mark.asyncio
@pytest.mark.parametrize("is_warm", [True, False])
async def test_a_model_whose_inputs_are_unknown_as_it_starts_is_warned_of(
    is_warm: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warmup = frame(0, (3,)) if is_warm else ()
    app = FastAPI(lifespan=serving.lifespan(affine=lambda: aiotrt.load(Affine(), device="host", warmup=warmup)))
    async with app.router.lifespan_context(app):
        assert ("model affine declares no inputs and was loaded without warmup=" in caplog.text) is not is_warm


def test_on_the_host_any_client_will_do() -> None:
    with TestClient(make_app("host")) as client:
        assert client.post("/", json=[0, 1, 2]).json() == [1, 4, 7]


async def ask(app: FastAPI, path: str, count: int) -> list[object]:
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = await asyncio.gather(*[client.post(path, json=[value] * 3) for value in range(count)])
        return [answer.json() for answer in answers]


@pytest.mark.parametrize("seed", range(3))
def test_on_the_simulated_gpu_the_service_runs_in_virtual_time(seed: int) -> None:
    device = SimulatedDevice(seed)
    answers = run(ask(make_app(device), "/", 6), device)
    assert answers == [[3 * value + 1] * 3 for value in range(6)]
    device = SimulatedDevice(seed)
    assert run(ask(make_app(device), "/kept", 4), device) == ["kept"] * 4


def test_a_race_in_a_service_is_found() -> None:
    device = SimulatedDevice(1)
    with pytest.raises(HazardError, match="missing"):
        run(ask(make_app(device, is_careful=False), "/kept", 4), device)


def test_a_client_with_a_loop_of_its_own_is_told_of_the_simulated_gpus() -> None:
    with pytest.raises(aiotrt.UsageError, match=r"virtual time.*aiotrt\.testing\.run\(main\(\), device\)"):
        with TestClient(make_app(SimulatedDevice())):
            pass


@pytest.mark.parametrize("inject", [False, True])
def test_a_loop_that_does_not_keep_virtual_time_is_refused_at_once(inject: bool) -> None:
    async def main() -> None:
        simulated = SimulatedDevice()
        model = aiotrt.load(Affine(), device=FaultInjector(simulated) if inject else simulated)
        with pytest.raises(aiotrt.UsageError, match=r"aiotrt\.testing\.run\(main\(\), device\)"):
            _ = await model

    asyncio.run(main())


@pytest.mark.asyncio
async def test_a_loop_of_another_simulation_is_refused_too() -> None:
    async def main() -> None:
        with pytest.raises(aiotrt.UsageError, match="virtual time"):
            async with aiotrt.load(Affine(), device=SimulatedDevice(2)):
                pass

    device = SimulatedDevice(1)
    await asyncio.to_thread(run, main(), device)
