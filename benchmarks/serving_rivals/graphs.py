"""A torch model's CUDA graphs, replayed by hand: the best torch engine that a server without aiotrt can use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.serving_rivals.work import Array

__all__ = ["Graphs"]


class Graphs:
    """One graph for each batch size, on a stream of their own, for one thread at a time.

    A graph copies its inputs from pinned memory to the device, runs the model, and copies the outputs to pinned memory.

    Args:
        module: from pixels (n, ...) and numbers (n,) on the device to any outputs with n rows.
        shape: of one item's pixels.
        sizes: of the batches, ascending. A batch of another size uses the next larger graph.
        blocks: whether a thread that waits for its results sleeps. Otherwise it polls: it resumes earlier, and uses a core.
    """

    def __init__(self, module: torch.nn.Module, shape: Sequence[int], sizes: Sequence[int], *, blocks: bool) -> None:
        self._stream = torch.cuda.Stream()
        self._done = torch.cuda.Event(blocking=blocks)
        self._pinned = (
            torch.zeros((sizes[-1], *shape), dtype=torch.uint8, pin_memory=True),
            torch.zeros(sizes[-1], dtype=torch.int64, pin_memory=True),
        )
        self._pixels, self._numbers = (tensor.numpy() for tensor in self._pinned)
        self._inputs = [tensor.cuda() for tensor in self._pinned]
        torch.cuda.synchronize()  # weights and inputs were written on another stream
        pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        # Largest first, so that the others fit into its memory.
        captured = [(size, *self._capture(module, size, pool)) for size in reversed(sizes)]
        self._graphs = captured[::-1]

    @torch.inference_mode()
    def _capture(self, module: torch.nn.Module, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        inputs = [tensor[:size] for tensor in self._inputs]
        with torch.cuda.stream(self._stream):
            module(*inputs)  # loads kernels and allocates workspaces, which a capture may not
            outputs = module(*inputs)
        self._stream.synchronize()
        pinned = [torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in outputs]
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            for target, source in zip(inputs, self._pinned, strict=True):
                target.copy_(source[:size], non_blocking=True)
            for target, source in zip(pinned, module(*inputs), strict=True):
                target.copy_(source, non_blocking=True)
        return graph, pinned

    def __call__(self, pixels: Sequence[Array] | Array, numbers: Sequence[Array] | Array) -> tuple[Array, Array]:
        """Run the model on so many items; blocks without the interpreter lock. Returns arrays of the caller's own."""
        count = len(pixels)
        _, graph, pinned = next(one for one in self._graphs if one[0] >= count)
        for i, item in enumerate(pixels):
            self._pixels[i] = item
        self._numbers[:count] = numbers
        with torch.cuda.stream(self._stream):
            graph.replay()
        self._done.record(self._stream)
        self._done.synchronize()
        outputs, checksums = (tensor[:count].numpy().copy() for tensor in pinned)
        return outputs, checksums
