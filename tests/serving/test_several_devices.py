"""A model on several devices behind HTTP: readiness, metrics and the status page know each device, and which broke."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI

import aiotrt
from aiotrt import serving
from aiotrt.errors import DeviceError
from aiotrt.serving.kserve import ModelSettings
from tests.building import models as onnx_models
from tests.serving.test_fastapi import models_behind
from tests.serving.tools import served
from tests.tools import Affine, frame

pytestmark = pytest.mark.asyncio


def application() -> FastAPI:
    def source() -> aiotrt.Model:
        return aiotrt.load(Affine(), device=["host", "host"], slots=1, warmup=frame(0))

    app = FastAPI(lifespan=serving.lifespan(affine=source))
    serving.install(app)
    app.mount("/status", serving.status_page())
    return app


async def test_a_device_that_breaks_makes_the_model_degraded_and_not_unready() -> None:
    async with served(application()) as client:
        models = await models_behind(client)
        model = models["affine"]
        await asyncio.gather(*(model(frame(value)) for value in range(10)))

        async def metrics() -> dict[str, float]:
            lines = [line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines() if line[0] != "#"]
            return {name: float(value) for name, value in lines}

        def value(found: dict[str, float], name: str, device: str, **labels: str) -> float:
            wanted = {f'{k}="{v}"' for k, v in {"device": device, "model": "affine", **labels}.items()}
            (line,) = [
                one for one in found if one.startswith(name + "{") and set(one[len(name) + 1 : -1].split(",")) == wanted
            ]
            return found[line]

        assert (await client.get("/readyz")).json()["models"] == {"affine": "ready"}
        found = await metrics()
        assert found['aiotrt_model_degraded{model="affine"}'] == 0
        done = [value(found, "aiotrt_device_requests_total", device, outcome="completed") for device in ("host", "host:1")]
        assert sum(done) == found['aiotrt_requests_total{model="affine",outcome="completed"}'] == 10
        assert all(done)

        model._executors[1].break_down(DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
        answer = await client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json() == {"ready": True, "draining": False, "models": {"affine": "degraded: host:1 is broken"}}
        found = await metrics()
        assert found['aiotrt_model_degraded{model="affine"}'] == 1
        assert found['aiotrt_model_ready{model="affine"}'] == 1
        assert [value(found, "aiotrt_device_ready", device) for device in ("host", "host:1")] == [1, 0]
        assert value(found, "aiotrt_device_slots", "host:1", state="broken") == 1
        (described,) = (await client.get("/status/status.json")).json()["models"]
        assert (described["standing"], described["reason"]) == ("ready", "degraded: host:1 is broken")
        assert [(one["device"], one["broken"]) for one in described["devices"]] == [("host", False), ("host:1", True)]
        assert (await model(frame(1)) == 4).all()

        model._executors[0].break_down(DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
        assert (await client.get("/readyz")).status_code == 503
        assert (await metrics())['aiotrt_model_degraded{model="affine"}'] == 0, "it is broken"


async def test_a_configuration_may_name_several_devices(tmp_path: Path) -> None:
    settings = ModelSettings("m", tmp_path / "m.onnx", options={"device": ["host", "host"], "retry": True})
    assert settings.maker() is not None
    with pytest.raises(aiotrt.InputError, match="device must be a string, or a list of strings, got 3"):
        ModelSettings("m", tmp_path / "m.onnx", options={"device": 3})
    with pytest.raises(aiotrt.InputError, match="pass a list"):
        ModelSettings("m", tmp_path / "m.onnx", options={"device": "host", "retry": True})


async def test_an_onnx_file_runs_on_several_devices(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 8))
    async with aiotrt.load(path, device=["host", "host"]) as model:
        results = await asyncio.gather(*(model(np.full((1, 8), value, np.float32)) for value in range(-3, 3)))
        assert [float(result.max()) for result in results] == [0, 0, 0, 0, 1, 2]
        assert len(model.statistics().devices) == 2
