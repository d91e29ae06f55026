"""What items have in common that can go into one batch, and what is prepared for their batches."""

from __future__ import annotations

from collections.abc import Sequence

from aiotrt.runtime.executor import Executor
from aiotrt.runtime.route import Route
from aiotrt.tensors import DEVICE, Argument, Kind, Shapes, Specs

__all__ = ["Group"]


class Group:
    """Items of one signature, with equal shapes, in the same places. Compared by identity.

    Args:
        executor: runs the batches.
        arguments: of the first item.
        specs: what they were checked against.
        shapes: of the inputs.
        kind: what the results should be.
        stack: whether items get a batch axis.

    Attributes:
        batched: the signature of batches.
        device: the device of which inputs may be.
        on_host: the indices of the inputs on the host.
        nbytes: how many bytes those have.
        on_device: whether inputs or results are on the device.
        route: recognises an item without making arguments; None until one was seen that can be.
    """

    def __init__(
        self, executor: Executor, arguments: Sequence[Argument], specs: Specs, shapes: Shapes, kind: Kind, *, stack: bool
    ) -> None:
        self.batched = specs.batched() if stack else specs
        self.device = executor.device
        self.shapes = shapes
        self.kind = kind
        self.on_host = tuple(i for i, argument in enumerate(arguments) if argument.host is not None)
        self.on_device = kind is DEVICE or len(self.on_host) < len(arguments)
        self.route: Route | None = None
        self._executor = executor
        self._stack = stack
        self.nbytes = sum(argument.host.nbytes for argument in arguments if argument.host is not None)
        self._routes: dict[int, Route] = {}

    def route_of(self, size: int) -> Route:
        """The route of batches of this size. Its inputs are in place when it is replayed, unless the size is 1."""
        route = self._routes.get(size)
        if route is None or not route.holders:  # a mapping that is empty is kept up to date no longer
            shapes = tuple([(size, *shape) for shape in self.shapes]) if self._stack else self.shapes
            holders = self._executor.cache.holders((shapes, (), self.batched))
            route = self._routes[size] = Route((), (), self.batched, shapes, self.kind, holders, self._executor.device)
            if size == 1:
                route.on_host = self.on_host
        return route
