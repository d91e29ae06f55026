"""Fault injection: any verb (operation) of any device fails at its n-th use.

`FaultInjector` wraps a device and counts the uses of every verb. `fault_points` runs a scenario once without a fault and
lists every fault that could have happened in it, so that a test can try them all:

    for fault in fault_points(scenario, SimulatedDevice):
        device = FaultInjector(SimulatedDevice(), fault)
        ...  # run the scenario again, and check what must still hold
"""

from __future__ import annotations

import enum
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from aiotrt.devices.base import BaseGraph, CaptureError, Device, Event, Graph, Stream
from aiotrt.errors import DeviceError
from aiotrt.testing.simulator import SimulatedDevice

__all__ = ["VERBS", "Fault", "FaultInjector", "FaultKind", "fault_points"]

T = TypeVar("T")


class FaultKind(enum.Enum):
    """How a verb fails."""

    STICKY = "sticky"  #: DeviceError, from this use on for all verbs, as after an illegal address
    PASSING = "passing"  #: RuntimeError, once, as for an invalid argument
    MEMORY = "memory"  #: torch.OutOfMemoryError, once
    CAPTURE = "capture"  #: CaptureError, once
    HANG = "hang"  #: the event never completes, and neither do later events on its stream or on a stream that waits for it


_ANY: Final = (FaultKind.STICKY, FaultKind.PASSING)
_ALLOCATES: Final = (*_ANY, FaultKind.MEMORY)

#: Every verb, with the kinds of its faults. "call" counts `Device.call`, "run" `Stream.run`, "launch" `Graph.launch`.
VERBS: Final[dict[str, tuple[FaultKind, ...]]] = {
    "stream": _ALLOCATES,
    "event": _ANY,
    "query": (FaultKind.STICKY,),
    "empty": _ALLOCATES,
    "pinned": _ALLOCATES,
    "capture": (*_ALLOCATES, FaultKind.CAPTURE),
    "call": _ALLOCATES,
    "synchronize": (FaultKind.STICKY,),
    "record": (*_ANY, FaultKind.HANG),
    "wait": _ANY,
    "copy": _ANY,
    "run": _ALLOCATES,
    "launch": _ANY,
}


@dataclass(frozen=True)
class Fault:
    """A failure of the `use`-th use of `verb`, counted from 1, of the given `kind`."""

    verb: str
    use: int
    kind: FaultKind

    def __str__(self) -> str:
        return f"{self.verb}-{self.use}-{self.kind.value}"


