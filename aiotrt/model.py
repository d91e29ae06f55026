"""`load` and `Model`: the story that the README tells. How it is done stands in `executor`, `graphs` and `completion`."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NoReturn, Self, TypeAlias, TypeVar, Unpack, overload

import anyio
import numpy as np
import torch

from aiotrt._impl import IMPLEMENTATION
from aiotrt._workers import Workers
from aiotrt.batching.batch import check_extents
from aiotrt.batching.batcher import Gatherer
from aiotrt.batching.dispatcher import Dispatcher
from aiotrt.batching.queue import Batching
from aiotrt.batching.stacked import Stacked
from aiotrt.building.files import unreadable
from aiotrt.building.profiles import Examples, ProfileArgument
from aiotrt.completion.hub import Hub, check_asyncio, check_loop
from aiotrt.completion.prediction import Progress
from aiotrt.devices import Device, Devices, Stream, is_several, open_device, open_devices
from aiotrt.engines import Engine, EngineOptions, is_file, open_engine, usual_device
from aiotrt.engines.module import training_parts
from aiotrt.engines.replicas import check_free, replicas
from aiotrt.errors import AiotrtError, EngineError, InputError, ModelBrokenError, ModelClosedError, ResourceError, UsageError
from aiotrt.lease import Lease
from aiotrt.load_options import EngineLoadOptions, LoadOptions
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.mapping import map_in_order
from aiotrt.runtime.programs import ProgramCache, Recipe
from aiotrt.runtime.request import Request
from aiotrt.runtime.slots import State
from aiotrt.tensors import Argument, InputSpecs, Kind, Parameters, Shapes, Specs, TensorSpec, examples

__all__ = ["Model", "Statistics", "load"]

T = TypeVar("T")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    R = TypeVarWithDefault("R", default=Any)  # so that Model alone means Model[Any], for strict checkers too
else:
    R = TypeVar("R")
S = TypeVar("S")

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Engine: TypeAlias = str | os.PathLike[str] | torch.nn.Module | torch.export.ExportedProgram

LOOP_END: Final = 5.0  # seconds that the end of a loop waits for the device of a model that is being closed


@overload
def load(source: _Engine, **options: Unpack[EngineLoadOptions]) -> Model[Any]: ...
@overload
def load(
    source: Callable[..., torch.Tensor], *, outputs: Literal["numpy"], **options: Unpack[LoadOptions]
) -> Model[Array]: ...
@overload
def load(
    source: Callable[..., torch.Tensor], *, outputs: Literal["torch", "device"], **options: Unpack[LoadOptions]
) -> Model[torch.Tensor]: ...
@overload
def load(source: Callable[..., torch.Tensor], *, outputs: None = None, **options: Unpack[LoadOptions]) -> TensorModel: ...
@overload
def load(
    source: Callable[..., S],
    *,
    outputs: Literal["numpy", "torch", "device"] | None = None,
    **options: Unpack[LoadOptions],
) -> Model[S]: ...
@overload
def load(source: Callable[..., object], **options: Unpack[EngineLoadOptions]) -> Model[Any]: ...
def load(
    source: object,
    *,
    device: Devices = "auto",
    slots: int = 2,
    overlap: bool = True,
    max_queue: int | None = 1024,
    batching: Batching | None = None,
    graphs: bool = True,
    warmup: object = (),
    signatures: Literal["any", "fixed"] = "any",
    preprocess: Callable[..., object] | None = None,
    postprocess: Callable[..., object] | None = None,
    outputs: Literal["numpy", "torch", "device"] | None = None,
    graph_cache_entries: int = 64,
    graph_cache_bytes: int = 8 << 30,
    hang_timeout: float | None = 60.0,
    retry: bool = False,
    progress: Literal["predict", "spin", "interval"] = "predict",
    threads: int = 1,
    runtime: Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"] | None = None,
    precision: Literal["fp32", "fp16", "bf16"] | None = None,
    profiles: Iterable[ProfileArgument] | ProfileArgument | None = None,
    sha256: str | None = None,
    allow_host_code: bool = False,
) -> Model[Any]:
    """Load an engine: ``async with aiotrt.load(...) as model``, or ``model = await aiotrt.load(...)``.

    Nothing happens before the model is awaited or entered. Then reading, deserialising, warming up and capturing happen in
    worker threads, and the loop goes on. It returns when everything in `warmup` is captured on every slot. Cancellation
    stops the waiting at once; a step that cannot be interrupted ends in its thread, which frees what it made.

    Args:
        source: a path to a TensorRT ``.engine`` or ``.plan`` file; a path to an ``.onnx`` file, which TensorRT builds once
            into a cache on CUDA, and ONNX Runtime runs on the host, with the files of its weights in its folder, which may
            be symbolic links out of it; a `torch.nn.Module` on the model's device; a `torch.export.ExportedProgram`; or a
            function over device tensors. A module is used in the mode that it is in; `load` warns of dropout or batch norm
            in training mode. Weights that are updated in place are seen by the next call; weights that are replaced are
            not, since graphs use the memory that they were captured with.
        device: ``"auto"``, ``"host"``, ``"cuda"`` or ``"cuda:1"``. "auto" is the current CUDA device if there is one, and
            the host otherwise, or for an ``.onnx`` file where no TensorRT is installed. A list of devices, or ``"cuda:*"``
            for every GPU that the process sees: one model and one queue for all of them. Each call goes to the device where
            it is expected to finish first. A module is copied to each device but its own.
        slots: how many requests may be on each device at once; each slot has its own stream, buffers and graphs.
        overlap: whether launches of several slots may run at the same time. False makes each wait, on the device, for the
            one before it, but for its copies: for a model that fills the device by itself, which gets no more done by two
            at a time, but each of the two later. A call without a graph waits for nobody; its end is seen in its turn, and
            the calls after it wait for it.
        max_queue: how many calls may wait for a slot before `QueueFullError`; 0 for none, None for no bound.
        batching: make batches of single items. Calls, `map`, `warmup` and `inputs` are then about items, **which have no
            batch axis**: they are stacked on a new axis 0, and results are split on axis 0. See `Batching`.
        graphs: whether to capture at all.
        warmup: example inputs, to capture ahead of the first call: a list with one entry per shape or signature, each an
            input, or a tuple or dict of inputs.
        signatures: which inputs calls may have, where the engine does not declare them. "any": each signature (names,
            dtypes, ranks, structure and constants) has its own graphs in the cache, as each shape has. "fixed": those of
            `warmup` only, or else that of the first call; any other is an `InputError`. Shapes may always differ.
        preprocess: from the model's inputs to the engine's: a function over device tensors that returns a tensor, or a
            tuple or dict of them. Captured into the graph.
        postprocess: from the engine's outputs to the model's; likewise. It gets what the engine returned: a tensor, each
            tensor of a flat tuple, list or dict by position, or any other structure as it is. Callers get what it returns.
        outputs: the kind of results, instead of the kind that went in: "numpy" arrays, host "torch" tensors, or "device"
            tensors.
        graph_cache_entries: how many graphs are kept, over all slots and shapes; at least one per slot.
        graph_cache_bytes: how many bytes of device memory they may keep; a graph in use is never evicted.
        hang_timeout: seconds that one request may take on the device before `DeviceHangError`; None for no limit. It holds
            too for the engine's first run for new shapes with its capture, while the model is warmed up or called: raise it
            for a module that compiles itself for longer.
        retry: with several devices, whether a call whose inputs are on the host runs again on another device, once, when the
            device that ran it broke or hung. For models whose result does not depend on how often they run.
        progress: how completion is found: "predict" sleeps until just before it is expected; "spin" looks at every loop
            iteration, for the lowest latency and a whole core; "interval" looks at growing intervals.
        threads: how many threads one run of a host engine may use.
        runtime: the TensorRT to build and run a file with; None for what is installed and reads it. The host has no use
            for this, nor for the next two.
        precision: to build an ``.onnx`` file with on CUDA; see `build`.
        profiles: to build an ``.onnx`` file with on CUDA; see `build`. None derives one from `warmup` where shapes are open,
            unless there is a `preprocess`: the engine takes the examples' shapes and those between them.
        sha256: the file's checksum in hexadecimal, checked before anything looks into the file. Engines are code: pin those
            that come from elsewhere.
        allow_host_code: whether code for the host inside an engine may run.

    Raises:
        InputError: an option is out of range, or is for files and the engine is none; at once. The following when awaited or
            entered; no model exists then.
        EngineError: the engine is missing, damaged or unusable, or it raised while it was warmed up.
        MissingDependencyError: a package is missing that this engine or device needs.
        UsageError: there is no such device, or it is a simulated one and `aiotrt.testing.run` does not run this loop.
        DeviceHangError: a run for `warmup`, or its capture, took longer than `hang_timeout`.
        ResourceError: the process has no thread or file descriptor left.
    """
    bounds: tuple[tuple[str, object, int], ...] = (
        ("slots", slots, 1), ("threads", threads, 1), ("max_queue", max_queue, 0),
        ("graph_cache_entries", graph_cache_entries, 1), ("graph_cache_bytes", graph_cache_bytes, 0),
    )  # fmt: skip
    for name, value, least in bounds:
        if name == "max_queue" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    flags = ("overlap", overlap), ("graphs", graphs), ("retry", retry), ("allow_host_code", allow_host_code)
    for name, value in flags:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {value!r}")
    limit: object = hang_timeout
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise InputError(f"hang_timeout must be a positive number of seconds or None, got {hang_timeout!r}")
    if is_several(device):
        if not isinstance(device, str):
            device = tuple(device)  # type: ignore[arg-type]  # a value, whatever becomes of the caller's list
            if not device:
                raise InputError("device=[] names no device: expected a list of devices, such as ['cuda:0', 'cuda:1']")
    elif retry:
        raise InputError(f"retry=True needs another device to run a call again, and device={device!r} is one: pass a list")
    options_of_batching: object = batching
    if options_of_batching is not None and not isinstance(options_of_batching, Batching):
        raise InputError(f"batching must be an aiotrt.Batching or None, got {batching!r}")
    kind = _kind(outputs)
    if signatures not in ("any", "fixed"):
        raise InputError(f"signatures must be 'any' or 'fixed', got {signatures!r}")
    if progress not in [mode.value for mode in Progress]:
        raise InputError(f"progress must be 'predict', 'spin' or 'interval', got {progress!r}")
    for name, function in (("preprocess", preprocess), ("postprocess", postprocess)):
        if function is not None and not callable(function):
            raise InputError(f"{name} must be a function over tensors, got {type(function).__name__}")
    _check_engine_options(source, {"runtime": runtime, "precision": precision, "profiles": profiles, "sha256": sha256})
    if (part := training_parts(source)) is not None:
        name = type(source).__name__
        warnings.warn(
            f"{name} is in training mode, where {part} gives other results than in evaluation: call eval() on it first",
            stacklevel=2,
        )
    options = _Options(
        source, device, slots, overlap, max_queue, graphs, warmup, signatures == "fixed", preprocess, postprocess,
        kind,
        max(graph_cache_entries, slots), graph_cache_bytes, hang_timeout, Progress(progress),
        EngineOptions(threads, runtime, sha256, allow_host_code, precision, profiles), batching, retry,
    )  # fmt: skip
    return Model(options)


@dataclass(frozen=True)
class Statistics:
    """A model at one moment. Counts are since it was opened. With batching, calls are items; launches are of batches.

    Attributes:
        engine: its name.
        device: its device's name; of several devices, their names with commas between them.
        implementation: "native" or "python": whether aiotrt runs compiled.
        free: slots nobody uses.
        claimed: slots whose caller writes inputs.
        preparing: slots that a worker thread captures for, or copies into.
        in_flight: slots on the device.
        readable: slots whose lease holder reads outputs.
        draining: slots on the device that nobody waits for.
        broken: slots lost to a fault.
        waiting: callers in line for a slot.
        submitted: calls and leases accepted.
        completed: calls that returned results.
        failed: calls that raised.
        cancelled: calls whose caller stopped waiting.
        rejected: calls refused because the queue was full, and calls that made way for newer ones.
        expired: calls whose deadline passed.
        replays: launches of captured graphs.
        fallback_runs: launches that were not one graph.
        captures: graphs (or what stands in for one) built.
        hits: requests (with batching, batches) whose graph was there.
        misses: requests for which one had to be built first. Warm-up counts for neither.
        graphs: how many are kept now.
        graph_bytes: bytes of device memory that they keep.
        signatures: of how many different signatures of inputs they are.
        evictions: how many were given up for others.
        fallbacks: why something runs without a graph, each reason once.
        polls: event queries made by this loop's hub, for all its models.
        wakes: times that hub's timer fired.
        batches: how many batches there were of each number of items, with batching.
        padding: how many rows of those batches held no item of their own.
        devices: of a model on several devices, the numbers of each. There, with batching, calls are batches, and
            `submitted` to `rejected` count what came to the device; what waits for a device is in the model's queue.
    """

    engine: str
    device: str
    implementation: Literal["native", "python"]
    free: int
    claimed: int
    preparing: int
    in_flight: int
    readable: int
    draining: int
    broken: int
    waiting: int
    submitted: int
    completed: int
    failed: int
    cancelled: int
    rejected: int
    expired: int
    replays: int
    fallback_runs: int
    captures: int
    hits: int
    misses: int
    graphs: int
    graph_bytes: int
    signatures: int
    evictions: int
    fallbacks: tuple[str, ...]
    polls: int
    wakes: int
    batches: Mapping[int, int]
    padding: int
    devices: tuple[Statistics, ...] = ()

    @property
    def is_broken(self) -> bool:
        """Whether a fault has taken every slot, so that no call can succeed on this model, or on this one of its devices."""
        return self.broken > 0 and not (
            self.free or self.claimed or self.preparing or self.in_flight or self.readable or self.draining
        )


class Model(Generic[R]):
    """An engine with slots, on one device or several, for one event loop. Made by `load`.

    Await it, or enter it with ``async with``, before use. It belongs to the loop that opened it: load once per loop. All
    methods are for that loop's thread.
    """

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._executor: Executor | None = None  # of several, the first
        self._executors: tuple[Executor, ...] = ()
        self._gatherer: Gatherer | None = None  # with batching, or several devices
        self._opening: asyncio.Task[None] | None = None
        self._awaiting = 0
        self._is_closed = False
        self._closing: asyncio.Task[None] | None = None
        self._freeing: asyncio.Future[None] | None = None
        self._warmup_lock = anyio.Lock()

    def __await__(self) -> Generator[Any, None, Self]:
        return self._opened().__await__()

    async def __aenter__(self) -> Self:
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(drain=kind is None)

    async def __call__(
        self, *inputs: object, deadline: float | None = None, priority: int | None = None, **named: object
    ) -> R:
        """Run once.

        Args:
            *inputs: in the engine's order: numpy arrays, torch tensors on the host or on the model's device, or anything
                with ``__array__`` (a video frame), DLPack or ``__cuda_array_interface__``. Any strides. Where the engine
                declares its inputs, dtypes, ranks and extents as `inputs` says; modules and functions also take nested
                structures of them, and numbers, text and None as constants. A host input must not change before the call
                returns: from 128 KiB on CUDA reads it where it is, if it was allocated as page-locked and is in plain order;
                any other one is copied first.
            deadline: with batching, seconds from now after which the result is of no use. An item that still waits then is
                dropped before it reaches the device.
            priority: with batching, the class: 0 is the most urgent, and 1 what calls have that do not say.
            **named: inputs by name; without batching ``deadline`` and ``priority`` are names like any other.

        Returns:
            The results, when they are complete. Of a module or function, the structure that it returns; of any other engine,
            one output bare, and several as a named tuple. They belong to the caller, permanently. They are of the kind that
            went in (numpy, host tensor, device tensor; the latter if any input is on the device), unless `load` was told
            otherwise. bfloat16 and float8 results come to numpy as float32, complex32 as complex64.

        Raises:
            InputError: an input does not fit. Nothing was submitted, unless only the engine could say: it raised for inputs
                of a new signature, while it accepted another before.
            QueueFullError: all slots are busy and `max_queue` calls wait. Nothing was submitted.
            DeadlineError: the deadline passed; the model is usable.
            OverloadedError: the result would come after it. Nothing was submitted.
            EngineError: the engine raised. This call failed, with the others of its batch; the model is usable.
            DeviceError: the device broke; so did the model, unless it has other devices.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from here.

        Cancellation returns at once. A call in line leaves it; work on the device goes on, and its slot, inputs and
        outputs are kept until it has ended. Whether the work was done is unknown then.
        """
        executor = self._executor
        if executor is None:
            raise self._not_open()
        if self._gatherer is not None:
            gatherer = self._gatherer
            call = gatherer.submit(inputs, named, deadline=deadline, priority=priority)
            try:
                return await call  # type: ignore[no-any-return]
            except (asyncio.CancelledError, GeneratorExit):
                gatherer.abandon(call)
                raise
        if deadline is not None:
            named["deadline"] = deadline
        if priority is not None:
            named["priority"] = priority
        request = executor.submit(inputs, named)
        try:
            result: R = await request
        except (asyncio.CancelledError, GeneratorExit):
            executor.abandon(request)
            raise
        executor.recycle(request)
        return result

    def lease(
        self,
        shapes: object = None,
        *,
        outputs: Literal["numpy", "torch", "device"] | None = None,
        device: str | torch.device | None = None,
    ) -> Lease:
        """Hold a slot: ``async with model.lease() as slot``. Zero copy, both ways.

        Args:
            shapes: of the inputs: a sequence of shapes, a mapping from input names, or for a single input its shape. None
                for the declared shapes if they are all fixed, else those of the first warm-up or call.
            outputs: where results should be after a launch: "device" (the default), or also on the host.
            device: one of the model's devices. None for the one where a launch is expected to end first when the lease is
                entered; then it waits in that device's line.

        Raises:
            InputError: the shapes are missing or do not fit.
            UsageError: the model has no such device.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from here; or it makes batches,
                whose slots nobody holds.
        """
        executor, gatherer = self._usable(), self._gatherer
        if self._options.batching is not None:
            raise UsageError(
                f"{executor.recipe.engine.name}: a model with batching= has no slots of a caller's own; "
                "load the engine without batching= for leases"
            )
        kind = _kind(outputs) or Kind.DEVICE
        shapes, specs = self._lease_shapes(executor, shapes), executor.specs.known()
        name = None if device is None else str(device)
        if not isinstance(gatherer, Dispatcher):
            if name not in (None, executor.device.name, str(executor.device.torch_device)):
                raise UsageError(f"device must be the model's ({executor.device.name}), got {name!r}")
            return Lease(executor, specs, shapes, kind, self)
        executor = gatherer.executor(name, (shapes, (), specs))
        if name is not None:
            return Lease(executor, specs, shapes, kind, self)
        return Lease(executor, specs, shapes, kind, self, lambda: gatherer.executor(None, (shapes, (), specs)))

    async def map(
        self, frames: Iterable[object] | AsyncIterable[object], *, in_flight: int | None = None
    ) -> AsyncGenerator[R, None]:
        """Run for each of `frames`, several at a time, results in order: ``async for result in model.map(frames)``.

        Args:
            frames: any iterable, or asynchronous iterable, of inputs; a tuple is several inputs, a dict named ones.
            in_flight: how many calls may be under way or waiting to be fetched; None for two per slot, and with batching
                for a full batch per slot and one more. They do not count against `max_queue`, since this bounds them.

        Raises what a call raises, and what `frames` raises, in its place in the order: earlier results come first. Leaving
        the loop, or cancelling, abandons what is under way, as for a call.

        With a progress bar of tqdm: ``async for result in tqdm(model.map(frames), total=len(frames))``.
        """
        executor, gatherer = self._usable(), self._gatherer
        usual = 2 * len(executor.slots) if gatherer is None else gatherer.in_flight
        limit = usual if in_flight is None else in_flight
        results = map_in_order(executor, frames, limit) if gatherer is None else map_in_order(gatherer, frames, limit)
        try:
            async for result in results:
                yield result
        finally:
            await results.aclose()

    async def warmup(self, entries: object) -> None:
        """Capture ahead of the first call, on every slot, and with batching every size of batch.

        Args:
            entries: as for `load`; where the inputs are known, shapes will do: for a single input one shape or a list of
                shapes (tuples of integers), else a dict from names to shapes.

        Waits until each slot was free once. Cancellation leaves what was captured so far.

        Raises:
            InputError: an entry does not fit.
            EngineError: the engine raised.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from here.
        """
        executor, gatherer = self._usable(), self._gatherer
        specs = executor.specs if gatherer is None else gatherer.specs
        for values, named in examples(entries):
            if gatherer is not None:
                gatherer.learn()
            shapes = _as_shapes(specs, values, named)
            arguments: Sequence[Argument] = ()
            if shapes is None:
                arguments, shapes, kind, fixed = specs.parse(values, named)
            else:
                kind, fixed = Kind.NUMPY, specs.known()
            kind = executor.outputs or kind
            if gatherer is None:
                await self._warm(fixed, shapes, kind, arguments)
                continue
            for stacked, batch_shapes, size in gatherer.stacked(fixed, shapes):
                examples_of_size = arguments if size is None else [Stacked([argument], size) for argument in arguments]
                await self._warm(stacked, batch_shapes, kind, examples_of_size, size)

    def statistics(self) -> Statistics:
        """How things are now; see `Statistics`."""
        executor = self._executor
        if executor is None:
            raise self._not_open()
        gatherer = self._gatherer
        found = [_statistics(one) for one in self._executors]
        if isinstance(gatherer, Dispatcher):
            return _of_several(found, gatherer)
        if gatherer is None:
            return found[0]
        batches = dict(sorted(gatherer.counters.batches.items()))
        return replace(found[0], **vars(gatherer.counters) | {"batches": batches, "waiting": gatherer.waiting})

    def stream(self, device: str | torch.device | None = None) -> Stream:
        """A new stream on the model's device, for consumers: ``wait`` for an event, ``run`` a function, ``close``.

        Args:
            device: of several devices, which; None for the first that works.

        Raises:
            UsageError: the model has no such device.
        """
        executor = self._usable()
        if device is not None and isinstance(self._gatherer, Dispatcher):
            executor = self._gatherer.executor(str(device), ((), (), executor.specs.known()))
        return executor.device.stream()

    @property
    def inputs(self) -> tuple[TensorSpec, ...] | None:
        """What a call takes, with batching a single item.

        Where the engine does not declare it, these are the inputs of the first example or call that the engine accepted;
        None until then. Calls may have others, unless ``signatures="fixed"``.
        """
        executor = self._executor
        if executor is None:
            raise self._not_open()
        if self._gatherer is not None:
            self._gatherer.learn()
        specs = executor.specs.specs if self._gatherer is None else self._gatherer.specs.specs
        return None if specs is None else tuple(specs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...] | None:
        """What a call gives, with batching a batch of them; None where the engine does not declare it, as a module's."""
        executor = self._executor
        if executor is None:
            raise self._not_open()
        return executor.recipe.engine.outputs

    @property
    def slots(self) -> int:
        """How many calls and leases can be on the devices at the same time."""
        if self._executor is None:
            raise self._not_open()
        return sum(len(executor.slots) for executor in self._executors)

    def observe(self, observer: Callable[[Any], None] | None) -> None:
        """Call `observer` for each call and lease that comes in, with batching for each item and each batch.

        Args:
            observer: called on the loop's thread in the caller's context, with the request. The request has the methods of
                an `asyncio.Future`, which say how it ended, and `times`, which say when. What the observer raises goes to
                the loop's exception handler, and the request goes on. None to observe nothing any more.

        A model has one observer. Warm-ups are not observed.

        Raises:
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from here.
        """
        self._usable()
        for executor in self._executors:
            executor.observer = observer

    @property
    def is_ready(self) -> bool:
        """Whether a call now could succeed, since it is open, warmed up, not broken and not closing."""
        return (
            self._opening is not None
            and self._opening.done()
            and any(executor.broken is None and not executor.closing for executor in self._executors)
        )

    @property
    def is_degraded(self) -> bool:
        """Whether some of the model's devices broke, and others go on."""
        return self.is_ready and any(executor.broken is not None for executor in self._executors)

    async def aclose(self, *, drain: bool = True) -> None:
        """Close. Idempotent. New calls raise `ModelClosedError` from now on.

        Args:
            drain: let calls that wait or run finish, and leases be left. Without it they raise `ModelClosedError` now; what
                is on the device still ends there first, since memory that it uses cannot be freed.

        Returns when the device is done with the model and everything is freed. Cancellation stops the waiting, not the
        closing: call it again to wait on. A broken model's memory is kept, because the device may still use it.
        """
        opening = self._opening
        if opening is not None and not opening.done():
            check_loop(opening.get_loop(), _name(self._options.source))
            opening.cancel()
            await asyncio.wait([opening])
        executor = self._executor
        if executor is None:
            self._is_closed = True
            return
        check_loop(executor.loop, executor.recipe.engine.name)
        self._refuse(drain)
        if self._closing is None or self._closing.done():  # the first, or the last one failed
            self._closing = _in_background(self._close())
        await asyncio.shield(self._closing)

    def __repr__(self) -> str:
        executor = self._executor
        name = _name(self._options.source)
        if executor is None:
            return f"<aiotrt.Model {name}: {'closed' if self._is_closed else 'not open'}>"
        places = ", ".join(one.device.name for one in self._executors)
        if self._is_closed:
            return f"<aiotrt.Model {name} on {places}: closed>"
        totals = {state: sum(one.machine.count(state) for one in self._executors) for state in State}
        counts = ", ".join(f"{n} {state.value}" for state, n in totals.items() if n)
        waiting = executor.machine.waiting if self._gatherer is None else self._gatherer.waiting
        return f"<aiotrt.Model {name} on {places}: {counts}; {waiting} waiting>"

    def __reduce__(self) -> NoReturn:
        # Of two models with one executor, the first that is garbage would take it from the other.
        raise TypeError(f"{self!r} cannot be copied or pickled: share it, or load the engine again")

    def __del__(self) -> None:
        executor = getattr(self, "_executor", None)
        if executor is not None and not self._is_closed and not executor.is_forked and not sys.is_finalizing():
            was_closing = executor.closing  # and the loop was closed under that
            for one in self._executors:
                one.discard()
            if not was_closing:
                warnings.warn(
                    f"{self!r} was never closed: use 'async with', or await aclose()",
                    ResourceWarning,
                    stacklevel=1,
                    source=self,
                )

    # Opening...

    async def _opened(self) -> Self:
        if self._is_closed:
            raise ModelClosedError(f"{_name(self._options.source)} is closed: load it again")
        if self._opening is None:
            check_asyncio(_name(self._options.source))
            given = self._options.device
            for device in given if isinstance(given, tuple) else (given,):
                if not isinstance(device, (str, torch.device)) and hasattr(device, "check_loop"):
                    device.check_loop()
            self._opening = _in_background(self._open())
        opening = self._opening
        check_loop(opening.get_loop(), _name(self._options.source))
        self._awaiting += 1
        try:
            if not opening.done():
                await asyncio.wait([opening])  # of several tasks that await one model, each can be cancelled by itself
        except asyncio.CancelledError:
            if self._awaiting == 1:
                opening.cancel()  # it goes on to free what it has
            raise
        finally:
            self._awaiting -= 1
        if opening.cancelled():
            raise ModelClosedError(f"{_name(self._options.source)} was closed while it was being opened")
        opening.result()
        return self

    async def _open(self) -> None:
        options = self._options
        loading = _Loading(options)
        try:
            loaded = await _in_thread(loading.run)
        except BaseException:
            self._is_closed = True
            loading.abandon()
            raise
        try:
            self._executor = self._make_executors(loaded)
        except BaseException:
            self._is_closed = True
            made, self._executors = self._executors, ()
            for executor in made:
                executor.detach()

            def free() -> None:
                for executor in made:
                    executor.free()
                for _, engine in loaded[len(made) :]:
                    engine.close()

            await _start_freeing(free)
            raise
        try:
            self._gatherer = self._make_gatherer(options.batching)
            for executor in self._executors:
                if executor.broken is not None:
                    device = executor.device
                    raise ModelBrokenError(f"{device.name} is broken: {device.fault}") from device.fault
            if not _is_empty(options.warmup):
                await self.warmup(options.warmup)
            self._executor.specs.seal()
            if self._gatherer is not None:
                self._gatherer.seal()
        except GeneratorExit:
            raise  # the loop was closed and nothing can be awaited any more: `__del__` discards the executor
        except BaseException:
            self._refuse(drain=False)
            await self._close()
            raise

    def _make_executors(self, loaded: Sequence[tuple[Device, Engine]]) -> Executor:
        """Make an executor for each device, and return the first. All of them check inputs alike."""
        device, engine = loaded[0]
        declared, parameters = engine.inputs, engine.parameters
        if self._options.preprocess is not None:  # then the model's inputs are that function's
            declared, parameters = None, Parameters.of(self._options.preprocess)
        devices = [device for device, _ in loaded]
        specs = InputSpecs(
            declared, parameters, _holds(devices), device.torch_device, fixed=self._options.fixed, devices=_names(devices)
        )
        for device, engine in loaded:
            self._executors += (self._make_executor(device, engine, specs),)
        return self._executors[0]

    def _make_executor(self, device: Device, engine: Engine, specs: InputSpecs) -> Executor:
        options = self._options
        hub = Hub.acquire(options.progress)
        try:
            return Executor(
                Recipe(
                    device,
                    engine,
                    options.preprocess,
                    options.postprocess,
                    options.graphs,
                    ordered=not options.overlap and options.slots > 1,
                ),
                specs,
                hub,
                slots=options.slots,
                max_queue=options.max_queue,
                cache=ProgramCache(options.graph_cache_entries, options.graph_cache_bytes),
                # Where host memory is device memory, results on the device are results on the host.
                outputs=Kind.TORCH if device.unified and options.outputs is Kind.DEVICE else options.outputs,
                hang_timeout=options.hang_timeout,
                overlap=options.overlap,
            )
        except BaseException as error:
            hub.release()
            if isinstance(error, AiotrtError) or not isinstance(error, Exception):
                raise
            raise EngineError(
                f"{engine.name}: {device.name} could not provide for {options.slots} slots: {error}"
            ) from error

    def _make_gatherer(self, batching: Batching | None) -> Gatherer | None:
        options, executor = self._options, self._executors[0]
        devices = [one.device for one in self._executors]

        def of_items(declared: Specs | None) -> InputSpecs:
            return InputSpecs(
                declared,
                executor.specs.parameters,
                _holds(devices),
                devices[0].torch_device,
                of_items=True,
                fixed=options.fixed,
                devices=_names(devices),
            )

        if len(devices) > 1:
            return Dispatcher(self._executors, of_items, batching, options.max_queue, retry=options.retry)
        return None if batching is None else Gatherer(executor, of_items, batching, options.max_queue)

    async def _warm(
        self,
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        arguments: Sequence[Argument],
        batch: int | None = None,
    ) -> None:
        # One at a time: two that each held some of the slots would wait for each other for ever.
        await self._warmup_lock.acquire()
        requests: list[tuple[Executor, Request]] = []
        working = [executor for executor in self._executors if executor.broken is None] or self._executors
        try:
            for executor in working:  # the devices side by side
                ready = [
                    other.device.current_stream().record()
                    for other in working
                    if other is not executor
                    and any(one.tensor is not None and other.device.holds(one.tensor) for one in arguments)
                ]
                requests.extend(
                    (executor, executor.lease(specs, shapes, kind, is_warmup=True, arguments=arguments, ready=ready))
                    for _ in executor.slots
                )
            for _, request in requests:
                await request
                if batch is not None:
                    assert request.slot is not None
                    assert request.slot.program is not None
                    check_extents(request.slot.program, batch)
        finally:
            if not working[0].loop.is_closed():  # else a garbage collection ends this, and no task can be woken
                self._warmup_lock.release()
                # All are held until all were granted, so that each slot had its turn.
                for executor, request in requests:
                    request.cancel()
                    executor.abandon(request)
                    if request.done() and not request.cancelled():
                        request.exception()  # seen: the first one's is raised

    # Closing...

    def _refuse(self, drain: bool) -> None:
        if not self._is_closed:
            for executor in self._executors:
                executor.refuse()
            if self._gatherer is not None:
                self._gatherer.pump()  # nothing is held back any more
            if not drain:
                for executor in self._executors:
                    executor.drop()

    async def _close(self) -> None:
        executors = self._executors
        if not self._is_closed:
            while True:
                for executor in executors:
                    await _outlast(executor.idle(), executors)
                    await _outlast(executor.consumed(), executors)
                # What a device that broke meanwhile left undone may have gone to one that was idle already.
                if all(executor.idle().done() for executor in executors) and not (self._gatherer and self._gatherer.waiting):
                    break
            self._is_closed = True
            for executor in executors:
                executor.detach()
            if self._gatherer is not None:
                self._gatherer.close()
        if self._freeing is None:
            self._freeing = _start_freeing(lambda: _free(executors))
        await _outlast(self._freeing, executors)
        self._executor = self._gatherer = None
        self._executors = ()

    # Helpers...

    def _usable(self) -> Executor:
        executor = self._executor
        if executor is None:
            raise self._not_open()
        if isinstance(self._gatherer, Dispatcher):
            executor = self._gatherer.lead
        executor.check_usable()
        return executor

    def _not_open(self) -> ModelClosedError:
        name = _name(self._options.source)
        if self._is_closed:
            return ModelClosedError(f"{name} is closed: load it again")
        return ModelClosedError(
            f"{name} is not open: use 'async with aiotrt.load(...) as model' or 'await aiotrt.load(...)'"
        )

    def _lease_shapes(self, executor: Executor, shapes: object) -> Shapes:
        specs = executor.specs
        if shapes is None:
            if specs.specs is not None and all(spec.shape is not None and None not in spec.shape for spec in specs.specs):
                return tuple(tuple(extent or 0 for extent in spec.shape or ()) for spec in specs.specs)
            usual = next((one.first_shapes for one in self._executors if one.first_shapes is not None), None)
            if usual is None:
                raise InputError("the inputs' shapes are not known yet: pass shapes=, or load with warmup=")
            return usual
        named = {str(k): v for k, v in shapes.items()} if isinstance(shapes, Mapping) else {}
        values: tuple[object, ...] = ()
        if not named:
            if not isinstance(shapes, Sequence):
                raise InputError(f"shapes must be tuples of integers, one for each of the inputs, got {shapes!r}")
            values = (tuple(shapes),) if _is_shape(shapes) else tuple(shapes)
        found = _as_shapes(specs, values, named)
        if found is None:
            raise InputError(f"shapes must be tuples of integers, one for each of the inputs, got {shapes!r}")
        return found


