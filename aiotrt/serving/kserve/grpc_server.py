"""The Open Inference Protocol over gRPC, on the event loop of the models.

gRPC passes messages to and from the methods as bytes. Messages are parsed after the check of the token, within the limits,
and large ones in a thread. A method with a single request reads it as a stream of one message, because only then a timeout
can limit its arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self

from aiotrt._install import install_hint
from aiotrt.errors import AiotrtError, MissingDependencyError, UsageError

try:
    import grpc
    from google.protobuf import json_format
except ImportError as error:
    raise MissingDependencyError(f"gRPC needs {error.name}; {install_hint('grpc')}") from error

from starlette.exceptions import HTTPException

from aiotrt.decoding.threads import COPIED, off_loop
from aiotrt.serving.errors import BodyTimeoutError, BodyTooLargeError, Problem
from aiotrt.serving.kserve.contents import Parts, decode, encode, parsed, split, streamed
from aiotrt.serving.kserve.guards import Body, has_token
from aiotrt.serving.kserve.messages import messages
from aiotrt.serving.kserve.regions import Kind
from aiotrt.serving.kserve.service import Service

__all__ = ["GrpcServer"]

_log: Final = logging.getLogger("aiotrt")
_access: Final = logging.getLogger("uvicorn.access")
_SERVICE: Final = "inference.GRPCInferenceService"
_HEALTH: Final = "grpc.health.v1.Health"
#: Methods that need no token, because probes have none, as over HTTP.
_OPEN: Final = frozenset(("ServerLive", "ServerReady", "Check", "Watch"))
#: Methods of the protocol that are refused, by feature.
_REFUSED: Final = {
    "trace settings": ["TraceSetting"],
    "log settings": ["LogSettings"],
}
#: gRPC's status codes by those of HTTP; any other is `INTERNAL`.
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
#: The maximum length of an error's message: gRPC sends it in a header, and clients refuse long headers.
_LONGEST_MESSAGE: Final = 1000
#: How many requests of one stream run at once; the next one is read when one has ended.
_MOST_IN_STREAM: Final = 64
#: Bytes that a message may have in addition to its body: names, shapes, parameters.
_OVERHEAD: Final = 64 << 10
#: Seconds until a message that is still arriving counts as slow.
_SLOW: Final = 1.0
#: Seconds between two checks of readiness, for clients that watch the server's health.
_WATCHED: Final = 0.5

#: `grpc.aio` has no types.
_Context = Any


class _NotTakenError(Exception):
    """Raised when a client does not read its answers."""


class GrpcServer:
    """Serves a `Service` over gRPC.

    ::

        service = Service(settings)
        async with service.running(), GrpcServer(service, port=8001) as server:
            await server.wait()

    The service may be served over HTTP too, by the application that `create_app` made: ``app.state.service``.

    Args:
        service: the models, with the settings: the token, limits and timeouts.
        host: the address to bind to; by default that of the settings.
        port: the port, 0 for any free one; by default that of the settings.

    Raises:
        UsageError: neither `port` nor the settings name a port.
    """

    def __init__(self, service: Service, host: str | None = None, port: int | None = None) -> None:
        settings = service.settings
        port = settings.grpc_port if port is None else port
        if port is None:
            raise UsageError("a gRPC server needs a port: GrpcServer(service, port=...), or grpc_port in its settings")
        self._service = service
        self._settings = settings
        self._host = settings.host if host is None else host
        self._port = port
        self._server: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._slow: dict[asyncio.Timeout, None] = {}
        self._stopping: asyncio.Task[None] | None = None
        self._is_stopping = asyncio.Event()
        self._is_ending = False

    @property
    def address(self) -> str:
        """The host and the port, in the form for gRPC clients."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    def bind(self) -> None:
        """Bind to the address; afterwards `address` contains the actual port. Call it on the event loop.

        Raises:
            OSError: binding failed.
        """
        if self._server is not None:
            return
        settings = self._settings
        if tuple(map(int, grpc.__version__.split(".")[:2])) >= (1, 84):
            _log.warning("grpcio %s ends the server at a path that is no UTF-8: install grpcio<1.84", grpc.__version__)
        most, seconds = settings.max_body + _OVERHEAD, round(1e3 * settings.body_timeout)
        server = grpc.aio.server(
            handlers=self._handlers(),
            maximum_concurrent_rpcs=settings.max_connections,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", -1),
                # Compressed messages are refused, because gRPC does not bound their decompressed size.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.server_handshake_timeout_ms", seconds),
                # Close connections that the client does not read, and those whose client is gone.
                ("grpc.keepalive_time_ms", seconds),
                ("grpc.keepalive_timeout_ms", seconds),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ],
        )
        try:
            self._port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise OSError(f"cannot bind to {self.address} for gRPC") from error
        self._server = server

    async def start(self) -> None:
        """Accept connections.

        Raises:
            OSError: as `bind` does.
        """
        self.bind()
        await self._server.start()

    async def stop(self) -> None:
        """Accept no more calls, and wait until the running calls have ended.

        Calls that have not ended after the settings' `drain_timeout` get `UNAVAILABLE`. Cancellation stops only the waiting.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="aiotrt stopping gRPC")
        await asyncio.shield(self._stopping)

    def end(self) -> None:
        """End the running calls at once: they get `UNAVAILABLE`."""
        self._is_ending = True
        for task in self._tasks:
            task.cancel()

    async def wait(self) -> None:
        """Wait until the server was stopped."""
        await self._server.wait_for_termination()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _stop(self) -> None:
        self._is_stopping.set()
        if self._server is None:
            return
        seconds = self._settings.drain_timeout
        timer = asyncio.get_running_loop().call_later(seconds, self.end)
        await self._server.stop(seconds + _SLOW)
        timer.cancel()

    # Methods...

    def _handlers(self) -> list[Any]:
        models = self._service.models
        methods: dict[str, Any] = {
            "ServerLive": self._method("ServerLive", lambda _: {"live": True}),
            "ServerReady": self._method("ServerReady", lambda _: {"ready": models.is_ready}),
            "ModelReady": self._method("ModelReady", self._model_ready),
            "ServerMetadata": self._method("ServerMetadata", lambda _: self._service.metadata()),
            "ModelMetadata": self._method("ModelMetadata", self._model_metadata),
            "ModelConfig": self._method("ModelConfig", self._model_config),
            "ModelStatistics": self._method("ModelStatistics", self._model_statistics),
            "RepositoryIndex": self._method("RepositoryIndex", lambda said: {"models": self._service.index(said.ready)}),
            "RepositoryModelLoad": self._method("RepositoryModelLoad", self._load),
            "RepositoryModelUnload": self._method("RepositoryModelUnload", self._unload),
            "ModelInfer": grpc.stream_unary_rpc_method_handler(self._called("ModelInfer", self._infer)),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._called("ModelStreamInfer", self._stream)),
        }
        kinds: tuple[Kind, ...] = ("system", "cuda")
        for kind in kinds:
            for action, answer in (
                ("Status", self._region_status),
                ("Register", self._register_region),
                ("Unregister", self._unregister_region),
            ):
                name = f"{kind.title()}SharedMemory{action}"
                methods[name] = self._method(name, partial(answer, kind))
        for what, names in _REFUSED.items():
            for name in names:
                methods[name] = self._method(name, self._refuse(f"this server does not have {what}"))
        health = {
            "Check": self._method("Check", self._check, ("HealthCheckRequest", "HealthCheckResponse")),
            "Watch": grpc.stream_stream_rpc_method_handler(self._called("Watch", self._watch)),
        }
        return [
            grpc.method_handlers_generic_handler(_SERVICE, methods),
            grpc.method_handlers_generic_handler(_HEALTH, health),
        ]

    def _method(self, name: str, answer: Callable[[Any], Any], kinds: tuple[str, str] | None = None) -> Any:
        """Make a method with one request and one answer, which `answer` returns as a mapping or as an awaitable of one."""
        asked, answered = kinds or (f"{name}Request", f"{name}Response")

        async def run(context: _Context) -> bytes:
            data = await self._read(context)
            if len(data) > _OVERHEAD:
                raise BodyTooLargeError(f"the request has {len(data):,} bytes, at most {_OVERHEAD:,} are taken")
            found = answer(parsed(asked, data) if asked in messages else None)
            said = await found if isinstance(found, Awaitable) else found
            message = json_format.ParseDict(said, messages[answered](), ignore_unknown_fields=True)
            return bytes(message.SerializeToString())

        return grpc.stream_unary_rpc_method_handler(self._called(name, run))

    def _called(self, name: str, run: Callable[[_Context], Awaitable[bytes | None]]) -> Any:
        """Wrap a method for `grpc.aio`: check the token, answer errors, and let `end` end the call."""

        async def call(_: object, context: _Context) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            code, message, wait = grpc.StatusCode.OK, "", None
            try:
                self._check_token(name, context)
                return await run(context)
            except asyncio.CancelledError:
                if not self._is_ending:
                    code = grpc.StatusCode.CANCELLED
                    raise
                task.uncancel()
                code, message = grpc.StatusCode.UNAVAILABLE, "the server ended before this request did"
            except (grpc.aio.BaseError, _NotTakenError) as error:  # the client would not read a status either
                code = grpc.StatusCode.CANCELLED
                raise asyncio.CancelledError from error
            except Exception as error:
                found = self._problem(error)
                code, message = _CODES.get(found.status, grpc.StatusCode.INTERNAL), found.message
                wait = found.retry_after
            finally:
                self._tasks.discard(task)
                if self._settings.access_log:
                    _access.info('%s - "gRPC %s" %s', context.peer(), name, code.name)
            trailer = () if wait is None else (("grpc-retry-pushback-ms", str(1000 * wait)),)
            try:
                await context.abort(code, message[:_LONGEST_MESSAGE], trailer)  # raises
            except grpc.aio.InternalError as error:
                raise asyncio.CancelledError from error

        return call

    def _problem(self, error: Exception) -> Problem:
        if not isinstance(error, (AiotrtError, HTTPException, TimeoutError)):
            _log.error("a request failed", exc_info=error)
        return self._service.problem(error)

    def _check_token(self, name: str, context: _Context) -> None:
        token = self._settings.token
        if token is None or name in _OPEN:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not has_token(given.encode() if isinstance(given, str) else given, token):
            raise HTTPException(401, "the token is missing or wrong")

    def _model_ready(self, said: Any) -> Mapping[str, Any]:
        try:
            return {"ready": self._service.standing(said.name, said.version)[0]}
        except HTTPException:  # Triton gives this answer for an unknown model
            return {"ready": False}

    def _model_metadata(self, said: Any) -> Mapping[str, Any]:
        model, servable = self._service.model(said.name, said.version)
        return servable.metadata(model)

    def _model_config(self, said: Any) -> Mapping[str, Any]:
        model, servable = self._service.model(said.name, said.version)
        return {"config": servable.config(model)}

    def _model_statistics(self, said: Any) -> Mapping[str, Any]:
        return self._service.statistics(said.name or None, said.version)

    async def _load(self, said: Any) -> Mapping[str, Any]:
        self._check_repository()
        await self._service.load(said.model_name, said.parameters)
        return {}

    async def _unload(self, said: Any) -> Mapping[str, Any]:
        self._check_repository()
        await self._service.unload(said.model_name)
        return {}

    def _region_status(self, kind: Kind, said: Any) -> Mapping[str, Any]:
        return {"regions": {one["name"]: one for one in self._service.region_status(kind, said.name or None)}}

    async def _register_region(self, kind: Kind, said: Any) -> Mapping[str, Any]:
        fields = {field.name: getattr(said, field.name) for field in said.DESCRIPTOR.fields}
        await self._service.register_region(kind, said.name, fields)
        return {}

    def _unregister_region(self, kind: Kind, said: Any) -> Mapping[str, Any]:
        self._service.unregister_region(kind, said.name or None)
        return {}

    def _check_repository(self) -> None:
        if not self._settings.repository:
            raise HTTPException(501, "clients may not load and unload models here")

    def _refuse(self, message: str) -> Callable[[Any], Any]:
        def refuse(_: Any) -> Mapping[str, Any]:
            raise HTTPException(501, message)

        return refuse

    # Health...

    def _check(self, said: Any) -> Mapping[str, Any]:
        if said.service not in ("", _SERVICE):
            raise HTTPException(404, f"there is no service {said.service[:80]!r}")
        return {"status": "SERVING" if self._service.models.is_ready else "NOT_SERVING"}

    async def _watch(self, context: _Context) -> None:
        said = parsed("HealthCheckRequest", await self._read(context))
        last = None
        while not self._is_stopping.is_set():
            try:
                status = self._check(said)["status"]
            except HTTPException:
                status = "SERVICE_UNKNOWN"
            if status != last:
                last = status
                await context.write(messages["HealthCheckResponse"](status=status).SerializeToString())
            await asyncio.sleep(_WATCHED)

    # Inference...

    async def _infer(self, context: _Context) -> bytes:
        answer = await self._answer(await self._split(await self._read(context)), context)
        self._sends(context, len(answer))
        return answer

    async def _stream(self, context: _Context) -> None:
        """Run each request of a stream in a task, and write each answer when it is available, one at a time."""
        writing, room = asyncio.Lock(), asyncio.Semaphore(_MOST_IN_STREAM)

        async def answer(data: bytes) -> None:
            name = ""
            try:
                try:
                    parts = await self._split(data)
                    del data
                    name = parts.head.id
                    said = await self._answer(parts, context, is_streamed=True)
                except Exception as error:
                    found = self._problem(error).message
                    said = messages["ModelStreamInferResponse"](error_message=found, infer_response={"id": name})
                    said = said.SerializeToString()
                async with writing:
                    with self._service.budget.sending(len(said)):
                        try:
                            async with asyncio.timeout(self._settings.body_timeout):
                                await context.write(said)
                        except TimeoutError as error:
                            raise _NotTakenError from error
            finally:
                room.release()

        stopping = asyncio.ensure_future(self._is_stopping.wait())
        reading: asyncio.Future[Any] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                while not stopping.done():
                    await room.acquire()
                    reading = asyncio.ensure_future(context.read())
                    await asyncio.wait([reading, stopping], return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done() or (data := reading.result()) is grpc.aio.EOF:
                        break
                    group.create_task(answer(data))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            stopping.cancel()
            if reading is not None:
                reading.cancel()
        if self._is_stopping.is_set():
            raise HTTPException(503, "the server ends: it takes no more requests of this stream")

    async def _split(self, data: bytes) -> Parts:
        return await off_loop(lambda: split(data, self._settings.max_json), len(data), COPIED)

    async def _answer(self, parts: Parts, context: _Context, *, is_streamed: bool = False) -> bytes:
        """Run a model for one request, and return the answer's message."""
        body = Body(self._service.budget)
        body.reserve(len(parts.data))
        model, servable = self._service.model(parts.head.model_name, parts.head.model_version)
        with servable.counted() as passed:
            size = parts.head_size if len(parts.data) < COPIED else len(parts.data)
            called = await off_loop(lambda: decode(parts, body, servable.images), size, json=parts.head_size)
            remaining = context.time_remaining()
            if remaining is not None:
                remaining = max(remaining, 1e-3)  # a passed deadline: gRPC will cancel this call
                called = replace(called, deadline=min(remaining, called.deadline or remaining))
            head, outputs, placed = await self._service.run(model, servable, called, passed)
            pieces = encode(head, outputs, placed)
            pieces = streamed(pieces) if is_streamed else pieces
            answer = await off_loop(lambda: b"".join(pieces), sum(map(len, pieces)), COPIED)
            passed()
            return answer

    # Limits...

    async def _read(self, context: _Context) -> bytes:
        """Read the single request of a call.

        gRPC itself holds a message while it arrives, so the bytes that have arrived cannot be counted. Instead the number of
        slowly arriving messages is limited, so that together they stay within `max_bodies`. One more of them times out the
        one that has been slow for longest.

        Raises:
            BodyTimeoutError: the request did not arrive in time.
        """
        try:
            async with asyncio.timeout(self._settings.body_timeout) as timeout:
                timer = asyncio.get_running_loop().call_later(_SLOW, self._is_slow, timeout)
                try:
                    data = await context.read()
                finally:
                    timer.cancel()
                    self._slow.pop(timeout, None)
        except TimeoutError as error:
            raise BodyTimeoutError("the request did not arrive in time") from error
        if data is grpc.aio.EOF:
            raise HTTPException(400, "the call ended without a request")
        return bytes(data)

    def _is_slow(self, timeout: asyncio.Timeout) -> None:
        if len(self._slow) >= max(self._settings.max_bodies // self._settings.max_body, 1):
            slowest = next(iter(self._slow))
            del self._slow[slowest]
            slowest.reschedule(asyncio.get_running_loop().time())
        self._slow[timeout] = None

    def _sends(self, context: _Context, size: int) -> None:
        """Count an answer until the client has read it or `body_timeout` has passed.

        The timeout is needed because gRPC cannot end a call that has its answer.
        """
        sent = contextlib.ExitStack()
        sent.enter_context(self._service.budget.sending(size))
        timer = asyncio.get_running_loop().call_later(self._settings.body_timeout, sent.close)
        sent.callback(timer.cancel)
        context.add_done_callback(lambda _: sent.close())
