"""Pipelines with functions for models, held by events: who waits for whom, what is lost, and what is left."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from aiotrt.errors import InputError, UsageError
from aiotrt.video import Frame, Kind, Pipeline, Policy, Result
from aiotrt.video.pipeline import _limit
from tests.tools import turns, until
from tests.video.tools import Remember, number_of, picture, write_video

pytestmark = pytest.mark.asyncio


#: Of pipelines, sinks and the sources here; the devices' own stay.
THREADS = ("aiotrt-video", "aiotrt-sink", "aiotrt-a", "aiotrt-b", "aiotrt-frames")


async def number(frame: Frame) -> int:
    """A model that reads a picture's number."""
    return number_of(frame.image)


def pictures(n: int) -> list[np.ndarray[Any, Any]]:
    return [picture(i % 32) for i in range(n)]


class Gate:
    """A model that waits until it is let go, frame by frame."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Frame, asyncio.Future[None]]] = []

    async def __call__(self, frame: Frame) -> int:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((frame, future))
        await future
        return number_of(frame.image)

    def open(self, which: int = 0) -> None:
        _, future = self.waiting.pop(which)
        future.set_result(None)


async def nothing_left(before: set[asyncio.Task[Any]]) -> None:
    await turns(3)
    assert asyncio.all_tasks() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


async def test_every_frame_of_every_source_comes_in_order() -> None:
    before, sink = asyncio.all_tasks(), Remember()
    async with Pipeline(number, {"a": pictures(20), "b": pictures(7), "c": []}, sink) as pipeline:
        await pipeline.wait()
        status = pipeline.status()
    for name, count in (("a", 20), ("b", 7), ("c", 0)):
        assert sink.indices(name) == list(range(count))
        source = status.sources[name]
        assert (source.state, source.frames, source.completed, source.dropped) == ("ended", count, count, 0)
    assert [result.output for result in sink.results if result.frame.source == "a"] == list(range(20))
    assert status.completed == 27
    assert status.in_flight == 0
    await nothing_left(before)


@pytest.mark.parametrize("slow", ["source", "models", "sinks"])
async def test_the_status_says_what_limits_the_pipeline(slow: str) -> None:
    now = 0.0

    async def work(who: str) -> None:
        nonlocal now
        if who == slow:
            await turns(30)
            now += 1.0

    async def frames() -> AsyncIterator[Any]:
        for i in range(30):
            await work("source")
            yield picture(i)

    async def model(frame: Frame) -> int:
        await work("models")
        return frame.index

    async def sink(result: Result) -> None:
        await work("sinks")

    sources = {"a": frames, "b": frames}
    async with Pipeline(model, sources, sink, clock=lambda: now, in_flight=2, sink_buffer=1) as pipeline:
        assert pipeline.status().limited_by == ""
        await pipeline.wait()
        status = pipeline.status()
    assert {source.limited_by for source in status.sources.values()} == {slow}
    assert status.limited_by == slow


async def test_a_source_in_real_time_does_not_hide_that_the_models_are_full() -> None:
    assert _limit(["source", "models", "source"]) == "models"
    assert _limit(["source", "", "source"]) == "source"


async def test_leaving_waits_for_the_tail() -> None:
    sink = Remember()
    async with Pipeline(number, pictures(30), sink) as pipeline:
        await until(lambda: len(sink.results) > 3)
    status = pipeline.status().sources["frames"]
    assert sink.indices("frames") == list(range(status.frames))
    assert status.frames >= 4


async def test_results_that_overtake_each_other_are_put_in_order() -> None:
    gate, sink = Gate(), Remember()
    async with Pipeline(gate, pictures(3), sink, in_flight=3) as pipeline:
        await until(lambda: len(gate.waiting) == 3)
        gate.open(2)
        gate.open(1)
        await turns(20)
        assert not sink.results
        gate.open(0)
        await pipeline.wait()
    assert sink.indices("frames") == [0, 1, 2]


async def test_no_more_are_in_flight_than_allowed_whoever_they_are_from() -> None:
    gate = Gate()
    async with Pipeline(gate, {"a": pictures(5), "b": pictures(5)}, in_flight=3) as pipeline:
        await until(lambda: len(gate.waiting) == 3)
        await turns(50)
        status = pipeline.status()
        assert len(gate.waiting) == status.in_flight == status.limit == 3
        sources = status.sources.values()
        assert all(s.frames == s.completed + s.failed + s.dropped + s.waiting + s.in_flight for s in sources)
        while pipeline.status().completed < 10:
            if gate.waiting:
                gate.open()
            await asyncio.sleep(0)


@pytest.mark.parametrize("policy", ["every_frame", "latest"])
async def test_a_sink_that_stands_still_stalls_nobody_else(policy: Any) -> None:
    """Of its own source, every frame waits, or the latest stay; of the other, all come."""
    held, got, other = asyncio.Event(), [], Remember()

    async def slow(result: Result) -> None:
        await held.wait()
        got.append(result.frame.index)

    async def frames() -> AsyncIterator[Any]:
        for i in range(40):
            if policy == "latest":  # each is done before the next comes, so that what is dropped is the sink's
                await until(lambda i=i: pipeline.status().completed >= 40 + i)  # type: ignore[misc]
            yield picture(i % 32)

    sources: dict[str, Any] = {"a": frames, "b": pictures(40)}
    sinks: dict[str, Any] = {"a": slow, "b": other}
    pipeline = Pipeline(number, sources, sinks, policy={"a": policy}, sink_buffer=2)
    async with pipeline:
        await until(lambda: len(other.results) == 40)
        if policy == "every_frame":
            await turns(200)
            status = pipeline.status().sources["a"]
            assert 3 <= status.completed < 12
            assert status.sinks[0].drops == 0
        else:
            await until(lambda: pipeline.status().completed == 80)
            await turns(5)
            status = pipeline.status().sources["a"]
            assert status.sinks[0].drops == 37  # one in its hands, two in its mailbox
        assert status.sinks[0].waiting == 2
        held.set()
        await pipeline.wait()
    assert got == (list(range(40)) if policy == "every_frame" else [0, 38, 39])


async def test_two_sinks_of_one_live_source_do_not_wait_for_each_other() -> None:
    held, fast = asyncio.Event(), Remember()

    async def slow(result: Result) -> None:
        await held.wait()

    release = asyncio.Event()

    async def frames() -> AsyncIterator[Any]:
        for i in range(20):
            await until(lambda i=i: len(fast.results) >= i)  # type: ignore[misc]
            yield picture(i)
        await release.wait()

    async with Pipeline(number, video.open(frames, live=True), [slow, fast]) as pipeline:
        await until(lambda: len(fast.results) == 20)
        held.set()
        release.set()
        await pipeline.wait()
        slow_status, fast_status = pipeline.status().sources["frames"].sinks
    assert fast.indices("frames") == list(range(20))
    assert slow_status.delivered + slow_status.drops == fast_status.delivered == 20
    assert slow_status.drops == 15  # one in its hands, four in its mailbox


async def test_a_sink_that_raises_is_counted_and_called_again() -> None:
    reports: list[video.Report] = []
    good = Remember()

    def bad(result: Result) -> None:
        if result.frame.index % 2:
            raise ValueError("odd")

    async with Pipeline(number, pictures(10), [bad, good], listener=reports.append) as pipeline:
        await pipeline.wait()
        sinks = pipeline.status().sources["frames"].sinks
    assert (sinks[0].name, sinks[0].delivered, sinks[0].failed) == ("bad", 5, 5)
    assert len(good.results) == 10
    assert [report.kind for report in reports] == [Kind.SINK] * 5
    assert "bad raised for <Frame 1 of frames" in reports[0].detail


async def cancelled_elsewhere() -> None:
    """As a call of somebody's does that its connection gave up."""
    call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    call.cancel()
    await call


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("give_up", [cancelled_elsewhere, cancels_itself])
async def test_a_model_whose_call_is_cancelled_elsewhere_fails_that_frame_alone(give_up: Any) -> None:
    before, sink, reports = asyncio.all_tasks(), Remember(), list[video.Report]()

    async def call(frame: Frame) -> int:
        if frame.index == 2:
            await give_up()
        return number_of(frame.image)

    async with Pipeline(call, pictures(9), sink, listener=reports.append) as pipeline:
        await pipeline.wait()
        status = pipeline.status().sources["frames"]
    assert sink.indices("frames") == [0, 1, *range(3, 9)]
    assert (status.frames, status.completed, status.failed, status.in_flight) == (9, 8, 1, 0)
    assert [report.kind for report in reports] == [Kind.INFERENCE]
    assert "<Frame 2 of frames: 48x64x3>: an operation that it awaited was cancelled from outside" in reports[0].detail
    await nothing_left(before)


