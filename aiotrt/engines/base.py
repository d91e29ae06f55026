"""The protocol of engines, which compute output tensors from input tensors, with an execution context per slot and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.tensors import Parameters, Shapes, TensorSpec

__all__ = ["Engine", "Execution"]


class Execution(Protocol):
    """One execution context of an engine, for one slot and one set of shapes; used by one thread at a time."""

    @property
    def nbytes(self) -> int:
        """The bytes of device memory that this context owns."""
        ...

    def __call__(self, inputs: Sequence[torch.Tensor]) -> object:
        """Submit the work to the current stream and return the outputs: a mapping by name, or any structure for a module.

        Called once to warm up and once under capture; without a graph, also once per request.
        """
        ...

    def close(self) -> None:
        """Release the context. Its work must have completed."""
        ...


class Engine(Protocol):
    """A loaded engine, shared by all slots of a model.

    Attributes:
        name: its name in messages: a file name or a class name.
        inputs: the declared inputs, or None if they are recognised from each call.
        parameters: the parameters that calls are matched against, if it declares no inputs.
        uncapturable: the reason why it cannot be captured in a graph, if known in advance; else None.
    """

    name: str
    inputs: tuple[TensorSpec, ...] | None
    parameters: Parameters
    uncapturable: str | None

    @property
    def outputs(self) -> tuple[TensorSpec, ...] | None:
        """The declared outputs, or None if they are known only after a run."""
        ...

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> Execution:
        """Create an execution context for inputs of these names and shapes, which submits to `stream`. Blocks.

        Raises:
            InputError: no profile of the engine allows these shapes.
            EngineError: the context cannot be created.
        """
        ...

    def close(self) -> None:
        """Release the engine. All its executions must be closed."""
        ...
