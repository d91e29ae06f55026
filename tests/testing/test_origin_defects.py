"""Models of the defects of the code that the idea came from: the detector finds each, and some schedule shows the damage.

Each model is the faulty order of device calls, and nothing else. B1 to B18 are the numbers used in the design; those of them
that no order of calls would mend are in `test_origin_habits`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aiotrt.testing import HazardError, SimulatedDevice
from aiotrt.testing.streams import SimulatedEvent

F = torch.float32


class Original:
    """One graph on a private stream, y = 2 x, its buffers shared by all calls, and the caller's stream."""

    def __init__(self, seed: int) -> None:
        self.device = device = SimulatedDevice(seed)
        self.graph_stream = device.stream()
        self.outer = device.current_stream()
        self.x = device.call(self.graph_stream, lambda: device.empty((4,), F).zero_())
        self.graph, (self.y,) = device.capture(self.graph_stream, lambda: [self.x * 2])
        self.pinned = device.pinned((4,), F)
        self.seen: list[float] = []
        self.expected: list[float] = []

    def fill_input(self, value: float) -> None:
        """A well ordered way to set the input."""
        self.graph_stream.run(lambda: self.x.fill_(value))

    def record(self, on: str) -> SimulatedEvent:
        event = self.device.event()
        (self.graph_stream if on == "graph" else self.outer).record(event)
        return event

    def wait(self, event: SimulatedEvent) -> None:
        """The host waits."""
        event.synchronize()

    def see(self, tensor: torch.Tensor, expected: float) -> None:
        """The host reads."""
        self.seen.append(self.device.read(tensor)[0].item())
        self.expected.append(expected)

    def consume(self, expected: float) -> torch.Tensor:
        """The caller's stream reads the output into memory of its own, which is looked at in the end."""
        with self.device.use():
            mine = self.y.clone()
        self.expected.append(expected)
        return mine

    def finish(self, *mine: torch.Tensor) -> None:
        self.device.synchronize()
        self.seen += [self.device.read(tensor)[0].item() for tensor in mine]


def b1_input_is_not_ordered_with_the_graph_stream(m: Original) -> None:
    source = m.device.tensor([1.0] * 4)  # on the caller's stream
    m.graph_stream.copy(m.x, source)  # which the graph's stream never waits for
    m.graph.launch(m.graph_stream)
    m.wait(m.record("graph"))
    m.see(m.y, 2.0)