if TYPE_CHECKING:

    class TensorModel(Model[torch.Tensor | Array]):
        """For checkers: a model of a function that returns a tensor. A result is of the kind that went in."""

        @overload
        async def __call__(
            self,
            *inputs: torch.Tensor,
            deadline: float | None = None,
            priority: int | None = None,
            **named: torch.Tensor,
        ) -> torch.Tensor: ...
        @overload
        async def __call__(
            self, *inputs: Array, deadline: float | None = None, priority: int | None = None, **named: Array
        ) -> Array: ...
        @overload
        async def __call__(
            self, *inputs: object, deadline: float | None = None, priority: int | None = None, **named: object
        ) -> torch.Tensor | Array: ...
        async def __call__(self, *inputs: object, **named: Any) -> Any: ...

else:
    TensorModel = Model


@dataclass(frozen=True)
class _Options:
    source: object
    device: Devices
    slots: int
    overlap: bool
    max_queue: int | None
    graphs: bool
    warmup: object
    fixed: bool
    preprocess: Callable[..., object] | None
    postprocess: Callable[..., object] | None
    outputs: Kind | None
    graph_cache_entries: int
    graph_cache_bytes: int
    hang_timeout: float | None
    progress: Progress
    engine: EngineOptions
    batching: Batching | None
    retry: bool


