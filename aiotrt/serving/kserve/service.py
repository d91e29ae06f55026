"""What the server does, whatever the protocol of the request: `app` has it over HTTP, `grpc_server` over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from starlette.exceptions import HTTPException

import aiotrt
from aiotrt.decoding.threads import off_loop
from aiotrt.errors import AiotrtError, ModelBrokenError, UsageError
from aiotrt.model import Model
from aiotrt.serving.errors import BodyError, Problem, problem
from aiotrt.serving.kserve.binary import InferRequest, Result
from aiotrt.serving.kserve.guards import Budget
from aiotrt.serving.kserve.regions import Kind, Region, Regions
from aiotrt.serving.kserve.servable import VERSION, Servable
from aiotrt.serving.kserve.settings import ServerSettings
from aiotrt.serving.models import Models, Standing, running
from aiotrt.tensors import TensorSpec

__all__ = ["Service"]

_log: Final = logging.getLogger("aiotrt")
_EXTENSIONS: Final = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")


class Service:
    """The models, and what may be asked of them. For one event loop.

    Args:
        settings: what is served, and how.

    Attributes:
        settings: the argument.
        models: the models by name, loaded or not.
        budget: the bytes of requests and answers that are in memory, of both protocols.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._servables = {model.name: Servable(model) for model in settings.models}
        self._first = [model.name for model in settings.models if model.is_loaded]
        self.budget = Budget(settings.max_bodies, settings.max_body, settings.body_timeout)
        self._regions = Regions()
        self.models = Models(
            {model.name: model.maker() for model in settings.models},
            close_timeout=settings.drain_timeout,
            opened=lambda name, model: self._servables[name].opened(model),
            required=self._first,
        )

    @contextlib.asynccontextmanager
    async def running(
        self, on_failure: Callable[[BaseException], None] | None = None, on_loaded: Callable[[], object] | None = None
    ) -> AsyncIterator[None]:
        """Load models inside the block, in a task of their own, and close them at its end.

        Args:
            on_failure: called when a model that was to be loaded at the start cannot be.
            on_loaded: called when all of those are.
        """

        async def load_first() -> None:
            try:
                for name in self._first:
                    await self.models.load(name)
            except Exception as error:
                if on_failure is not None:
                    on_failure(error)
            else:
                if on_loaded is not None:
                    on_loaded()

        try:
            async with running(self.models, wait=False, loading=load_first):
                yield
        except asyncio.CancelledError:  # by a second signal: the models are closed, and there is nothing to report
            if not self.models.is_draining:
                raise

    # The server...

    def metadata(self) -> dict[str, Any]:
        """The server's name, version and extensions."""
        shared = ("system_shared_memory", "cuda_shared_memory") if self.settings.shared_memory else ()
        return {"name": "aiotrt", "version": aiotrt.__version__, "extensions": [*_EXTENSIONS, *shared]}

    def index(self, is_ready: bool) -> list[dict[str, str]]:
        """All models, loaded or not; or those that can be called."""
        entries = []
        for name in self.models.names():
            standing, reason = self.models.standing(name)
            if standing is Standing.READY or not is_ready:
                entries.append({"name": name, "version": VERSION, "state": standing.value, "reason": reason})
        return entries

    def problem(self, error: Exception) -> Problem:
        """What to answer where this was raised; see `aiotrt.serving.errors.problem`."""
        if isinstance(error, HTTPException):
            return Problem(error.status_code, "", error.detail)
        if not isinstance(error, (AiotrtError, TimeoutError)):
            return Problem(500, "server_error", "the server failed")
        return problem(error, self.models.monitor.seconds_to_wait())

    # A model...

    def check(self, name: str, version: str | None) -> None:
        """Check that there is this model.

        Raises:
            starlette.exceptions.HTTPException: there is none of this name or version; 404.
        """
        try:
            self.models.standing(name)
        except UsageError as error:
            raise HTTPException(404, _unknown(name)) from error
        if version not in (None, "", VERSION):
            raise HTTPException(404, _unknown(name, version))

    def model(self, name: str, version: str | None) -> tuple[Model, Servable]:
        """A model that can be called.

        Raises:
            starlette.exceptions.HTTPException: as `check` does.
            ModelClosedError: it is not loaded.
            ModelBrokenError: it is broken. Said before a body is read for nothing.
        """
        self.check(name, version)
        model = self.models[name]
        if not model.is_ready:
            raise ModelBrokenError(f"model {name!r} is broken")
        return model, self._servables[name]

    def standing(self, name: str, version: str | None) -> tuple[bool, str]:
        """Whether a model can be called, and why not. Raises as `check` does."""
        self.check(name, version)
        standing, reason = self.models.standing(name)
        return standing is Standing.READY, reason

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Any]:
        """How many requests a model had, or each model, and where their time went. Raises as `check` does."""
        if name is not None:
            self.check(name, version)
        names = self.models.names() if name is None else [name]
        is_open = self.models.open()
        return {"model_stats": [self._servables[n].statistics(is_open.get(n), self.models.registry) for n in names]}

    async def run(
        self, model: Model, servable: Servable, called: InferRequest, passed: Callable[[], object]
    ) -> tuple[dict[str, object], list[tuple[str, bool, Result]], Collection[str]]:
        """Run a model.

        Args:
            model: what to run.
            servable: the model's description and counters for clients.
            called: the request.
            passed: called when its inputs are there, and again when the model has run.

        Returns:
            The answer but for its outputs; of each output its name, whether it is sent as bytes, and it; and the names of
            those that were written to shared memory. All others are on the host.

        Raises:
            BodyError: there is no such output or region, or as `Regions`, `Servable.decoded` and `Servable.run` do.
            AiotrtError: as these do; or `BusyError`, there is no room for inputs that are not in the request.
        """
        wanted = _wanted(called, servable.outputs)  # before the call, which would be for nothing
        regions = self._regions_of(called)
        with contextlib.ExitStack() as held:
            if sizes := [one.placed.size for one in called.inputs if one.placed is not None]:
                held.enter_context(self.budget.holding(sum(sizes)))
                on_gpu = model.statistics().device.startswith("cuda")
                called = await self._regions.filled(called, servable.images, on_gpu=on_gpu)
            if any(one.files for one in called.inputs):
                called = await servable.decoded(called)
                held.enter_context(self.budget.holding(sum(one.tensor.nbytes for one in called.inputs)))
            passed()
            results = await servable.run(model, called, self.settings.max_deadline)
            passed()
        placed = await self._regions.put(called, results, regions)
        head: dict[str, object] = {"model_name": servable.name, "model_version": VERSION}
        if called.id is not None:
            head["id"] = called.id
        outputs = [(output, is_binary, results[output]) for output, is_binary in wanted]
        return head, await _on_host(outputs, placed), placed

    # Shared memory...

    def region_status(self, kind: Kind, name: str | None) -> list[dict[str, Any]]:
        """The regions that are registered, or the one of this name.

        Raises:
            starlette.exceptions.HTTPException: there is none of this name, 404; or no shared memory here, 501.
        """
        self._check_shared(kind)
        try:
            return self._regions.status(kind, name)
        except KeyError as error:
            raise HTTPException(404, f"Unable to find {kind} shared memory region: '{(name or '')[:80]}'") from error

    async def register_region(self, kind: Kind, name: str, fields: Mapping[str, Any]) -> None:
        """Register a region of shared memory, for tensors of requests and answers.

        Raises:
            starlette.exceptions.HTTPException: there is no shared memory here; 501.
            BodyError: as `Regions.register` does.
        """
        self._check_shared(kind)
        await self._regions.register(kind, name, fields)

    def unregister_region(self, kind: Kind, name: str | None) -> None:
        """Forget a region, or all. Requests that use it are not disturbed.

        Raises:
            starlette.exceptions.HTTPException: there is no shared memory here; 501.
        """
        self._check_shared(kind)
        self._regions.unregister(kind, name)

    def _check_shared(self, kind: Kind) -> None:
        if not self.settings.shared_memory:
            raise HTTPException(501, f"this server does not have {kind} shared memory: it is off without --shared-memory")

    def _regions_of(self, called: InferRequest) -> dict[str, Region]:
        """The regions of outputs, by output, so that a wrong one is found before the model runs."""
        placed = any(one.placed for one in called.inputs) or any(one.placed for one in called.outputs)
        if placed and not self.settings.shared_memory:
            raise BodyError("the parameter shared_memory_region: this server has no shared memory without --shared-memory")
        return {one.name: self._regions.find(one.placed) for one in called.outputs if one.placed is not None}

    # The repository...

    async def load(self, name: str, parameters: object) -> None:
        """Load a model that the server was started with, with the settings of the start.

        Raises:
            starlette.exceptions.HTTPException: as `check` does.
            BodyError: there are parameters, which are not taken.
            AiotrtError: as `Models.load` does.
        """
        failed = f"failed to load '{name[:80]}'"  # Triton's words, which its clients compare
        try:
            self.check(name, None)
        except HTTPException as error:
            raise HTTPException(404, f"{failed}: {error.detail}") from error
        if parameters:
            raise BodyError(f"{failed}: it is loaded with the server's settings, and parameters are not taken")
        try:
            await self.models.load(name)
            self.models.required |= {name} & set(self._first)
        except AiotrtError as error:  # of others there is more in the log
            _log.error("model %s could not be loaded: %s", name, error)
            raise

    async def unload(self, name: str) -> None:
        """Unload a model; calls that are under way end first. Raises as `check` does."""
        self.check(name, None)
        if not self.settings.strict_readiness:
            self.models.required.discard(name)  # a client wanted it so: the others are served
        await self.models.unload(name)


