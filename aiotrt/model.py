"""`load` and `Model`, the public interface. The implementation is in `aiotrt.runtime`, `batching` and `completion`."""

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

LOOP_END: Final = 5.0  # seconds that closing a model waits for its device when the loop ends meanwhile


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

    Nothing happens before the model is awaited or entered. Then worker threads read and deserialise the engine, warm it up
    and capture it, and the loop goes on. The await returns when everything in `warmup` is captured on every slot.
    Cancellation stops the waiting at once; a step that cannot be interrupted ends in its thread, which frees its results.

    Args:
        source: a path to a TensorRT ``.engine`` or ``.plan`` file; a path to an ``.onnx`` file; a `torch.nn.Module` on the
            model's device; a `torch.export.ExportedProgram`; or a function over device tensors. On CUDA, TensorRT builds an
            ``.onnx`` file once into a cache; on the host, ONNX Runtime runs it. The files of its weights must be in its
            folder, as files or as symbolic links to other folders. A module is used in its present mode; `load` warns of
            dropout or batch norm in training mode. The next call uses weights that were updated in place. Weights that were
            replaced by other tensors have no effect, because graphs use the memory that they were captured with.
        device: ``"auto"``, ``"host"``, ``"cuda"`` or ``"cuda:1"``. "auto" is the current CUDA device if there is one. It is
            the host otherwise, and for an ``.onnx`` file where no TensorRT is installed. A list of devices, or ``"cuda:*"``
            for every GPU that the process sees, gives one model with one queue for all of them. Each call goes to the device
            where it is expected to finish first. A module is copied to each device but its own.
        slots: how many requests may be on each device at once; each slot has its own stream, buffers and graphs.
        overlap: whether launches of several slots may run at the same time. With False, each launch waits on the device for
            the previous one to end; copies still run at the same time. Set False when one launch saturates the device:
            throughput stays the same and latency is lower. A call without a graph does not wait for the previous launch;
            its completion is reported in the order of the launches, and later calls wait for it.
        max_queue: how many calls may wait for a slot before `QueueFullError`; 0 for none, None for no bound.
        batching: make batches of single items. Calls, `map`, `warmup` and `inputs` are then about items, **which have no
            batch axis**: they are stacked on a new axis 0, and results are split on axis 0. See `Batching`.
        graphs: whether to capture graphs.
        warmup: example inputs, to capture ahead of the first call: a list with one entry per shape or signature. Each entry
            is an input, or a tuple or dict of inputs.
        signatures: which inputs calls may have, where the engine does not declare them. "any": each signature (names,
            dtypes, ranks, structure and constants) has its own graphs in the cache, as each shape has. "fixed": only the
            signatures of `warmup`, or without `warmup` that of the first call; any other is an `InputError`. Shapes may
            always differ.
        preprocess: a function over device tensors from the model's inputs to the engine's. It returns a tensor, or a tuple
            or dict of tensors, and is captured into the graph.
        postprocess: a function over device tensors from the engine's outputs to the model's. It is captured into the graph
            too. Its arguments are the engine's result: a tensor, each tensor of a flat tuple, list or dict by position, or
            any other structure unchanged. Calls return its result.
        outputs: the kind of results: "numpy" arrays, host "torch" tensors, or "device" tensors; None for the kind of the
            inputs.
        graph_cache_entries: how many graphs are kept, over all slots and shapes; at least one per slot.
        graph_cache_bytes: how many bytes of device memory the graphs may keep; a graph in use is never evicted.
        hang_timeout: seconds that one request may take on the device before `DeviceHangError`; None for no limit. It also
            limits the engine's first run for new shapes together with its capture, in a warm-up or a call. Raise it for a
            module whose own compilation takes longer.
        retry: with several devices, whether a call whose inputs are on the host runs again on another device, once, when the
            device that ran it broke or hung. For models whose result does not depend on how often they run.
        progress: how completion is detected: "predict" sleeps until just before the expected completion; "spin" polls in
            every loop iteration, for the lowest latency, and occupies a whole core; "interval" polls at growing intervals.
        threads: how many threads one run of a host engine may use.
        runtime: the TensorRT to build and run a file with; None for an installed one that reads the file. The host ignores
            this option and the next two.
        precision: the precision to build an ``.onnx`` file with on CUDA; see `build`.
        profiles: the profiles to build an ``.onnx`` file with on CUDA; see `build`. None derives one from `warmup` where
            shapes are open, unless there is a `preprocess`: the engine then takes the examples' shapes and those between
            them.
        sha256: the file's checksum in hexadecimal, checked before anything else reads the file. Engines are code: pin those
            that come from other sources.
        allow_host_code: whether host code inside an engine may run.

    Raises:
        InputError: an option is out of range, or is for files only and the engine is not a file. Raised at once. The
            following are raised when the model is awaited or entered; no model exists then.
        EngineError: the engine is missing, damaged or unusable, or it raised while it was warmed up.
        MissingDependencyError: this engine or device needs a package that is missing.
        UsageError: there is no such device, or it is a simulated device and `aiotrt.testing.run` does not run this loop.
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
            device = tuple(device)  # type: ignore[arg-type]  # copied: the caller may change its list
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
    """The state of a model at one moment. Counts are since it was opened.

    With batching, calls are items, and launches are of batches.

    Attributes:
        engine: the engine's name.
        device: the device's name; for several devices, their names separated by commas.
        implementation: "native" if aiotrt runs compiled, else "python".
        free: slots that are free.
        claimed: slots whose caller writes inputs.
        preparing: slots for which a worker thread captures a graph or copies inputs.
        in_flight: slots on the device.
        readable: slots whose lease holder reads outputs.
        draining: slots that are still on the device, but whose caller no longer waits.
        broken: slots lost to a fault.
        waiting: callers that are queued for a slot.
        submitted: calls and leases accepted.
        completed: calls that returned results.
        failed: calls that raised.
        cancelled: calls whose caller stopped waiting.
        rejected: calls refused because the queue was full, and queued calls that newer ones replaced.
        expired: calls whose deadline passed.
        replays: launches of captured graphs.
        fallback_runs: launches that were not one graph.
        captures: programs built, with or without a graph.
        hits: requests (with batching, batches) whose graph was in the cache.
        misses: requests for which a graph had to be built first. Warm-ups count neither as hits nor as misses.
        graphs: graphs in the cache now.
        graph_bytes: bytes of device memory that these graphs keep.
        signatures: the number of different input signatures among these graphs.
        evictions: graphs removed from the cache to make room for others.
        fallbacks: why parts of the model run without a graph, each reason once.
        polls: event queries made by this loop's hub, for all its models.
        wakes: how often that hub's timer fired.
        batches: with batching, the number of batches by their number of items.
        padding: rows of these batches that only repeated an item.
        devices: if the model is on several devices, the numbers of each. With batching, a device's calls are batches. Its
            `submitted` to `rejected` count only the calls that were sent to that device; calls that wait for a device are
            in the model's queue.
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
        """Whether a fault broke every slot of the model or device that these numbers describe. No call can succeed then."""
        return self.broken > 0 and not (
            self.free or self.claimed or self.preparing or self.in_flight or self.readable or self.draining
        )


class Model(Generic[R]):
    """An engine with slots, on one device or several, for one event loop. Made by `load`.

    Await it, or enter it with ``async with``, before use. It belongs to the loop that opened it: load once per loop. Call
    all methods on that loop's thread.
    """

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._executor: Executor | None = None  # the first, if there are several
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
        """Run the model once.

        Args:
            *inputs: in the engine's order: numpy arrays, torch tensors on the host or on the model's device, or objects
                with ``__array__`` (such as a video frame), DLPack or ``__cuda_array_interface__``, with any strides. Where
                the engine declares its inputs, they must have the dtypes, ranks and dimensions of `inputs`. Modules and
                functions also take nested structures of tensors, and numbers, text and None as constants. A host input must
                not change before the call returns, because CUDA reads an input of 128 KiB or more in place if it was
                allocated as page-locked and is contiguous. Other host inputs are copied first.
            deadline: with batching, seconds from now after which the result is of no use. An item that is still queued then
                is dropped before it reaches the device.
            priority: with batching, the class of the call. 0 is the most urgent; the default is 1.
            **named: inputs by name. Without batching, ``deadline`` and ``priority`` are ordinary input names.

        Returns:
            The results, when they are complete. A module or function gives the structure that it returns; any other engine
            gives its single output itself, or several outputs as a named tuple. The results belong to the caller
            permanently. Unless `load` was called with ``outputs=``, they are of the inputs' kind: numpy, host tensor or
            device tensor; device tensors if any input is on the device. As numpy arrays, bfloat16 and float8 results are
            float32, and complex32 results complex64.

        Raises:
            InputError: an input does not fit. Nothing was submitted, except where only the engine itself could detect it:
                it raised for inputs of a new signature after it had accepted another signature.
            QueueFullError: all slots are busy and `max_queue` calls wait. Nothing was submitted.
            DeadlineError: the deadline passed; the model is usable.
            OverloadedError: the result would come after the deadline. Nothing was submitted.
            EngineError: the engine raised. This call failed, with the others of its batch; the model is usable.
            DeviceError: the device broke, and with it the model, unless the model has other devices.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from this loop or thread.

        Cancellation returns at once. A queued call leaves the queue. Work on the device goes on, and its slot, inputs and
        outputs are kept until it has ended; the caller cannot know whether the work was done.
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
        """Hold a slot: ``async with model.lease() as slot``. Inputs and outputs need no copies.

        Args:
            shapes: the inputs' shapes: a sequence of shapes, a mapping from input names to shapes, or for a single input its
                shape. None for the declared shapes if they are all fixed, else those of the first warm-up or call.
            outputs: where results should be after a launch: "device" (the default), or with "torch" or "numpy" also on the
                host.
            device: one of the model's devices. None chooses, when the lease is entered, the device where a launch is
                expected to end first; the lease then waits in that device's queue.

        Raises:
            InputError: the shapes are missing or do not fit.
            UsageError: the model has no such device.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from this loop or thread; or it
                makes batches, whose slots cannot be held.
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
        """Run the model for each of `frames`, several at a time, and yield the results in order.

        Use it as ``async for result in model.map(frames)``.

        Args:
            frames: any iterable, or asynchronous iterable, of inputs; a tuple is several inputs, a dict is named inputs.
            in_flight: how many calls may be running or have results that were not fetched yet. None for two per slot, or
                with batching for a full batch per slot and one more batch. They do not count against `max_queue`, because
                this argument bounds them.

        Raises what a call raises, and what `frames` raises, after the results of all earlier frames. Leaving the loop, or
        cancelling, abandons the running calls, as cancelling a call does.

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
        """Capture graphs ahead of the first call, on every slot, and with batching for every size of batch.

        Args:
            entries: as for `load`. Where the inputs are known, an entry may be shapes instead: for a single input one shape
                or a list of shapes (tuples of integers), else a dict from names to shapes.

        Waits until each slot was free once. Graphs that were captured before a cancellation are kept.

        Raises:
            InputError: an entry does not fit.
            EngineError: the engine raised.
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from this loop or thread.
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
        """Return the model's present numbers; see `Statistics`."""
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
        """Make a stream on the model's device, for consumers: ``wait`` for an event, ``run`` a function, ``close``.

        Args:
            device: if the model is on several devices, one of them; None for the first that is not broken.

        Raises:
            UsageError: the model has no such device.
        """
        executor = self._usable()
        if device is not None and isinstance(self._gatherer, Dispatcher):
            executor = self._gatherer.executor(str(device), ((), (), executor.specs.known()))
        return executor.device.stream()

    @property
    def inputs(self) -> tuple[TensorSpec, ...] | None:
        """The inputs of a call, or with batching of a single item.

        Where the engine does not declare inputs, these are those of the first example or call that the engine accepted;
        None until then. Calls may have other inputs, unless ``signatures="fixed"``.
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
        """The results of a call, or with batching of a batch; None for engines that do not declare them, such as modules."""
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
        """Call `observer` for each new call and lease, or with batching for each item and each batch.

        Args:
            observer: called on the loop's thread in the caller's context, with the request. The request has the methods of
                an `asyncio.Future`, which give its outcome, and `times`, the times of its steps. An exception of the
                observer goes to the loop's exception handler, and the request goes on. None removes the observer.

        A model has one observer. Warm-ups are not observed.

        Raises:
            ModelBrokenError, ModelClosedError, UsageError: the model is not usable, or not from this loop or thread.
        """
        self._usable()
        for executor in self._executors:
            executor.observer = observer

    @property
    def is_ready(self) -> bool:
        """Whether the model is open, warmed up, not broken and not closing, so that a call can succeed now."""
        return (
            self._opening is not None
            and self._opening.done()
            and any(executor.broken is None and not executor.closing for executor in self._executors)
        )

    @property
    def is_degraded(self) -> bool:
        """Whether some of the model's devices broke, while others still work."""
        return self.is_ready and any(executor.broken is not None for executor in self._executors)

    async def aclose(self, *, drain: bool = True) -> None:
        """Close the model. Idempotent. New calls raise `ModelClosedError` from now on.

        Args:
            drain: wait until queued and running calls have finished and leases were left. With False they raise
                `ModelClosedError` now. Work on the device still has to end first, because the memory that it uses cannot
                be freed before.

        Returns when the device is done with the model and everything is freed. Cancellation stops the waiting, not the
        closing: call `aclose` again to wait for its end. A broken model's memory is kept, because the device may still use
        it.
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
        if self._closing is None or self._closing.done():  # the first attempt, or the last one failed
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
        # A copy would share the executor: the first of the two to be garbage-collected would discard it under the other.
        raise TypeError(f"{self!r} cannot be copied or pickled: share it, or load the engine again")

    def __del__(self) -> None:
        executor = getattr(self, "_executor", None)
        if executor is not None and not self._is_closed and not executor.is_forked and not sys.is_finalizing():
            was_closing = executor.closing  # then the loop was closed before `aclose` had ended
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
                await asyncio.wait([opening])  # `wait`: cancelling one of several waiting tasks must not cancel it
        except asyncio.CancelledError:
            if self._awaiting == 1:
                opening.cancel()  # its handlers still free what was loaded
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
        """Make an executor for each device, and return the first. All of them share one check of inputs."""
        device, engine = loaded[0]
        declared, parameters = engine.inputs, engine.parameters
        if self._options.preprocess is not None:  # the model's inputs are then those of `preprocess`
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
        # One at a time: two warm-ups that each held some of the slots would wait for each other permanently.
        await self._warmup_lock.acquire()
        requests: list[tuple[Executor, Request]] = []
        working = [executor for executor in self._executors if executor.broken is None] or self._executors
        try:
            for executor in working:  # all devices at the same time
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
            if not working[0].loop.is_closed():  # else garbage collection closes this coroutine, and no task can be woken
                self._warmup_lock.release()
                # All requests are held until all were granted, so that each slot was warmed up once.
                for executor, request in requests:
                    request.cancel()
                    executor.abandon(request)
                    if request.done() and not request.cancelled():
                        request.exception()  # asyncio logs an exception that was never retrieved

    # Closing...

    def _refuse(self, drain: bool) -> None:
        if not self._is_closed:
            for executor in self._executors:
                executor.refuse()
            if self._gatherer is not None:
                self._gatherer.pump()  # closing: batches that `max_delay` held back go now
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
                # A device that broke meanwhile may have passed its calls to one that was idle already: check all again.
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
        """For type checkers: a model of a function that returns a tensor. A result is of the inputs' kind."""

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
    """The part of opening a model that runs in a worker thread. The caller may be cancelled before it ends."""

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
        """Close the engines, because the caller was cancelled. `run` closes those that it opens after this call."""
        with self._lock:
            self._is_abandoned = True
            for _, engine in self._loaded:
                engine.close()


