"""BaseDevice happen when and how they were asked for, and are all enumerated."""

from __future__ import annotations

import pytest
import torch

from aiotrt.devices import CaptureError, Device
from aiotrt.devices.host import HostDevice
from aiotrt.errors import DeviceError
from aiotrt.testing import VERBS, Fault, FaultInjector, FaultKind, SimulatedDevice, fault_points


def scenario(device: FaultInjector) -> None:
    """Uses every verb, some of them twice."""
    stream = device.stream()
    event = device.event()
    x = device.call(stream, lambda: device.empty((2,), torch.float32).zero_())
    pinned = device.pinned((2,), torch.float32)
    pinned.numpy()[:] = 1.0
    graph, _ = device.capture(stream, lambda: [x + 1])
    stream.copy(x, pinned)
    graph.launch(stream)
    graph.launch(stream)
    stream.run(lambda: x.add_(1))
    stream.record(event)
    stream.wait(event)
    stream.synchronize()
    device.query(event)
    device.synchronize()
    graph.close()
    stream.close()


@pytest.mark.parametrize("make", [SimulatedDevice, HostDevice])
def test_without_a_fault_it_is_the_device_within(make: type[SimulatedDevice | HostDevice]) -> None:
    device = FaultInjector(make())
    scenario(device)
    assert device.uses.keys() == VERBS.keys()
    assert device.uses["launch"] == 2
    assert not device.happened
    assert (device.name, device.unified) == (device.device.name, device.device.unified)


POINTS = list(fault_points(scenario, SimulatedDevice))
RAISES = {
    FaultKind.STICKY: DeviceError,
    FaultKind.PASSING: RuntimeError,
    FaultKind.MEMORY: torch.OutOfMemoryError,
    FaultKind.CAPTURE: CaptureError,
}


def test_every_verb_fails_in_every_way() -> None:
    assert {(point.verb, point.kind) for point in POINTS} == {
        (verb, kind) for verb, kinds in VERBS.items() for kind in kinds
    }
    assert Fault("launch", 2, FaultKind.STICKY) in POINTS
    assert Fault("launch", 3, FaultKind.STICKY) not in POINTS


@pytest.mark.parametrize("point", [point for point in POINTS if point.kind is not FaultKind.HANG], ids=str)
def test_a_fault_happens_once_where_it_was_asked_for(point: Fault) -> None:
    device = FaultInjector(SimulatedDevice(), point)
    with pytest.raises(RAISES[point.kind], match=f"injected: {point}"):
        scenario(device)
    assert device.happened == [point]
    assert device.uses[point.verb] == point.use
    if point.kind is FaultKind.STICKY:
        with pytest.raises(DeviceError, match=str(point)):
            device.event()
    else:
        scenario(device)
    assert device.happened == [point]


def test_a_hang_spreads_to_whatever_waits_for_it() -> None:
    device = FaultInjector(SimulatedDevice(), Fault("record", 1, FaultKind.HANG))
    a, b, c = device.stream(), device.stream(), device.stream()
    hung, later, behind, free = (device.event() for _ in range(4))
    a.record(hung)
    a.record(later)
    b.wait(later)
    b.record(behind)
    c.record(free)
    device.simulated.run_until_idle()
    assert [device.query(event) for event in (hung, later, behind, free)] == [False, False, False, True]
    c.record(hung)  # it moves to a stream that works
    assert device.query(hung)


def test_streams_are_one_object_each() -> None:
    device: Device = FaultInjector(SimulatedDevice())
    assert device.current_stream() is device.current_stream()
    stream = device.stream()
    assert device.adopt_stream(stream) is stream
