"""One frame through one model: straight into a leased slot's staging where that can be, else by a call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from aiotrt.errors import InputError
from aiotrt.model import Model
from aiotrt.tensors import take_apart
from aiotrt.video.cancellation import to_its_end
from aiotrt.video.frames import Frame

__all__ = ["Infer", "ModelLike", "Outcome", "Runner", "check_models", "runner_of"]

Infer: TypeAlias = Callable[[Frame], Awaitable[Any]]
#: A model, several by name (each gets every frame, and the result is a dict), or a coroutine function from frame to result.
ModelLike: TypeAlias = Model | Mapping[str, Model] | Infer

INLINE: int = 1 << 20  # bytes that may be copied on the loop's thread


class Outcome(NamedTuple):
    """A result, and where the time went, in seconds."""

    result: Any
    slot: float | None
    device: float


class Runner(Protocol):
    """Frames in, results out."""

    @property
    def capacity(self) -> int:
        """How many frames keep it busy."""
        ...

    async def __call__(self, frame: Frame) -> Outcome:
        """Run for one frame."""
        ...


def check_models(models: ModelLike) -> None:
    """Before anything is opened for them.

    Raises:
        InputError: they are none.
    """
    if isinstance(models, Mapping):
        if not models:
            raise InputError("a pipeline needs at least one model")
        for name, model in models.items():
            if not isinstance(model, Model):
                raise InputError(f"{name!r}: expected a model, got {type(model).__name__}")
    elif not callable(models):
        raise InputError(f"expected a model, a dict of models or a coroutine function, got {type(models).__name__}")


def runner_of(models: ModelLike, pool: Executor, clock: Callable[[], float], in_flight: int | None) -> Runner:
    """How to run frames.

    Args:
        models: see `ModelLike`; `check_models` has seen them.
        pool: threads that convert frames.
        clock: in seconds.
        in_flight: where `models` does not say itself how many frames keep it busy.
    """
    if isinstance(models, Model):
        return _OneModel(models, pool, clock)
    if isinstance(models, Mapping):
        return _Several({name: _OneModel(model, pool, clock) for name, model in models.items()}, clock)
    return _Function(models, clock, in_flight or 2)


class _OneModel:
    def __init__(self, model: Model, pool: Executor, clock: Callable[[], float]) -> None:
        self._model = model
        self._pool = pool
        self._clock = clock
        statistics = model.statistics()
        slots = statistics.free + statistics.claimed + statistics.preparing + statistics.in_flight
        slots += statistics.readable + statistics.draining + statistics.broken
        batching = model._options.batching
        # One on the device and one in line for each slot, or for each place in a batch: it never waits for a frame.
        self.capacity = 2 * slots * (1 if batching is None else batching.max_size)
        self._may_lease = batching is None and model._options.outputs is None

    async def __call__(self, frame: Frame) -> Outcome:
        if self._may_lease and not frame.is_converted and self._takes_frames():
            return await self._by_lease(frame)
        started = self._clock()
        image = frame.image if frame.is_converted else await self._in_pool(lambda: frame.image)
        return Outcome(await self._model(image), None, self._clock() - started)

    def _takes_frames(self) -> bool:
        inputs = self._model.inputs
        return inputs is not None and len(inputs) == 1 and inputs[0].dtype is torch.uint8 and len(inputs[0].shape or ()) == 3

    async def _by_lease(self, frame: Frame) -> Outcome:
        started = self._clock()
        async with self._model.lease((frame.shape,), outputs="numpy") as slot:
            staging = slot.inputs[0].host.numpy()
            await self._in_pool(lambda: frame.write(staging))
            written = self._clock()
            structure, views = take_apart(await slot.replay())

            def owned() -> Any:  # copies, since the next launch overwrites the views
                return structure.build([np.array(view) for view in views])

            result = owned() if sum(view.nbytes for view in views) <= INLINE else await self._in_pool(owned)
        return Outcome(result, written - started, self._clock() - written)

    async def _in_pool(self, function: Callable[[], Any]) -> Any:
        """Cancelled, this waits for the thread all the same: it works on a slot that is somebody else's afterwards."""
        work = asyncio.get_running_loop().run_in_executor(self._pool, function)
        return await to_its_end(work)


class _Several:
    def __init__(self, runners: Mapping[str, _OneModel], clock: Callable[[], float]) -> None:
        self._runners = runners
        self._clock = clock
        self.capacity = max(runner.capacity for runner in runners.values())

    async def __call__(self, frame: Frame) -> Outcome:
        started = self._clock()
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(runner(frame)) for name, runner in self._runners.items()}
        return Outcome({name: task.result().result for name, task in tasks.items()}, None, self._clock() - started)


class _Function:
    def __init__(self, function: Infer, clock: Callable[[], float], capacity: int) -> None:
        self._function = function
        self._clock = clock
        self.capacity = capacity

    async def __call__(self, frame: Frame) -> Outcome:
        started = self._clock()
        return Outcome(await self._function(frame), None, self._clock() - started)