async def _outlast(future: asyncio.Future[None], executors: Sequence[Executor]) -> None:
    """Wait for a step of closing, even while cancelled: nothing can be freed before the device is done.

    Raises:
        CancelledError: the wait was cancelled, and `LOOP_END` seconds later the step is not done. The loop must end
            nevertheless; memory that may still be in use is kept.
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
                executor.drop()  # the loop ends: it must not wait for a lease whose holder will never leave it
            ends = min(ends, executors[0].loop.time() + LOOP_END)
    future.result()


def _free(executors: Sequence[Executor]) -> None:
    for executor in executors:
        executor.free()


def _holds(devices: Sequence[Device]) -> Callable[[torch.Tensor], bool]:
    """Return a function that says whether a tensor is in the memory of any of these devices."""
    if len(devices) == 1:
        return devices[0].holds
    return lambda tensor: any(device.holds(tensor) for device in devices)


def _names(devices: Sequence[Device]) -> str:
    """Return the devices' names for error messages; empty if there is only one device."""
    return ", ".join(device.name for device in devices) if len(devices) > 1 else ""


def _statistics(executor: Executor) -> Statistics:
    """Return the numbers of one device."""
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
    """Return the numbers of a model on several devices, made from those of each device."""
    devices = []
    for one, member in zip(found, gatherer.members, strict=True):  # without the empty batches in their queues
        queued = one.waiting - (member.open is not None)
        submitted = one.submitted - member.empty - (member.open is not None)
        devices.append(replace(one, waiting=queued, submitted=submitted, cancelled=one.cancelled - member.empty))
    items = vars(gatherer.counters)
    totals: dict[str, Any] = {name: sum(getattr(one, name) for one in found) for name in _SUMS}
    for name in ("submitted", "completed", "failed", "cancelled", "rejected"):
        # `items` counts calls that went through the queue; `others` are leases, and calls that found a slot free.
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
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # a user cannot act on that log
    return task


