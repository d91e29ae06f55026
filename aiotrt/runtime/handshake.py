"""Roboflow's handshake: attributes of tensors that are read and set here, so that its code and aiotrt work together.

A slice or view of a tensor loses its attributes, and the next replay makes them meaningless. So nothing inside aiotrt
depends on these attributes: they are read from inputs and set on inputs and results, and state in between is in objects.

| attribute | on | means |
|---|---|---|
| ``_trt_ready_event`` | an input | it may be read after this event |
| ``_trt_reuse_as_input_buffer`` | an input | capture the graph on this memory itself, instead of copying from it |
| ``_trt_consumed_event`` | an input | set here: it has been read after this event |
| ``_trt_produce_event`` | an output | set here: it may be read after this event |
| ``_trt_graph_state`` | a leased output | set here: a consumer sets ``consumer_done_event`` on this object |
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from aiotrt.devices import Event
from aiotrt.tensors import Argument

__all__ = ["GraphState", "bound_inputs", "carries_anything", "carry", "mark_consumed", "ready_events", "wants_consumed"]


class GraphState:
    """Takes the consumer events of a leased output, in the way that Roboflow's code assigns them.

    Roboflow's class keeps the last event only, so a second consumer hides the first; here each assignment counts.

    Attributes:
        assigned: the events assigned since the last `take`.
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
        """Return and remove all assigned events; the next launch must wait for them."""
        events, self.assigned = self.assigned, []
        return events


def carries_anything(arguments: Sequence[Argument]) -> bool:
    """Return whether any input has attributes; if none has, the other functions here find nothing."""
    return bool(_owners(arguments))


def ready_events(arguments: Sequence[Argument]) -> list[Event]:
    """Return the events after which the device inputs may be read."""
    return [event for owner in _owners(arguments) if (event := getattr(owner, "_trt_ready_event", None)) is not None]


def bound_inputs(arguments: Sequence[Argument]) -> dict[int, torch.Tensor]:
    """Return the device inputs whose memory the graph is to read in place; inputs that are not contiguous are copied."""
    return {
        i: argument.tensor
        for i, argument in enumerate(arguments)
        if argument.tensor is not None
        and isinstance(argument.owner, tuple)
        and getattr(argument.owner[0], "_trt_reuse_as_input_buffer", False)
        and argument.tensor.is_contiguous()
    }


def wants_consumed(arguments: Sequence[Argument]) -> bool:
    """Return whether any input has an attribute of the handshake, so that its caller expects ``_trt_consumed_event``."""
    return any(
        hasattr(owner, "_trt_ready_event") or hasattr(owner, "_trt_reuse_as_input_buffer") for owner in _owners(arguments)
    )


def mark_consumed(arguments: Sequence[Argument], event: Event) -> None:
    """Set on the inputs the event after which they have been read."""
    for owner in _owners(arguments):
        with contextlib.suppress(AttributeError):  # an object without settable attributes does not use the handshake
            owner._trt_consumed_event = event  # type: ignore[attr-defined]


def carry(tensor: torch.Tensor, event: Event) -> None:
    """Set on a result the event after which it may be read."""
    tensor._trt_produce_event = event  # type: ignore[attr-defined]


def _owners(arguments: Sequence[Argument]) -> list[object]:
    """Return the device inputs that have attributes, as the caller gave them."""
    # Reading an attribute that a tensor lacks costs as much as a launch; reading its `__dict__` does not.
    return [
        argument.owner[0]
        for argument in arguments
        if isinstance(argument.owner, tuple) and getattr(argument.owner[0], "__dict__", True)
    ]
