"""Run the application on uvicorn, with signals, draining, and a bounded shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from aiotrt.serving.kserve.app import create_app
from aiotrt.serving.kserve.protocol import protocol
from aiotrt.serving.kserve.settings import ServerSettings
from aiotrt.serving.models import Models

__all__ = ["serve"]

_log: Final = logging.getLogger("aiotrt")


def serve(
    settings: ServerSettings,
    *,
    started: Callable[[str], None] | None = None,
    grpc_started: Callable[[str], None] | None = None,
    loaded: Callable[[], object] | None = None,
) -> int:
    """Serve until a signal: SIGTERM, or Ctrl-C.

    From the signal on, ``/readyz`` answers 503. After `drain_delay` no more connections are accepted, and requests may
    finish within `drain_timeout`. The remaining ones are answered 503, and the models are closed. A second signal ends these
    waits. From the first signal on, each answer says that its connection is closed; idle connections stay open for another
    half second.

    Args:
        settings: the models to serve, and the options of the server.
        started: called with the address when connections are accepted, while models are still being loaded.
        grpc_started: called at the same time with the host and port of gRPC, if the settings have a port for it.
        loaded: called when all models that are loaded at the start are loaded.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        AiotrtError: a model could not be loaded, or a package for gRPC is missing.
        OSError: an address cannot be bound to.
    """
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def settle() -> None:
        # The present objects stay: torch and other modules have 200,000. Without this, every two thousand requests Python
        # would scan all of them without freeing any, which blocks everything else for a tenth of a second.
        gc.collect()
        gc.freeze()
        if loaded is not None:
            loaded()

    app = create_app(settings, on_failure=fail, on_loaded=settle)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Based on h11, which bounds the headers that it buffers; uvicorn's faster parser does not.
        http=protocol(settings.body_timeout, settings.max_connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=settings.access_log,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # seconds for a timer, whole or not
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
    )
    if settings.access_log:
        logger = logging.getLogger("uvicorn.access")
        logger.setLevel(logging.INFO)
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.handlers, logger.propagate = [handler], False
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family, backlog=config.backlog) as listener:
        address = listener.getsockname()[:2]

        def tell() -> None:
            if started is not None:
                started(_url(*address))
            if grpc_started is not None and app.state.grpc is not None:
                grpc_started(app.state.grpc.address)

        server = _Server(config, app, settings.drain_delay, tell, fail)
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
    models: Models = app.state.models
    if not models.is_closed:
        # Threads that wait for a hanging device would keep the interpreter alive permanently.
        _log.error("the device does not finish: ending without it")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 130 if server.signal == signal.SIGINT else 0


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which drains the models first, and does not raise the signal again that stopped it."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        delay: float,
        started: Callable[[], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__(config)
        self._models: Models = app.state.models
        self._grpc = app.state.grpc
        self._fail = fail
        self._delay = delay
        self._started = started
        self.signal: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self._grpc is not None:
            try:
                self._grpc.bind()
            except OSError as error:
                self._fail(error)
                return
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # gRPC stops at the same time as HTTP. The end of the lifespan, the last step of the shutdown, waits for it.
        stopping = None if self._grpc is None else asyncio.create_task(self._grpc.stop())
        await super().shutdown(sockets)
        if stopping is not None:
            stopping.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.should_exit = self.force_exit = True
            self._loop.call_soon_threadsafe(self._cancel)
            return
        self.signal = sig
        self._models.drain()
        if self._delay:
            # In a thread: a signal handler runs between any two instructions, where the loop's timers cannot be used safely.
            timer = threading.Timer(self._delay, lambda: setattr(self, "should_exit", True))
            timer.daemon = True
            timer.start()
        else:
            self.should_exit = True

    def _cancel(self) -> None:
        """End the running requests: each is answered 503, see `guards.Draining`."""
        for task in self.server_state.tasks:
            task.cancel()
        if self._grpc is not None:
            self._grpc.end()
