"""Groups: what the items of one batch have in common, and what is prepared for their batches."""

from __future__ import annotations

from collections.abc import Sequence

from aiotrt.runtime.executor import Executor
from aiotrt.runtime.route import Route
from aiotrt.tensors import DEVICE, Argument, Kind, Shapes, Specs

__all__ = ["Group"]


class Group:
    """Items of one signature and equal shapes, with each input in the same place. Groups are compared by identity.

    Args:
        executor: runs the batches.
        arguments: the arguments of the first item.
        specs: what they were checked against.
        shapes: the shapes of the inputs.
        kind: what the results should be.
        stack: whether items get a batch axis.

    Attributes:
        batched: the signature of batches.
        device: the executor's device, where inputs may be.
        on_host: the indices of the inputs on the host.
        nbytes: how many bytes the inputs on the host have.
        on_device: whether inputs or results are on the device.
        route: recognises an item without making arguments; None until an item came that can have one.
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
        """Return the route of batches of this size. Unless the size is 1, inputs are in staging memory before its replay."""
        route = self._routes.get(size)
        if route is None or not route.holders:  # the cache no longer updates a mapping that became empty
            shapes = tuple([(size, *shape) for shape in self.shapes]) if self._stack else self.shapes
            holders = self._executor.cache.holders((shapes, (), self.batched))
            route = self._routes[size] = Route((), (), self.batched, shapes, self.kind, holders, self._executor.device)
            if size == 1:
                route.on_host = self.on_host
        return route
