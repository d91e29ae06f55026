"""Models in a FastAPI application, behind a real socket: life, access, bodies, errors, disconnections, health, metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route

import aiotrt
from aiotrt import serving
from aiotrt.errors import DeviceError
from aiotrt.serving.errors import problem
from tests.serving.tools import Served, raw, served
from tests.tools import Affine, executor_of, held, until

pytestmark = pytest.mark.asyncio

Affinity = Annotated[aiotrt.Model, Depends(serving.get("affine"))]
Array = Annotated[npt.NDArray[np.float32], Depends(serving.array_body(np.float32, max_bytes=4096))]
Page = Annotated[npt.NDArray[np.uint8], Depends(serving.image_body(max_bytes=100_000, max_pixels=10_000, timeout=0.5))]
WARMUP = [np.zeros((2, 3), np.float32)]


def affine(**options: Any) -> Callable[[], aiotrt.Model]:
    return lambda: aiotrt.load(Affine(), device="host", warmup=WARMUP, signatures="fixed", **options)


def application(**options: Any) -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan(affine=affine(**options)))

    @app.post("/affine", openapi_extra=serving.array_request)
    async def run(x: Array, model: Affinity) -> list[list[float]]:
        result: list[list[float]] = (await model(x)).tolist()
        return result

    @app.post("/hurry")
    async def hurry(x: Array, model: Affinity) -> None:
        async with asyncio.timeout(0.05):
            await model(x)

    @app.post("/size", openapi_extra=serving.image_request)
    async def size(page: Page) -> tuple[int, ...]:
        return page.shape

    @app.websocket("/frames")
    async def frames(socket: WebSocket, model: Affinity) -> None:
        await socket.accept()

    serving.install(app)
    return app


def npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def vast(width: int, height: int) -> bytes:
    """A PNG whose head says so."""
    parts = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def headed(shape: str) -> bytes:
    """The head of an .npy file of float32."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


def png(width: int = 20, height: int = 10, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, form, **options)
    return file.getvalue()


X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
NPY = {"content-type": "application/x-npy"}


# --- life ---------------------------------------------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_a_model_lives_as_long_as_its_application_and_inside_the_own_lifespan() -> None:
    seen: list[Any] = []

    @contextlib.asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        seen.append("own starts")
        yield {"database": "here"}
        seen.append(("own ends", model.is_ready))

    app = FastAPI(lifespan=serving.lifespan(own, affine=affine()))

    @app.get("/")
    async def root(request: Request, model: Affinity) -> str:
        seen.append(model)
        return str(request.state.database)

    async with served(app) as client:
        assert (await client.get("/")).json() == "here"
        model: Any = seen[1]
        assert model.is_ready
        assert model.statistics().captures == 2  # warmed up on both slots
    assert seen == ["own starts", model, ("own ends", True)]
    assert not model.is_ready
    async with served(app) as client:  # and again, as tests do: the function loads a new one
        assert (await client.get("/")).json() == "here"


async def test_a_loaded_model_and_a_network_can_be_given_as_they_are() -> None:
    sources: dict[str, serving.Source] = {"a": aiotrt.load(Affine(), device="host"), "b": Affine()}
    models = serving.Models(sources)
    await models.load("a")
    await models.load("b")
    assert (await models["a"](X)).tolist() == (await models["b"](X)).tolist()
    await models.unload("a")
    with pytest.raises(aiotrt.UsageError, match="pass a function that loads it"):
        await models.load("a")
    with pytest.raises(aiotrt.ModelClosedError, match="model 'a' is unavailable: loading failed"):
        _ = models["a"]
    with pytest.raises(aiotrt.UsageError, match="no model 'c' here; there are: a, b"):
        _ = models["c"]
    assert await models.aclose()
    with pytest.raises(aiotrt.InputError, match="expected a file"):
        serving.Models({"x": 7})  # type: ignore[dict-item]


async def test_what_is_being_loaded_when_all_is_closed_does_not_stay() -> None:
    opened, gate = asyncio.Event(), asyncio.Event()

    async def wait(name: str, model: aiotrt.Model) -> None:
        opened.set()
        await gate.wait()

    models = serving.Models({"a": Affine()}, opened=wait)
    loading = asyncio.create_task(models.load("a"))
    await opened.wait()
    assert await models.aclose()
    gate.set()
    with pytest.raises(aiotrt.ModelClosedError, match="all models are being closed"):
        await loading  # `_no_leaks` says so if the model was left open
    with pytest.raises(aiotrt.ModelClosedError, match="all models are being closed"):
        await models.load("a")
    assert not models.open()


