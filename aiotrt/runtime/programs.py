"""Programs: what one slot replays for one set of shapes, and how many programs may be kept.

A program consists of fixed input buffers, the work, and fixed output buffers. The work is one graph if everything can be
captured; else it is a sequence of steps, each a graph or plain calls, and the reasons are recorded. Copies between the
caller and the buffers are not captured, so that one capture serves both host and device callers; they are passed to a
launch, and a device may make them part of the graph.

The cache is pure bookkeeping: it decides what to evict, and the executor, which knows when the device is done, frees it.
Its key is the slot, the shapes, the addresses of inputs that a caller wants read in place, and the signature: dtypes, names,
and the structure that the inputs come in. Each model has its own engine; all other inputs are copied into contiguous buffers
at addresses that the slot owns, so strides and addresses are fixed.
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
        device: the device where the programs run.
        engine: the engine that they run.
        preprocess: makes the engine's inputs from the model's.
        postprocess: makes the model's outputs from the engine's.
        graphs: whether to capture graphs at all.
        ordered: whether launches of the programs will run one after the other.
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
        """Allocate, warm up and capture a program. Blocks: for worker threads.

        Args:
            slot: the slot that will own it.
            stream: that slot's stream.
            specs: the signature of the inputs.
            key: the program's key.
            bound: inputs that it is to read in place.
            fill: copies example inputs into its buffers, with `stream` current. They are used only if the engine raises for
                zeros: some networks raise for empty masks and zero lengths.

        Raises:
            EngineError: the engine cannot run at all, with or without a graph.
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
    """Input and output buffers, and the work between them.

    Attributes:
        slot: the slot that owns it.
        key: its key among the slot's programs.
        inputs: the device buffers that it reads.
        outputs: the device tensors that it writes; without a graph, a launch may replace them.
        names: the names of the outputs.
        fallbacks: why parts of it are not in a graph; empty if all of it is one graph.
        captured: whether all of it is one graph.
        blocking: whether a launch occupies the calling thread, and so belongs in a worker.
        estimate: what was learned about its duration.
        nbytes: bytes of device memory that it keeps, buffers included.
        spare: results for the next caller, and the handle of the stream in whose order they were allocated.
        graph: the graph, if all of it is one; else None.
        used: when it was used last, as a count of uses of the cache's programs.
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
        """Submit the copies `before`, the work, and the copies `after` to the stream, which runs them in this order.

        The work between the copies waits for `wait`, and `record` is recorded after it. Without `own`, work without a graph
        puts the tensors that it returned into `outputs` without a copy; the module may keep and change them.
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
        """Return whether there is pinned memory for these inputs, and for the outputs if `outputs`."""
        for i in inputs:
            if self.staged_inputs[i] is None:
                return False
        if outputs:
            for view in self.output_views:
                if view is None:
                    return False
        return True

    def stage(self, inputs: Collection[int], *, outputs: bool) -> None:
        """Allocate the pinned memory that `is_staged` checks for. Blocks: that takes milliseconds."""
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
        """Return the pinned memory of input `i`, which `stage` has allocated."""
        staged = self.staged_inputs[i]
        assert staged is not None
        return staged

    def output_view(self, i: int) -> Array:
        """Return a host view of output `i`, whose content is valid once the launch is complete."""
        if self._device.unified:
            output = self.outputs[i]
            if output is not self.staged_outputs[i]:  # a launch has replaced the tensor
                self.staged_outputs[i] = output
                self.output_views[i] = numpy_view(output)
        view = self.output_views[i]
        assert view is not None
        return view

    def close(self) -> None:
        """Free the program. All its launches and all readers of its buffers must be done. Blocks."""
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
        max_entries: the most programs, over all slots.
        max_bytes: the most bytes of device memory, over all slots.

    Attributes:
        uses: how many times programs of this cache were used.
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
        """Return the program, and make it the most recently used one; None if there is none."""
        program = self._programs.get((slot, key))
        if program is not None:
            self.uses = program.used = self.uses + 1
        return program

    def holders(self, key: Key) -> Mapping[int, Program]:
        """Return the programs for this key, by slot."""
        return self._holders.get(key, {})

    def add(self, program: Program) -> None:
        """Add a new program."""
        self._programs[program.slot, program.key] = program
        self.uses = program.used = self.uses + 1
        self._holders.setdefault(program.key, {})[program.slot] = program
        self.nbytes += program.nbytes

    def evict(self, busy: Collection[int], keep: Program | None) -> list[Program]:
        """Remove the programs that exceed the bounds, least recently used first, and return them.

        Args:
            busy: slots whose programs may be in flight, leased or being built: their programs stay, even if the cache then
                exceeds a bound for a while.
            keep: a program that stays too; None to remove all programs of other slots, regardless of the bounds.
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
        """Remove all programs, and return them."""
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
            # Work that still runs uses what is freed here, so wait for it first. On a broken device, which has reported its
            # fault already, the wait raises and nothing is freed, since the device may use the memory forever.
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
            """Return the engine if it is a module that now runs as its export, which may be capturable; else None."""
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
        # Zeros, because the warm-up reads them: what the memory held before could be an index out of range.
        inputs = [
            self._bound[i] if i in self._bound else device.empty(shape, spec.dtype).zero_()
            for i, (spec, shape) in enumerate(zip(self._specs, self._key[0], strict=True))
        ]
        if self._fill is not None:
            self._fill(inputs)
        return inputs

    def _execution(self, inputs: Tensors) -> tuple[Execution, Tensors]:
        """Return the engine's context, made for the shapes that `preprocess` returns, and the engine's inputs."""
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
            assert isinstance(execution, ModuleExecution)  # only an engine that declares no inputs takes a structure
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
        """Return the tensors in what the engine returned."""
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
            # A flat result is passed as one argument per tensor, any other as the engine returned it.
            result = function(*values) if self._engine.is_flat else function(self._engine.pack(values))
        names, tensors = flatten("postprocess", result, self._recipe.device.torch_device, known=self._post)
        if names is not self._post:
            self._post = self._agreed("postprocess", self._post, names)
        return tensors

    @staticmethod
    def _agreed(source: str, known: OutputNames | None, names: OutputNames) -> OutputNames:
        """Return the names and structure of what `source` returned; without a graph they may differ from call to call."""
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
        """Return the steps, the outputs that they write, and why they are not one graph; one graph if that is possible."""
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
                        module.restore()  # without a graph the export has no use, and is slower
            if recipe.preprocess is not None or recipe.postprocess is not None:
                # Most of the gain is in the engine's graph: it must not be lost because another function is not capturable.
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
                for step in more:  # a capture computes nothing: without a launch the next piece would warm up on garbage
                    step.launch(self._stream)
            except CaptureError as error:
                more, values = self._eager(function, values)
                fallbacks.append(f"{name} could not be captured: {error}")
            steps += more
        # If each piece could be captured but the whole could not, it is still not one graph, and needs a reason.
        return steps, values, fallbacks or ["captured piece by piece; not as a whole"]


class _Eager(BaseGraph):
    """Work without a graph, submitted again for each launch.

    Args:
        function: submits the work, and returns the results.
        outputs: the list that holds the results for their readers.

    Attributes:
        own: whether results are copied into memory that the program owns, which readers of a lease need. A call's results
            are copied for the caller anyway.
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
    """Name the user's function in the error if that function raised, and not the device."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (AiotrtError, torch.OutOfMemoryError)) or hasattr(error, "error_code"):
            raise
        raise EngineError(f"{source} raised {type(error).__name__}: {error}") from error


def settled(outputs: Tensors, inputs: Tensors) -> Tensors:
    """Return the outputs contiguous, without lazy flags, and in other memory than the inputs.

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
