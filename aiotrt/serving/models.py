"""The models of an application: opened as it starts, closed as it ends, found by name in between."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeAlias

import anyio
import torch
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from aiotrt.errors import AiotrtError, InputError, ModelClosedError, UsageError
from aiotrt.model import Model, load
from aiotrt.serving.metrics import ModelsCollector
from aiotrt.serving.monitor import Monitor
from aiotrt.serving.observing import Durations, Observer, tracing_of

__all__ = ["Models", "Source", "Standing", "get", "lifespan", "models_of"]

#: A file, a network, a model that `aiotrt.load` made and nobody has opened, or a function that makes one.
Source: TypeAlias = str | os.PathLike[str] | torch.nn.Module | torch.export.ExportedProgram | Model | Callable[[], Model]

_log: Final = logging.getLogger("aiotrt")
#: Seconds that closing may take once nobody waits for results any more; a device that hangs takes for ever.
_CLOSE: Final = 5.0


class Standing(enum.Enum):
    """Where a model stands; KServe's names."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class _Entry:
    def __init__(self, name: str, make: Callable[[], Model]) -> None:
        self.name = name
        self.make = make
        self.model: Model | None = None
        self.standing = Standing.UNAVAILABLE
        self.reason = "not loaded yet"
        self.lock = asyncio.Lock()  # loading and unloading, one at a time
        self.closing: asyncio.Task[bool] | None = None  # as long as it is


