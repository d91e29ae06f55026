"""`tests/test_defects.py` has teeth: with a defect put into aiotrt, the test named after it fails under some schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Event
from aiotrt.runtime.hold import Hold
from aiotrt.runtime.programs import Program, ProgramCache
from aiotrt.tensors import Kind
from aiotrt.testing import SimulatedDevice, SimulatedStream, Workers
from tests import test_defects as bodies
from tests.testing.test_mutants import consumers_do_not_gate_the_next_launch, ready_events_are_not_waited_for, without

Patch: TypeAlias = contextlib.AbstractContextManager[object]

patch = mock.patch.object


def streams_wait_for_nothing() -> Patch:
    def wait(stream: SimulatedStream, event: Event) -> None: ...

    return patch(SimulatedStream, "wait", wait)


def everything_is_complete() -> Patch:
    return patch(SimulatedDevice, "query", return_value=True)


def the_loop_keeps_its_capture_mode() -> Patch:
    def prepare(device: SimulatedDevice) -> None:
        if device.time.is_worker:
            device._local.is_prepared = True

    return patch(SimulatedDevice, "prepare_thread", prepare)


def results_are_views_of_the_slot() -> Patch:
    def own(view: Any, dtype: torch.dtype, kind: Kind) -> Any:
        return np.asarray(view) if kind is Kind.NUMPY else torch.as_tensor(view)

    return mock.patch("aiotrt.tensors.own", own)


@contextlib.contextmanager
def nobody_waits_for_readers() -> Iterator[None]:
    with consumers_do_not_gate_the_next_launch(), mock.patch("aiotrt.runtime.launch.await_gates"):
        yield


def graphs_have_no_key() -> Patch:
    def get(cache: ProgramCache, slot: int, key: object) -> Program | None:
        return next((program for (index, _), program in cache._programs.items() if index == slot), None)

    return patch(ProgramCache, "get", get)


def staging_may_be_written_at_any_time() -> Patch:
    return patch(Hold, "check_settled", lambda hold, what: None)


def copies_take_memory_as_it_lies() -> Patch:
    original = SimulatedStream.copy

    def copy(stream: SimulatedStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        original(stream, destination, source.as_strided(destination.shape, destination.stride()))

    return patch(SimulatedStream, "copy", copy)


def nothing_is_evicted() -> Patch:
    return patch(ProgramCache, "evict", return_value=[])


def work_is_done_on_the_loop() -> Patch:
    class Inline:
        def submit(self, job: Callable[..., object], *args: object) -> Future[None]:
            job(*args)
            return Future()

        def shutdown(self, *, wait: bool) -> None: ...

    original = SimulatedDevice.workers

    def workers(device: SimulatedDevice, count: int) -> Workers | Inline:
        return original(device, count) if count == 8 else Inline()  # eight are the loop's own, for asyncio.to_thread

    return patch(SimulatedDevice, "workers", workers)


def readers_are_not_heard() -> Patch:
    return patch(Hold, "consumed", lambda hold, stream: None)


MUTANTS: list[tuple[Callable[[], Patch], Callable[[str], None]]] = [
    (streams_wait_for_nothing, bodies.test_b1_an_input_in_the_making_is_waited_for),
    (ready_events_are_not_waited_for, bodies.test_b1_an_input_on_the_device_is_waited_for),
    (everything_is_complete, bodies.test_b2_the_produce_event_is_of_the_stream_that_runs_the_graph),
    (the_loop_keeps_its_capture_mode, bodies.test_b3_a_capture_elsewhere_is_not_broken_and_breaks_nothing),
    (streams_wait_for_nothing, bodies.test_b4_what_the_caller_reads_at_once_is_waited_for),
    (consumers_do_not_gate_the_next_launch, bodies.test_b5_every_consumer_gates_the_next_replay),
    (results_are_views_of_the_slot, bodies.test_b6_results_of_two_calls_are_never_one),
    (results_are_views_of_the_slot, bodies.test_b7_the_parts_of_a_batch_share_nothing),
    (everything_is_complete, bodies.test_b8_a_padded_result_is_waited_for),
    (results_are_views_of_the_slot, bodies.test_b9_callers_in_two_threads_get_their_own),
    (results_are_views_of_the_slot, bodies.test_b10_any_number_may_be_in_flight_and_of_any_shape),
    (everything_is_complete, bodies.test_b11_done_means_that_the_device_is_done),
    (nobody_waits_for_readers, bodies.test_b12_an_eviction_waits_for_who_still_reads),
    (graphs_have_no_key, bodies.test_b13_models_share_no_graph_and_shapes_have_their_own),
    (graphs_have_no_key, bodies.test_b13_a_graph_on_a_callers_memory_is_for_that_memory_only),
    (staging_may_be_written_at_any_time, bodies.test_b14_an_input_is_not_overwritten_while_it_is_read),
    (without("wait", "mark"), bodies.test_b14_an_input_on_the_device_may_be_dropped_at_once),
    (copies_take_memory_as_it_lies, bodies.test_b15_strides_are_honoured_and_other_dtypes_refused),
    (nothing_is_evicted, bodies.test_b16_memory_is_bounded_in_bytes_and_given_back),
    (work_is_done_on_the_loop, bodies.test_b17_the_loop_goes_on_whatever_happens),
    (readers_are_not_heard, bodies.test_b18_a_view_that_carries_nothing_is_as_safe),
]


#: A wrong result, a race, an error that is not raised, a hang, and what such a result leads to.
SYMPTOMS = (AssertionError, pytest.fail.Exception, aiotrt.AiotrtError, ValueError)


@pytest.mark.parametrize(("mutant", "test"), MUTANTS)
def test_it_fails(mutant: Callable[[], Patch], test: Callable[[str], None]) -> None:
    with mutant(), pytest.raises(SYMPTOMS, match="under the schedule with seed"):
        test("simulated")
