"""Programs: what one slot replays for one set of shapes, and how many of them may be kept.

A program is fixed input buffers, what runs, and fixed output buffers. What runs is one graph, where everything can be
captured; else a sequence of steps, each a graph or plain calls, with the reason why. Copies between the caller and the
buffers are not captured, so that one capture serves host and device callers alike; a launch is told of them, and a device
may make them part of the graph.

The cache is pure bookkeeping: it says what to evict, and the executor, who knows when the device is done, evicts.
Its key is the slot, the shapes, the addresses of inputs that a caller wants read where they are, and the signature: dtypes,
names, and the structure that the inputs come in. The engine is the model's own; all other inputs are copied into contiguous
buffers at addresses that the slot owns, so strides and addresses are fixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from aiotrt.completion.prediction import Estimate
from aiotrt.devices import CaptureError, Copies, Device, Event, Graph, Stream
from aiotrt.devices.base import BaseGraph, write_back
from aiotrt.engines import Engine, Execution
from aiotrt.engines.module import ModuleExecution
from aiotrt.errors import AiotrtError, EngineError
from aiotrt.tensors import Key, OutputNames, Signature, TensorSpec, flatten, numpy_view

__all__ = ["Program", "ProgramCache", "Recipe"]

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = list[torch.Tensor]
Step: TypeAlias = "Graph | _Eager"


@dataclass(frozen=True)
class Recipe:
    """How to build a model's programs: everything but the slot and the shapes.

    Attributes:
        device: where they run.
        engine: what they run.
        preprocess: from the model's inputs to the engine's.
        postprocess: from the engine's outputs to the model's.
        graphs: whether to capture at all.
        ordered: whether launches of the programs will go one after the other.
    """

    device: Device
    engine: Engine
    preprocess: Callable[..., object] | None
    postprocess: Callable[..., object] | None
    graphs: bool
    ordered: bool = False

    def build(
        self,
        slot: int,
        stream: Stream,
        specs: Signature,
        key: Key,
        bound: Mapping[int, torch.Tensor],
        fill: Callable[[Tensors], None] | None = None,
    ) -> Program:
        """Allocate, warm up and capture. Blocks: for worker threads.

        Args:
            slot: whose it will be.
            stream: that slot's.
            specs: of the inputs.
            key: of the program.
            bound: inputs that it shall read where they are.
            fill: copies example inputs into its buffers, with `stream` current. They are used only where zeros do not do:
                masks and lengths of nothing make some networks raise.

        Raises:
            EngineError: it cannot run at all, with or without a graph.
            InputError: the engine does not allow these shapes.
            DeviceError: the device broke.
        """
        try:
            return _Builder(self, slot, stream, specs, key, bound, None).build()
        except (AiotrtError, torch.OutOfMemoryError) as error:
            if not isinstance(error, EngineError) or fill is None:
                raise
        except Exception:
            if fill is None:
                raise
        return _Builder(self, slot, stream, specs, key, bound, fill).build()


class Program:
    """Buffers, and what runs between them.

    Attributes:
        slot: whose it is.
        key: what tells it from the slot's others.
        inputs: the device buffers that it reads.
        outputs: the device tensors that it writes; without a graph, a launch may replace them.
        names: of the outputs.
        fallbacks: why parts of it are not in a graph; empty when all of it is.
        captured: whether all of it is one graph.
        blocking: whether a launch occupies the calling thread, and so belongs in a worker.
        estimate: what was learned about its duration.
        nbytes: bytes of device memory that it keeps, buffers included.
        spare: results for the next caller, and the stream in whose order they were allocated.
        graph: what is launched, where that is one graph; else None.
        used: when it was used last, in uses of its cache's programs.
    """

    def __init__(
        self,
        device: Device,
        slot: int,
        key: Key,
        inputs: Tensors,
        outputs: Tensors,
        names: OutputNames,
        stream: Stream,
        steps: Sequence[Step],
        closers: Sequence[Callable[[], None]],
        fallbacks: Sequence[str],
        nbytes: int,
    ) -> None:
        self.slot = slot
        self.key = key
        self.inputs = inputs
        self.outputs = outputs
        self.names = names
        self.fallbacks = tuple(fallbacks)
        self.captured = not fallbacks
        self.blocking = bool(fallbacks) and device.submits_from_threads
        self.estimate = Estimate()
        self.nbytes = nbytes
        self.spare: tuple[int, Tensors] | None = None
        self.used = 0
        self.graph: Graph | None = steps[0] if self.captured else None  # type: ignore[assignment]
        self.makers = [device.maker(output) for output in outputs]
        self.staged_inputs: list[torch.Tensor | None] = [None] * len(inputs)  # pinned; the buffers themselves if unified
        self.staged_outputs: list[torch.Tensor | None] = [None] * len(outputs)
        self.input_views: list[Array | None] = [None] * len(inputs)  # numpy views of the above
        self.output_views: list[Array | None] = [None] * len(outputs)
        self._device = device
        self._stream = stream
        self._steps = tuple(steps)
        self._closers = tuple(closers)

    def launch(
        self,
        before: Copies = (),
        after: Copies = (),
        wait: Event | None = None,
        record: Event | None = None,
        *,
        own: bool = True,
    ) -> None:
        """Submit the copies `before`, itself once, and the copies `after`; its stream's order does the rest.

        What is between the copies waits for `wait`, and `record` is recorded when it has ended. Without `own`, what runs
        without a graph leaves what it returned in `outputs` as it is: tensors that the module may keep and change.
        """
        steps = self._steps
        if not self.captured and isinstance(steps[-1], _Eager):
            steps[-1].own = own
        if len(steps) == 1:
            steps[0].launch(self._stream, before, after, wait, record)
            return
        first, *others, last = steps
        first.launch(self._stream, before, wait=wait)
        for step in others:
            step.launch(self._stream)
        last.launch(self._stream, after=after, record=record)

    def is_staged(self, inputs: Collection[int], *, outputs: bool) -> bool:
        """Whether pinned memory is there for these inputs, and for the outputs."""
        for i in inputs:
            if self.staged_inputs[i] is None:
                return False
        if outputs:
            for view in self.output_views:
                if view is None:
                    return False
        return True

    def stage(self, inputs: Collection[int], *, outputs: bool) -> None:
        """Make sure it is. Blocks: allocating pinned memory takes milliseconds."""
        for i in inputs:
            if self.staged_inputs[i] is None:
                self.staged_inputs[i] = staged = self._staging(self.inputs[i])
                self.input_views[i] = numpy_view(staged)
        if outputs:
            for i, output in enumerate(self.outputs):
                staged_output = self.staged_outputs[i]
                if staged_output is None or staged_output.shape != output.shape or staged_output.dtype != output.dtype:
                    self.staged_outputs[i] = staged = self._staging(output)
                    self.output_views[i] = numpy_view(staged)

    def staged_input(self, i: int) -> torch.Tensor:
        """The pinned memory of input `i`, which `stage` has made."""
        staged = self.staged_inputs[i]
        assert staged is not None
        return staged

    def output_view(self, i: int) -> Array:
        """A host view of output `i`, once it is complete."""
        if self._device.unified:
            output = self.outputs[i]
            if output is not self.staged_outputs[i]:  # a launch has replaced the tensor
                self.staged_outputs[i] = output
                self.output_views[i] = numpy_view(output)
        view = self.output_views[i]
        assert view is not None
        return view

    def close(self) -> None:
        """Free it. Everything that it launched, and everybody who reads its buffers, is done. Blocks."""
        for closer in self._closers:
            closer()
        self.graph = None
        self._steps = ()
        self._closers = ()

    def _staging(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._device.unified else self._device.pinned(tensor.shape, tensor.dtype)


class ProgramCache:
    """Programs by slot and key, least recently used first, bounded in number and bytes.

    Args:
        max_entries: over all slots.
        max_bytes: over all slots.

    Attributes:
        uses: how often one of them was used.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.uses = 0
        self._programs: dict[tuple[int, Key], Program] = {}
        self._holders: dict[Key, dict[int, Program]] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def get(self, slot: int, key: Key) -> Program | None:
        """The program, now the most recently used one."""
        program = self._programs.get((slot, key))
        if program is not None:
            self.uses = program.used = self.uses + 1
        return program

    def holders(self, key: Key) -> Mapping[int, Program]:
        """The slots that have a program for this key."""
        return self._holders.get(key, {})

    def add(self, program: Program) -> None:
        """Keep a new program."""
        self._programs[program.slot, program.key] = program
        self.uses = program.used = self.uses + 1
        self._holders.setdefault(program.key, {})[program.slot] = program
        self.nbytes += program.nbytes

    def evict(self, busy: Collection[int], keep: Program | None) -> list[Program]:
        """Take out what is over the bounds, least recently used first, and return it.

        Args:
            busy: slots whose programs may be in flight, leased or in the making: theirs stay, even if that means staying
                over a bound for a while.
            keep: stays too; None to take out all that may be taken, whatever the bounds.
        """
        evicted: list[Program] = []
        for program in sorted(self._programs.values(), key=lambda program: program.used):
            if keep is not None and len(self._programs) <= self.max_entries and self.nbytes <= self.max_bytes:
                break
            if program is not keep and program.slot not in busy:
                self._remove(program)
                evicted.append(program)
        return evicted

    def clear(self) -> list[Program]:
        """Take out everything, and return it."""
        programs = list(self._programs.values())
        for program in programs:
            self._remove(program)
        return programs

    def _remove(self, program: Program) -> None:
        del self._programs[program.slot, program.key]
        holders = self._holders[program.key]
        del holders[program.slot]
        if not holders:
            del self._holders[program.key]
        self.nbytes -= program.nbytes


