"""What every device promises (`devices.base`), checked on each: so the model of the GPU is itself held against the GPU.

Each body must hold on the host, on the simulated device, and on CUDA.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from aiotrt.devices import CaptureError, Device, Event, Graph, Stream, open_device
from aiotrt.errors import DeviceError
from aiotrt.testing import SimulatedDevice
from aiotrt.testing.streams import Record
from tests.tools import Latch

F = torch.float32


class Gate:
    """Holds streams until it is opened, on any device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._record = Record({})
        self._latch = None if isinstance(device, SimulatedDevice) else Latch(device.name)

    def hold(self, stream: Stream) -> None:
        if self._latch is None:
            assert isinstance(self._device, SimulatedDevice)
            self._device.adopt_stream(stream).follow(self._record)
        else:
            self._latch.hold(stream)

    def open(self) -> None:
        if self._latch is None:
            assert isinstance(self._device, SimulatedDevice)
            self._record.is_done = True
            self._device.pump()
        else:
            self._latch.open()


@pytest.fixture(params=["host", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param != "simulated":
        real = open_device(request.param)
        load_kernels(real)
        yield real
        return
    simulated = SimulatedDevice(7)
    yield simulated
    simulated.check()


@pytest.fixture
def gate(device: Device) -> Iterator[Gate]:
    gate = Gate(device)
    yield gate
    gate.open()


def filled(device: Device, stream: Stream, value: float) -> torch.Tensor:
    """Memory of the stream's, which will hold this value."""
    return device.call(stream, lambda: device.empty((4,), F).fill_(value))


def soon(device: Device, event: Event, *, polls: int = 2000) -> bool:
    """Whether the event completes within so many polls, each of which lets other threads run and some time pass."""
    for _ in range(polls):
        if device.query(event):
            return True
        if isinstance(device, SimulatedDevice):
            device.advance(1e-5)
        else:
            os.sched_yield()
    return False


def load_kernels(device: Device) -> None:
    """CUDA loads a kernel when it is first launched, and waits for the device to do so: under a closed gate, for ever."""
    stream = device.stream()
    x = filled(device, stream, 1.0)
    for function in (lambda: x.add_(x), lambda: x.mul_(2.0), lambda: x + 1.0, lambda: x * 2.0, lambda: x.copy_(x + x)):
        device.call(stream, function)
    values(device, stream, x)


def record(device: Device, stream: Stream) -> Event:
    event = device.event()
    stream.record(event)
    return event


def values(device: Device, stream: Stream, tensor: torch.Tensor) -> list[float]:
    """What the tensor holds, in the stream's order."""
    staged = device.pinned(tensor.shape, tensor.dtype)
    stream.copy(staged, tensor)
    stream.synchronize()
    found: list[float] = staged.tolist()
    return found


def unordered(device: Device, tensor: torch.Tensor, wanted: list[float]) -> bool:
    """Whether the tensor soon holds these values, though no event says when."""
    if isinstance(device, SimulatedDevice):
        device.advance(1.0)
        with device.raw():
            return bool(tensor.tolist() == wanted)
    stream = device.stream()
    return any(values(device, stream, tensor) == wanted for _ in range(1000))


# Events...


def test_an_unrecorded_event_is_complete(device: Device) -> None:
    event = device.event()
    assert device.query(event)
    event.synchronize()
    stream = device.stream()
    stream.wait(event)
    stream.synchronize()


def test_an_event_completes_when_its_stream_gets_there(device: Device, gate: Gate) -> None:
    stream = device.stream()
    gate.hold(stream)
    event = record(device, stream)
    assert not soon(device, event)
    gate.open()
    event.synchronize()
    assert device.query(event)


def test_recording_again_moves_the_event(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    event = record(device, a)
    event.synchronize()
    gate.hold(b)
    b.record(event)
    assert not soon(device, event)
    gate.open()
    event.synchronize()


def test_a_device_lets_go_of_whom_it_has_told(device: Device) -> None:
    if not device.tells:
        return
    stream, gone = device.stream(), threading.Event()
    event = stream.record()

    class Waiter:
        def __call__(self) -> None:
            pass

    waiter = Waiter()
    weakref.finalize(waiter, gone.set)
    gc.disable()  # what is let go of, nobody has to look for
    try:
        device.when_complete(event, waiter)
        del waiter
        stream.synchronize()
        assert gone.is_set(), "though the event is still there"
    finally:
        gc.enable()
    assert device.query(event)


def test_a_device_that_tells_does_so_when_its_stream_gets_there_and_at_once_afterwards(device: Device, gate: Gate) -> None:
    event = device.event()
    if not device.tells:
        with pytest.raises(NotImplementedError, match="must be asked"):
            device.when_complete(event, lambda: None)
        return
    told: list[bool] = []

    def ask() -> None:
        told.append(device.query(event))

    device.when_complete(event, ask)
    assert told == [True], "it was never recorded"
    stream = device.stream()
    gate.hold(stream)
    stream.record(event)
    elsewhere, here = threading.Event(), threading.Event()
    for callback in (ask, ask, here.set):
        device.when_complete(event, callback)
    device.when_complete(device.stream().record(), elsewhere.set)
    assert elsewhere.wait(5)
    assert told == [True]
    gate.open()
    assert here.wait(5)
    assert told == [True] * 3, "it was told before it was true"
    device.when_complete(event, ask)
    assert told == [True] * 4


def test_a_failure_is_told_as_soon_as_it_can_be_asked_for(device: Device) -> None:
    if not device.tells:
        pytest.skip("it must be asked")
    stream, told = device.stream(), threading.Event()
    seen: list[Exception] = []

    def look() -> None:
        try:
            device.query(event)
        except ZeroDivisionError as error:
            seen.append(error)
        told.set()

    stream.run(lambda: 1 // 0)
    event = stream.record()
    device.when_complete(event, look)
    assert told.wait(5)
    assert len(seen) == 1


def test_streams_are_unordered(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    gate.hold(a)
    x = filled(device, b, 1.0)
    assert values(device, b, x) == [1.0] * 4


# Waits...


def test_a_stream_that_waits_comes_after(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    y = filled(device, b, 0.0)
    gate.hold(a)
    a.run(lambda: x.fill_(2.0))
    b.wait(record(device, a))
    b.copy(y, x)
    event = record(device, b)
    assert not soon(device, event)
    gate.open()
    assert values(device, b, y) == [2.0] * 4


def test_a_wait_is_for_the_last_record_before_it(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    event = record(device, a)
    event.synchronize()
    b.wait(event)
    gate.hold(a)
    a.record(event)
    b.synchronize()  # not held: the later record is none of its business
    assert not soon(device, event)


def test_a_wait_is_not_for_a_record_that_is_made_later(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    event = device.event()
    b.wait(event)
    gate.hold(a)
    a.record(event)
    b.synchronize()


def test_a_wait_keeps_its_record_when_the_event_moves_on(device: Device, gate: Gate) -> None:
    a, b, c = device.stream(), device.stream(), device.stream()
    gate.hold(a)
    event = record(device, a)
    b.wait(event)
    behind = record(device, b)
    c.record(event)
    assert soon(device, event, polls=200_000)
    assert not soon(device, behind)
    gate.open()
    b.synchronize()


def test_several_streams_wait_for_one_event(device: Device, gate: Gate) -> None:
    a = device.stream()
    others = [device.stream() for _ in range(3)]
    gate.hold(a)
    event = record(device, a)
    for other in others:
        other.wait(event)
    marks = [record(device, other) for other in others]
    assert not any(map(device.query, marks))
    gate.open()
    for mark in marks:
        mark.synchronize()


# Work...


def test_work_on_a_stream_is_in_order(device: Device) -> None:
    stream = device.stream()
    x = filled(device, stream, 0.0)
    for value in range(1, 20):
        stream.run(lambda value=value: x.mul_(2).add_(value))  # type: ignore[misc]
    expected = 0.0
    for value in range(1, 20):
        expected = expected * 2 + value
    assert values(device, stream, x) == [expected] * 4


def test_page_locked_memory_is_known_as_such(device: Device) -> None:
    pinned = device.pinned((4, 8), F)
    assert device.is_pinned(pinned) is not device.unified  # where there is nothing else, nothing is gained by knowing
    assert device.is_pinned(pinned[1:]) is not device.unified
    assert device.is_pinned(torch.from_numpy(pinned.numpy()[2])) is not device.unified
    assert not device.is_pinned(torch.zeros(4, 8))
    assert not device.is_pinned(torch.zeros(0))


def test_copies_go_through_pinned_memory_both_ways(device: Device) -> None:
    stream = device.stream()
    source, target = device.pinned((4,), F), device.pinned((4,), F)
    source.numpy()[:] = [1.0, 2.0, 3.0, 4.0]
    x = device.call(stream, lambda: device.empty((4,), F))
    stream.copy(x, source)
    stream.copy(target, x)
    stream.synchronize()
    assert target.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_copy_reads_when_its_turn_comes(device: Device, gate: Gate) -> None:
    stream = device.stream()
    x, y = filled(device, stream, 1.0), filled(device, stream, 0.0)
    stream.synchronize()
    gate.hold(stream)
    stream.run(lambda: x.fill_(5.0))
    stream.copy(y, x)
    gate.open()
    assert values(device, stream, y) == [5.0] * 4


def test_call_returns_and_raises(device: Device) -> None:
    stream = device.stream()
    assert device.call(stream, lambda: 7) == 7

    def wrong() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        device.call(stream, wrong)
    assert values(device, stream, filled(device, stream, 3.0)) == [3.0] * 4


def test_an_error_in_run_is_raised_there_or_by_the_next_event(device: Device) -> None:
    stream = device.stream()

    def wrong() -> None:
        raise KeyError("mine")

    def submit() -> None:
        stream.run(wrong)
        event = record(device, stream)
        event.synchronize()

    with pytest.raises(KeyError, match="mine"):
        submit()
    assert values(device, stream, filled(device, stream, 3.0)) == [3.0] * 4


def test_synchronize_waits_for_every_stream(device: Device, gate: Gate) -> None:
    streams = [device.stream() for _ in range(3)]
    marks = []
    for stream in streams:
        gate.hold(stream)
        marks.append(record(device, stream))
    gate.open()
    device.synchronize()
    assert all(map(device.query, marks))


def test_closing_a_stream_leaves_its_work(device: Device, gate: Gate) -> None:
    stream = device.stream()
    gate.hold(stream)
    event = record(device, stream)
    stream.close()
    assert not soon(device, event)
    gate.open()
    event.synchronize()


def test_synchronize_waits_for_a_stream_that_is_closed(device: Device, gate: Gate) -> None:
    stream = device.stream()
    gate.hold(stream)
    event = record(device, stream)
    stream.close()
    gate.open()
    device.synchronize()
    assert device.query(event)


def test_current_and_adopted_streams(device: Device) -> None:
    assert device.current_stream().handle == device.current_stream().handle
    stream = device.stream()
    assert device.adopt_stream(stream).handle == stream.handle
    assert stream.handle != device.stream().handle
    with pytest.raises(TypeError, match="stream"):
        device.adopt_stream(object())


def test_the_current_stream_of_what_runs_on_a_stream(device: Device) -> None:
    if device.name == "host":
        pytest.skip("what runs on a stream of the host has no current stream of its own: it is on one")
    stream = device.stream()
    assert device.call(stream, device.current_stream).handle == stream.handle


# Graphs...


def captured(device: Device, stream: Stream, body: Callable[[], list[torch.Tensor]]) -> tuple[Graph, torch.Tensor]:
    graph, (output,) = device.capture(stream, body)
    return graph, output


def test_a_graph_reads_and_writes_the_memory_it_was_captured_with(device: Device) -> None:
    stream = device.stream()
    x = filled(device, stream, 1.0)
    graph, y = captured(device, stream, lambda: [x * 2 + 1])
    for value in (3.0, 5.0):
        stream.run(lambda value=value: x.fill_(value))  # type: ignore[misc]
        graph.launch(stream)
        assert values(device, stream, y) == [value * 2 + 1] * 4
    assert graph.nbytes >= 0
    graph.close()


def test_a_graph_runs_in_its_streams_order(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    graph, y = captured(device, a, lambda: [x * 2])
    gate.hold(b)
    b.run(lambda: x.fill_(4.0))
    a.wait(record(device, b))
    graph.launch(a)
    event = record(device, a)
    assert not soon(device, event)
    gate.open()
    assert values(device, a, y) == [8.0] * 4


def test_a_graph_never_overlaps_itself(device: Device, gate: Gate) -> None:
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    graph, _ = captured(device, a, lambda: [x * 2])
    a.synchronize()
    gate.hold(a)
    graph.launch(a)
    graph.launch(b)
    event = record(device, b)
    assert not soon(device, event)
    gate.open()
    event.synchronize()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_graph_waits_for_an_event_and_the_copies_before_it_do_not(device: Device, gate: Gate, ordered: bool) -> None:
    a, b = device.stream(), device.stream()
    x, target = filled(device, a, 1.0), filled(device, a, 0.0)
    source = device.pinned((4,), F)
    source.fill_(3.0)
    graph, (y,) = device.capture(a, lambda: [x * 2.0], [x], ordered=ordered)
    a.synchronize()
    gate.hold(b)
    event = record(device, b)
    ended = device.event()
    graph.launch(a, [(x, source)], [(target, y)], event, ended)
    assert not soon(device, record(device, a))
    seen = unordered(device, x, [3.0] * 4)
    gate.open()
    ended.synchronize()
    a.synchronize()
    assert seen or not ordered, "the copy waited too"  # without `ordered` it may: then all is a graph that waits
    assert values(device, a, target) == [6.0] * 4
    graph.close()


@pytest.mark.parametrize("ordered", [True, False])
def test_what_a_graph_records_covers_its_replay(device: Device, gate: Gate, ordered: bool) -> None:
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    graph, (y,) = device.capture(a, lambda: [x * 2.0], [x], ordered=ordered)
    ended = device.event()
    for value in (3.0, 5.0):
        a.run(lambda value=value: x.fill_(value))  # type: ignore[misc]
        graph.launch(a, record=ended)
        b.wait(ended)
        assert values(device, b, y) == [2 * value] * 4
    a.synchronize()
    gate.hold(a)
    graph.launch(a, record=ended)
    assert not soon(device, ended)
    gate.open()
    ended.synchronize()
    graph.close()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_graph_waits_for_the_record_that_was_made_before_its_launch(device: Device, gate: Gate, ordered: bool) -> None:
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    graph, (y,) = device.capture(a, lambda: [x * 2.0], [x], ordered=ordered)
    event = device.event()
    graph.launch(a, wait=event)  # never recorded: complete
    a.synchronize()
    b.record(event)
    b.synchronize()
    graph.launch(a, wait=event)
    gate.hold(b)
    b.record(event)  # again: the launch before it must not wait for this
    a.synchronize()
    graph.launch(a, wait=event)
    later = record(device, a)
    assert not soon(device, later)
    gate.open()
    later.synchronize()
    assert values(device, a, y) == [2.0] * 4
    graph.launch(a)  # and none does not wait for what another launch waited for
    a.synchronize()
    graph.close()


@pytest.mark.parametrize("ordered", [True, False])
def test_graphs_on_two_streams_take_turns(device: Device, ordered: bool) -> None:
    """Each reads what the other wrote; copies of a launch may run beside the other's replay, replays may not."""
    a, b = device.stream(), device.stream()
    x = filled(device, a, 1.0)
    a.synchronize()
    first, (y,) = device.capture(a, lambda: [x + 1.0], [x], ordered=ordered)
    first.launch(a)
    a.synchronize()
    second, (z,) = device.capture(b, lambda: [x.copy_(y + y)], [y], ordered=ordered)
    a.synchronize()
    b.synchronize()
    device.call(a, lambda: x.fill_(1.0))
    a.synchronize()
    turns = [device.event(), device.event()]
    expected = 1.0
    for i in range(20):
        first.launch(a, wait=turns[1] if i else None, record=turns[0])
        second.launch(b, wait=turns[0], record=turns[1])
        expected = 2 * (expected + 1)
    assert values(device, b, z) == [expected] * 4
    assert values(device, b, x) == [expected] * 4
    first.close()
    second.close()


def test_two_graphs_of_one_stream_do_not_share_outputs(device: Device) -> None:
    stream = device.stream()
    x = filled(device, stream, 1.0)
    first, y = captured(device, stream, lambda: [x + 1])
    second, z = captured(device, stream, lambda: [x + 2])
    first.launch(stream)
    second.launch(stream)
    assert values(device, stream, y) == [2.0] * 4
    assert values(device, stream, z) == [3.0] * 4


def test_what_fails_in_the_warm_up_is_raised_as_it_is(device: Device) -> None:
    stream = device.stream()

    def wrong() -> list[torch.Tensor]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        device.capture(stream, wrong)
    assert values(device, stream, filled(device, stream, 3.0)) == [3.0] * 4


def test_what_cannot_be_captured_leaves_the_stream_usable(device: Device) -> None:
    if device.name == "host":
        pytest.skip("the host captures everything")
    stream = device.stream()
    x = filled(device, stream, 1.0)
    with pytest.raises(CaptureError):
        device.capture(stream, lambda: [x * x.sum().item()])
    assert values(device, stream, x) == [1.0] * 4
    graph, y = captured(device, stream, lambda: [x + 1])
    graph.launch(stream)
    assert values(device, stream, y) == [2.0] * 4


# Threads...


def test_work_may_be_submitted_from_a_thread(device: Device) -> None:
    stream = device.stream()
    x = filled(device, stream, 1.0)
    stream.synchronize()

    def submit() -> None:
        device.prepare_thread()
        stream.run(lambda: x.fill_(6.0))

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    assert values(device, stream, x) == [6.0] * 4
    assert not device.is_on_stream()


# Faults...


def test_a_fault_is_remembered_and_told_once() -> None:
    device = SimulatedDevice()  # a device of the process must not be broken by a test; all share this code
    told: list[tuple[str, DeviceError]] = []
    device.on_fault(lambda error: told.append(("stays", error)))
    stop = device.on_fault(lambda error: told.append(("left", error)))
    stop()
    first, second = DeviceError("first"), DeviceError("second")
    device.fail(first)
    device.fail(second)
    assert device.fault is first
    assert told == [("stays", first)]