def b2_completion_event_is_recorded_on_the_wrong_stream(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.wait(m.record("outer"))
    m.see(m.y, 2.0)


def b4_the_caller_reads_on_a_stream_that_waits_for_nothing(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.outer.copy(m.pinned, m.y)  # what `.cpu()` does: a copy on the current stream,
    m.outer.synchronize()  # and a wait for that one
    m.see(m.pinned, 2.0)


def b5_consumer_event_is_waited_for_before_it_is_recorded(m: Original) -> None:
    consumed = m.device.event()
    results = []
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.outer.wait(m.record("graph"))
    m.graph_stream.wait(consumed)  # nothing yet: the consumer has not been submitted
    m.fill_input(5.0)
    m.graph.launch(m.graph_stream)
    results.append(m.consume(2.0))
    m.outer.record(consumed)
    m.finish(*results)


def b5_the_second_consumer_replaces_the_first(m: Original) -> None:
    consumed, other = m.device.event(), m.device.stream()
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    produced = m.record("graph")
    m.outer.wait(produced)
    other.wait(produced)
    mine = m.consume(2.0)
    m.outer.record(consumed)
    with m.device.use(other):
        m.y.sum()
    other.record(consumed)  # one event for all consumers
    m.graph_stream.wait(consumed)
    m.fill_input(5.0)
    m.graph.launch(m.graph_stream)
    m.finish(mine)


def b6_results_of_two_calls_are_one_buffer(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    first = m.record("graph")
    m.fill_input(5.0)
    m.graph.launch(m.graph_stream)
    m.wait(first)
    m.device.advance(300e-6)  # the host was busy elsewhere
    m.see(m.y, 2.0)
    m.finish()


def b7_the_parts_of_a_split_batch_are_one_buffer(m: Original) -> None:
    parts = []
    for value in (1.0, 5.0):
        m.fill_input(value)
        m.graph.launch(m.graph_stream)
        parts.append(m.y)
    with m.device.use():  # a stream that waits for neither
        whole = torch.cat(parts)
    m.expected += [2.0, 10.0]
    m.finish(whole[:4], whole[4:])


def b8_padded_result_lost_its_event(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.wait(m.device.event())  # of another stream, or none: never recorded, so complete
    m.see(m.y[:-1], 2.0)


def b10_the_ring_of_clones_comes_round(m: Original) -> None:
    ring = [m.device.call(m.graph_stream, lambda: m.device.empty((4,), F)) for _ in range(3)]
    produced = []
    for i in range(4):
        m.fill_input(float(i + 1))
        m.graph.launch(m.graph_stream)
        m.graph_stream.copy(ring[i % 3], m.y)
        produced.append(m.record("graph"))
    m.wait(produced[0])
    m.device.advance(300e-6)
    m.see(ring[0], 2.0)
    m.finish()


def b11_done_means_submitted(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.outer.wait(m.record("graph"))
    with m.device.use():
        answer = m.y + 1.0
    m.see(answer, 3.0)  # as soon as `done()` says so


def b12_a_graph_is_evicted_while_its_output_is_read(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.outer.wait(m.record("graph"))
    mine = m.consume(2.0)
    m.graph.close()
    del m.y
    m.graph, (m.y,) = m.device.capture(m.graph_stream, lambda: [m.x * 7])  # for another shape, in the same memory
    m.finish(mine)


def b13_the_next_marked_input_is_copied_into_the_first(m: Original) -> None:
    first = m.device.tensor([1.0] * 4)
    m.graph_stream.wait(m.record("outer"))
    graph, _ = m.device.capture(m.graph_stream, lambda: [first * 2])  # on its own memory, as its owner asked
    second = m.device.tensor([5.0] * 4)
    m.graph_stream.wait(m.record("outer"))
    m.graph_stream.copy(first, second)  # the key is the same: shape, dtype and device
    graph.launch(m.graph_stream)
    with m.device.use():
        mine = first.clone()  # its owner looks at it again
    m.expected.append(1.0)
    m.finish(mine)


def b14_input_is_overwritten_while_the_graph_reads_it(m: Original) -> None:
    with m.device.use():
        m.x.fill_(1.0)
    m.graph_stream.wait(m.record("outer"))
    m.graph.launch(m.graph_stream)
    produced = m.record("graph")
    with m.device.use():
        m.x.fill_(5.0)  # the next frame's preprocessing
    m.wait(produced)
    m.see(m.y, 2.0)
    m.finish()


def b14_pinned_input_is_overwritten_during_its_copy(m: Original) -> None:
    m.pinned.numpy()[:] = 1.0
    m.graph_stream.copy(m.x, m.pinned)
    m.graph.launch(m.graph_stream)
    m.device.advance(50e-6)
    m.pinned.numpy()[:] = 5.0
    m.wait(m.record("graph"))
    m.see(m.y, 2.0)


def b14_pinned_output_is_read_during_its_copy(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    produced = m.record("graph")
    m.graph_stream.copy(m.pinned, m.y)  # after the event
    m.wait(produced)
    m.see(m.pinned, 2.0)


def b18_a_view_has_lost_the_event(m: Original) -> None:
    m.fill_input(1.0)
    m.graph.launch(m.graph_stream)
    m.y._trt_produce_event = m.record("graph")  # type: ignore[attr-defined]
    some = m.y[:2]
    event = getattr(some, "_trt_produce_event", None)
    if event is not None:
        m.wait(event)
    m.see(some, 2.0)


DEFECTS = [value for name, value in dict(globals()).items() if name.startswith("b") and name[1].isdigit()]
SEEDS = 60


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_the_detector_finds_it_under_any_schedule_and_some_schedule_shows_it(defect: Callable[[Original], None]) -> None:
    damage = 0
    for seed in range(SEEDS):
        model = Original(seed)
        defect(model)
        model.device.run_until_idle()
        wrong = model.seen != model.expected
        damage += wrong
        if defect is not b14_pinned_input_is_overwritten_during_its_copy or wrong:
            # The host's writes through numpy are not seen, only what they change under a copy.
            with pytest.raises(HazardError):
                model.device.check()
    assert damage


def test_the_same_work_in_the_right_order_has_no_hazard() -> None:
    for seed in range(SEEDS):
        m = Original(seed)
        consumed: list[SimulatedEvent] = []
        results = []
        for i in range(4):
            source = m.device.tensor([float(i)] * 4)
            for event in [m.record("outer"), *consumed]:
                m.graph_stream.wait(event)
            m.graph_stream.copy(m.x, source)
            m.graph.launch(m.graph_stream)
            m.outer.wait(m.record("graph"))
            results.append(m.consume(2.0 * i))
            consumed = [m.record("outer")]
            del source
        m.finish(*results)
        assert m.seen == m.expected
        m.device.check()