def _unknown(name: str, version: str | None = None) -> str:
    """What to say of a model or version that is not there. Clients compare these words, which are Triton's."""
    version = "" if version is None else f" version {version[:80]}"
    return f"Request for unknown model: '{name[:80]}'{version} is not found"


def _wanted(called: InferRequest, outputs: Sequence[TensorSpec]) -> list[tuple[str, bool]]:
    """Names, and whether as bytes."""
    if not called.outputs:
        return [(output.name, called.is_binary) for output in outputs]
    names = [output.name for output in outputs]
    for requested in called.outputs:
        if requested.name not in names:
            raise BodyError(f"there is no output {requested.name[:80]!r}; the outputs are {', '.join(names)}")
    return [(requested.name, requested.is_binary) for requested in called.outputs]


async def _on_host(outputs: list[tuple[str, bool, Result]], placed: Collection[str]) -> list[tuple[str, bool, Result]]:
    """Outputs, of which those in the answer are moved to the host."""

    def on_gpu(name: str, result: Result) -> bool:
        return isinstance(result, torch.Tensor) and result.is_cuda and name not in placed

    def moved() -> list[tuple[str, bool, Result]]:
        return [
            (name, is_binary, result.cpu() if isinstance(result, torch.Tensor) and on_gpu(name, result) else result)
            for name, is_binary, result in outputs
        ]

    return await off_loop(moved) if any(on_gpu(name, result) for name, _, result in outputs) else outputs
