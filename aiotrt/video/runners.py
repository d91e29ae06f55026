"""Run models on a frame: written directly into a leased slot's staging memory where possible, else by a call."""

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
from aiotrt.video.cancellation import wait_until_done
from aiotrt.video.frames import Frame

__all__ = ["Infer", "ModelLike", "Outcome", "Runner", "check_models", "runner_of"]

Infer: TypeAlias = Callable[[Frame], Awaitable[Any]]
#: A model, several by name (each gets every frame, and the result is a dict), or a coroutine function from frame to result.
ModelLike: TypeAlias = Model | Mapping[str, Model] | Infer

INLINE: int = 1 << 20  # bytes that may be copied on the event loop's thread


class Outcome(NamedTuple):
    """A result and its durations in seconds.

    Attributes:
        result: of the models.
        slot: waiting for a slot and writing its staging memory; None if the frame was not written there directly.
        device: the rest.
    """

    result: Any
    slot: float | None
    device: float


class Runner(Protocol):
    """Runs models on frames."""

    @property
    def capacity(self) -> int:
        """The number of concurrent frames that keep it busy."""
        ...

    async def __call__(self, frame: Frame) -> Outcome:
        """Run the models on one frame."""
        ...


def check_models(models: ModelLike) -> None:
    """Check the models of a pipeline, before it opens anything.

    Raises:
        InputError: there is no model, or an object is not a model.
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
    """Create the runner for the models.

    Args:
        models: see `ModelLike`; already checked by `check_models`.
        pool: threads that convert frames.
        clock: in seconds.
        in_flight: the capacity of a coroutine function; None for 2. Models determine their own.
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
        # One on the device and one queued for each slot or place in a batch, so that the device never waits for a frame.
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

            def owned() -> Any:  # copies, because the next launch overwrites the views
                return structure.build([np.array(view) for view in views])

            result = owned() if sum(view.nbytes for view in views) <= INLINE else await self._in_pool(owned)
        return Outcome(result, written - started, self._clock() - written)

    async def _in_pool(self, function: Callable[[], Any]) -> Any:
        """Call `function` in a thread. If cancelled, wait for it, because it uses a slot that is released afterwards."""
        work = asyncio.get_running_loop().run_in_executor(self._pool, function)
        return await wait_until_done(work)


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
