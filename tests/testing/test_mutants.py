"""The laws have teeth: with one line of the core taken out, a law fails under some schedule, by name of the hazard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pytest
import torch

from aiotrt.completion.lane import Lane
from aiotrt.devices import Device, Event, Stream
from aiotrt.runtime import launch as submission
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot
from aiotrt.testing import SimulatedStream
from tests import test_laws_simulated as laws


@contextlib.contextmanager
def consumers_do_not_gate_the_next_launch() -> Iterator[None]:
    with mock.patch("aiotrt.runtime.launch.open_gates", lambda slot: slot.gates.clear()):
        yield


@contextlib.contextmanager
def ready_events_are_not_waited_for() -> Iterator[None]:
    with mock.patch("aiotrt.runtime.executor.ready_events", return_value=[]):
        yield


def without(verb: str, name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Streams that ignore `verb` for the events that slots call by this name."""

    @contextlib.contextmanager
    def mutant() -> Iterator[None]:
        ignored: set[int] = set()
        original_verb = getattr(SimulatedStream, verb)
        original_init = Slot.__init__

        def init(slot: Slot, index: int, device: Device, lane: Lane, *, overlap: bool = True) -> None:
            original_init(slot, index, device, lane, overlap=overlap)
            ignored.add(id(getattr(slot, name)))

        def ignore(stream: SimulatedStream, event: Event) -> None:
            if id(event) not in ignored:
                original_verb(stream, event)

        with mock.patch.object(Slot, "__init__", init), mock.patch.object(SimulatedStream, verb, ignore):
            yield

    return mutant


@contextlib.contextmanager
def produce_event_is_recorded_before_the_copy_out() -> Iterator[None]:
    original = submission.submit_request

    def submit(device: Device, slot: Slot, request: Request, program: Program) -> None:
        slot.stream.record(slot.event)
        with mock.patch.object(SimulatedStream, "record", return_value=None):
            original(device, slot, request, program)

    with mock.patch("aiotrt.runtime.executor.submit_request", submit):
        yield


@contextlib.contextmanager
def results_belong_to_the_wrong_stream() -> Iterator[None]:
    streams: dict[int, Stream] = {}

    def allocate(device: Device, origin: Stream, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        wrong = streams.setdefault(id(device), device.stream())
        return device.call(wrong, lambda: [device.empty(output.shape, output.dtype) for output in outputs])

    with mock.patch("aiotrt.runtime.launch.allocate", allocate), mock.patch("aiotrt.runtime.executor.allocate", allocate):
        yield


Mutant = Callable[[], contextlib.AbstractContextManager[None]]
MUTANTS: list[tuple[Mutant, Callable[[int], None], str]] = [
    (consumers_do_not_gate_the_next_launch, laws.test_a_lease_is_not_overwritten, "write before read"),
    (ready_events_are_not_waited_for, laws.test_device_inputs_are_read_after_they_were_made, "read before write"),
    (without("wait", "mark"), laws.test_device_inputs_are_read_after_they_were_made, "read before write"),
    (without("wait", "mark"), laws.test_a_chain_of_leases_stays_on_the_device, "read before write"),
    (without("record", "event"), laws.test_concurrent_calls_get_their_own_results, "read before write"),
    (produce_event_is_recorded_before_the_copy_out, laws.test_concurrent_calls_get_their_own_results, "read before write"),
    (results_belong_to_the_wrong_stream, laws.test_results_on_the_device_can_be_consumed_there, "use after free"),
]


@pytest.mark.parametrize(("mutant", "law", "kind"), MUTANTS)
def test_a_law_fails(mutant: Mutant, law: Callable[[int], None], kind: str) -> None:
    with mutant(), pytest.raises(AssertionError) as caught:
        for group in laws.GROUPS:
            law(group)
    # Where the damage was done, the wrong result is what failed, and the hazard stands in a note.
    story = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert any(kind in line for line in story), story
