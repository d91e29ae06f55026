"""What sinks write can be read again: video with its times, JSON, MJPEG, and what is drawn."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from aiotrt import video
from aiotrt.video import Detections, Frame, Pipeline, Result
from aiotrt.video.frames import Held
from tests.tools import turns, until
from tests.video.tools import number_of, picture, write_video

pytestmark = pytest.mark.asyncio


async def same(frame: Frame) -> int:
    return frame.index


def contents(path: Path) -> list[tuple[float, np.ndarray[Any, Any]]]:
    with av.open(str(path)) as file:
        return [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def found(n: int = 1) -> Detections:
    masks = np.zeros((n, 48, 64), bool)
    masks[:, 20:30, 20:40] = True
    return Detections(np.array([[10.0, 18, 50, 40]] * n), np.full(n, 0.9), np.arange(n), masks, (48, 64))


async def test_a_video_file_keeps_every_frame_and_its_time(tmp_path: Path) -> None:
    times = [0, 0.04, 0.05, 0.3, 1.0]
    source = write_video(tmp_path / "a.mkv", range(5), times=times)
    async with Pipeline(same, source, video.VideoFile(tmp_path / "out.mp4")) as pipeline:
        await pipeline.wait()
    written = contents(tmp_path / "out.mp4")
    assert [number_of(image) for _, image in written] == list(range(5))
    assert [at for at, _ in written] == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize(
    ("times", "written"),
    [
        ([0, 0.1, 0.2, 0, 0.1, 0.2], [0, 0.1, 0.2, 0.25, 0.35, 0.45]),  # a source that came back
        ([0, 0.1, 90, 0.3, 0.4], [0, 0.1, 90, 90.05, 90.15]),
        ([5, 5.1, 5.1, 5.2], [0, 0.1, 0.1, 0.2]),
        ([None, 3, None, 3.2], [0, 0.05, 0.1, 0.25]),
        ([np.nan, 3, np.inf, 3.2], [0, 0.05, 0.1, 0.25]),
        ([0, 0.1, 36000.1, 36000.2, 36000.3], [0, 0.1, 0.15, 0.25, 0.35]),  # a clock that was set
        ([0, 0.1, 47721.9, 47722.0], [0, 0.1, 0.15, 0.25]),  # an RTP clock that rolled over
        ([0, 3599.0, 3599.1], [0, 3599.0, 3599.1]),  # nothing moved
        ([0.0, 1e300, 0.1, 0.2], [0, 0.05, 0.1, 0.2]),
    ],
)
async def test_times_that_go_back_or_far_ahead_or_are_none_take_the_place_after_the_last_one(
    tmp_path: Path, times: list[float | None], written: list[float]
) -> None:
    sink = video.VideoFile(tmp_path / "x.mp4", rate=20)
    await sink.open()
    for i, at in enumerate(times):
        await sink.write(Result(Frame("a", i, Held(picture(i)), time=at), None))
    await sink.aclose()
    assert [at for at, _ in contents(tmp_path / "x.mp4")] == pytest.approx(written, abs=1e-3)


async def test_a_file_for_each_source_and_odd_sizes(tmp_path: Path) -> None:
    sources = {"a/b": [picture(i, 51, 33) for i in range(4)], "c": [picture(i) for i in range(6)]}
    async with Pipeline(same, sources, video.VideoFile(tmp_path / "{source}.mp4", rate=10)) as pipeline:
        await pipeline.wait()
    assert [image.shape for _, image in contents(tmp_path / "a_b.mp4")] == [(32, 50, 3)] * 4
    assert [at for at, _ in contents(tmp_path / "c.mp4")] == pytest.approx([i / 10 for i in range(6)])


async def test_a_second_source_needs_a_name_in_the_path(tmp_path: Path) -> None:
    reports: list[video.Report] = []
    sources = {"a": [picture(1)], "b": [picture(1)]}
    async with Pipeline(same, sources, video.VideoFile(tmp_path / "x.mp4"), listener=reports.append) as pipeline:
        await pipeline.wait()
    (report,) = reports
    assert "put {source} into the path" in report.detail


async def test_sources_whose_files_would_be_one_do_not_write_into_each_other(tmp_path: Path) -> None:
    reports: list[video.Report] = []
    sources = {"door 1": [picture(1)] * 3, "door_1": [picture(2)] * 4}
    sink = video.VideoFile(tmp_path / "{source}.mp4")
    assert sink.path_of("door 1") == sink.path_of("door_1") == str(tmp_path / "door_1.mp4")
    async with Pipeline(same, sources, sink, listener=reports.append) as pipeline:
        await pipeline.wait()
    delivered = {name: source.sinks[0].delivered for name, source in pipeline.status().sources.items()}
    written = {"door 1": (3, 1), "door_1": (4, 2)}  # whichever came first has the file to itself
    (name,) = [name for name, count in delivered.items() if count]
    count, number = written[name]
    assert [number_of(image) for _, image in contents(tmp_path / "door_1.mp4")] == [number] * count
    assert {report.detail.partition(": <")[0].partition(" raised")[0] for report in reports} == {"VideoFile"}
    assert len(reports) == 7 - count
    assert f"belongs to source {name!r}" in reports[0].detail


async def test_another_size_in_mid_stream_is_scaled_to_the_first(tmp_path: Path) -> None:
    frames = [picture(3), picture(4, 128, 96), picture(5)]
    async with Pipeline(same, frames, video.VideoFile(tmp_path / "x.mp4"), listener=lambda report: None) as pipeline:
        await pipeline.wait()
    assert [(number_of(image), image.shape) for _, image in contents(tmp_path / "x.mp4")] == [
        (3, (48, 64, 3)), (4, (48, 64, 3)), (5, (48, 64, 3)),
    ]  # fmt: skip


async def test_a_cancelled_pipeline_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    delivered = asyncio.Event()

    async def told(result: Result) -> None:
        if result.frame.index == 5:
            delivered.set()

    async def main() -> None:
        source = video.open([picture(i) for i in range(8)], loop=True)
        async with Pipeline(same, source, [video.VideoFile(tmp_path / "x.mp4"), told]) as pipeline:
            await pipeline.wait()

    task = asyncio.ensure_future(main())
    await delivered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contents(tmp_path / "x.mp4")


async def test_a_pipeline_that_is_cancelled_again_while_it_closes_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    unwinding, held = asyncio.Event(), asyncio.Event()

    async def call(frame: Frame) -> int:
        try:
            if frame.index == 5:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            unwinding.set()
            await held.wait()
            raise
        return frame.index

    pipeline = Pipeline(call, [picture(i) for i in range(8)], video.VideoFile(tmp_path / "x.mp4"))

    async def main() -> None:
        async with pipeline:
            await pipeline.wait()

    task = asyncio.ensure_future(main())
    await until(lambda: pipeline.status().sources["frames"].sinks[0].delivered == 5)
    task.cancel()
    await unwinding.wait()
    for _ in range(2):
        task.cancel()
        await turns()
    assert not task.done()
    held.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contents(tmp_path / "x.mp4")
    await turns()
    assert asyncio.all_tasks() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("aiotrt-video", "aiotrt-sink"))]


async def test_a_codec_that_is_not_there_is_reported(tmp_path: Path) -> None:
    reports: list[video.Report] = []
    sink = video.VideoFile(tmp_path / "x.mp4", codec="abacus")
    async with Pipeline(same, [picture(1)], sink, listener=reports.append) as pipeline:
        await pipeline.wait()
        assert pipeline.status().sources["frames"].sinks[0].failed == 1
    assert "abacus" in reports[0].detail
    assert not (tmp_path / "x.mp4").exists()


async def test_a_video_file_that_cannot_be_written_fails_for_each_frame_and_not_only_in_the_end(tmp_path: Path) -> None:
    reports: list[video.Report] = []
    sink = video.VideoFile(tmp_path / "missing" / "x.mp4")
    async with Pipeline(same, [picture(0), picture(1)], sink, listener=reports.append) as pipeline:
        await pipeline.wait()
    assert pipeline.status().sources["frames"].sinks[0].failed == 2
    assert all("No such file or directory" in report.detail for report in reports)


async def test_a_file_that_cannot_be_written_is_told_on_entering(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with Pipeline(same, [picture(1)], video.JsonLines(tmp_path / "nowhere" / "x.jsonl")):
            pass


async def test_json_lines(tmp_path: Path) -> None:
    async def detect(frame: Frame) -> Detections:
        return found(frame.index)

    source = write_video(tmp_path / "a.mp4", range(3))
    buffer = io.StringIO()
    sinks = [video.JsonLines(tmp_path / "x.jsonl"), video.JsonLines(buffer, len)]
    async with Pipeline(detect, source, sinks) as pipeline:
        await pipeline.wait()
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(line["source"], line["index"], line["time"]) for line in lines] == [
        ("a.mp4", 0, 0.0), ("a.mp4", 1, 0.04), ("a.mp4", 2, 0.08),
    ]  # fmt: skip
    assert [len(line["output"]) for line in lines] == [0, 1, 2]
    assert lines[2]["output"][1] == {"box": [10.0, 18.0, 50.0, 40.0], "score": 0.9, "class": 1}
    assert [json.loads(line)["output"] for line in buffer.getvalue().splitlines()] == [0, 1, 2]


async def test_what_is_not_finite_is_null_in_json() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    async def odd(frame: Frame) -> Any:
        return {"scores": np.array([1, np.nan, np.inf]), "found": (np.float32(-np.inf), 2)}

    buffer = io.StringIO()
    async with Pipeline(odd, [picture(1)], video.JsonLines(buffer)) as pipeline:
        await pipeline.wait()
    row = json.loads(buffer.getvalue(), parse_constant=refuse)
    assert row["output"] == {"scores": [1, None, None], "found": [None, 2]}


def annotated(size: tuple[int, int] = (64, 48)) -> np.ndarray[Any, Any]:
    image = picture(0, *size)
    image.flags.writeable = False
    return video.Annotator(labels=["duck"])(image, found())


async def test_boxes_masks_and_labels_are_drawn_on_a_copy() -> None:
    shown = annotated()
    assert shown.shape == (48, 64, 3)
    assert shown[39, 12:49].all(axis=1).all()  # the lower edge of the box
    assert shown[25, 30].tolist() == [int(0.4 * c) for c in (230, 80, 60)]  # inside of the mask
    assert not shown[44:].any()  # nothing below
    assert (shown[4:16] == 255).all(axis=2).any()  # the label's letters


async def test_a_frame_of_another_size_gets_boxes_and_masks_in_its_scale() -> None:
    shown = annotated((128, 96))
    assert shown[50, 60].tolist() == [int(0.4 * c) for c in (230, 80, 60)]
    assert shown[79, 24:96].all(axis=1).all()


async def test_callbacks_run_where_they_should() -> None:
    where: dict[str, threading.Thread] = {}

    def quick(result: Result) -> None:
        where["quick"] = threading.current_thread()

    def slow(result: Result) -> None:
        where["slow"] = threading.current_thread()

    async with Pipeline(same, [picture(1)], [quick, video.Callback(slow, in_thread=True)]) as pipeline:
        await pipeline.wait()
    assert where["quick"] is threading.main_thread()
    assert where["slow"] is not threading.main_thread()


async def test_progress_counts_frames(capsys: pytest.CaptureFixture[str]) -> None:
    sink = video.Progress({"frames": 5})
    async with Pipeline(same, [picture(1)] * 5, sink) as pipeline:
        await pipeline.wait()
    (task,) = sink._progress.tasks
    assert (task.completed, task.total) == (5, 5)
    assert "5/5" in capsys.readouterr().err


async def test_mjpeg_over_http() -> None:
    """As a browser sees it: parts, each a whole JPEG, until the pipeline ends. Nobody watching means no work."""
    import httpx
    from fastapi import FastAPI

    mjpeg = video.Mjpeg()
    app = FastAPI()
    app.get("/video")(lambda: mjpeg.response("door"))
    watched = asyncio.Event()

    async def frames() -> Any:
        await watched.wait()
        for i in range(3):
            yield picture(10 + i)

    async with Pipeline(same, {"door": frames}, mjpeg) as pipeline:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            request = asyncio.ensure_future(client.get("/video"))
            await until(lambda: bool(mjpeg.viewers()))
            watched.set()
            await pipeline.wait()
            await mjpeg.aclose()
            response = await request
    assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
    parts = response.content.split(b"--frame\r\n")[1:]
    assert parts
    for part in parts:
        head, _, body = part.partition(b"\r\n\r\n")
        length = int(head.rpartition(b"Content-Length: ")[2])
        assert number_of(np.asarray(Image.open(io.BytesIO(body[:length])))) in (10, 11, 12)
    assert not mjpeg.viewers()


async def test_a_slow_watcher_of_mjpeg_skips_frames() -> None:
    mjpeg = video.Mjpeg()
    parts = mjpeg.parts("door")
    first = asyncio.ensure_future(anext(parts))
    await until(lambda: bool(mjpeg.viewers()))
    for i in (1, 2, 3):
        await mjpeg.write(Result(Frame("door", i, Held(picture(10 * i))), None))
    await first
    left = [part async for part in _until_closed(mjpeg, parts)]
    assert len(left) <= 1


async def _until_closed(mjpeg: video.Mjpeg, parts: Any) -> Any:
    await mjpeg.aclose()
    async for part in parts:
        yield part