async def _in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in its own thread. After a cancellation, a function that has begun runs to its end."""
    return await _start_thread(function)


def _start_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Start a blocking function in its own thread, not in one of a shared pool, and return a future of its result."""
    pool = Workers(1, "aiotrt-load")
    try:
        return asyncio.get_running_loop().run_in_executor(pool, function)
    finally:
        pool.shutdown(wait=False)  # the submitted function still runs


def _start_freeing(function: Callable[[], None]) -> asyncio.Future[None]:
    try:
        return _start_thread(function)
    except ResourceError:  # free on this thread: the device is done, and freeing ends threads
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
    """Check and return inputs that are given as shapes; None if they are not shapes."""
    if len(values) > 1 and _is_shape(values):
        values = (tuple(values),)
    if not all(_is_shape(value) for value in (*values, *named.values())):
        return None
    return specs.shapes(values, named)


def _example_shapes(warmup: object, batching: Batching | None) -> Examples:
    """Return the shapes of the examples in `warmup`, for which an engine is built without `profiles`."""
    shapes = []
    if not _is_empty(warmup):
        for values, named in examples(warmup):
            if len(values) > 1 and _is_shape(values):
                values = (values,)  # the shape of a single input
            shapes.append((tuple(map(_shape_of, values)), {name: _shape_of(value) for name, value in named.items()}))
    return Examples(tuple(shapes), batching.max_size if batching is not None and batching.stack else None)


def _shape_of(value: object) -> tuple[int, ...]:
    """Return the shape of an example, or a shape unchanged; () for any other value, which `Model.warmup` rejects."""
    return tuple(value) if _is_shape(value) else tuple(getattr(value, "shape", ()))  # type: ignore[arg-type]


def _is_empty(warmup: object) -> bool:
    return warmup is None or (isinstance(warmup, (tuple, list, dict)) and not warmup)


def _name(source: object) -> str:
    if is_file(source):
        return str(source)
    if isinstance(source, functools.partial):
        return repr(source)
    return str(getattr(source, "__name__", type(source).__name__))