async def test_a_sink_whose_call_is_cancelled_elsewhere_gets_the_next_result() -> None:
    before, got, reports = asyncio.all_tasks(), list[int](), list[video.Report]()

    async def sink(result: Result) -> None:
        if result.frame.index == 2:
            await cancelled_elsewhere()
        got.append(result.frame.index)

    async with Pipeline(number, pictures(9), sink, listener=reports.append) as pipeline:
        await pipeline.wait()
        (status,) = pipeline.status().sources["frames"].sinks
    assert got == [0, 1, *range(3, 9)]
    assert (status.delivered, status.failed) == (8, 1)
    assert [report.kind for report in reports] == [Kind.SINK]
    await nothing_left(before)


async def test_a_source_whose_call_is_cancelled_elsewhere_fails_or_is_tried_again() -> None:
    before, sink, lives = asyncio.all_tasks(), Remember(), Counter[str]()

    def frames(name: str) -> Any:
        async def generate() -> AsyncIterator[Any]:
            lives[name] += 1
            yield picture(0)
            if lives[name] == 1:
                await cancelled_elsewhere()

        return generate

    sources = {"a": frames("a"), "b": video.open(frames("b"), reconnect=video.Backoff(first=0))}
    async with Pipeline(number, sources, sink, listener=lambda report: None) as pipeline:
        await pipeline.wait()
        status = pipeline.status().sources
    assert (status["a"].state, status["a"].frames) == ("failed", 1)
    assert "cancelled from outside" in (status["a"].error or "")
    assert (status["b"].state, status["b"].error, status["b"].frames) == ("ended", None, 2)
    assert status["b"].reports == {"lost": 1, "reconnected": 1}
    await nothing_left(before)


