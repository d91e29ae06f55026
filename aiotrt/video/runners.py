"""Run models on a frame, after converting it in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol, TypeAlias

from aiotrt.errors import InputError
from aiotrt.model import Model
from aiotrt.video.cancellation import wait_until_done
from aiotrt.video.frames import Frame

__all__ = ["Infer", "ModelLike", "Outcome", "Runner", "check_models", "runner_of"]

Infer: TypeAlias = Callable[[Frame], Awaitable[Any]]
#: A model, several by name (each gets every frame, and the result is a dict), or a coroutine function from frame to result.
ModelLike: TypeAlias = Model | Mapping[str, Model] | Infer


class Outcome(NamedTuple):
    """A result and its durations in seconds.

    Attributes:
        result: of the models.
        convert: converting the frame to RGB in a thread; None if that was done before.
        device: the rest, waiting for a slot included.
    """

    result: Any
    convert: float | None
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
        return _Several({name: _OneModel(model, pool, clock) for name, model in models.items()}, pool, clock)
    return _Function(models, clock, in_flight or 2)


class _OneModel:
    def __init__(self, model: Model, pool: Executor, clock: Callable[[], float]) -> None:
        self._model = model
        self._pool = pool
        self._clock = clock
        batching = model._options.batching
        # One on the device and one queued for each slot or place in a batch, so that the device never waits for a frame.
        self.capacity = 2 * model.slots * (1 if batching is None else batching.max_size)

    async def __call__(self, frame: Frame) -> Outcome:
        converting = await _convert(frame, self._pool, self._clock)
        started = self._clock()
        return Outcome(await self._model(_pixels(frame)), converting, self._clock() - started)


class _Several:
    def __init__(self, runners: Mapping[str, _OneModel], pool: Executor, clock: Callable[[], float]) -> None:
        self._runners = runners
        self._pool = pool
        self._clock = clock
        self.capacity = max(runner.capacity for runner in runners.values())

    async def __call__(self, frame: Frame) -> Outcome:
        converting = await _convert(frame, self._pool, self._clock)  # once for all models
        started = self._clock()
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(runner(frame)) for name, runner in self._runners.items()}
        return Outcome({name: task.result().result for name, task in tasks.items()}, converting, self._clock() - started)


class _Function:
    def __init__(self, function: Infer, clock: Callable[[], float], capacity: int) -> None:
        self._function = function
        self._clock = clock
        self.capacity = capacity

    async def __call__(self, frame: Frame) -> Outcome:
        started = self._clock()
        return Outcome(await self._function(frame), None, self._clock() - started)


def _pixels(frame: Frame) -> Any:
    """Return a frame's pixels, in device memory if they are there already."""
    tensor = frame.device_image
    return frame.image if tensor is None else tensor


async def _convert(frame: Frame, pool: Executor, clock: Callable[[], float]) -> float | None:
    """Convert a frame in a thread, before it takes a slot, which would be idle meanwhile.

    Returns the duration in seconds; None if the frame was converted before.
    """
    if frame.is_converted:
        return None
    started = clock()
    # If cancelled, wait for the thread, so that the pipeline's pool is idle when it is shut down.
    await wait_until_done(asyncio.get_running_loop().run_in_executor(pool, lambda: frame.image))
    return clock() - started