class _Loading:
    """The part of opening that runs in a worker thread, and that nobody may be left to receive."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._loaded: list[tuple[Device, Engine]] = []

    def run(self) -> list[tuple[Device, Engine]]:
        options = self._options
        given, source = options.device, options.source
        if is_several(given):
            devices = open_devices(given)
            sources = replicas(source, devices)
            for name, function in (("preprocess", options.preprocess), ("postprocess", options.postprocess)):
                if function is not None:
                    check_free(name, function, devices)
        else:
            assert not isinstance(given, tuple)
            devices = [open_device(usual_device(source) if given == "auto" else given)]  # type: ignore[arg-type]
            sources = [source]
        engine_options = options.engine
        if options.preprocess is None and is_file(source):  # else the examples are not the engine's inputs
            engine_options = replace(engine_options, examples=_example_shapes(options.warmup, options.batching))
        for device, one in zip(devices, sources, strict=True):
            try:
                engine = open_engine(one, device, engine_options)
            except OSError as error:
                raise unreadable(_name(source), error) from error
            with self._lock:
                self._loaded.append((device, engine))
                if self._is_abandoned:
                    engine.close()
        return self._loaded

    def abandon(self) -> None:
        """Nobody will take the engines: whoever of the two threads comes second closes each."""
        with self._lock:
            self._is_abandoned = True
            for _, engine in self._loaded:
                engine.close()


async def _outlast(future: asyncio.Future[None], executors: Sequence[Executor]) -> None:
    """Wait for a step of closing though that is cancelled: before the device is done nothing can be freed.

    Raises:
        CancelledError: it was, and a few seconds later the step is not done: the loop must end all the same, and what may
            still be in use is kept.
    """
    ends = inf
    while not future.done():
        left = ends - executors[0].loop.time()
        if left <= 0:
            raise asyncio.CancelledError
        try:
            await asyncio.wait([future], timeout=None if left == inf else left)
        except asyncio.CancelledError:
            for executor in executors:
                executor.drop()  # the loop ends: it must not wait for a lease that nobody will leave
            ends = min(ends, executors[0].loop.time() + LOOP_END)
    future.result()


def _free(executors: Sequence[Executor]) -> None:
    for executor in executors:
        executor.free()


def _holds(devices: Sequence[Device]) -> Callable[[torch.Tensor], bool]:
    """What says whether a tensor is in the memory of any of these."""
    if len(devices) == 1:
        return devices[0].holds
    return lambda tensor: any(device.holds(tensor) for device in devices)


def _names(devices: Sequence[Device]) -> str:
    """The devices, for messages about several."""
    return ", ".join(device.name for device in devices) if len(devices) > 1 else ""


def _statistics(executor: Executor) -> Statistics:
    """The numbers of one device."""
    counts: dict[str, Any] = {state.value: executor.machine.count(state) for state in State}
    calls: dict[str, Any] = executor.counters.as_dict()
    return Statistics(
        engine=executor.recipe.engine.name,
        device=executor.device.name,
        implementation=IMPLEMENTATION,
        **counts,
        waiting=executor.machine.waiting,
        **calls,
        expired=0,
        graphs=len(executor.cache),
        graph_bytes=executor.cache.nbytes,
        signatures=len({program.key[2] for program in executor.cache}),
        fallbacks=tuple(executor.fallbacks),
        polls=executor.hub.polls,
        wakes=executor.hub.wakes,
        batches={},
        padding=0,
    )


def _of_several(found: Sequence[Statistics], gatherer: Dispatcher) -> Statistics:
    """The numbers of a model on several devices, from those of each."""
    devices = []
    for one, member in zip(found, gatherer.members, strict=True):  # without batches that held nothing
        queued = one.waiting - (member.open is not None)
        submitted = one.submitted - member.empty - (member.open is not None)
        devices.append(replace(one, waiting=queued, submitted=submitted, cancelled=one.cancelled - member.empty))
    items = vars(gatherer.counters)
    totals: dict[str, Any] = {name: sum(getattr(one, name) for one in found) for name in _SUMS}
    for name in ("submitted", "completed", "failed", "cancelled", "rejected"):
        # Calls that went through the queue, and others: leases, and calls that found a slot free.
        others = totals[name] - sum(getattr(member, name, 0) for member in gatherer.members)
        totals[name] = items[name] + others
    return replace(
        found[0],
        device=", ".join(one.device for one in found),
        **totals,
        waiting=gatherer.waiting + sum(one.waiting for one in devices),
        expired=items["expired"],
        signatures=max(one.signatures for one in found),
        fallbacks=tuple(dict.fromkeys(reason for one in found for reason in one.fallbacks)),
        batches=dict(sorted(items["batches"].items())),
        padding=items["padding"],
        devices=tuple(devices),
    )


_SUMS: Final = (
    "free", "claimed", "preparing", "in_flight", "readable", "draining", "broken", "submitted", "completed", "failed",
    "cancelled", "rejected", "replays", "fallback_runs", "captures", "hits", "misses", "graphs", "graph_bytes", "evictions",
)  # fmt: skip


def _check_engine_options(source: object, options: Mapping[str, object]) -> None:
    choices = {"runtime": ("tensorrt", "tensorrt_rtx", "tensorrt_lean"), "precision": ("fp32", "fp16", "bf16")}
    for name, value in options.items():
        if value is None:
            continue
        if name in choices and value not in choices[name]:
            raise InputError(f"{name} must be {', '.join(map(repr, choices[name]))} or None, got {value!r}")
        if name == "profiles" and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise InputError(f"profiles must be dicts of input names to shapes, or None, got {value!r}")
        if name == "sha256" and not (isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{64}", value)):
            raise InputError(f"sha256 must be 64 hexadecimal digits or None, got {value!r}")
        if not is_file(source):
            raise InputError(f"{name} is for files, and the engine is of type {type(source).__name__}: leave it out")


def _kind(outputs: object) -> Kind | None:
    for kind in Kind:
        if kind.value == outputs:
            return kind
    if outputs is not None:
        raise InputError(f"outputs must be 'numpy', 'torch', 'device' or None, got {outputs!r}")
    return None


def _in_background(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.ensure_future(coroutine)
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # nobody can do anything about a loop that was closed
    return task


async def _in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a thread of its own; cancelled, it runs on alone, if it has begun."""
    return await _start_thread(function)