async def test_broken_sources_end_alone_and_say_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    good, sink = write_video(tmp_path / "good.mp4", range(10)), Remember()

    def raises() -> Any:
        yield picture(0)
        raise RuntimeError("lens cap")

    sources = {"missing": tmp_path / "missing.mp4", "text": tmp_path / "text.mp4", "raises": raises, "good": good}
    async with Pipeline(number, sources, sink) as pipeline:
        await pipeline.wait()
        status = pipeline.status()
    assert {name: source.state for name, source in status.sources.items()} == {
        "missing": "failed", "text": "failed", "raises": "failed", "good": "ended",
    }  # fmt: skip
    assert sink.indices("good") == list(range(10))
    assert sink.indices("raises") == [0]
    assert "No such file" in (status.sources["missing"].error or "")
    assert "lens cap" in (status.sources["raises"].error or "")
    assert sum("failed" in record.message for record in caplog.records) == 3


async def test_of_all_bad_inputs_at_once_nothing_is_lost_silently(tmp_path: Path) -> None:
    """Each says what is wrong with it; each frame has gone somewhere; and a good one next to them gets all of its own."""
    cut = write_video(tmp_path / "cut.mp4", [i % 32 for i in range(100)])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    sizes = [write_video(tmp_path / f"{i}.h264", range(5), size=size) for i, size in enumerate([(64, 48), (128, 80)])]
    (tmp_path / "sizes.h264").write_bytes(b"".join(path.read_bytes() for path in sizes))
    (tmp_path / "text.mp4").write_text("no video")
    times = [0, 0.04, 0.05, 0.3, 1.0]
    sources: dict[str, Any] = {
        "missing": tmp_path / "missing.mp4",
        "text": tmp_path / "text.mp4",
        "cut": cut,
        "sizes": tmp_path / "sizes.h264",
        "empty": write_video(tmp_path / "empty.mp4", []),
        "uneven": write_video(tmp_path / "uneven.mkv", range(5), times=times),
        "huge": video.open([picture(0), picture(1, 640, 480), picture(2)], max_pixels=10_000),
        "good": write_video(tmp_path / "good.mp4", range(10)),
    }
    remembered, heard = Remember(), Counter[tuple[str, str]]()

    def raises(result: Result) -> None:
        raise ValueError("no")

    def hear(report: video.Report) -> None:
        heard[report.source, report.kind.value] += 1

    async with Pipeline(number, sources, [remembered, raises], listener=hear) as pipeline:
        await pipeline.wait()
        status = pipeline.status()
    reports = {}
    for name, source in status.sources.items():
        good, bad = source.sinks
        assert source.frames == source.completed == good.delivered == bad.failed == len(remembered.indices(name))
        assert remembered.indices(name) == list(range(source.frames))
        assert dict(source.reports) == {kind: count for (whose, kind), count in heard.items() if whose == name}
        reports[name] = {kind: count for kind, count in source.reports.items() if kind != "sink"}
        assert (source.error is not None) == (source.state == "failed") == ("failed" in reports[name])
    assert reports.pop("cut")["truncated"] == 1
    assert reports == {
        "missing": {"failed": 1}, "text": {"failed": 1}, "empty": {"failed": 1}, "sizes": {"resolution": 1}, "uneven": {},
        "huge": {"huge": 1}, "good": {},
    }  # fmt: skip
    assert 10 < status.sources["cut"].frames < 90
    assert {name: status.sources[name].frames for name in ("sizes", "huge", "good")} == {"sizes": 10, "huge": 2, "good": 10}
    assert [frame.time for frame in remembered.frames("uneven")] == pytest.approx(times, abs=1e-3)


