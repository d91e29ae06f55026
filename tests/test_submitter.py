"""The compiled module that submits, against a stand-in driver: what it asks of the driver, in which order, what it refuses.

On a GPU, `tests/gpu` runs it against the real driver wherever the compiled build runs.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.standin.driver import Driver, Kind, Logged, missing, submitter

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"compiling: {missing()}")

BARE, DIRECT, CONTEXT = 11, 12, 13
STREAM, CALLER, EVENT = 21, 22, 31
#: Nodes, and the addresses and sizes of the buffers: two inputs and one output.
PORTS = [(41, 0x1000, 64), (42, 0x2000, 128), (43, 0x3000, 32)]


@dataclass
class Tensor:
    """What the module asks of a tensor."""

    address: int
    is_cuda: bool = True

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Event:
    address: int = EVENT


class Stream:
    def __init__(self, handle: int, log: list[tuple[Any, ...]]) -> None:
        self.handle = handle
        self._log = log

    def record(self, event: Event) -> None:
        self._log.append(("record", self.handle, event))

    def wait(self, event: Event) -> None:
        self._log.append(("wait", self.handle, event))


class Bench:
    """A submitter, and what it did."""

    def __init__(self, driver: Driver, module: Any, *, has_direct: bool = True) -> None:
        self.driver = driver
        self.log: list[tuple[Any, ...]] = []
        self.stream, self.caller = Stream(STREAM, self.log), Stream(CALLER, self.log)
        self.mark = Event(99)
        self.event = Event()
        self.made = module.Submitter(
            BARE, DIRECT if has_direct else 0, CONTEXT, PORTS if has_direct else [], 2, self._fallback, self._fail
        )

    def _fallback(self, *arguments: object) -> None:
        self.log.append(("fallback", *arguments))

    def _fail(self, doing: str, status: int) -> None:
        raise RuntimeError(f"{doing}: {status}")

    def submit(
        self, sources: tuple[Tensor, ...] = (), results: tuple[Tensor, ...] = (), origin: Stream | None = None
    ) -> None:
        self.made.submit(self.stream, origin, self.mark, (), sources, (), results, self.event)


LAUNCH = Logged(Kind.GRAPH_LAUNCH, BARE, STREAM)
LAUNCH_DIRECT = Logged(Kind.GRAPH_LAUNCH, DIRECT, STREAM)
RECORD = Logged(Kind.EVENT_RECORD, EVENT, STREAM)
SOURCES, RESULTS = (Tensor(0xA000), Tensor(0xB000)), (Tensor(0xC000),)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return submitter(tmp_path_factory.mktemp("submitter"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, module: Any) -> Driver:
    driver = Driver(tmp_path_factory.mktemp("driver"))
    module.fill(driver.addresses(module.NAMES))
    return driver


@pytest.fixture
def bench(library: Driver, module: Any) -> Bench:
    library.take()
    return Bench(library, module)


def copies(sources: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> list[Logged]:
    """The calls that point the nodes at these."""
    into = [
        Logged(Kind.SET_COPY, DIRECT, node, (tensor.address, buffer, nbytes))
        for tensor, (node, buffer, nbytes) in zip(sources, PORTS, strict=False)
    ]
    node, buffer, nbytes = PORTS[2]
    return [*into, *[Logged(Kind.SET_COPY, DIRECT, node, (buffer, tensor.address, nbytes)) for tensor in results]]


def test_a_launch_without_copies_is_two_calls(bench: Bench) -> None:
    bench.submit()
    assert bench.driver.take() == [LAUNCH, RECORD]
    assert bench.log == []


def test_copies_are_pointed_at_the_callers_memory_before_the_launch(bench: Bench) -> None:
    bench.submit(SOURCES, RESULTS)
    assert bench.driver.take() == [*copies(SOURCES, RESULTS), LAUNCH_DIRECT, RECORD]


def test_only_what_changed_is_pointed_anew(bench: Bench) -> None:
    bench.submit(SOURCES, RESULTS)
    bench.driver.take()
    bench.submit(SOURCES, RESULTS)
    assert bench.driver.take() == [LAUNCH_DIRECT, RECORD]
    other = Tensor(0xB100)
    bench.submit((SOURCES[0], other), RESULTS)
    assert bench.driver.take() == [copies((SOURCES[0], other), ())[1], LAUNCH_DIRECT, RECORD]


def test_what_was_prepared_is_not_pointed_again(bench: Bench) -> None:
    bench.submit(SOURCES, RESULTS)
    bench.driver.take()
    following = (Tensor(0xC100),)
    bench.made.prepare(following)
    assert bench.driver.take() == copies((), following)
    bench.submit(SOURCES, following)
    assert bench.driver.take() == [LAUNCH_DIRECT, RECORD]


def test_other_results_than_were_prepared_are_pointed_at_again(bench: Bench) -> None:
    bench.made.prepare((Tensor(0xC100),))
    bench.driver.take()
    bench.submit(SOURCES, RESULTS)
    assert bench.driver.take() == [*copies(SOURCES, RESULTS), LAUNCH_DIRECT, RECORD]


def test_nothing_is_prepared_without_a_graph_for_it(library: Driver, module: Any) -> None:
    for results, has_direct in ((RESULTS, False), ((*RESULTS, *RESULTS), True)):
        library.take()
        Bench(library, module, has_direct=has_direct).made.prepare(results)
        assert library.take() == []


def test_preparing_that_fails_is_an_error_and_is_done_again(bench: Bench) -> None:
    bench.driver.answer(Kind.SET_COPY, 700)
    with pytest.raises(RuntimeError, match="setting the address of a copy: 700"):
        bench.made.prepare(RESULTS)
    bench.driver.take()
    bench.submit(SOURCES, RESULTS)
    assert bench.driver.take() == [*copies(SOURCES, RESULTS), LAUNCH_DIRECT, RECORD]


def test_the_callers_stream_is_waited_for_only_while_it_is_busy(bench: Bench) -> None:
    bench.submit(origin=bench.caller)
    assert bench.driver.take() == [Logged(Kind.STREAM_QUERY, CALLER, 0), LAUNCH, RECORD]
    assert bench.log == []
    for status in (600, 700, 900):  # not ready, a fault, a capture: what is done instead says what it is
        bench.driver.answer(Kind.STREAM_QUERY, status)
        bench.submit(origin=bench.caller)
        assert bench.driver.take() == [Logged(Kind.STREAM_QUERY, CALLER, 0), LAUNCH, RECORD]
        assert bench.log == [("record", CALLER, bench.mark), ("wait", STREAM, bench.mark)]
        bench.log.clear()


@pytest.mark.parametrize(
    ("sources", "results"),
    [
        (SOURCES, ()),  # inputs without results: a lease's
        (SOURCES[:1], RESULTS),
        (SOURCES, RESULTS * 2),
        ((SOURCES[0], Tensor(0xB000, is_cuda=False)), RESULTS),
        (SOURCES, (Tensor(0xC000, is_cuda=False),)),
    ],
)
def test_what_it_cannot_submit_goes_to_the_fallback_whole(
    bench: Bench, sources: tuple[Tensor, ...], results: tuple[Tensor, ...]
) -> None:
    bench.submit(sources, results, bench.caller)
    assert bench.log == [("fallback", bench.stream, bench.caller, bench.mark, (), sources, (), results, bench.event)]
    assert not {Kind.GRAPH_LAUNCH, Kind.EVENT_RECORD} & {call.kind for call in bench.driver.take()}


def test_a_graph_without_copies_of_its_own_leaves_calls_to_the_fallback(library: Driver, module: Any) -> None:
    bench = Bench(library, module, has_direct=False)
    bench.submit(SOURCES, RESULTS)
    assert bench.log[0][0] == "fallback"
    library.take()
    bench.submit()
    assert library.take() == [LAUNCH, RECORD]


def test_an_event_that_was_never_recorded_goes_to_the_fallback(bench: Bench) -> None:
    bench.event = Event(0)
    bench.submit()
    assert bench.log[0][0] == "fallback"
    assert bench.driver.take() == []


@pytest.mark.parametrize(
    ("kind", "doing"),
    [
        (Kind.GRAPH_LAUNCH, "launching a graph"),
        (Kind.EVENT_RECORD, "recording an event"),
        (Kind.SET_COPY, "setting the address of a copy"),
    ],
)
def test_an_error_is_raised_and_says_what_failed(bench: Bench, kind: Kind, doing: str) -> None:
    bench.driver.answer(kind, 700)
    with pytest.raises(RuntimeError, match=f"{doing}: 700"):
        bench.submit(SOURCES, RESULTS)
    assert bench.driver.take()[-1].kind == kind, "nothing is asked after an error"
    bench.submit(SOURCES, RESULTS)
    calls = bench.driver.take()
    assert calls[-2:] == [LAUNCH_DIRECT, RECORD]
    assert kind != Kind.SET_COPY or calls[:3] == copies(SOURCES, RESULTS), "a node that failed is pointed anew"


def test_an_input_whose_address_raises_is_the_callers_error(bench: Bench) -> None:
    class Bad(Tensor):
        def data_ptr(self) -> int:
            raise ValueError("no address")

    with pytest.raises(ValueError, match="no address"):
        bench.submit((SOURCES[0], Bad(0)), RESULTS)
    assert not {Kind.GRAPH_LAUNCH, Kind.EVENT_RECORD} & {call.kind for call in bench.driver.take()}


def test_a_probe_answers_as_the_event_does(bench: Bench, module: Any) -> None:
    event = Event(0)
    probe = module.Probe(event)
    assert probe() is True, "an event that was never recorded is complete"
    assert bench.driver.take() == []
    event.address = EVENT
    for status, answer in ((0, True), (600, False)):
        bench.driver.answer(Kind.EVENT_QUERY, status)
        assert probe() is answer
        assert bench.driver.take() == [Logged(Kind.EVENT_QUERY, EVENT, 0)]
    bench.driver.answer(Kind.EVENT_QUERY, 719)
    with pytest.raises(RuntimeError, match="719"):
        probe()


def test_a_probe_keeps_its_event(module: Any) -> None:
    class Tracked(Event):
        pass

    event = Tracked()
    reference = weakref.ref(event)
    probe = module.Probe(event)
    del event
    gc.collect()
    assert reference() is not None
    del probe
    gc.collect()
    assert reference() is None


def test_a_driver_without_one_of_the_functions_is_an_error(module: Any, library: Driver) -> None:
    addresses = library.addresses(module.NAMES)
    for name in module.NAMES:
        with pytest.raises(KeyError, match=name):
            module.fill({key: value for key, value in addresses.items() if key != name})
    module.fill(addresses)


# Jobs: copies and launches by threads...

SUBMISSION = [Logged(Kind.SET_CONTEXT, CONTEXT, 0), Logged(Kind.GRAPH_LAUNCH, BARE, STREAM), RECORD]


class Jobs:
    """Makes jobs, and remembers what their `fail` was given."""

    def __init__(self, module: Any, driver: Driver, threads: int = 2) -> None:
        self.module, self.driver, self.threads = module, driver, threads
        self.failures: list[tuple[str, int, bool]] = []
        self.is_complete = True

    def job(self, *copies: tuple[Any, Any], graph: int = BARE, kept: object = None) -> Any:
        return self.module.CopyJob(
            copies, graph, STREAM, EVENT, CONTEXT, kept, self.threads, self._fail, lambda: self.is_complete
        )

    def _fail(self, doing: str, status: int, is_lost: bool) -> None:
        self.failures.append((doing, status, is_lost))
        raise OSError(doing)

    def finish(self, job: Any) -> None:
        """Wait until it was submitted, and see that it is complete."""
        ends = time.monotonic() + 20
        while not job.confirm():
            assert time.monotonic() < ends
            time.sleep(1e-4)


@pytest.fixture
def jobs(library: Driver, module: Any) -> Iterator[Jobs]:
    library.take()
    yield Jobs(module, library)
    ends = time.monotonic() + 20
    while module.end():
        assert time.monotonic() < ends
        time.sleep(1e-4)
    module.begin()


def test_a_job_copies_and_then_launches(jobs: Jobs) -> None:
    sources: list[np.ndarray[Any, Any]] = [np.arange(1 << 18, dtype=np.float32), np.ones((3, 5), np.uint8)]
    destinations = [np.zeros_like(source) for source in sources]
    job = jobs.job(*zip(destinations, sources, strict=True))
    assert job() is False
    assert jobs.driver.take() == []
    job.start()
    jobs.finish(job)
    assert jobs.driver.take() == SUBMISSION
    assert all(np.array_equal(got, source) for got, source in zip(destinations, sources, strict=True))
    for status, answer in ((600, False), (0, True)):
        jobs.driver.answer(Kind.EVENT_QUERY, status)
        assert job() is answer
    jobs.driver.take()
    job.start()
    assert jobs.driver.take() == [], "it was started once"


def test_a_job_is_incomplete_while_its_thread_launches(jobs: Jobs) -> None:
    job = jobs.job((np.zeros(4), np.ones(4)))
    with jobs.driver.holding():
        job.start()
        jobs.driver.wait_held(1)
        assert job() is False
        assert job.confirm() is False
    jobs.finish(job)


def test_no_more_threads_than_wanted_and_the_first_comes_first(jobs: Jobs) -> None:
    made = [jobs.job((np.zeros(4), np.ones(4)), graph=100 + i) for i in range(20)]
    with jobs.driver.holding():
        for job in made:
            job.start()
        jobs.driver.wait_held(2)
        launched = [call.a for call in jobs.driver.take() if call.kind == Kind.GRAPH_LAUNCH]
        assert sorted(launched) == [100, 101]
    for job in made:
        jobs.finish(job)
    assert sorted(call.a for call in jobs.driver.take() if call.kind == Kind.GRAPH_LAUNCH) == list(range(102, 120))


def test_one_thread_keeps_the_order(jobs: Jobs) -> None:
    jobs.threads = 1
    made = [jobs.job((np.zeros(4), np.ones(4)), graph=100 + i) for i in range(20)]
    for job in made:
        job.start()
    for job in made:
        jobs.finish(job)
    assert [call.a for call in jobs.driver.take() if call.kind == Kind.GRAPH_LAUNCH] == list(range(100, 120))


def test_a_launch_that_fails_is_an_error_once_what_was_submitted_is_complete(jobs: Jobs) -> None:
    jobs.driver.answer(Kind.GRAPH_LAUNCH, 700)
    jobs.is_complete = False
    job = jobs.job((np.zeros(4), np.ones(4)))
    job.start()
    until_submitted(job)
    assert job.confirm() is False
    jobs.is_complete = True
    with pytest.raises(OSError, match="launching a graph"):
        job.confirm()
    assert jobs.failures == [("launching a graph", 700, False)]
    assert jobs.driver.take() == SUBMISSION, "the event is recorded even so: part of the work may be on the stream"


def test_a_record_that_fails_leaves_the_end_unknown(jobs: Jobs) -> None:
    jobs.driver.answer(Kind.EVENT_RECORD, 2)
    job = jobs.job((np.zeros(4), np.ones(4)))
    job.start()
    until_submitted(job)
    with pytest.raises(OSError, match="recording an event"):
        job.confirm()
    assert jobs.failures == [("recording an event", 2, True)]


def test_without_the_context_nothing_is_launched(jobs: Jobs) -> None:
    jobs.driver.answer(Kind.SET_CONTEXT, 201)
    job = jobs.job((np.zeros(4), np.ones(4)))
    job.start()
    until_submitted(job)
    with pytest.raises(OSError, match="launching a graph"):
        job.confirm()
    assert jobs.driver.take() == SUBMISSION[:1]


def until_submitted(job: Any) -> None:
    """Wait until a job that fails was submitted."""
    ends = time.monotonic() + 20
    while True:
        try:
            job()
        except RuntimeError:
            return
        assert time.monotonic() < ends
        time.sleep(1e-4)


@pytest.mark.parametrize(
    "copy",
    [
        (np.zeros(4), np.ones(8)[::2]),
        (np.zeros(8)[::2], np.ones(4)),
        (np.zeros(4), np.ones(5)),
        (np.zeros(4), "text"),
        (np.frombuffer(bytes(32)), np.ones(4)),
    ],
)
def test_arrays_that_it_cannot_copy_are_refused_and_let_go(jobs: Jobs, copy: tuple[Any, Any]) -> None:
    good = np.zeros(4), np.ones(4)
    with pytest.raises((BufferError, TypeError, ValueError)):
        jobs.job(good, copy)
    good[0].resize(5, refcheck=True)  # refused while a buffer of it is exported


def test_what_a_thread_uses_is_kept_until_it_is_done(jobs: Jobs) -> None:
    class Tracked(np.ndarray[Any, Any]):
        pass

    kept = Tracked((4,))
    source = np.ones(4).view(Tracked)
    references = [weakref.ref(kept), weakref.ref(source)]
    job = jobs.job((np.zeros(4), source), kept=kept)
    del kept, source
    with jobs.driver.holding():
        job.start()
        jobs.driver.wait_held(1)
        del job  # as a request that was given up
        gc.collect()
        assert all(reference() is not None for reference in references)
    following = jobs.job((np.zeros(4), np.ones(4)))
    jobs.threads = 1
    following.start()
    jobs.finish(following)
    ends = time.monotonic() + 20
    while any(reference() is not None for reference in references):  # the next start forgets it
        assert time.monotonic() < ends
        another = jobs.job((np.zeros(4), np.ones(4)))
        another.start()
        jobs.finish(another)


def test_what_the_device_uses_is_kept_until_the_work_is_complete(jobs: Jobs) -> None:
    class Kept:
        pass

    kept = Kept()
    reference = weakref.ref(kept)
    jobs.driver.answer(Kind.EVENT_QUERY, 600)
    job = jobs.job((np.zeros(4), np.ones(4)), kept=kept)
    job.start()
    del job, kept  # as a request whose model was dropped
    for status in (600, 900):
        jobs.driver.answer(Kind.EVENT_QUERY, status)
        for _ in range(100):
            jobs.job((np.zeros(4), np.ones(4))).start()
        gc.collect()
        assert reference() is not None
    jobs.driver.answer(Kind.EVENT_QUERY, 0)
    ends = time.monotonic() + 20
    while reference() is not None:
        assert time.monotonic() < ends
        jobs.job((np.zeros(4), np.ones(4))).start()


def test_a_job_that_was_never_started_lets_go(jobs: Jobs) -> None:
    source = np.ones(4)
    job = jobs.job((np.zeros(4), source))
    del job
    source.resize(5, refcheck=True)


def test_threads_end_and_work_after_that_is_done(jobs: Jobs) -> None:
    first = jobs.job((np.zeros(4), np.ones(4)))
    first.start()
    jobs.finish(first)
    ends = time.monotonic() + 20
    while jobs.module.end():
        assert time.monotonic() < ends
        time.sleep(1e-4)
    late = jobs.job((np.zeros(4), np.ones(4)))
    late.start()
    jobs.finish(late)


def test_it_frees_what_it_has(library: Driver, module: Any) -> None:
    class Fallback:
        def __call__(self, *_: object) -> None:
            raise AssertionError

    fallback = Fallback()
    reference = weakref.ref(fallback)
    made = [module.Submitter(BARE, DIRECT, CONTEXT, PORTS, 2, fallback, None) for _ in range(1000)]
    del made, fallback
    gc.collect()
    assert reference() is None
