"""Several callers' items as one request: stacked on the way in, split on the way out.

To the executor a batch is a request like any other: what it does otherwise stands here. Host items are copied straight into
the rows of the slot's staging memory, device items into the rows of the graph's own input buffer, on the slot's stream,
which has waited for each caller's. Each result is a copy of its own, of one row, in memory that it shares with nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch

from aiotrt.completion.waiter import Waiter
from aiotrt.devices import Device, Event, Stream
from aiotrt.errors import EngineError, InputError
from aiotrt.runtime.handshake import bound_inputs, mark_consumed, wants_consumed
from aiotrt.runtime.memory import allocate
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot, Times
from aiotrt.tensors import Argument, Kind, Signature, Specs

__all__ = ["Batch", "Call", "Single", "Stacked", "check_extents", "check_stackable"]

T = TypeVar("T")

_NONE: Final = Signature(())


class Call(Waiter):
    """One caller's item, from its submission to its result. Awaiting it gives the item's results.

    It is an `Entry` of the queue, which says what the attributes mean that are not below.

    Attributes:
        arguments: the checked inputs, kept alive until the device is done with them.
        specs: what they were checked against.
        kind: what the results should be.
        origin: the caller's current stream, when inputs or results are on the device.
        ready: events that the inputs carry.
        batch: the batch that it went with, until that or it has ended.
        expected: when, as it was let in, its result was thought to be there; None where nothing was.
        times: what happened when; None where nobody observes.
        span: what an observer keeps with it.
    """

    __slots__ = (
        "arguments",
        "arrival",
        "batch",
        "deadline",
        "due",
        "expected",
        "group",
        "is_bounded",
        "kind",
        "origin",
        "place",
        "priority",
        "ready",
        "span",
        "specs",
        "times",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        arguments: Sequence[Argument],
        specs: Specs,
        kind: Kind,
        *,
        group: Hashable,
        priority: int,
        arrival: float,
        deadline: float | None,
    ) -> None:
        # As `Waiter` does, which has arguments for what is polled: a batch is, and its items are not.
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value = self._error = self._message = self._callback = self._context = self._others = None
        self.group = group
        self.priority = priority
        self.arrival = self.due = arrival
        self.deadline = deadline
        self.is_bounded = True
        self.place: Literal["queue", "door"] | None = None
        self.arguments = arguments
        self.specs = specs
        self.kind = kind
        self.origin: Stream | None = None
        self.ready: list[Event] = []
        self.batch: Batch | None = None
        self.expected: float | None = None
        self.times: Times | None = None
        self.span: Any = None


class Stacked(Argument):
    """One input of a batch: the items' arguments on a new axis 0, the last one repeated up to the batch's size.

    Args:
        items: at least one, all on the host or all on the device, of equal shapes.
        size: of the batch.
    """

    __slots__ = ("items",)

    def __init__(self, items: Sequence[Argument], size: int) -> None:
        first = items[0]
        shape = (size, *first.shape)
        # Never read: it says where the input is, and how much there is to copy.
        host = None if first.host is None else np.broadcast_to(first.host, shape)
        super().__init__(shape, None, host, first.tensor)
        self.items = items

    def write(self, view: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Copy each item into its row."""
        last = len(self.items) - 1
        for i, item in enumerate(self.items):
            assert item.host is not None
            # An ellipsis, or the row of an item without extents would be a number and not a view.
            np.copyto(view[i, ...] if i < last else view[i:, ...], item.host)

    def copies(self, buffer: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Each item goes to its row."""
        tensors = [item.tensor for item in self.items if item.tensor is not None]
        tensors += tensors[-1:] * (self.shape[0] - len(tensors))
        return [(buffer[i], tensor) for i, tensor in enumerate(tensors)]


class Batch(Request):
    """A request that many callers wait for. It may stand in line empty: `assemble` fills it when its slot is granted.

    Nobody awaits it: it tells its members when it is resolved or rejected. Its result is whether they have results.

    Args:
        loop: the model's.
        assemble: fills this batch with whoever should go now; or cancels it, and then the slot goes on.
        settle: is told how a member ended: with its result, or an error; nothing for a member that had gone.

    Attributes:
        calls: its members.
        left: how many of them still want their result.
    """

    __slots__ = ("_assemble", "_settle", "_taken", "_untold", "calls", "left", "size")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        assemble: Callable[[Batch], None],
        settle: Callable[[Call, object, BaseException | None], None],
    ) -> None:
        super().__init__(loop, (), _NONE, (), Kind.NUMPY)
        self._settle = settle
        self.calls: list[Call] = []
        self._untold: list[Call] = []
        self.left = 0
        self.size = 0
        self._assemble = assemble
        self._taken: list[Call] = []

    def fill(self, calls: list[Call], size: int, specs: Specs) -> None:
        """These go; all of one group. If it raises, the batch is as empty as it was."""
        self.size = size
        self.arguments = self.joined(calls)
        self.calls = self._untold = calls
        self.left = len(calls)
        self.specs = specs
        self.kind = calls[0].kind
        self.shapes = tuple([argument.shape for argument in self.arguments])
        for call in calls:
            call.batch = self

    def joined(self, calls: Sequence[Call]) -> Sequence[Argument]:
        """The members' inputs as the batch's."""
        return [Stacked(items, self.size) for items in zip(*[call.arguments for call in calls], strict=True)]

    def split(self, program: Program, outputs: Sequence[T]) -> Sequence[Sequence[T]]:
        """Each member's part of these outputs.

        Raises:
            EngineError: they have no row for each.
        """
        check_extents(program, self.size)
        return [[_row(output, i) for output in outputs] for i in range(len(self.calls))]

    def granted(self) -> None:
        """Now is when it is decided who goes."""
        if not self.calls:
            self._assemble(self)

    def order(self, slot: Slot) -> None:
        """After every caller's stream, and every event that an item carries."""
        for origin in self._origins():
            slot.follow(origin)
        for call in self.calls:
            for event in call.ready:
                slot.stream.wait(event)

    def mark_consumed(self, stream: Stream) -> None:
        """One event for all items."""
        marked = [call.arguments for call in self.calls if call.origin is not None and wants_consumed(call.arguments)]
        if marked:
            event = stream.record()
            for arguments in marked:
                mark_consumed(arguments, event)

    def allocate_results(self, device: Device, program: Program) -> None:
        """Each member's, in the order of its own stream."""
        self._taken = self.calls
        results: list[torch.Tensor] = []
        for call, outputs in zip(self.calls, self.split(program, program.outputs), strict=True):
            assert call.origin is not None
            results += allocate(device, call.origin, outputs)
        self.results = results

    def allocate_spare(self, device: Device, program: Program) -> None:
        """None: who is in the next batch is not known."""

    def parts(self, program: Program, outputs: Sequence[T]) -> Sequence[T]:
        """A part for each member and output."""
        split = self.split(program, outputs)
        if self.kind is not Kind.DEVICE:
            self._taken = [call for call in self.calls if not call.is_done]  # the others' need no copying
        taken = set(map(id, self._taken))
        return [part for call, parts in zip(self.calls, split, strict=True) if id(call) in taken for part in parts]

    def pack(self, program: Program, results: Sequence[object]) -> Any:
        """Each member with its own."""
        count = len(program.names.names)
        return [
            (call, program.names.pack(results[i * count : (i + 1) * count])) for i, call in enumerate(self._taken)
        ]  # fmt: skip

    def resolve(self, value: Any) -> None:
        """Tell the members, with what `pack` returned."""
        super().resolve(True)
        calls, self._untold = self._untold, []
        for call, result in value:
            self._settle(call, result, None)
        for call in calls:  # those that had gone before their rows were copied are settled too; the others are already
            self._settle(call, None, None)

    def reject(self, error: BaseException) -> None:
        """Tell the members."""
        super().resolve(False)
        calls, self._untold = self._untold, []
        for call in calls:
            self._settle(call, None, error)

    def _origins(self) -> Iterable[Stream]:
        return {call.origin.handle: call.origin for call in self.calls if call.origin is not None}.values()


class Single(Batch):
    """A batch of one call, which has its batch axis already, or none: nothing is stacked, and nothing split."""

    __slots__ = ()

    def joined(self, calls: Sequence[Call]) -> Sequence[Argument]:
        """The call's inputs."""
        (call,) = calls
        if call.origin is not None:
            self.bound = bound_inputs(call.arguments)
        return call.arguments

    def split(self, program: Program, outputs: Sequence[T]) -> Sequence[Sequence[T]]:
        """All is the call's."""
        return [outputs]


def check_stackable(items: Sequence[Argument], specs: Specs) -> None:
    """An item's inputs can be rows of a batch's.

    Raises:
        InputError: one cannot; the message names it.
    """
    for item, spec in zip(items, specs, strict=True):
        try:
            Stacked([item], 1)
        except ValueError as error:
            raise InputError(
                f"input {spec.name!r} has {len(item.shape)} extents, which leaves none for the batch: pass items of fewer, "
                f"or load without batching= ({error})"
            ) from None


def check_extents(program: Program, size: int) -> None:
    """A batch's outputs can be split.

    Raises:
        EngineError: one cannot; the message names it.
    """
    for name, output in zip(program.names.names, program.outputs, strict=True):
        if output.ndim == 0 or output.shape[0] != size:
            raise EngineError(
                f"output {name!r} has shape {tuple(output.shape)} for a batch of {size}: with batching, the first extent of "
                "every output must be the batch's; mend it in postprocess=, or load without batching="
            )


def _row(output: T, i: int) -> T:
    """Row `i` of a tensor, or of a host view that comes with its dtype."""
    if isinstance(output, tuple):
        view, dtype = output
        row: Any = (view[i, ...], dtype)
    else:
        row = output[i]  # type: ignore[index]
    return row  # type: ignore[no-any-return]
