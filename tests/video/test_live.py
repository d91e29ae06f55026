"""Eight live sources in virtual time: who is slow, stalled or broken harms nobody, and every drop is counted, exactly."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

import aiotrt
from aiotrt import video
from aiotrt.testing import Seeded, SimulatedDevice, run
from aiotrt.video import Backoff, Frame, Pipeline, PipelineStatus, Policy, Result
from tests.video.tools import Remember, clock, in_virtual_time, number_of, picture

FPS = 30
COUNT = 300  # frames of each source: ten seconds


async def camera(count: int = COUNT, *, first: int = 0) -> AsyncIterator[tuple[float, np.ndarray[Any, Any]]]:
    """Frames at its rate, whoever takes them."""
    begin = clock()
    for i in range(first, first + count):
        await asyncio.sleep(begin + (i - first) / FPS - clock())
        yield i / FPS, picture(i % 32)


def busy(index: int) -> float:
    """Three frames long, and for the first half a frame more, so that no end ever falls on an arrival."""
    return 3.5 / FPS if index == 0 else 3 / FPS


def delivered(arrivals: Sequence[float], waiting: int) -> tuple[list[int], int]:
    """What one that is `busy` with each gets, if so many may wait and the oldest makes way; and how many it never gets.

    Not how aiotrt does it: everything that is known about one worker and a bounded line, one arrival at a time.
    """
    line: list[int] = []
    got, drops, free = [], 0, 0.0
    for i, at in enumerate([*arrivals, float("inf")]):
        while line and free <= at:
            got.append(line.pop(0))
            free += busy(got[-1])
        if at == float("inf"):
            break
        if not line and free <= at:
            got.append(i)
            free = at + busy(i)
            continue
        if len(line) == waiting:
            line.pop(0)
            drops += 1
        line.append(i)
    return got, drops


def test_eight_live_sources_one_stalled_one_that_breaks_one_sink_that_sleeps() -> None:
    broken_at: list[float] = []

    async def stalls() -> AsyncIterator[Any]:
        async for frame in camera(60):
            yield frame
        await asyncio.Event().wait()

    async def breaks() -> AsyncIterator[Any]:
        if not broken_at:
            async for frame in camera(90):
                yield frame
            broken_at.append(clock())
            raise ConnectionError("the cable")
        async for frame in camera(COUNT - 90, first=90):
            yield frame

    async def infer(frame: Frame) -> int:
        await asyncio.sleep(0.004)
        return number_of(frame.image)

    remembered, slept = Remember(), Remember()

    async def sleeps(result: Result) -> None:
        slept(result)
        await asyncio.sleep(busy(result.frame.index))

    names = [f"camera {i}" for i in range(8)]
    frames: dict[str, Any] = dict.fromkeys(names, camera) | {"camera 1": stalls, "camera 2": breaks}
    sources = {name: video.open(make, live=True, reconnect=Backoff(first=1.0)) for name, make in frames.items()}
    sinks = {name: sleeps if name == "camera 3" else remembered for name in names}

    async def main() -> PipelineStatus:
        async with Pipeline(
            infer, sources, sinks, in_flight=4, sink_buffer=4, clock=clock, listener=lambda report: None
        ) as pipeline:  # fmt: skip
            await asyncio.sleep(COUNT / FPS - 0.5)
            during = pipeline.status()
            await asyncio.sleep(3.0)
            pipeline.stop("camera 1")
            await pipeline.wait()
            status = pipeline.status()
        for name in names:
            source = during.sources[name]
            assert source.fps == pytest.approx(0 if name == "camera 1" else FPS, rel=0.05), name
            assert source.latency["device"].worst == pytest.approx(0.004, abs=1e-4)
            assert source.latency["queue"].worst < 0.01
        return status

    status = in_virtual_time(main())
    for name in ("camera 0", *names[4:]):
        assert remembered.indices(name) == list(range(COUNT))
        assert status.sources[name].dropped == status.sources[name].failed == 0
        assert [number_of(frame.image) for frame in remembered.frames(name)] == [i % 32 for i in range(COUNT)]
    assert remembered.indices("camera 1") == list(range(60))
    assert remembered.indices("camera 2") == list(range(COUNT))
    assert [frame.time for frame in remembered.frames("camera 2")] == pytest.approx([i / FPS for i in range(COUNT)])
    assert status.sources["camera 2"].reports == {"lost": 1, "reconnected": 1}
    got, drops = delivered([i / FPS for i in range(COUNT)], 4)
    (sink,) = status.sources["camera 3"].sinks
    assert status.sources["camera 3"].completed == COUNT
    assert [result.frame.index for result in slept.results] == got
    assert (sink.delivered, sink.drops) == (len(got), drops)
    assert len(got) + drops == COUNT


def test_the_latest_frame_of_a_model_that_is_too_slow() -> None:
    remembered = Remember()

    async def infer(frame: Frame) -> None:
        await asyncio.sleep(busy(frame.index))

    async def main() -> PipelineStatus:
        async with Pipeline(infer, video.open(camera, live=True), remembered, in_flight=1, clock=clock) as pipeline:
            await pipeline.wait()
            return pipeline.status()

    status = in_virtual_time(main()).sources["frames"]
    got, drops = delivered([i / FPS for i in range(COUNT)], 1)
    assert remembered.indices("frames") == got
    assert status.drops == {"overtaken": drops}
    assert status.completed + drops == status.frames == COUNT


def test_stale_frames_are_dropped_when_their_turn_comes() -> None:
    remembered = Remember()

    async def infer(frame: Frame) -> None:
        assert clock() - frame.received <= 0.1 + 1e-6
        await asyncio.sleep(0.2)

    async def main() -> PipelineStatus:
        policy = Policy("latest", buffer=30, max_staleness=0.1)
        async with Pipeline(
            infer, video.open(camera, live=True), remembered, policy=policy, in_flight=1, clock=clock
        ) as pipeline:  # fmt: skip
            await pipeline.wait()
            return pipeline.status()

    status = in_virtual_time(main()).sources["frames"]
    indices = remembered.indices("frames")
    assert indices == sorted(indices)
    assert status.drops == {"stale": COUNT - len(indices)}
    # One in six: the oldest that waited no longer than 0.1 s came three frames before the model was free.
    assert len(indices) == pytest.approx(COUNT / 6, abs=2)


@pytest.mark.parametrize("keep", ["every_frame", "latest"])
def test_max_fps(keep: Any) -> None:
    remembered = Remember()
    times: list[float] = []

    async def infer(frame: Frame) -> None:
        times.append(clock())

    async def main() -> PipelineStatus:
        policy = Policy(keep, max_fps=10)
        async with Pipeline(infer, camera, remembered, policy=policy, clock=clock) as pipeline:
            await pipeline.wait()
            return pipeline.status()

    status = in_virtual_time(main()).sources["frames"]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == pytest.approx([0.1] * len(gaps), abs=1e-3)
    if keep == "every_frame":
        assert remembered.indices("frames") == list(range(COUNT))
        assert not status.drops
    else:
        assert remembered.indices("frames") == list(range(0, COUNT, 3))
        assert status.drops == {"max_fps": 200}


@pytest.mark.parametrize("seed", range(8))
def test_a_model_on_a_simulated_gpu_gives_every_frame_its_own_result(seed: int) -> None:
    """Whatever the device and the threads do when: in order, none lost, and never more in flight than slots allow."""
    remembered = Remember()

    async def main(device: SimulatedDevice) -> PipelineStatus:
        async with aiotrt.load(lambda frame: frame.float().mean(), device=device, slots=2) as model:
            sources = {f"camera {i}": (lambda i=i: camera(20, first=i)) for i in range(3)}
            async with Pipeline(model, sources, remembered, clock=clock) as pipeline:
                await pipeline.wait()
                return pipeline.status()

    device = SimulatedDevice(Seeded(seed))
    status = run(main(device), device)
    assert status.completed == 60
    for i in range(3):
        results = [result for result in remembered.results if result.frame.source == f"camera {i}"]
        assert [result.frame.index for result in results] == list(range(20))
        assert [float(result.output) for result in results] == [8.0 * ((i + k) % 32) for k in range(20)]
