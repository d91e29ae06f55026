"""What an engine is: something that turns input tensors into output tensors on a device, one context per slot and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.tensors import Parameters, Shapes, TensorSpec

__all__ = ["Engine", "Execution"]


class Execution(Protocol):
    """One execution context of an engine: for one slot and one set of shapes, never used by two threads at once."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that it holds for itself."""
        ...

    def __call__(self, inputs: Sequence[torch.Tensor]) -> object:
        """Submit the work to the current stream and return the outputs: a module any structure, others a mapping by name.

        Called once to warm up, once under capture (or once per request where there is no graph).
        """
        ...

    def close(self) -> None:
        """Let the context go; its work has completed."""
        ...


class Engine(Protocol):
    """A loaded engine, shared by all slots of a model.

    Attributes:
        name: what messages call it, a file name or a class name.
        inputs: what it takes, or None when each call says.
        parameters: what it may be called with, where it declares no inputs.
        uncapturable: why it cannot be captured in a graph, when that is known beforehand.
    """

    name: str
    inputs: tuple[TensorSpec, ...] | None
    parameters: Parameters
    uncapturable: str | None

    @property
    def outputs(self) -> tuple[TensorSpec, ...] | None:
        """What it gives, or None where only a run says."""
        ...

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> Execution:
        """A new execution context for inputs of these names and shapes, whose work goes to `stream`. Blocks.

        Raises:
            InputError: no profile of the engine allows these shapes.
            EngineError: the context cannot be made.
        """
        ...

    def close(self) -> None:
        """Let the engine go; all its executions are closed."""
        ...