class _Builder:
    """One build: the state that its steps share."""

    def __init__(
        self,
        recipe: Recipe,
        slot: int,
        stream: Stream,
        specs: Signature,
        key: Key,
        bound: Mapping[int, torch.Tensor],
        fill: Callable[[Tensors], None] | None,
    ) -> None:
        self._fill = fill
        self._recipe = recipe
        self._slot = slot
        self._stream = stream
        self._specs = specs
        self._key = key
        self._bound = bound
        self._pre: OutputNames | None = None  # what `preprocess` returned last
        self._engine: OutputNames | None = None  # what the engine returned last
        self._post: OutputNames | None = None  # what `postprocess` returned last
        self._closers: list[Callable[[], None]] = []
        self._graph_bytes = 0

    def build(self) -> Program:
        try:
            program = self._build()
            # Zeros and a first run may still be on the stream, and a lease's holder writes from another one.
            self._stream.synchronize()
            return program
        except BaseException:
            # What runs still uses what is freed here. A broken device has told so already, and may use it for ever.
            with contextlib.suppress(Exception):
                self._stream.synchronize()
                for closer in self._closers:
                    closer()
            raise

    def _build(self) -> Program:
        device = self._recipe.device
        inputs = device.call(self._stream, self._allocate)
        execution, engine_inputs = self._execution(inputs)
        self._closers.append(execution.close)

        def engine(values: Tensors) -> Tensors:
            return self._returned(execution(values))

        def whole(values: Tensors) -> Tensors:
            return self._postprocessed(engine(self._preprocessed(values)))

        def exported(reason: str) -> ModuleExecution | None:
            """The engine, if it is a module which runs as its export from now on: that may be capturable."""
            if not isinstance(execution, ModuleExecution):
                return None
            return execution if device.call(self._stream, lambda: execution.export(engine_inputs, reason)) else None

        steps, outputs, fallbacks = self._steps(whole, engine, inputs, exported)
        names = self._post or self._engine
        assert names is not None
        buffers = sum(t.nbytes for t in inputs) + sum(t.nbytes for t in engine_inputs if engine_inputs is not inputs)
        return Program(
            device, self._slot, self._key, inputs, outputs, names, self._stream, steps, self._closers,
            fallbacks, nbytes=buffers + self._graph_bytes + execution.nbytes,
        )  # fmt: skip

    def _allocate(self) -> Tensors:
        device = self._recipe.device
        # Zeros: the warm-up runs on them, and whatever the memory held before could be an index out of range.
        inputs = [
            self._bound[i] if i in self._bound else device.empty(shape, spec.dtype).zero_()
            for i, (spec, shape) in enumerate(zip(self._specs, self._key[0], strict=True))
        ]
        if self._fill is not None:
            self._fill(inputs)
        return inputs

    def _execution(self, inputs: Tensors) -> tuple[Execution, Tensors]:
        """The engine's context, made for what `preprocess` really gives it."""
        recipe = self._recipe
        values = inputs
        specs: Sequence[TensorSpec] = self._specs
        names = [spec.name for spec in specs]
        structure = self._specs.structure
        if recipe.preprocess is not None:
            values = recipe.device.call(self._stream, lambda: self._preprocessed(inputs))
            assert self._pre is not None
            names, structure = list(self._pre.names), None
            if recipe.engine.inputs is not None:
                names = [spec.name for spec in recipe.engine.inputs]
                self._check_preprocessed(recipe.engine.inputs, values)
            elif not self._pre.is_mapping:
                known = recipe.engine.parameters.positional
                names = [known[i] if i < len(known) else f"input_{i}" for i in range(len(values))]
            if recipe.engine.inputs is None and not self._pre.is_flat:
                structure = self._pre.structure
        shapes = tuple(tuple(value.shape) for value in values)
        execution = recipe.engine.execution(recipe.device, self._stream, names, shapes)
        if structure is not None:
            assert isinstance(execution, ModuleExecution)  # only what declares no inputs takes a structure
            execution.arrange(structure, is_call=recipe.preprocess is None)
        return execution, values

    def _check_preprocessed(self, specs: Sequence[TensorSpec], values: Tensors) -> None:
        if len(values) != len(specs):
            wanted = ", ".join(map(str, specs))
            raise EngineError(f"preprocess returned {len(values)} tensors; the engine takes {len(specs)} ({wanted})")
        for spec, value in zip(specs, values, strict=True):
            if value.dtype is not spec.dtype or not spec.fits(value.shape):
                dtype = str(value.dtype).removeprefix("torch.")
                raise EngineError(f"preprocess returned {dtype} {tuple(value.shape)}; the engine takes {spec}")

    # What runs...

    def _preprocessed(self, values: Tensors) -> Tensors:
        function = self._recipe.preprocess
        if function is None:
            return values
        structure = self._specs.structure
        args, named = (values, {}) if structure is None else structure.build(values)
        with _blame("preprocess"):
            result = function(*args, **named)
        engine = self._recipe.engine
        if isinstance(result, Mapping) and engine.inputs is not None:
            missing = [spec.name for spec in engine.inputs if spec.name not in result]
            if missing:
                raise EngineError(
                    f"preprocess returned no {missing[0]!r}; the engine takes {[s.name for s in engine.inputs]}"
                )
            result = {spec.name: result[spec.name] for spec in engine.inputs}
        known = self._pre
        self._pre, tensors = flatten("preprocess", result, self._recipe.device.torch_device, known=known)
        if known is not None and known.structure != self._pre.structure:
            raise EngineError("preprocess returned another structure than when it was warmed up")
        return tensors

    def _returned(self, result: object) -> Tensors:
        """The tensors of what the engine returned."""
        engine = self._recipe.engine
        names, tensors = flatten(
            engine.name, result, self._recipe.device.torch_device, declared=engine.outputs is not None, known=self._engine
        )
        if names is not self._engine:
            self._engine = self._agreed(engine.name, self._engine, names)
        return tensors

    def _postprocessed(self, values: Tensors) -> Tensors:
        function = self._recipe.postprocess
        if function is None:
            return values
        assert self._engine is not None
        with _blame("postprocess"):
            # What is flat comes as so many tensors, and anything else as the engine returned it.
            result = function(*values) if self._engine.is_flat else function(self._engine.pack(values))
        names, tensors = flatten("postprocess", result, self._recipe.device.torch_device, known=self._post)
        if names is not self._post:
            self._post = self._agreed("postprocess", self._post, names)
        return tensors

    @staticmethod
    def _agreed(source: str, known: OutputNames | None, names: OutputNames) -> OutputNames:
        """The names and structure of what `source` returned, which may differ from call to call where it is not captured."""
        if known is None:
            return names
        if len(names.names) != len(known.names):
            plural = "s" * (len(names.names) != 1)
            raise EngineError(
                f"{source} returned {len(names.names)} output{plural} ({', '.join(names.names)}), "
                f"and {len(known.names)} ({', '.join(known.names)}) when it was warmed up"
            )
        known.become(names)
        return known

    # How it runs...

    def _steps(
        self,
        whole: Callable[[Tensors], Tensors],
        engine: Callable[[Tensors], Tensors],
        inputs: Tensors,
        exported: Callable[[str], ModuleExecution | None],
    ) -> tuple[list[Step], Tensors, list[str]]:
        """As one graph if that can be; what runs, what it writes, and why it is not one graph."""
        recipe = self._recipe
        reason = recipe.engine.uncapturable if recipe.graphs else "graphs=False"
        if reason is None:
            try:
                return *self._captured(whole, inputs), []
            except CaptureError as error:
                reason = f"{recipe.engine.name} could not be captured: {error}"
                if (module := exported(str(error))) is not None:
                    try:
                        return *self._captured(whole, inputs), []
                    except CaptureError as second:
                        reason = f"{recipe.engine.name} could not be captured, nor could its export: {second}"
                        module.restore()  # without a graph, the export is only slower
            if recipe.preprocess is not None or recipe.postprocess is not None:
                # Most of the gain is in the engine's graph; it must not be lost to a function beside it.
                return self._piecewise(engine, inputs)
        return *self._eager(whole, inputs), [reason]

    def _captured(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> tuple[list[Step], Tensors]:
        recipe = self._recipe
        graph, outputs = recipe.device.capture(
            self._stream, lambda: settled(function(inputs), inputs), inputs, ordered=recipe.ordered
        )
        self._closers.insert(0, graph.close)  # before the execution, whose memory and kernels it refers to
        self._graph_bytes += graph.nbytes
        return [graph], outputs

    def _eager(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> tuple[list[Step], Tensors]:
        outputs = self._recipe.device.call(self._stream, lambda: [t.clone() for t in settled(function(inputs), inputs)])
        self._graph_bytes += sum(t.nbytes for t in outputs)
        return [_Eager(lambda: settled(function(inputs), inputs), outputs)], outputs

    def _piecewise(self, engine: Callable[[Tensors], Tensors], inputs: Tensors) -> tuple[list[Step], Tensors, list[str]]:
        recipe = self._recipe
        pieces: list[tuple[str, Callable[[Tensors], Tensors]]] = [("engine " + recipe.engine.name, engine)]
        if recipe.preprocess is not None:
            pieces.insert(0, ("preprocess", self._preprocessed))
        if recipe.postprocess is not None:
            pieces.append(("postprocess", self._postprocessed))
        steps: list[Step] = []
        fallbacks = []
        values = inputs
        for name, function in pieces:
            try:
                more, values = self._captured(function, values)
                for step in more:  # a capture computes nothing: the next piece would be warmed up on garbage
                    step.launch(self._stream)
            except CaptureError as error:
                more, values = self._eager(function, values)
                fallbacks.append(f"{name} could not be captured: {error}")
            steps += more
        # Nothing failed by itself, yet the whole could not be captured: still not one graph, and the reader is told so.
        return steps, values, fallbacks or ["captured piece by piece; not as a whole"]


class _Eager(BaseGraph):
    """Work that is submitted again for each launch.

    Args:
        function: submits it, and returns the results.
        outputs: where readers look for them.

    Attributes:
        own: whether results are copied into memory of the program's own, which readers of a lease need. Copies of a call's
            results are the caller's own anyway.
    """

    def __init__(self, function: Callable[[], Tensors], outputs: Tensors) -> None:
        self._function = function
        self._outputs = outputs
        self._are_own = True
        self.own = True

    def replay(self, stream: Stream) -> None:
        stream.run(partial(self._run, self.own))

    def _run(self, own: bool) -> None:
        new = self._function()
        if own and self._are_own:
            write_back(self._outputs, new)
        else:
            self._outputs[:] = [tensor.clone() for tensor in new] if own else new
        self._are_own = own


@contextlib.contextmanager
def _blame(source: str) -> Iterator[None]:
    """Say who raised, if that is the user's function and not the device."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (AiotrtError, torch.OutOfMemoryError)) or hasattr(error, "error_code"):
            raise
        raise EngineError(f"{source} raised {type(error).__name__}: {error}") from error


def settled(outputs: Tensors, inputs: Tensors) -> Tensors:
    """Return the outputs in plain row-major order, without lazy flags, in memory of their own.

    A result that is a view of an input would change with it. A lazy conjugate would be wrong on the host: torch
    conjugates it there, before the copy has ended.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    outputs = [tensor.resolve_conj().resolve_neg() for tensor in outputs]
    return [
        tensor.clone(memory_format=torch.contiguous_format)
        if tensor.untyped_storage().data_ptr() in taken
        else tensor.contiguous()
        for tensor in outputs
    ]