async def test_a_sink_that_cannot_be_closed_is_reported_and_the_others_are_closed() -> None:
    closed = []

    class Bad(video.Sink):
        async def write(self, result: Result) -> None:
            pass

        async def aclose(self) -> None:
            raise OSError("no space left")

    class Good(Bad):
        async def aclose(self) -> None:
            closed.append(self.name)

    before, reports = asyncio.all_tasks(), list[video.Report]()
    async with Pipeline(number, pictures(3), [Good(), Bad(), Good()], listener=reports.append) as pipeline:
        await pipeline.wait()
    assert [(report.kind, report.source, report.detail) for report in reports] == [
        (Kind.SINK, "", "Bad could not be closed: no space left")
    ]
    assert pipeline.status().reports == {"sink": 1}
    assert closed == ["Good", "Good"]
    await nothing_left(before)


async def test_a_frame_that_a_model_refuses_is_counted_and_the_next_one_comes() -> None:
    sink = Remember()
    reports: list[video.Report] = []

    async def picky(frame: Frame) -> int:
        if frame.index == 2:
            raise InputError("not this one")
        return frame.index

    async with Pipeline(picky, pictures(5), sink, listener=reports.append) as pipeline:
        await pipeline.wait()
        status = pipeline.status().sources["frames"]
    assert sink.indices("frames") == [0, 1, 3, 4]
    assert (status.completed, status.failed) == (4, 1)
    assert [report.kind for report in reports] == [Kind.INFERENCE]


async def test_pause_resume_and_stop() -> None:
    sink = Remember()
    async with Pipeline(number, {"a": pictures(500), "b": pictures(50)}, sink) as pipeline:
        pipeline.pause("a")
        await until(lambda: len(sink.indices("b")) == 50)
        await turns(50)
        count = len(sink.indices("a"))
        assert pipeline.status().sources["a"].state == "paused"
        await turns(50)
        assert len(sink.indices("a")) == count
        pipeline.resume("a")
        await until(lambda: len(sink.indices("a")) > count + 5)
        pipeline.stop("a")
        await pipeline.wait()
        status = pipeline.status().sources["a"]
    assert sink.indices("a") == list(range(status.frames))
    assert status.frames < 500
    with pytest.raises(UsageError, match="there is no source 'c'"):
        pipeline.pause("c")


