"""The ways without aiotrt to run a detector over frames, each as well as its kind can be: one call, one frame, results.

All of them go through page-locked memory both ways, and give arrays that the caller may keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from aiotrt.devices import Device
from aiotrt.video import Postprocess, Preprocess
from benchmarks.bare import Bare

__all__ = ["BLOCKING", "EAGER", "ENQUEUE", "SYNCHRONISED", "WHOLE", "ZERO_COPY", "Engine", "TensorRT", "Torch", "Way"]

EAGER: Final = "torch loop"
ENQUEUE: Final = "enqueue"
SYNCHRONISED: Final = "graph, synchronised"
ZERO_COPY: Final = "graph, zero copy"
WHOLE: Final = "whole graph"

Array = np.ndarray[Any, Any]


class Engine(Protocol):
    """A network with an input and outputs of its own on the device."""

    stream: Any
    input: torch.Tensor

    @property
    def outputs(self) -> Sequence[torch.Tensor]:
        """What the last run wrote."""
        ...

    def enqueue(self) -> None:
        """Submit one run to the stream."""
        ...

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of one run, which writes to `outputs` from then on."""
        ...


class TensorRT:
    """A TensorRT engine."""

    def __init__(self, path: Path) -> None:
        self._bare = Bare(path)
        self._bare.prepare((1, 3, 312, 312))
        self.stream = self._bare.stream
        self.input = self._bare.input

    @property
    def outputs(self) -> Sequence[torch.Tensor]:
        return list(self._bare.outputs.values())

    def enqueue(self) -> None:
        self._bare.enqueue()

    def capture(self) -> torch.cuda.CUDAGraph:
        return self._bare.capture()


class Torch:
    """A torch network; on the host without a stream and without graphs."""

    def __init__(self, network: torch.nn.Module, device: Device, dtype: torch.dtype) -> None:
        self.network = network
        self.stream: Any = None if device.unified else torch.cuda.Stream()
        self.input = torch.zeros(1, 3, 312, 312, dtype=dtype, device=device.torch_device)
        self.outputs: Sequence[torch.Tensor] = ()

    def enqueue(self) -> None:
        with torch.no_grad(), _on(self.stream):
            self.outputs = list(self.network(self.input))

    def capture(self) -> torch.cuda.CUDAGraph:
        for _ in range(2):
            self.enqueue()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = list(self.network(self.input))
        return graph


class Way:
    """Staging memory, and the copies to and from it."""

    def __init__(self, engine: Engine, before: Preprocess, after: Postprocess, frame: Array) -> None:
        self.engine = engine
        self.before = before
        self.after = after
        self.stream = engine.stream
        is_cuda = self.stream is not None
        self._staged = torch.empty(frame.shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._view = self._staged.numpy()
        self.frame = torch.empty_like(self._staged, device=engine.input.device)
        self._results: list[torch.Tensor] = []
        self.prepare()

    def prepare(self) -> None:
        """Make what is made once."""

    def upload(self, frame: Array) -> None:
        """To the device, on the current stream."""
        np.copyto(self._view, frame)
        self.frame.copy_(self._staged, non_blocking=True)

    def download(self, found: dict[str, torch.Tensor]) -> None:
        """To page-locked memory, on the current stream."""
        if not self._results:
            self._results = [torch.empty_like(t, device="cpu", pin_memory=self.stream is not None) for t in found.values()]
        for result, tensor in zip(self._results, found.values(), strict=True):
            result.copy_(tensor, non_blocking=True)

    def results(self) -> list[Array]:
        """Copies of what arrived there."""
        return [result.numpy().copy() for result in self._results]

    def synchronize(self) -> None:
        """Block until the stream is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def __call__(self, frame: Array) -> list[Array]:
        with torch.no_grad(), _on(self.stream):
            self.run(frame)
        return self.results()

    def run(self, frame: Array) -> None:
        """From the frame to `download`, complete."""
        raise NotImplementedError

    def gpu_seconds(self) -> float:
        """What one frame takes on the GPU from first to last kernel, copies to the host aside."""
        raise NotImplementedError


class Eager(Way):
    """Op by op; of TensorRT, by enqueue, and synchronised after the engine as well, as the origin without graphs does."""

    def run(self, frame: Array) -> None:
        self.upload(frame)
        self.engine.input.copy_(self.before(self.frame))
        self.engine.enqueue()
        if not isinstance(self.engine, Torch):
            self.synchronize()
        self.download(self.after(*self.engine.outputs))
        self.synchronize()


class Synchronised(Way):
    """As the origin's base: input copied in, outputs cloned, the stream synchronised; then postprocessing."""

    def prepare(self) -> None:
        self._graph = self.engine.capture()

    def run(self, frame: Array) -> None:
        self.upload(frame)
        self.engine.input.copy_(self.before(self.frame))
        self._graph.replay()
        clones = [output.clone() for output in self.engine.outputs]
        self.synchronize()
        self.download(self.after(*clones))
        self.synchronize()


class ZeroCopy(Way):
    """As the origin's change: no clones, no synchronisation; a second stream is ordered by events, both ways."""

    def prepare(self) -> None:
        self._graph = self.engine.capture()
        self.before = Preprocess(self.before.size, torch.float32)  # the cast writes the graph's input: no copy after it
        self._after = torch.cuda.Stream()
        self._produced = torch.cuda.Event()
        self._consumed = torch.cuda.Event()

    def run(self, frame: Array) -> None:
        self.upload(frame)
        prepared = self.before(self.frame)
        self.stream.wait_event(self._consumed)
        self.engine.input.copy_(prepared)
        self._graph.replay()
        self._produced.record(self.stream)
        with torch.cuda.stream(self._after):
            self._after.wait_event(self._produced)
            self.download(self.after(*self.engine.outputs))
            self._consumed.record(self._after)
        self._consumed.synchronize()  # of the results, which are read now; the engine's stream is not waited for


class Whole(Way):
    """Everything on the device in one graph; blocking, so that one frame's copies never overlap another's kernels."""

    def prepare(self) -> None:
        with torch.no_grad(), _on(self.stream):
            for _ in range(2):
                self._once()
            self.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self.stream, capture_error_mode="thread_local"):
                self._found = self._once()

    def _once(self) -> dict[str, torch.Tensor]:
        self.engine.input.copy_(self.before(self.frame))
        self.engine.enqueue()
        found: dict[str, torch.Tensor] = self.after(*self.engine.outputs)
        return found

    def run(self, frame: Array) -> None:
        self.upload(frame)
        self._graph.replay()
        self.download(self._found)
        self.synchronize()

    def gpu_seconds(self) -> float:
        series = []
        with _on(self.stream):
            for _ in range(3):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                for _ in range(5):
                    self._graph.replay()
                begin.record(self.stream)
                for _ in range(20):
                    self._graph.replay()
                end.record(self.stream)
                end.synchronize()
                series.append(float(begin.elapsed_time(end)) / 1e3 / 20)
        return min(series)


BLOCKING: Final[dict[str, type[Way]]] = {
    EAGER: Eager,
    ENQUEUE: Eager,
    SYNCHRONISED: Synchronised,
    ZERO_COPY: ZeroCopy,
    WHOLE: Whole,
}


def _on(stream: Any) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
