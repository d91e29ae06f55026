"""Roboflow's handshake: what tensors carry as attributes, understood and spoken, so that its code and this work together.

An attribute is lost with any slice or view of a tensor, and its meaning with the next replay. So nothing in aiotrt depends
on these: they are read from what comes in and put on what goes out, and everything between is in objects.

| attribute | on | means |
|---|---|---|
| ``_trt_ready_event`` | an input | it may be read after this |
| ``_trt_reuse_as_input_buffer`` | an input | capture the graph on this memory itself, instead of copying from it |
| ``_trt_consumed_event`` | an input | set here: it has been read after this |
| ``_trt_produce_event`` | an output | set here: it may be read after this |
| ``_trt_graph_state`` | a leased output | set here: whoever reads it puts a ``consumer_done_event`` into that |
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from aiotrt.devices import Event
from aiotrt.tensors import Argument

__all__ = ["GraphState", "bound_inputs", "carries_anything", "carry", "mark_consumed", "ready_events", "wants_consumed"]


class GraphState:
    """Where readers of a leased output say when they are done, the way Roboflow's do.

    Theirs keeps the last event only, so the second of two readers hides the first; here each assignment counts.

    Attributes:
        assigned: since the last `take`.
    """

    def __init__(self) -> None:
        self.assigned: list[Event] = []

    @property
    def consumer_done_event(self) -> Event | None:
        """The event assigned last. Assign one that was recorded after the reading was submitted."""
        return self.assigned[-1] if self.assigned else None

    @consumer_done_event.setter
    def consumer_done_event(self, event: Event | None) -> None:
        if event is not None:
            self.assigned.append(event)

    def take(self) -> list[Event]:
        """All of them, which the next launch must wait for."""
        events, self.assigned = self.assigned, []
        return events


def carries_anything(arguments: Sequence[Argument]) -> bool:
    """Whether an input has any attributes at all; if not, the other functions here find nothing."""
    return bool(_owners(arguments))


def ready_events(arguments: Sequence[Argument]) -> list[Event]:
    """What device inputs wait for."""
    return [event for owner in _owners(arguments) if (event := getattr(owner, "_trt_ready_event", None)) is not None]


def bound_inputs(arguments: Sequence[Argument]) -> dict[int, torch.Tensor]:
    """Device inputs whose own memory the graph shall read; one that is not in plain order is copied all the same."""
    return {
        i: argument.tensor
        for i, argument in enumerate(arguments)
        if argument.tensor is not None
        and isinstance(argument.owner, tuple)
        and getattr(argument.owner[0], "_trt_reuse_as_input_buffer", False)
        and argument.tensor.is_contiguous()
    }


def wants_consumed(arguments: Sequence[Argument]) -> bool:
    """Whether somebody who speaks the handshake passed an input."""
    return any(
        hasattr(owner, "_trt_ready_event") or hasattr(owner, "_trt_reuse_as_input_buffer") for owner in _owners(arguments)
    )


def mark_consumed(arguments: Sequence[Argument], event: Event) -> None:
    """Say on the inputs when they have been read."""
    for owner in _owners(arguments):
        with contextlib.suppress(AttributeError):  # an object that takes no attributes did not ask either
            owner._trt_consumed_event = event  # type: ignore[attr-defined]


def carry(tensor: torch.Tensor, event: Event) -> None:
    """Say on a result when it may be read."""
    tensor._trt_produce_event = event  # type: ignore[attr-defined]


def _owners(arguments: Sequence[Argument]) -> list[object]:
    """The device inputs as the caller gave them, of those that carry anything at all."""
    # Asking each for an attribute that it has not costs as much as a launch; asking for its dictionary does not.
    return [
        argument.owner[0]
        for argument in arguments
        if isinstance(argument.owner, tuple) and getattr(argument.owner[0], "__dict__", True)
    ]