def _start_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """The same, whoever waits for it: a thread of its own, not one of somebody else's pool."""
    pool = Workers(1, "aiotrt-load")
    try:
        return asyncio.get_running_loop().run_in_executor(pool, function)
    finally:
        pool.shutdown(wait=False)  # what it was given still runs


def _start_freeing(function: Callable[[], None]) -> asyncio.Future[None]:
    try:
        return _start_thread(function)
    except ResourceError:  # here, then: the device is done with all of it, and the process needs its threads back
        function()
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(extent, (int, np.integer)) and not isinstance(extent, bool) for extent in value)
    )


def _as_shapes(specs: InputSpecs, values: Sequence[object], named: Mapping[str, object]) -> Shapes | None:
    """Shapes that were given as such, checked; None if these are not shapes."""
    if len(values) > 1 and _is_shape(values):
        values = (tuple(values),)
    if not all(_is_shape(value) for value in (*values, *named.values())):
        return None
    return specs.shapes(values, named)


def _example_shapes(warmup: object, batching: Batching | None) -> Examples:
    """What the engine is built for, where the caller gives examples and no profiles."""
    shapes = []
    if not _is_empty(warmup):
        for values, named in examples(warmup):
            if len(values) > 1 and _is_shape(values):
                values = (values,)  # the shape of a single input
            shapes.append((tuple(map(_shape_of, values)), {name: _shape_of(value) for name, value in named.items()}))
    return Examples(tuple(shapes), batching.max_size if batching is not None and batching.stack else None)


def _shape_of(value: object) -> tuple[int, ...]:
    """Return the shape of an example, or a shape as it is. Any other value has none here: `Model.warmup` refuses it."""
    return tuple(value) if _is_shape(value) else tuple(getattr(value, "shape", ()))  # type: ignore[arg-type]


def _is_empty(warmup: object) -> bool:
    return warmup is None or (isinstance(warmup, (tuple, list, dict)) and not warmup)


def _name(source: object) -> str:
    if is_file(source):
        return str(source)
    if isinstance(source, functools.partial):
        return repr(source)
    return str(getattr(source, "__name__", type(source).__name__))