class Models:
    """Models by name, for one event loop. Made by `lifespan`, found by `models_of`.

    Args:
        sources: what to load, by name.
        close_timeout: seconds that calls may take to finish when a model is closed; then they are dropped.
        registry: where metrics go; by default a registry of its own.
        opened: awaited with a name and its model once it is warmed up, before anybody may use it.
        required: the names without which `is_ready` is false; by default all.

    Attributes:
        required: the names without which `is_ready` is false.
        monitor: measures the loop's lag and the models' rates.
        registry: the metrics, for `prometheus_client`.
        is_draining: whether the program is about to end; then `is_ready` is false, and what is asked is still answered.
        is_closed: whether all models were closed at the end; not so when a device hangs.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        close_timeout: float = 30.0,
        registry: CollectorRegistry | None = None,
        opened: Callable[[str, Model], Awaitable[None]] | None = None,
        required: Iterable[str] | None = None,
    ) -> None:
        self._entries = {name: _Entry(name, _maker(name, source)) for name, source in sources.items()}
        self._close_timeout = close_timeout
        self._opened = opened
        self.required = set(self._entries if required is None else required)
        self.registry = CollectorRegistry() if registry is None else registry
        self.monitor = Monitor(self.open, self.registry)
        self.registry.register(ModelsCollector(self.open, self.names))
        self._durations = Durations(self.registry)
        self.is_draining = False
        self.is_closed = False
        self._is_ending = False

    def names(self) -> list[str]:
        """Of all, loaded or not."""
        return list(self._entries)

    def open(self) -> dict[str, Model]:
        """Those that can be called, or are broken."""
        return {
            name: entry.model
            for name, entry in self._entries.items()
            if entry.model is not None and entry.standing is Standing.READY and _is_open(entry.model)
        }

    def __getitem__(self, name: str) -> Model:
        """The model of this name.

        Raises:
            UsageError: there is none; the message has those there are.
            ModelClosedError: it is not loaded, or not yet.
        """
        entry = self._entry(name)
        if entry.model is None or entry.standing is not Standing.READY:
            raise ModelClosedError(f"model {name!r} is {entry.standing.value.lower()}: {entry.reason}")
        return entry.model

    def standing(self, name: str) -> tuple[Standing, str]:
        """Where a model stands, and why if it cannot be called, or not on each of its devices.

        Raises:
            UsageError: there is none of this name.
        """
        entry = self._entry(name)
        model = entry.model
        if entry.standing is Standing.READY and model is not None and not model.is_ready:
            # It says so itself; the file it came from, which repr() has, is nobody's business out there.
            return Standing.UNAVAILABLE, "it is broken or closed"
        if entry.standing is Standing.READY and model is not None and model.is_degraded:
            broken = [one.device for one in model.statistics().devices if one.is_broken]
            return Standing.READY, f"degraded: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} broken"
        return entry.standing, entry.reason

    @property
    def is_ready(self) -> bool:
        """Whether every model that is required is warmed up and usable, and the program is not about to end."""
        return not self.is_draining and all(self.standing(name)[0] is Standing.READY for name in self.required)

    def drain(self) -> None:
        """Say that the program is about to end: from now on `is_ready` is false. Calls go on."""
        self.is_draining = True

    async def load(self, name: str) -> None:
        """Load and warm up, if that was not done or went wrong.

        Raises what `aiotrt.load` does, and `ModelClosedError` when all models are being closed.
        """
        entry = self._entry(name)
        async with entry.lock:
            self._check_going_on(name)
            if entry.model is not None and entry.model.is_ready:
                return
            await self._close(entry)
            entry.standing, entry.reason = Standing.LOADING, "it is being loaded and warmed up"
            try:
                model = await entry.make()
                Observer(name, self._durations, self.monitor.history.took, tracing_of(name)).observe(model)
                try:
                    if self._opened is not None:
                        await self._opened(name, model)
                    self._check_going_on(name)  # or it would be opened when all have been closed, and stay
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await model.aclose(drain=False)
                    raise
            except BaseException as error:
                entry.standing = Standing.UNAVAILABLE
                # What it says may name files, and clients are told the reason.
                is_error = isinstance(error, Exception)
                entry.reason = "loading failed; the log says why" if is_error else "loading was cancelled"
                raise
            if model.inputs is None:
                _log.warning(
                    "model %s declares no inputs and was loaded without warmup=: its first call, and the first of each "
                    "other shape, waits until the model is warmed up and captured",
                    name,
                )
            entry.model = model
            entry.standing, entry.reason = Standing.READY, ""

    async def unload(self, name: str) -> None:
        """Close, when the calls that are under way have ended. New ones raise `ModelClosedError`.

        Cancellation stops the waiting, not the closing.
        """
        entry = self._entry(name)
        async with entry.lock:
            await self._close(entry)

    async def aclose(self, *, drain: bool = True) -> bool:
        """Close all, the last loaded first.

        Args:
            drain: let calls that wait or run finish, for at most `close_timeout` seconds.

        Returns:
            Whether all are closed; not so when a device hangs.
        """
        self.drain()
        self._is_ending = True
        done = True
        for entry in reversed(self._entries.values()):
            done &= await self._close(entry, drain=drain)
        self.is_closed = done
        return done

    async def _close(self, entry: _Entry, *, drain: bool = True) -> bool:
        """Whether it is closed. A task of its own does it: one that is cancelled half-way would leave the model for ever."""
        if entry.model is None:
            return True
        if entry.closing is None:
            entry.standing, entry.reason = Standing.UNLOADING, "it is being unloaded"
            entry.closing = asyncio.create_task(self._finish(entry, entry.model, drain), name=f"aiotrt closing {entry.name}")
        return await asyncio.shield(entry.closing)

    async def _finish(self, entry: _Entry, model: Model, drain: bool) -> bool:
        closed = False
        for drains, seconds in ((True, self._close_timeout), (False, _CLOSE)):
            if drains <= drain and not closed:
                with anyio.move_on_after(seconds):
                    await model.aclose(drain=drains)
                    closed = True
        if not closed:
            _log.warning("model %s could not be closed: its device does not finish", entry.name)
        entry.model = entry.closing = None
        entry.standing, entry.reason = Standing.UNAVAILABLE, "it was unloaded"
        return closed

    def _check_going_on(self, name: str) -> None:
        if self._is_ending:
            raise ModelClosedError(f"model {name!r} is not loaded any more: all models are being closed")

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            listing = ", ".join(self._entries) or "none"
            raise UsageError(f"there is no model {name!r} here; there are: {listing}") from None


def lifespan(
    own: Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]] | None = None,
    /,
    *,
    wait: bool = True,
    close_timeout: float = 30.0,
    registry: CollectorRegistry | None = None,
    **sources: Source,
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """A lifespan for FastAPI and Starlette that loads, warms up and closes models.

    ::

        app = FastAPI(lifespan=serving.lifespan(detector="detector.onnx", embedder=lambda: aiotrt.load("e.onnx", slots=4)))

    Args:
        own: the application's own lifespan. It is entered when the models are there and left before they go, and what it
            yields becomes state as usual.
        wait: whether the application starts when all models are warmed up. Otherwise it starts at once, ``/livez`` answers,
            ``/readyz`` says no, and calls answer 503 until then: for engines that are built for minutes.
        close_timeout: seconds that calls may take to finish at the end; then they are dropped.
        registry: where metrics go, such as `prometheus_client.REGISTRY`; by default a registry of its own.
        **sources: what to load, by name: a file, a network, or what `aiotrt.load` returns. A function that calls
            `aiotrt.load` serves where the application is started more than once, as in tests.
    """

    @contextlib.asynccontextmanager
    async def enter(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        models = Models(sources, close_timeout=close_timeout, registry=registry)
        async with running(models, wait=wait), own(app) if own is not None else contextlib.nullcontext() as state:
            app.state.aiotrt = models  # for clients that run the lifespan and do not pass its state on to requests
            try:
                yield {**(state or {}), "aiotrt": models}
            finally:
                if getattr(app.state, "aiotrt", None) is models:  # else the application was started once more meanwhile
                    del app.state.aiotrt

    return enter


@contextlib.asynccontextmanager
async def running(
    models: Models, *, wait: bool, loading: Callable[[], Coroutine[Any, Any, None]] | None = None
) -> AsyncIterator[None]:
    """The models are loaded, or being loaded by a task; at the end they are closed.

    Args:
        models: them.
        wait: whether they are loaded first.
        loading: what loads them; by default all, one after the other.
    """

    async def load_all() -> None:
        for name in models.names():
            await models.load(name)

    async def load_behind() -> None:
        try:
            await (loading or load_all)()
        except Exception as error:  # nobody awaits this: what went wrong is in the log
            _log.error("loading failed: %s", error, exc_info=not isinstance(error, AiotrtError))

    drain = False
    task: asyncio.Task[None] | None = None
    try:
        async with models.monitor:
            if wait:
                await load_all()
            else:
                task = asyncio.create_task(load_behind(), name="aiotrt loading")
            yield
            drain = True
    finally:
        with anyio.CancelScope(shield=True):  # it is bounded
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task])
            await models.aclose(drain=drain)


def models_of(connection: HTTPConnection) -> Models:
    """All models of the application that this request or WebSocket came to.

    Raises:
        UsageError: the application's lifespan has not run, or is another one.
    """
    models = getattr(connection.state, "aiotrt", None)
    if models is None and (app := connection.scope.get("app")) is not None:
        models = getattr(app.state, "aiotrt", None)
    if models is None:
        raise UsageError(
            "the application has no models here: create it with lifespan=aiotrt.serving.lifespan(...), and see that the "
            "lifespan runs: httpx.ASGITransport does not run it, and a TestClient only inside its 'with' block"
        )
    assert isinstance(models, Models)
    return models


def get(name: str) -> Callable[[HTTPConnection], Awaitable[Model]]:
    """A dependency: the model of this name, ready to be called.

    ::

        Detector = Annotated[aiotrt.Model, Depends(serving.get("detector"))]


        @app.post("/detect")
        async def detect(detector: Detector, page: Annotated[Pixels, Depends(serving.image_body())]) -> list[Box]: ...
    """

    async def dependency(connection: HTTPConnection) -> Model:
        return models_of(connection)[name]

    return dependency


def _is_open(model: Model) -> bool:
    """Whether it has not been closed behind our back: the heartbeat and the metrics would end with an error."""
    try:
        model.statistics()
    except ModelClosedError:
        return False
    return True


def _maker(name: str, source: Source) -> Callable[[], Model]:
    if isinstance(source, Model):
        used = False

        def once() -> Model:
            nonlocal used
            if used:
                raise UsageError(f"model {name!r} was closed and cannot be opened again: pass a function that loads it")
            used = True
            return source

        return once
    if isinstance(source, (str, os.PathLike, torch.nn.Module, torch.export.ExportedProgram)):
        return lambda: load(source)
    if callable(source):
        return source
    raise InputError(
        f"model {name!r}: expected a file, a network, aiotrt.load(...) or a function that returns it, got {source!r}"
    )