async def test_an_application_whose_model_cannot_be_loaded_does_not_start_and_leaves_nothing() -> None:
    enter = serving.lifespan(affine=affine(), broken="no/such/file.onnx")
    with pytest.raises(aiotrt.EngineError, match="no/such/file"):
        async with enter(FastAPI()):
            pass  # `_no_leaks` says so if the first model was left open


async def test_loading_behind_answers_livez_at_once_and_readyz_when_warm() -> None:
    gate = asyncio.Event()

    class Slow(serving.Models):
        async def load(self, name: str) -> None:
            await gate.wait()
            await super().load(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiotrt.serving.models.Models", Slow)
        app = FastAPI(lifespan=serving.lifespan(affine=affine(), wait=False))
        serving.install(app)

        @app.post("/")
        async def run(model: Affinity) -> None: ...

        async with served(app) as client:
            assert (await client.get("/livez")).status_code == 200
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert answer.json() == {"ready": False, "draining": False, "models": {"affine": "not loaded yet"}}
            refused = await client.post("/")
            assert (refused.status_code, refused.json()["type"]) == (503, "model_closed")
            gate.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            assert (await client.post("/")).status_code == 200


async def test_loading_behind_that_fails_is_said_by_readyz(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI(lifespan=serving.lifespan(broken="no/such/file.onnx", wait=False))
    serving.install(app)
    async with served(app) as client:
        while "loading failed" not in (answer := await client.get("/readyz")).text:
            await asyncio.sleep(0.01)
        assert answer.status_code == 503
    assert "loading failed" in caplog.text


@pytest.mark.every_loop
async def test_an_application_that_ends_before_its_models_are_loaded() -> None:
    def never() -> aiotrt.Model:
        return aiotrt.load(Affine(), device="host", warmup=[np.zeros((n, 3), np.float32) for n in range(1, 2000)])

    async with serving.lifespan(affine=never, wait=False)(FastAPI()) as state:
        assert not state["aiotrt"].is_ready
        await asyncio.sleep(0.05)


# --- bodies -------------------------------------------------------------------------------------------------------------


async def test_array_bodies() -> None:
    expected = (X * 3 + 1).tolist()
    async with served(application()) as client:
        for request in (
            {"content": npy(X), "headers": NPY},
            {"content": npy(X)},
            {"content": npy(np.asfortranarray(X))},
            {"content": npy(X.astype(">f4"))},
            {"files": {"file": ("x.npy", npy(X))}},
            {"json": X.tolist()},
            {"json": {"array": X.tolist()}},
        ):
            answer = await client.post("/affine", **request)
            assert answer.status_code == 200, answer.text
            assert answer.json() == expected


async def test_large_arrays_are_copied_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def decode(data: bytearray) -> npt.NDArray[Any]:
        threads.append(threading.current_thread())
        return serving.decode_array(data)

    monkeypatch.setattr("aiotrt.serving.bodies.decode_array", decode)
    app = FastAPI()

    @app.post("/")
    async def size(array: Annotated[npt.NDArray[Any], Depends(serving.array_body())]) -> int:
        return array.size

    async with served(app) as client:
        for many in (10, 1 << 18):
            assert (await client.post("/", content=npy(np.zeros(many, ">f4")))).json() == many
            assert (await client.post("/", files={"file": npy(np.zeros(many, ">f4"))})).json() == many
    assert [thread is not threading.main_thread() for thread in threads] == [False, False, True, True]


BAD_ARRAYS: list[tuple[int, str, dict[str, Any]]] = [
    (422, "expected dtype float32, got float64", {"content": npy(X.astype(np.float64))}),
    (422, "not an .npy file", {"content": b"\x93NUMPY\x01\x00\xff\xff{"}),
    (422, "not an .npy file", {"content": b""}),
    (422, "not an .npy file", {"content": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118}),
    (422, "needs 24 bytes, and 20 were sent", {"content": npy(X)[:-4]}),
    (422, "needs 24 bytes, and 25 were sent", {"content": npy(X) + b"!"}),
    (
        422,
        "needs 120,000,000,000,000,000,000,000 bytes",
        {"content": npy(X).replace(b"(2, 3)", b"(1" + b"0" * 22 + b", 3)")},
    ),
    (422, "no array has the shape (0, 11805", {"content": headed(f"(0, {1 << 70})")}),
    (422, "no array has the shape (0, 46116", {"content": headed(f"(0, {1 << 62}, {1 << 62})")}),
    (422, "no array has the shape (True,)", {"content": headed("(True,)") + bytes(4)}),
    (422, "no array has the shape (-1, -1)", {"content": headed("(-1, -1)") + bytes(4)}),
    (422, "got dtype object", {"content": npy(np.array([{}], object))}),
    (422, "got dtype", {"content": npy(np.zeros(2, [("a", "f4")]))}),
    (422, "input 'x': expected", {"content": npy(X[None])}),
    (422, "not JSON", {"content": b'{"array": [nan]}', "headers": {"content-type": "application/json"}}),
    (422, "not JSON", {"content": b"[" * 4000, "headers": {"content-type": "application/json"}}),
    (422, "differ in length", {"json": [[1, 2], [3]]}),
    (422, "expected only numbers, got 'a'", {"json": [["a", 2]]}),
    (422, "expected only numbers, got null", {"json": [[None, 2]]}),
    (422, "expected only numbers, got", {"json": [[[1], 2]]}),
    (422, "does not fit into float32", {"json": [[1e300]]}),
    (422, "expected a list of numbers, got 7", {"json": {"array": 7}}),
    (422, "got the keys ['data']", {"json": {"data": 7}}),
    (422, f"got the keys ['{'k' * 38}...", {"json": {"k" * 3000: 7}}),
    (422, "file in the field 'file'", {"files": {"page": ("x.npy", npy(X))}}),
    (422, f"got the fields ['{'k' * 38}...", {"files": {"k" * 3000: ("x.npy", npy(X))}}),
    (422, "the form cannot be read", {"content": b"--", "headers": {"content-type": "multipart/form-data"}}),
    (413, "more than 4,096 bytes", {"content": npy(np.zeros((2, 3000), np.float32))}),
    (413, "more than 4,096 bytes", {"files": {"file": ("x.npy", npy(np.zeros((2, 3000), np.float32)))}}),
    (415, "with curl add -H 'Content-Type: application/x-npy'", {"data": {"what": "curl says of --data-binary"}}),
    (415, "got content type 'text/html'", {"content": b"<", "headers": {"content-type": "text/html; charset=utf-8"}}),
]


async def test_bad_array_bodies() -> None:
    async with served(application()) as client:
        for status, says, request in BAD_ARRAYS:
            answer = await client.post("/affine", **request)
            assert answer.status_code == status, (request, answer.text)
            assert says in answer.json()["detail"], request
        assert (await client.post("/affine", json=X.tolist())).status_code == 200


async def test_a_body_without_a_length_is_stopped_at_the_limit() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1024
            yield bytes(1024)

    async with served(application()) as client:
        with contextlib.suppress(Exception):  # the server may close the connection while the client still writes
            assert (await client.post("/affine", content=endless())).status_code == 413
        assert (await client.get("/readyz")).status_code == 200


async def test_image_bodies() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    async with served(application()) as client:
        for request, size in (
            ({"content": png(), "headers": {"content-type": "image/png"}}, [10, 20, 3]),
            ({"content": png(form="JPEG")}, [10, 20, 3]),
            ({"content": png(form="JPEG", exif=exif)}, [20, 10, 3]),
            ({"files": {"file": ("page.png", png())}}, [10, 20, 3]),
            ({"json": {"image": base64.b64encode(png()).decode()}}, [10, 20, 3]),
            ({"json": {"image": "data:image/png;base64," + base64.b64encode(png()).decode()}}, [10, 20, 3]),
        ):
            answer = await client.post("/size", **request)
            assert (answer.status_code, answer.json()) == (200, size)


def encoded(array: npt.NDArray[Any], form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


async def test_images_of_16_bits_are_as_bright_as_they_were() -> None:
    gray = np.arange(256, dtype=np.uint16).reshape(8, 32) * 256 + 7
    for data in (encoded(gray, "PNG"), encoded(gray, "TIFF"), encoded(gray.astype(">u2"), "TIFF")):
        pixels = serving.decode_image(data, 1000)
        assert (pixels == np.arange(256).reshape(8, 32, 1)).all()
        assert pixels.shape == (8, 32, 3)
        assert serving.decode_image(data, 1000, "L").shape == (8, 32, 1)
    for array in (gray.astype(np.int32), gray.astype(np.float32)):
        with pytest.raises(aiotrt.InputError, match=r"pixels of 32 bits \(Pillow's mode '[IF]'\); send 8 or 16 bits"):
            serving.decode_image(encoded(array, "TIFF"), 1000)


BAD_IMAGES: list[tuple[int, str, dict[str, Any]]] = [
    (422, "not an image", {"content": b"GIF89a"}),
    (422, "not an image", {"content": png()[:-30]}),
    (422, "not an image", {"content": png().replace(b"IHDR", b"IHDX")}),
    (422, "not base64", {"json": {"image": "?"}}),
    (422, "expected JSON like", {"json": ["?"]}),
    (413, "400 x 100 pixels; at most 10,000 are taken", {"content": png(400, 100)}),
    (413, "at most 10,000 are taken", {"content": vast(20_000, 10_000)}),  # for Pillow too
    (413, "more than 100,000 bytes", {"content": bytes(100_001)}),
    (415, "with curl add -H 'Content-Type: image/png'", {"data": {"what": "curl says of --data-binary"}}),
    (415, "got content type 'text/plain'", {"content": b"?", "headers": {"content-type": "text/plain"}}),
]


async def test_bad_image_bodies() -> None:
    async with served(application()) as client:
        for status, says, request in BAD_IMAGES:
            answer = await client.post("/size", **request)
            assert answer.status_code == status, (request, answer.text)
            assert says in answer.json()["detail"], request


@pytest.mark.every_loop
async def test_a_client_that_sends_its_body_too_slowly_is_answered_408() -> None:
    async with served(application()) as client:
        head = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"
        answer = await raw(client, head, b"!")
        assert b"408" in answer.splitlines()[0]
        assert b"did not arrive within 0.5 seconds" in answer


async def test_openapi_says_what_a_body_may_be() -> None:
    described = application().openapi()["paths"]
    assert set(described["/size"]["post"]["requestBody"]["content"]) - {"image/avif"} == {
        "image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif", "image/tiff",
        "application/octet-stream", "multipart/form-data", "application/json",
    }  # fmt: skip
    for path in ("/size", "/affine"):
        assert set(described[path]["post"]["responses"]) == {"200", "408", "413", "415", "422", "503", "504"}
    assert "application/x-npy" in described["/affine"]["post"]["requestBody"]["content"]
    assert "/readyz" not in described


# --- errors -------------------------------------------------------------------------------------------------------------


async def test_an_input_error_of_the_handlers_own_is_the_servers_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = application()

    @app.post("/bug")
    async def bug(page: Page, model: Affinity) -> None:
        await model(page.astype(np.float64))

    async with served(app) as client:
        answer = await client.post("/bug", content=png())
        assert (answer.status_code, answer.json()) == (500, {"detail": "the server failed", "type": "server_error"})
        assert "expected x: float32" in caplog.text
        assert "in bug" in caplog.text, "the traceback"
        caplog.clear()
        answer = await client.post("/affine", content=npy(X[None]))  # an array as the client sent it
        assert (answer.status_code, answer.json()["type"]) == (422, "invalid_input")
        assert "in run" in caplog.text, "it may be a bug of the handler's still"
        caplog.clear()
        for wrong in (b"?", npy(X.astype(np.float64))):
            assert (await client.post("/affine", content=wrong)).status_code == 422
        assert not [record for record in caplog.records if record.name == "aiotrt"], "what is wrong with a body is no news"


@pytest.mark.parametrize("error", [serving.BodyError, aiotrt.ModelBrokenError, aiotrt.DeviceError])
async def test_no_answer_shows_an_object(error: Callable[[str], Exception]) -> None:
    said = problem(error(f"cannot read {io.BytesIO()!r} of {object()!r}")).message
    assert said == "cannot read an object of an object"


async def test_a_full_queue_is_503_with_a_time_to_come_back() -> None:
    async with served(application(slots=1, max_queue=1)) as client:
        models = await models_behind(client)
        with held(models["affine"]) as latch:
            first = [asyncio.create_task(client.post("/affine", json=X.tolist())) for _ in range(2)]
            await until_waiting(models["affine"], 1)
            answer = await client.post("/affine", json=X.tolist())
            latch.open()
            assert [(await task).status_code for task in first] == [200, 200]
        assert answer.status_code == 503
        assert answer.json()["type"] == "queue_full"
        assert answer.headers["retry-after"] == "1"  # no rate was measured yet


@pytest.mark.every_loop
async def test_the_time_to_come_back_follows_the_measured_rate() -> None:
    app = FastAPI(lifespan=serving.lifespan(affine=affine(slots=1)))
    async with served(app) as client:
        models = await models_behind(client)
        model = models["affine"]
        with held(model):
            calls = [asyncio.create_task(model(X)) for _ in range(30)]
            await until(lambda: model.statistics().waiting == 29)
            await until_slow(lambda: "affine" in models.monitor._paces)  # a beat
            pace = models.monitor._paces["affine"]
            pace.done, pace.busy = 1e6, 1e5  # ten a second, as if that had been measured
            assert models.monitor.seconds_to_wait() == pytest.approx(2.9, rel=1e-3)
        await asyncio.gather(*calls)


@pytest.mark.every_loop
async def test_a_deadline_is_504_and_the_slot_comes_back() -> None:
    async with served(application(slots=1)) as client:
        models = await models_behind(client)
        with held(models["affine"]):
            answer = await client.post("/hurry", json=X.tolist())
            assert (answer.status_code, answer.json()["type"]) == (504, "deadline_exceeded")
            assert "deadline" in answer.json()["detail"]
        assert (await client.post("/affine", json=X.tolist())).status_code == 200


async def test_a_broken_model_is_503_and_not_ready() -> None:
    async with served(application()) as client:
        executor_of((await models_behind(client))["affine"]).break_down(DeviceError("the device", code=700, name="illegal"))
        answer = await client.post("/affine", json=X.tolist())
        assert (answer.status_code, answer.json()["type"]) == (503, "model_broken")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 200
        assert 'aiotrt_model_ready{model="affine"} 0.0' in (await client.get("/metrics")).text


async def test_a_model_that_a_handler_closed_is_503_and_the_metrics_go_on() -> None:
    async with served(application()) as client:
        await (await models_behind(client))["affine"].aclose()
        answer = await client.post("/affine", json=X.tolist())
        assert (answer.status_code, answer.json()["type"]) == (503, "model_closed")
        assert (await client.get("/readyz")).status_code == 503
        assert 'aiotrt_model_ready{model="affine"} 0.0' in (await client.get("/metrics")).text


async def test_an_engine_that_raises_is_500_and_keeps_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    def secret(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("/etc/secret")

    app = FastAPI(lifespan=serving.lifespan(affine=lambda: aiotrt.load(secret, device="host", slots=1)))
    serving.install(app)

    @app.post("/")
    async def run(model: Affinity) -> None:
        await model(X)

    async with served(app) as client:
        answer = await client.post("/")
        assert (answer.status_code, answer.json()["detail"]) == (500, "the model failed for this input")
        assert "/etc/secret" in caplog.text


async def test_an_application_without_the_lifespan_is_told() -> None:
    app = FastAPI()
    serving.add_exception_handlers(app)

    @app.post("/")
    async def run(model: Affinity) -> None: ...

    async with served(app) as client:
        assert (await client.post("/")).status_code == 500


# --- disconnections -----------------------------------------------------------------------------------------------------


async def passes(request: Request, call_next: Any) -> Any:
    return await call_next(request)


@pytest.mark.every_loop
@pytest.mark.parametrize("around", ["nothing", "inside", "outside", "both"])
async def test_a_call_whose_client_has_gone_leaves_the_queue(around: str) -> None:
    app = FastAPI(lifespan=serving.lifespan(affine=affine(slots=1)))
    ended: list[str] = []

    @app.post("/affine")
    async def run(x: Array, model: Affinity) -> None:
        try:
            await model(x)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    if around in ("inside", "both"):
        app.add_middleware(BaseHTTPMiddleware, dispatch=passes)
    serving.install(app)
    if around in ("outside", "both"):
        app.add_middleware(BaseHTTPMiddleware, dispatch=passes)
    async with served(app) as client:
        model = (await models_behind(client))["affine"]
        with held(model):
            _, first = await sent(client)
            _, second = await sent(client)
            await until_waiting(model, 1)
            second.close()
            await until_waiting(model, 0)
            first.close()
            await until_slow(lambda: model.statistics().cancelled == 2)
            assert model.statistics().draining == 1
        await until_slow(lambda: model.statistics().free == 1)
        assert ended == ["cancelled", "cancelled"]
        assert (await client.post("/affine", json=X.tolist())).status_code == 200


@pytest.mark.every_loop
async def test_background_tasks_are_not_for_the_client_and_go_on() -> None:
    app = FastAPI()
    done = asyncio.Event()

    async def later() -> None:
        await asyncio.sleep(0.1)
        done.set()

    @app.get("/")
    async def run(tasks: BackgroundTasks) -> str:
        tasks.add_task(later)
        return "ok"

    app.add_middleware(serving.CancelOnDisconnect)
    async with served(app) as client:
        assert b"200" in await raw(client, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(5):
            await done.wait()


@pytest.mark.every_loop
async def test_a_handler_that_catches_its_cancellation_and_a_body_in_parts() -> None:
    seen: list[object] = []

    async def caught(request: Request) -> Response:
        seen.append(len(await request.body()))
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            seen.append("caught")
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        return Response("too late")

    app = Starlette(routes=[Route("/", caught, methods=["POST"])])
    app.add_middleware(serving.CancelOnDisconnect)
    async with served(app) as client:
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
        for _ in range(3):
            writer.write(bytes(100_000))
            await writer.drain()
        await until_slow(lambda: seen == [300_000])
        writer.close()
        await until_slow(lambda: seen == [300_000, "caught"])


@pytest.mark.every_loop
async def test_a_cancellation_that_is_not_the_clients_passes_through() -> None:
    started = asyncio.Event()

    async def app(scope: object, receive: object, send: object) -> None:
        started.set()
        await asyncio.sleep(30)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(30)
        raise AssertionError

    async def send(message: object) -> None:
        raise AssertionError

    task = asyncio.create_task(serving.CancelOnDisconnect(app)({"type": "http", "path": "/"}, receive, send))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.every_loop
async def test_two_hundred_clients_killed_at_any_time_leave_all_slots_free() -> None:
    async with served(application(slots=2)) as client:
        model = (await models_behind(client))["affine"]
        for i in range(200):
            _, writer = await sent(client)
            for _ in range(i % 7):
                await asyncio.sleep(0)
            writer.transport.abort()
        await until_slow(lambda: model.statistics().free == 2 and not model.statistics().waiting)
        for _ in range(5):
            answer = await client.post("/affine", json=X.tolist())
            assert answer.json() == (X * 3 + 1).tolist()
        statistics = model.statistics()
        assert statistics.submitted == statistics.completed + statistics.cancelled + statistics.failed


# --- health and metrics -------------------------------------------------------------------------------------------------


@pytest.mark.every_loop
async def test_readyz_while_draining_and_metrics() -> None:
    async with served(application(slots=3)) as client:
        models = await models_behind(client)
        assert (await client.get("/readyz")).json() == {"ready": True, "draining": False, "models": {"affine": "ready"}}
        for _ in range(4):
            await client.post("/affine", json=X.tolist())
        await asyncio.sleep(0.15)  # a heartbeat
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        statistics = models["affine"].statistics()
        assert lines['aiotrt_requests_total{model="affine",outcome="completed"}'] == "4.0"
        assert lines['aiotrt_requests_total{model="affine",outcome="rejected"}'] == "0.0"
        assert lines['aiotrt_slots{model="affine",state="free"}'] == "3.0"
        assert lines['aiotrt_queue_waiting{model="affine"}'] == "0.0"
        assert float(lines['aiotrt_graph_captures_total{model="affine"}']) == statistics.captures == 3
        assert float(lines['aiotrt_graph_replays_total{model="affine"}']) == statistics.replays
        assert float(lines["aiotrt_completion_polls_total"]) > 0
        assert float(lines["aiotrt_polls_per_completion"]) > 0
        assert float(lines["aiotrt_event_loop_lag_seconds_count"]) >= 1
        assert lines['aiotrt_model_ready{model="affine"}'] == "1.0"
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert openmetrics.text.endswith("# EOF\n")
        models.drain()
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.post("/affine", json=X.tolist())).status_code == 200


# --- tools --------------------------------------------------------------------------------------------------------------


async def models_behind(client: Served) -> serving.Models:
    """The application's models: it runs on this loop."""
    state: dict[str, Any] = client.server.lifespan.state
    models = state["aiotrt"]
    assert isinstance(models, serving.Models)
    return models


async def sent(client: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent a request and not read the answer."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    body = npy(X)
    head = f"POST /affine HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def until_slow(predicate: Callable[[], bool]) -> None:
    """Wait for what sockets and threads bring about; the test's timeout is the bound."""
    while not predicate():
        await asyncio.sleep(0.002)


async def until_waiting(model: aiotrt.Model, n: int) -> None:
    """Until `n` callers stand in line, and a slot is busy."""
    await until_slow(lambda: model.statistics().waiting == n and model.statistics().free == 0)
