"""Each kind of hazard: a small program that has it, under a schedule where it does no harm, and its mended twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aiotrt.testing import HazardError, SimulatedDevice


class Bench:
    """Two streams, and memory that was written before they begin."""

    def __init__(self) -> None:
        self.device = SimulatedDevice(1)
        self.a = self.device.stream()
        self.b = self.device.stream()
        self.x = self.device.tensor([1.0, 2.0, 3.0, 4.0])
        self.y = self.device.tensor([0.0, 0.0, 0.0, 0.0])
        self.pinned = self.device.pinned((4,), torch.float32)
        self.pinned.numpy()[:] = 7.0
        self.device.synchronize()

    def order(self, first: str, then: str, *, mended: bool) -> None:
        """The edge that is missing from the broken program."""
        if not mended:
            self.device.run_until_idle()  # so the race is won, and must be found all the same
            return
        event = self.device.event()
        getattr(self, first).record(event)
        getattr(self, then).wait(event)

    def see(self, stream: str, *, mended: bool) -> None:
        """The host waits for a stream."""
        self.device.run_until_idle()
        if mended:
            event = self.device.event()
            getattr(self, stream).record(event)
            event.synchronize()


def read_before_write(bench: Bench, mended: bool) -> None:
    bench.a.run(lambda: bench.x.fill_(5.0))
    bench.order("a", "b", mended=mended)
    bench.b.run(lambda: bench.x + 1)


def write_before_read(bench: Bench, mended: bool) -> None:
    bench.a.copy(bench.y, bench.x)
    bench.order("a", "b", mended=mended)
    bench.b.run(lambda: bench.x.fill_(5.0))


def write_before_write(bench: Bench, mended: bool) -> None:
    bench.a.run(lambda: bench.x.fill_(1.0))
    bench.order("a", "b", mended=mended)
    bench.b.run(lambda: bench.x.fill_(2.0))


def host_reads_too_early(bench: Bench, mended: bool) -> None:
    bench.a.copy(bench.pinned, bench.x)
    bench.see("a", mended=mended)
    bench.device.host_read(bench.pinned.numpy())


def host_writes_too_early(bench: Bench, mended: bool) -> None:
    bench.a.copy(bench.x, bench.pinned)
    bench.see("a", mended=mended)
    bench.device.host_write(bench.pinned)


def event_of_an_earlier_record(bench: Bench, mended: bool) -> None:
    event = bench.device.event()
    bench.a.record(event)
    bench.a.run(lambda: bench.x.fill_(5.0))
    if mended:
        bench.a.record(event)
    bench.b.wait(event)
    bench.b.run(lambda: bench.x + 1)


def graph_output_is_overwritten(bench: Bench, mended: bool) -> None:
    graph, (output,) = bench.device.capture(bench.a, lambda: [bench.x * 2])
    graph.launch(bench.a)
    event = bench.device.event()
    bench.a.record(event)
    bench.b.wait(event)
    bench.b.run(lambda: output + 1)
    bench.order("b", "a", mended=mended)
    graph.launch(bench.a)


def memory_is_dropped_while_read(bench: Bench, mended: bool) -> None:
    x = bench.device.tensor([1.0, 2.0, 3.0, 4.0])
    stream = bench.device.current_stream()
    event = bench.device.event()
    stream.record(event)
    bench.b.wait(event)
    bench.b.copy(bench.y, x)
    if mended:
        bench.b.record(event)
        stream.wait(event)
    del x


def graph_reads_memory_that_was_dropped(bench: Bench, mended: bool) -> None:
    x = bench.device.tensor([1.0])
    keep = [x]
    bench.device.synchronize()
    graph, _ = bench.device.capture(bench.a, lambda: [keep[0] * 2])
    del x
    if not mended:
        keep.clear()
    graph.launch(bench.a)
    if mended:
        bench.a.synchronize()  # before the memory goes, with this function


def graph_closed_in_flight(bench: Bench, mended: bool) -> None:
    graph, _ = bench.device.capture(bench.a, lambda: [bench.x * 2])
    graph.launch(bench.a)
    bench.see("a", mended=mended)
    graph.close()


def garbage_is_read(bench: Bench, mended: bool) -> None:
    memory = bench.device.call(bench.a, lambda: bench.device.empty((4,), torch.float32))
    if mended:
        bench.a.run(memory.zero_)
    bench.a.run(lambda: memory + 1)


def pinned_memory_changes_during_a_copy(bench: Bench, mended: bool) -> None:
    bench.a.copy(bench.x, bench.pinned)
    if mended:
        bench.a.synchronize()
    bench.pinned.numpy()[:] = 8.0
    bench.device.run_until_idle()


def event_is_recorded_while_polled(bench: Bench, mended: bool) -> None:
    event = bench.device.event()
    bench.a.run(lambda: bench.x.fill_(5.0))
    bench.a.record(event)
    assert not bench.device.query(event)
    if mended:
        bench.device.run_until_idle()
        assert bench.device.query(event)
    bench.a.record(event)


PROGRAMS: list[tuple[Callable[[Bench, bool], None], str, str]] = [
    (read_before_write, "read before write", "stream 2 must wait for an event recorded on stream 1"),
    (write_before_read, "write before read", "stream 2 must wait for an event recorded on stream 1"),
    (write_before_write, "write before write", "stream 2 must wait for an event recorded on stream 1"),
    (host_reads_too_early, "read before write", "the host must see an event complete that was recorded on stream 1"),
    (host_writes_too_early, "write before read", "the host must see an event complete that was recorded on stream 1"),
    (event_of_an_earlier_record, "read before write", "stream 2 must wait"),
    (graph_output_is_overwritten, "write before read", "stream 1 must wait for an event recorded on stream 2"),
    (
        memory_is_dropped_while_read,
        "use after free",
        "stream 0 must wait for an event recorded on stream 2",
    ),
    (graph_reads_memory_that_was_dropped, "use after free", "freed before this access was submitted"),
    (graph_closed_in_flight, "use after free", "has not seen its last launch complete"),
    (garbage_is_read, "read of garbage", "was not written since its allocation"),
    (pinned_memory_changes_during_a_copy, "host write during a copy", "changed by the host"),
    (event_is_recorded_while_polled, "record while waited for", "may still be waiting"),
]


@pytest.mark.parametrize(("program", "kind", "message"), PROGRAMS, ids=[program.__name__ for program, _, _ in PROGRAMS])
def test_found(program: Callable[[Bench, bool], None], kind: str, message: str) -> None:
    bench = Bench()
    program(bench, False)
    bench.device.run_until_idle()
    with pytest.raises(HazardError, match=message) as caught:
        bench.device.check()
    assert caught.value.kind == kind
    assert program.__name__ in str(caught.value)  # the stack leads here


@pytest.mark.parametrize("program", [program for program, _, _ in PROGRAMS], ids=lambda program: program.__name__)
def test_mended(program: Callable[[Bench, bool], None]) -> None:
    bench = Bench()
    program(bench, True)
    bench.device.run_until_idle()
    bench.device.check()


def test_a_report_names_both_accesses_and_the_bytes() -> None:
    bench = Bench()
    bench.a.run(lambda: bench.x[2:].fill_(5.0))
    bench.b.run(lambda: bench.x + 1)
    with pytest.raises(HazardError) as caught:
        bench.device.check()
    first, second = caught.value.first, caught.value.second
    assert first is not None
    assert second is not None
    assert (first.name, first.what, first.writes, first.span.begin, first.span.end) == (
        "stream 1",
        "torch.fill_",
        True,
        8,
        16,
    )
    assert (second.name, second.what, second.writes, second.span.end) == ("stream 2", "torch.add", False, 16)


def test_bytes_that_do_not_overlap_are_no_hazard() -> None:
    bench = Bench()
    bench.a.run(lambda: bench.x[2:].fill_(5.0))
    bench.b.run(lambda: bench.x[:2].fill_(6.0))
    bench.device.check()


def test_order_through_a_third_stream_counts() -> None:
    bench = Bench()
    c = bench.device.stream()
    bench.a.run(lambda: bench.x.fill_(5.0))
    for first, then in ((bench.a, c), (c, bench.b)):
        event = bench.device.event()
        first.record(event)
        then.wait(event)
    bench.b.run(lambda: bench.x + 1)
    bench.device.check()


def test_order_through_the_host_counts() -> None:
    bench = Bench()
    bench.a.run(lambda: bench.x.fill_(5.0))
    bench.a.synchronize()
    bench.b.run(lambda: bench.x + 1)
    bench.device.check()