async def test_a_paused_pipeline_can_be_left() -> None:
    sink = Remember()
    async with Pipeline(number, pictures(5), sink) as pipeline:
        pipeline.pause()
    assert sink.indices("frames") == list(range(pipeline.status().completed))


async def test_an_exception_in_the_block_drops_everything_at_once() -> None:
    before, gate = asyncio.all_tasks(), Gate()
    with pytest.raises(RuntimeError, match="enough"):
        async with Pipeline(gate, pictures(9)):
            await until(lambda: len(gate.waiting) == 2)
            raise RuntimeError("enough")
    assert all(future.cancelled() for _, future in gate.waiting)
    await nothing_left(before)


async def test_cancellation_leaves_nothing(tmp_path: Path) -> None:
    before, path = asyncio.all_tasks(), write_video(tmp_path / "a.mp4", range(20))
    gate = Gate()

    async def main() -> None:
        async with Pipeline(gate, [path, video.open(path, name="b", loop=True)], lambda result: None) as pipeline:
            await pipeline.wait()

    task = asyncio.ensure_future(main())
    await until(lambda: len(gate.waiting) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_left(before)


# With models...


async def test_decoded_frames_keep_their_own_results(tmp_path: Path, device: str) -> None:
    """Every result is its frame's, though the slots' buffers are used again and again."""
    path, sink = write_video(tmp_path / "a.mp4", [i % 32 for i in range(64)], size=(50, 38)), Remember()

    def read(frame: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": frame.float().mean(), "image": frame}

    async with aiotrt.load(read, device=device, slots=3) as model:
        async with Pipeline(model, {"a": path, "b": path}, sink) as pipeline:
            await pipeline.wait()
            status = pipeline.status()
        assert model.statistics().replays == 128
    assert status.limit == 6
    for name in ("a", "b"):
        results = [result for result in sink.results if result.frame.source == name]
        assert [round(float(r.output["mean"]) / 8) for r in results] == [i % 32 for i in range(64)]
        assert all(np.array_equal(r.output["image"], r.frame.image) for r in results)
        assert status.sources[name].latency.keys() >= {"decode", "queue", "convert", "device", "sink"}


class Latched:
    """A picture whose conversion waits for permission."""

    shape, pixel_aspect = (4, 4, 3), 1.0
    is_on_device = False
    tensor = None

    def __init__(self) -> None:
        self.begun, self.permitted = threading.Event(), threading.Event()

    def array(self) -> Any:
        self.begun.set()
        assert self.permitted.wait(20)
        return np.full(self.shape, 8, np.uint8)


@pytest.mark.parametrize("several", [False, True])
async def test_no_slot_waits_for_a_conversion(several: bool, device: str) -> None:
    latched, sink = Latched(), Remember()
    async with aiotrt.load(lambda frame: frame.float().mean(), device=device, slots=1) as model:
        models = {"a": model} if several else model
        async with Pipeline(models, [[Frame("a", 0, latched)]], sink) as pipeline:
            await until(latched.begun.is_set)
            assert model.statistics().free == 1
            assert await model(np.zeros((4, 4, 3), np.uint8)) == 0
            latched.permitted.set()
            await pipeline.wait()
    output = sink.results[0].output
    assert (output["a"] if several else output) == 8


async def test_a_resolution_that_changes_is_captured_anew(tmp_path: Path, device: str) -> None:
    first = write_video(tmp_path / "1.h264", range(5))
    second = write_video(tmp_path / "2.h264", range(5, 10), size=(128, 80))
    (tmp_path / "a.h264").write_bytes(first.read_bytes() + second.read_bytes())
    sink = Remember()
    async with aiotrt.load(lambda frame: frame.float().mean(), device=device, slots=1) as model:
        async with Pipeline(model, tmp_path / "a.h264", sink, listener=lambda report: None) as pipeline:
            await pipeline.wait()
        assert model.statistics().captures == 2
    assert [round(float(result.output) / 8) for result in sink.results] == list(range(10))
    assert pipeline.status().sources["a.h264"].reports == {"resolution": 1}


async def test_frames_that_do_not_fit_the_model_are_counted(tmp_path: Path, device: str) -> None:
    path = write_video(tmp_path / "a.mp4", range(4))
    reports: list[video.Report] = []
    program = torch.export.export(Mean(), (torch.zeros(10, 10, 3, dtype=torch.uint8),))
    async with aiotrt.load(program, device=device, slots=1) as model:
        async with Pipeline(model, path, listener=reports.append) as pipeline:
            await pipeline.wait()
            status = pipeline.status().sources["a.mp4"]
    assert (status.completed, status.failed) == (0, 4)
    assert "(48, 64, 3)" in reports[0].detail


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean()


async def test_several_models_and_batches_across_sources(device: str) -> None:
    sink = Remember()

    def of_items(x: torch.Tensor) -> torch.Tensor:
        return x.float().mean(dim=(1, 2, 3))

    async with (
        aiotrt.load(of_items, device=device, slots=1, batching=aiotrt.Batching(max_size=4)) as batched,
        aiotrt.load(lambda frame: frame.amax(), device=device, slots=1) as other,
    ):
        sources = {f"camera {i}": pictures(16) for i in range(4)}
        async with Pipeline({"mean": batched, "max": other}, sources, sink) as pipeline:
            await pipeline.wait()
        sizes = batched.statistics().batches
    assert sum(size * count for size, count in sizes.items()) == 64
    assert max(sizes) > 1  # frames of several calls went together
    for result in sink.results:
        assert float(result.output["mean"]) == pytest.approx(float(result.output["max"]))
        assert float(result.output["max"]) == 8 * (result.frame.index % 32)


async def test_a_model_that_is_closed_stops_the_pipeline_and_wait_says_so(device: str) -> None:
    before = asyncio.all_tasks()
    model = await aiotrt.load(lambda frame: frame.float().mean(), device=device, slots=1)
    stopped = asyncio.Event()

    async def frames() -> AsyncIterator[Any]:
        yield picture(0)
        await stopped.wait()
        for i in range(100):
            yield picture(i % 32)

    with pytest.raises(aiotrt.ModelClosedError):
        async with Pipeline(model, {"a": frames, "b": frames}) as pipeline:
            await until(lambda: pipeline.status().completed == 2)
            await model.aclose()
            stopped.set()
            await pipeline.wait()
    await nothing_left(before)


# Options...


async def test_wrong_options() -> None:
    for arguments, says in (
        ({"sources": []}, "at least one source"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
        ({"policy": {"b": "latest"}}, "there is no source 'b'"),
        ({"sinks": {"b": print}}, "there is no source 'b'"),
        ({"sinks": [3]}, "a sink must be a Sink, a function"),
    ):
        with pytest.raises(InputError, match=says):
            Pipeline(number, **{"sources": {"a": pictures(1)}, **arguments})  # type: ignore[arg-type]
    for models, says in ((3, "expected a model"), ({}, "at least one model"), ({"a": print}, "'a': expected a model")):
        with pytest.raises(InputError, match=says):
            Pipeline(models, pictures(1))  # type: ignore[arg-type]


async def test_sources_of_one_name_are_told_apart() -> None:
    sink = Remember()
    async with Pipeline(number, [video.open(pictures(2)), video.open(pictures(3))], sink) as pipeline:
        await pipeline.wait()
    assert {name: len(sink.indices(name)) for name in pipeline.status().sources} == {"frames 0": 2, "frames 1": 3}


async def test_status_is_frozen_and_entering_twice_is_refused() -> None:
    pipeline = Pipeline(number, pictures(1), policy=Policy(buffer=1))
    assert pipeline.status().state == "closed"
    async with pipeline:
        with pytest.raises(AttributeError):
            pipeline.status().limit = 3  # type: ignore[misc]
    assert pipeline.status().state == "ended"
    with pytest.raises(UsageError, match="entered only once"):
        async with pipeline:
            pass
