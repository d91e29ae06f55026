"""Several callers' items that one request runs: stacked on the way in, split on the way out.

To the executor a batch is a request like any other that has `Items`. Host items are copied straight into the rows of the
slot's staging memory, device items into the rows of the graph's own input buffer, on the slot's stream, which has waited for
each caller's stream. Each result is a copy of one row, in memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from aiotrt.batching.group import Group
from aiotrt.batching.item import Item
from aiotrt.batching.stacked import Stacked, write_rows
from aiotrt.devices import Copies, Device
from aiotrt.errors import EngineError
from aiotrt.runtime.executor import COPY_ON_LOOP_BYTES
from aiotrt.runtime.handshake import bound_inputs, wants_consumed
from aiotrt.runtime.memory import allocate
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot
from aiotrt.tensors import DEVICE, Argument, own
from aiotrt.tensors.conversion import Array

__all__ = ["Batch", "argument_of", "check_extents"]


class Batch:
    """The items of one request. It is empty until `assemble` fills it, which may be when its slot is granted.

    Args:
        assemble: chooses the items of this request; if there are none, it cancels the request.
        settle: called with this batch when it has ended, and with the items' results or an error.
        stack: whether items are stacked; if not, the batch has one item.

    Attributes:
        items: the items.
        left: how many items still wait for their results.
        size: what the batch is padded to.
        number: its number at `Pace`.
    """

    __slots__ = ("_assemble", "_is_whole", "_settle", "_stack", "group", "items", "left", "number", "size")

    group: Group

    def __init__(
        self,
        assemble: Callable[[Request, Batch], object],
        settle: Callable[[Batch, Sequence[object], BaseException | None], None],
        *,
        stack: bool,
    ) -> None:
        self._assemble = assemble
        self._settle = settle
        self._stack = stack
        self._is_whole = False  # whether the device results still have the batch axis
        self.items: Sequence[Item] = ()
        self.left = self.size = self.number = 0

    def fill(self, request: Request, slot: Slot) -> bool:
        """Copy the inputs into the slot's memory, and return whether `_replay` can launch them; see `Items.fill`."""
        if not self.items:
            self._assemble(request, self)
            if not self.items:
                return False
        items, group, size = self.items, self.group, self.size
        route = group.route_of(size)
        request.specs, request.shapes, request.kind = group.batched, route.shapes, group.kind
        request.origin = items[0].origin
        program = route.holders.get(slot.index)
        if (
            program is None
            or program.graph is None
            or slot.turn is not None
            or slot.gates
            or (group.on_device and (size > 1 or items[0].arguments))
            or group.nbytes * size > COPY_ON_LOOP_BYTES
            or not program.is_staged(group.on_host, outputs=group.kind is not DEVICE)
        ):
            self._take_long_way(request)
            return False
        values: Sequence[Any]
        if size == 1:
            values = items[0].values
            if group.on_device and self._stack:
                check_extents(program, 1)
                values = [value[None] for value in values]
                self._is_whole = True
        else:
            for i, view in enumerate(program.input_views):
                assert view is not None
                write_rows(view, [item.values[i] for item in items])
            values = program.staged_inputs
        request.values = values
        request.route = route
        return True

    def allocate(self, device: Device, program: Program) -> Copies:
        """Allocate each item's device results: see `Items.allocate`."""
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for item, outputs in zip(self.items, self._split(program, program.outputs), strict=True):
            assert item.origin is not None
            copies += zip(allocate(device, item.origin, outputs), outputs, strict=True)
        return copies

    def handed_out(self, results: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        """Divide the device results of a request: see `Items.handed_out`."""
        if self._is_whole:
            return [[result[0] for result in results]]
        count = len(results) // len(self.items)
        return [results[i : i + count] for i in range(0, len(results), count)]

    def copied(self, program: Program, views: Sequence[Array]) -> Sequence[Sequence[object]]:
        """Copy each item's part of the outputs: see `Items.copied`."""
        dtypes, kind = [output.dtype for output in program.outputs], self.group.kind
        return [
            () if item.is_done else [own(view, dtype, kind) for view, dtype in zip(part, dtypes, strict=True)]
            for item, part in zip(self.items, self._split(program, views), strict=True)
        ]

    def settle(self, results: Sequence[object], error: BaseException | None) -> None:
        """Give each item its result, or the error."""
        self._settle(self, results, error)

    def _take_long_way(self, request: Request) -> None:
        """Give the request what the long way needs: arguments, and the streams and events that they depend on."""
        items = self.items
        on_host = self.group.on_host
        arguments = [
            item.arguments or [argument_of(value, i in on_host) for i, value in enumerate(item.values)] for item in items
        ]
        if self._stack:
            request.arguments = [Stacked(column, self.size) for column in zip(*arguments, strict=True)]
        else:
            request.arguments = arguments[0]
            if self.group.on_device:
                request.bound = bound_inputs(arguments[0])
        if self.group.on_device:
            origins = {item.origin.handle: item.origin for item in items if item.origin is not None}
            request.origins = [origin for origin in origins.values() if origin is not request.origin]
            request.ready = [event for item in items for event in item.ready]
            request.marked = [one for item in items if wants_consumed(item.arguments) for one in item.arguments]

    def _split(self, program: Program, outputs: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return each item's part of these outputs, or of views of them.

        Raises:
            EngineError: the outputs have no row for each item.
        """
        if not self._stack:
            return [outputs]
        check_extents(program, self.size)
        return [[output[i, ...] for output in outputs] for i in range(len(self.items))]


def check_extents(program: Program, size: int) -> None:
    """Raise unless the outputs of a batch can be split.

    Raises:
        EngineError: an output cannot; the message names it.
    """
    for name, output in zip(program.names.names, program.outputs, strict=True):
        if output.ndim == 0 or output.shape[0] != size:
            raise EngineError(
                f"output {name!r} has shape {tuple(output.shape)} for a batch of {size}: with batching, the first extent of "
                "every output must be the batch's; mend it in postprocess=, or load without batching="
            )


def argument_of(value: Any, is_on_host: bool) -> Argument:
    """Return the argument for an input that a route has matched."""
    if is_on_host:
        return Argument(tuple(value.shape), value, host=value if type(value) is np.ndarray else value.numpy())
    return Argument(tuple(value.shape), (value, value), tensor=value)
