"""The Open Inference Protocol (KServe v2) over HTTP, as an application."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import aiotrt
from aiotrt.decoding.threads import COPIED, off_loop
from aiotrt.errors import AiotrtError
from aiotrt.model import Model
from aiotrt.serving.bodies import read_body
from aiotrt.serving.disconnect import CancelOnDisconnect
from aiotrt.serving.errors import BodyError, BodyTooLargeError
from aiotrt.serving.health import livez, metrics, readyz
from aiotrt.serving.json_body import loads
from aiotrt.serving.kserve.binary import InferRequest, encode, header_length, parse
from aiotrt.serving.kserve.compression import compress, wanted_coding
from aiotrt.serving.kserve.guards import BearerToken, Body, Budget, Draining
from aiotrt.serving.kserve.openapi import INDEX, INFER, LOAD, UNLOAD, described, whether_ready
from aiotrt.serving.kserve.origins import Origins, is_loopback
from aiotrt.serving.kserve.regions import Kind
from aiotrt.serving.kserve.servable import Servable
from aiotrt.serving.kserve.service import Service
from aiotrt.serving.kserve.settings import ServerSettings
from aiotrt.serving.status import status_page

__all__ = ["create_app"]

#: Features of Triton that this server does not have, by path.
_ABSENT: Final = {
    "/v2/trace/setting": "trace settings",
    "/v2/models/{name}/trace/setting": "trace settings",
    "/v2/logging": "log settings",
    "/v2/models/{name}/generate": "the generate extension",
    "/v2/models/{name}/generate_stream": "the generate extension",
}
#: Bytes of an answer written at once: enough to keep a socket busy, and few enough for other work of the loop in between.
_CHUNK: Final = 256 << 10


def create_app(
    settings: ServerSettings,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
    on_loaded: Callable[[], object] | None = None,
) -> FastAPI:
    """Make the application. Its models are ``app.state.models``.

    With `grpc_port` in the settings, its lifespan serves gRPC too, at ``app.state.grpc.address``.

    Args:
        settings: the models to serve, and the options of the server.
        on_failure: called when a model that should be loaded at the start cannot be loaded.
        on_loaded: called when all models that should be loaded at the start are loaded.

    Raises:
        MissingDependencyError: a package for gRPC is missing.
    """
    service = Service(settings)
    server = _Server(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with service.running(on_failure, on_loaded), app.state.grpc or contextlib.nullcontext():
            yield {"aiotrt": service.models}

    app = FastAPI(
        title="aiotrt",
        version=aiotrt.__version__,
        description="The Open Inference Protocol, version 2.",
        lifespan=lifespan,
        # Off by default: the page loads its scripts from a third party's server.
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
    )
    app.state.service, app.state.models, app.state.grpc = service, service.models, None
    if settings.grpc_port is not None:
        from aiotrt.serving.kserve.grpc_server import GrpcServer

        app.state.grpc = GrpcServer(service)
    app.include_router(server.routes())
    ready = readyz if settings.token is None else server.readyz
    for path, endpoint in (("/livez", livez), ("/readyz", ready), ("/metrics", metrics)):
        app.add_route(path, endpoint, include_in_schema=False)
    app.router.routes.extend(status_page().routes)
    for kind in (AiotrtError, TimeoutError, HTTPException, Exception):
        app.add_exception_handler(kind, server.answer_error)
    app.add_middleware(CancelOnDisconnect)
    if settings.token is not None:
        app.add_middleware(BearerToken, token=settings.token)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Inference-Header-Content-Length", "Retry-After"],
        )
    is_private = settings.token is None and is_loopback(settings.host)
    hosts = [settings.host, *settings.allowed_hosts] if settings.allowed_hosts or is_private else None
    app.add_middleware(Origins, hosts=hosts, origins=settings.cors_origins)
    app.add_middleware(Draining, models=service.models)
    return app


class _Server:
    """The routes, and the objects that they share."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.settings
        self._budget = service.budget
        self._models = service.models

    def routes(self) -> APIRouter:
        router = APIRouter()
        add = functools.partial(router.add_api_route, response_class=JSONResponse)
        add("/v2", self.server_metadata, tags=["server"])
        add("/v2/health/live", self.server_live, tags=["server"])
        add("/v2/health/ready", self.server_ready, tags=["server"], responses=whether_ready("ready"))
        add("/v2/models/stats", self.all_statistics, tags=["server"])
        for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            add(prefix, self.model_metadata, tags=["model"], responses=described())
            add(f"{prefix}/config", self.model_config, tags=["model"], responses=described())
            add(f"{prefix}/stats", self.model_statistics, tags=["model"], responses=described())
            add(f"{prefix}/ready", self.model_ready, tags=["model"], responses=whether_ready("name", "ready"))
            add(f"{prefix}/infer", self.infer, methods=["POST"], tags=["model"], **INFER)
        add("/v2/repository/index", self.index, methods=["POST"], tags=["repository"], **INDEX)
        if self._settings.repository:
            add("/v2/repository/models/{name}/load", self.load, methods=["POST"], tags=["repository"], **LOAD)
            add("/v2/repository/models/{name}/unload", self.unload, methods=["POST"], tags=["repository"], **UNLOAD)
        for kind in ("system", "cuda"):
            prefix = f"/v2/{kind}sharedmemory"
            for path, method, function in (
                ("status", "GET", self.region_status),
                ("region/{name}/status", "GET", self.region_status),
                ("region/{name}/register", "POST", self.register_region),
                ("region/{name}/unregister", "POST", self.unregister_region),
                ("unregister", "POST", self.unregister_region),
            ):
                add(f"{prefix}/{path}", functools.partial(function, kind), methods=[method], include_in_schema=False)
        for path, feature in _ABSENT.items():
            add(path, functools.partial(_absent, feature), methods=["GET", "POST"], include_in_schema=False)
        return router

    # The server...

    async def server_metadata(self) -> dict[str, Any]:
        """Return the server's name, version and extensions."""
        return self._service.metadata()

    async def server_live(self) -> dict[str, bool]:
        """Answer 200 while the event loop runs."""
        return {"live": True}

    async def server_ready(self, request: Request) -> Response:
        """Whether all models can be called."""
        return JSONResponse({"ready": self._models.is_ready}, 200 if self._models.is_ready else 503)

    async def readyz(self, request: Request) -> Response:
        """Whether all models can be called, without the models' names and states, because probes have no token."""
        said = {"ready": self._models.is_ready, "draining": self._models.is_draining}
        return JSONResponse(said, 200 if self._models.is_ready else 503)

    # A model...

    async def model_metadata(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return a model's inputs and outputs. A dimension whose size may differ between calls is -1."""
        model, servable = self._service.model(name, version)
        return servable.metadata(model)

    async def model_config(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return a model's configuration: the fields that Triton's clients read."""
        model, servable = self._service.model(name, version)
        return servable.config(model)

    async def model_statistics(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return the number of a model's requests, and the time that each stage took."""
        return self._service.statistics(name, version)

    async def all_statistics(self) -> dict[str, Any]:
        """Return the statistics of all models."""
        return self._service.statistics()

    async def model_ready(self, name: str, version: str | None = None) -> Response:
        """Whether a model can be called."""
        is_ready, reason = self._service.standing(name, version)
        said = {"name": name, "ready": is_ready, **({} if is_ready else {"error": reason})}
        return JSONResponse(said, 200 if is_ready else 503)

    async def infer(self, request: Request, name: str, version: str | None = None) -> Response:
        """Run a model."""
        model, servable = self._service.model(name, version)
        with servable.counted() as passed:
            body = await self._budget.read(request)  # counted until the end: tensors from JSON take about as much memory
            called = await self._parse(request, body, model, servable)
            head, outputs, placed = await self._service.run(model, servable, called, passed)
            coding = wanted_coding(request.headers.get("accept-encoding"))

            def encoded() -> tuple[bytes, list[memoryview]]:
                return encode(head, outputs, placed)

            # Binary outputs are sent without a copy; writing many numbers as text is slow, so a thread does it.
            is_short = all(is_binary or math.prod(output.shape) < 1024 for _, is_binary, output in outputs)
            json, chunks = await off_loop(encoded, 0 if is_short else None)
            response = _InferResponse(self._budget, json, chunks)
            if coding is not None:
                response.compress(coding, await off_loop(lambda: compress([json, *chunks], coding)))
            passed()
            return response

    # Shared memory...

    async def region_status(self, kind: Kind, name: str | None = None) -> list[dict[str, Any]]:
        """Return the status of all registered regions, or of the region of this name."""
        return self._service.region_status(kind, name)

    async def register_region(self, kind: Kind, name: str, request: Request) -> dict[str, Any]:
        """Register a region of shared memory, for tensors of requests and answers."""
        await self._service.register_region(kind, name, await self._small_json(request))
        return {}

    async def unregister_region(self, kind: Kind, request: Request, name: str | None = None) -> dict[str, Any]:
        """Unregister a region, or all regions. Requests that use them are not affected."""
        await self._small_json(request)
        self._service.unregister_region(kind, name)
        return {}

    # The repository...

    async def index(self, request: Request) -> list[dict[str, str]]:
        """List all models, loaded or not; with ``{"ready": true}`` only those that can be called."""
        is_ready = (await self._small_json(request)).get("ready")
        is_ready = False if is_ready is None else is_ready
        if not isinstance(is_ready, bool):
            raise BodyError("ready must be true or false")
        return self._service.index(is_ready)

    async def load(self, request: Request, name: str) -> dict[str, Any]:
        """Load a model that the server was configured with at its start, with those settings."""
        await self._service.load(name, (await self._small_json(request)).get("parameters"))
        return {}

    async def unload(self, request: Request, name: str) -> dict[str, Any]:
        """Unload a model after its running calls have ended."""
        self._service.check(name, None)
        await self._small_json(request)
        await self._service.unload(name)
        return {}

    # Errors...

    async def answer_error(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        # Starlette raises an unexpected error again after this, so that it is logged.
        found = self._service.problem(error)
        # A wrong request is always answered 400, as by other servers of this protocol.
        status = 400 if found.status == 422 else found.status
        return JSONResponse({"error": found.message}, status, found.headers)

    # Helpers...

    async def _parse(self, request: Request, body: Body, model: Model, servable: Servable) -> InferRequest:
        length = header_length(request.headers.get("inference-header-content-length"), len(body))
        if not length and body:
            return servable.raw(model, body)
        if length > self._settings.max_json:
            raise BodyTooLargeError(
                f"the request has {length:,} bytes of JSON, at most {self._settings.max_json:,} are taken: "
                "send tensors with the binary extension"
            )
        # Binary tensors are copied if they are strings or not aligned.
        size = length if len(body) < COPIED else len(body)
        return await off_loop(lambda: parse(body, length, servable.images), size, json=length)

    async def _small_json(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, 64 << 10, self._settings.body_timeout)
        fields = loads("the request", body or b"{}")
        if not isinstance(fields, dict) or not isinstance(fields.get("parameters"), dict | None):
            raise BodyError("the request must be a JSON object, and so must its parameters, if it has some")
        return fields


async def _absent(feature: str) -> Response:
    """Answer 501 with the name of a missing feature: with a 404, a client could not know whether its URL is wrong."""
    return JSONResponse({"error": f"this server does not have {feature}"}, 501)


class _InferResponse(Response):
    """A response of JSON and the bytes after it, which are sent in pieces at the rate at which the client reads them."""

    media_type = "application/json"

    def __init__(self, budget: Budget, json: bytes, chunks: list[memoryview]) -> None:
        self._budget = budget
        self._parts: list[bytes | memoryview] = [json, *chunks]
        super().__init__(media_type="application/octet-stream" if chunks else "application/json")
        self.headers["content-length"] = str(sum(map(len, self._parts)))
        if chunks:
            self.headers["inference-header-content-length"] = str(len(json))

    def compress(self, coding: str, body: bytes) -> None:
        """Send `body` instead, which is the compressed response."""
        self._parts = [body]
        self.headers["content-length"] = str(len(body))
        self.headers["content-encoding"] = coding
        self.headers["vary"] = "Accept-Encoding"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._budget.sending(sum(map(len, self._parts))):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for part in self._parts:
                for start in range(0, len(part), _CHUNK):
                    await send(
                        {"type": "http.response.body", "body": bytes(part[start : start + _CHUNK]), "more_body": True}
                    )
        await send({"type": "http.response.body", "body": b""})