class FaultInjector:
    """A device that fails on demand, and otherwise behaves as the device that it wraps.

    Unknown attributes are those of the wrapped device, so the methods of a `SimulatedDevice` can be used.

    Args:
        device: the wrapped device.
        faults: the faults to inject.

    Attributes:
        device: the wrapped device.
        uses: how often each verb was used.
        happened: the faults that have happened.
        error: the error that every verb raises after a sticky fault; None before one.
    """

    def __init__(self, device: Device, *faults: Fault) -> None:
        self.device = device
        self.uses: Counter[str] = Counter()
        self.happened: list[Fault] = []
        self.error: DeviceError | None = None
        self._faults = {(fault.verb, fault.use): fault for fault in faults}
        self._streams: dict[int, _Stream] = {}
        self._hung_events: dict[int, Event] = {}

    @property
    def simulated(self) -> SimulatedDevice:
        """The wrapped device, which must be a simulated one."""
        assert isinstance(self.device, SimulatedDevice), self.device
        return self.device

    @property
    def fault(self) -> DeviceError | None:
        """The fault that broke the device, or None."""
        return self.device.fault

    @fault.setter
    def fault(self, error: DeviceError | None) -> None:
        self.device.fault = error

    def stream(self) -> Stream:
        """Create a stream of the wrapped device."""
        self.use_verb("stream")
        return self._wrap(self.device.stream())

    def event(self) -> Event:
        """Create an event of the wrapped device."""
        self.use_verb("event")
        return self.device.event()

    def current_stream(self) -> Stream:
        """Return the wrapped device's current stream. Not a verb: no fault can be injected."""
        return self._wrap(self.device.current_stream())

    def adopt_stream(self, stream: object) -> Stream:
        """Adopt a stream as the wrapped device does. Not a verb: no fault can be injected."""
        return self._wrap(self.device.adopt_stream(_unwrap(stream)))

    def maker(self, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return a function that allocates memory like `like`; each call counts as an `empty`."""
        return functools.partial(self.empty, tuple(like.shape), like.dtype)

    def probe(self, event: Event) -> Callable[[], bool]:
        """Return a function that queries `event`; each call counts as a `query`."""
        return functools.partial(self.query, event)

    def query(self, event: Event) -> bool:
        """Query `event` as the wrapped device does; always False for an event that hangs."""
        self.use_verb("query")
        return id(event) not in self._hung_events and self.device.query(event)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate memory of the wrapped device."""
        self.use_verb("empty")
        return self.device.empty(shape, dtype)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate pinned memory of the wrapped device."""
        self.use_verb("pinned")
        return self.device.pinned(shape, dtype)

    def capture(
        self,
        stream: Stream,
        body: Callable[[], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor] = (),
        *,
        ordered: bool = False,
    ) -> tuple[Graph, list[torch.Tensor]]:
        """Capture as the wrapped device does; an injected fault is raised before the warm-up."""
        self.use_verb("capture")
        graph, outputs = self.device.capture(_unwrap(stream), body, inputs, ordered=ordered)
        return _Graph(self, graph), outputs

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        """Call `function` as the wrapped device does; an injected fault is raised before the call."""
        self.use_verb("call")
        return self.device.call(_unwrap(stream), function)

    def synchronize(self) -> None:
        """Synchronise the wrapped device."""
        self.use_verb("synchronize")
        self.device.synchronize()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def use_verb(self, verb: str) -> FaultKind | None:
        """Count a use of `verb`, and raise the fault that is planned for it.

        Returns:
            FaultKind.HANG if the fault is a hang, which raises nothing; else None.
        """
        self.uses[verb] += 1
        if self.error is not None:
            raise self.error
        fault = self._faults.get((verb, self.uses[verb]))
        if fault is None:
            return None
        self.happened.append(fault)
        message = f"injected: {fault}"
        match fault.kind:
            case FaultKind.STICKY:
                self.error = DeviceError(message, code=700, name="cudaErrorIllegalAddress")
                raise self.error
            case FaultKind.PASSING:
                raise RuntimeError(message)
            case FaultKind.MEMORY:
                raise torch.OutOfMemoryError(message)
            case FaultKind.CAPTURE:
                raise CaptureError(message)
            case FaultKind.HANG:
                return fault.kind

    def hangs(self, event: Event, *, hang: bool) -> None:
        """Make `event` hang, or with ``hang=False`` complete normally again."""
        if hang:
            self._hung_events[id(event)] = event  # kept alive, so that its id is not reused
        else:
            self._hung_events.pop(id(event), None)

    def is_hung(self, event: Event) -> bool:
        """Whether `event` hangs."""
        return id(event) in self._hung_events

    def _wrap(self, stream: Stream) -> _Stream:
        return self._streams.setdefault(stream.handle, _Stream(self, stream))

    def __repr__(self) -> str:
        return f"<FaultInjector {', '.join(map(str, self._faults.values()))} in {self.device!r}>"


class _Stream:
    """A stream whose verbs are counted."""

    def __init__(self, injector: FaultInjector, stream: Stream) -> None:
        self.stream = stream
        self.handle = stream.handle
        self._injector = injector
        self._is_hung = False

    def record(self, event: Event | None = None) -> Event:
        event = self._injector.event() if event is None else event
        if self._injector.use_verb("record") is FaultKind.HANG:
            self._is_hung = True
        self._injector.hangs(event, hang=self._is_hung)
        return self.stream.record(event)

    def wait(self, event: Event) -> None:
        self._injector.use_verb("wait")
        self._is_hung = self._is_hung or self._injector.is_hung(event)
        self.stream.wait(event)

    def query(self) -> bool:
        return not self._is_hung and self.stream.query()  # not a verb: a stream's query never raises

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._injector.use_verb("copy")
        self.stream.copy(destination, source)

    def run(self, function: Callable[[], object]) -> None:
        self._injector.use_verb("run")
        self.stream.run(function)

    def synchronize(self) -> None:
        self._injector.use_verb("synchronize")
        self.stream.synchronize()

    def close(self) -> None:
        self.stream.close()


class _Graph(BaseGraph):
    """A graph whose launches are counted."""

    def __init__(self, injector: FaultInjector, graph: Graph) -> None:
        self.nbytes = graph.nbytes
        self._injector = injector
        self._graph = graph

    def replay(self, stream: Stream) -> None:
        self._injector.use_verb("launch")
        self._graph.launch(_unwrap(stream))

    def close(self) -> None:
        self._graph.close()


def _unwrap(stream: Any) -> Any:
    return stream.stream if isinstance(stream, _Stream) else stream


def fault_points(scenario: Callable[[FaultInjector], object], make: Callable[[], Device]) -> Iterator[Fault]:
    """Yield every fault that could happen in `scenario`.

    Args:
        scenario: called once, with a device that does not fail; must be deterministic.
        make: creates the device for it.
    """
    injector = FaultInjector(make())
    scenario(injector)
    uses = dict(injector.uses)
    for verb, kinds in VERBS.items():
        for use in range(1, uses.get(verb, 0) + 1):
            for kind in kinds:
                yield Fault(verb, use, kind)
