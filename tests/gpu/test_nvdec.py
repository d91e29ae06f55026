"""NVDEC on a real GPU: its pictures, times and reports are those of FFmpeg, and damage harms nothing else."""

from __future__ import annotations

import asyncio
import gc
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from aiotrt.video import Frame, Kind, SourceError, UnsupportedError, nvdec

pytest.importorskip("av")
from tests.video.test_decoding import TURNS, film, turn
from tests.video.test_nvdec import damage, moving, psnr
from tests.video.tools import Remember, write_video

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio, pytest.mark.timeout(300)]

QUIET = {"x265-params": "log-level=0"}


@pytest.fixture(autouse=True)
def library() -> Any:
    try:
        return nvdec.load_library()
    except UnsupportedError as error:
        pytest.skip(str(error))


async def read(path: Path, decode: Any = "gpu", **options: Any) -> tuple[list[Frame], video.Source]:
    source = video.open(path, decode=decode, **options)
    async with source:
        return [frame async for frame in source], source


async def compare(path: Path, **options: Any) -> list[Frame]:
    """Read a video both ways, and compare times, shapes, reports and pixels."""
    (found, source), (expected, by_cpu) = await read(path, **options), await read(path, "cpu", **options)
    assert [frame.time for frame in found] == [frame.time for frame in expected]
    assert [frame.shape for frame in found] == [frame.shape for frame in expected]
    assert source.counts == by_cpu.counts
    assert found
    assert all(frame.device_image is not None and frame.device_image.is_cuda for frame in found)
    worst = min(psnr(a.image, b.image) for a, b in zip(found, expected, strict=True))
    means = [float((a.image.astype(float) - b.image).mean()) for a, b in zip(found, expected, strict=True)]
    print(f"{path.name}: {len(found)} frames, PSNR at least {worst:.1f} dB, mean difference {np.mean(means):+.2f}")
    assert worst >= 40
    return found


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_both_codecs_with_reordered_pictures(codec: str, extension: str, tmp_path: Path) -> None:
    path = moving(tmp_path / f"a.{extension}", size=(1280, 720), codec=codec, encoder={"g": "10", "bf": "3"} | QUIET)
    assert len(await compare(path)) == 30
    await compare(path, start=0.5)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("size", [(322, 242), (500, 282), (1918, 1078), (1920, 1080)])
async def test_sizes_that_are_no_multiple_of_a_block(codec: str, size: tuple[int, int], tmp_path: Path) -> None:
    await compare(moving(tmp_path / "a.mp4", size=size, codec=codec, count=8, encoder=QUIET))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("colorspace", [1, 2, 5, 6, 9])
async def test_the_streams_own_colours(codec: str, colorspace: int, color_range: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"colorspace": colorspace, "color_range": color_range, "encoder": QUIET}
    await compare(moving(tmp_path / "a.mp4", codec=codec, count=6, **options))


@pytest.mark.parametrize("matrix", TURNS)
async def test_turned_pictures(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", size=(320, 240), count=4)
    turn(path, matrix)
    await compare(path)


@pytest.mark.parametrize("offset", [0.0, 600.0])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_times_begin_with_the_file(extension: str, offset: float, tmp_path: Path) -> None:
    path = film(tmp_path / f"a.{extension}", 40, offset=offset)
    for start in (0.0, 2.0):
        (found, _), (expected, _) = await read(path, start=start), await read(path, "cpu", start=start)
        assert [frame.time for frame in found] == [frame.time for frame in expected]


@pytest.mark.parametrize(("codec", "extension"), [("libx264", "h264"), ("libx265", "hevc")])
async def test_another_size_in_mid_stream(codec: str, extension: str, tmp_path: Path) -> None:
    sizes = [(320, 240), (640, 480), (192, 160), (320, 240)]  # HEVC needs 144 by 144
    parts = [
        moving(tmp_path / f"{i}.{extension}", size=size, count=10, codec=codec, encoder=QUIET)
        for i, size in enumerate(sizes)
    ]
    path = tmp_path / f"all.{extension}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    await compare(path)


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv422p", "yuv444p"])
async def test_formats_that_are_refused(pixel_format: str, tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", count=5, format=pixel_format)
    with pytest.raises(SourceError, match=f"not {pixel_format}"):
        await read(path)
    frames, source = await read(path, "auto")
    assert len(frames) == 5
    assert source.counts == {Kind.DECODER: 1}


async def test_a_picture_too_small_for_the_gpu(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(3), size=(16, 16))
    with pytest.raises(SourceError, match="16 by 16"):
        await read(path)
    assert len((await read(path, "auto"))[0]) == 3


async def test_a_consumer_on_another_stream_waits_for_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = nvdec._Session._picture

    def late(session: Any, frame: Any) -> nvdec.DevicePicture:
        torch.cuda._sleep(20_000_000)  # on the decoder's stream
        return convert(session, frame)

    path = moving(tmp_path / "a.mp4")
    expected, _ = await read(path, "cpu")
    monkeypatch.setattr(nvdec._Session, "_picture", late)
    copies, other = list[torch.Tensor](), torch.cuda.Stream()
    async with video.open(path, decode="gpu") as frames:
        async for frame in frames:
            with torch.cuda.stream(other):
                tensor = frame.device_image
                assert tensor is not None
                copies.append(tensor.clone())
            del frame, tensor  # the memory may be used again as soon as the copy is complete
    torch.cuda.synchronize()
    for copy, frame in zip(copies, expected, strict=True):
        assert psnr(copy.cpu().numpy(), frame.image) >= 40


async def test_memory_that_is_full(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", size=(1920, 1080), count=40)
    torch.cuda.empty_cache()
    held = []
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(SourceError, match=r"the memory of cuda:\d is full"):
            async with video.open(path, decode="gpu") as frames:
                async for frame in frames:
                    held.append(frame)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
    assert len((await read(path))[0]) == 40


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((0, 1))


async def test_eight_streams_at_once_and_no_pixel_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {f"s{i}": moving(tmp_path / f"{i}.mp4", size=(640, 360 + 8 * i), count=60) for i in range(8)}
    expected = {name: [f.image.mean((0, 1)) for f in (await read(path, "cpu"))[0]] for name, path in paths.items()}

    def refuse(picture: object) -> None:
        raise AssertionError("pixels were copied to the host")

    monkeypatch.setattr(nvdec.DevicePicture, "array", refuse)
    sink = Remember()
    async with aiotrt.load(Mean(), device="cuda", slots=3) as model:
        sources = [video.open(path, name=name, decode="gpu") for name, path in paths.items()]
        async with video.Pipeline(model, sources, sink) as pipeline:
            await pipeline.wait()
            status = pipeline.status()
    assert all(not source.reports for source in status.sources.values())
    for name in paths:
        means = [result.output for result in sink.results if result.frame.source == name]
        assert sink.indices(name) == list(range(60))
        assert np.abs(np.array(means) - np.array(expected[name])).max() < 3


async def test_a_hundred_damaged_videos_and_a_sound_one_beside_each(tmp_path: Path) -> None:
    sound = moving(tmp_path / "sound.mp4", count=20)
    whole = [
        moving(tmp_path / f"{codec}.{extension}", codec=codec, count=40, encoder={"g": "10"} | QUIET)
        for codec, extension in [("libx264", "mp4"), ("libx264", "ts"), ("libx265", "mkv"), ("libx265", "ts")]
    ]
    expected, _ = await read(sound, "cpu")
    outcomes = {"same": 0, "fewer": 0, "more": 0, "error": 0}
    free: list[int] = []
    for seed in range(100):
        path = tmp_path / f"damaged{whole[seed % 4].suffix}"
        path.write_bytes(damage(whole[seed % 4].read_bytes(), seed))

        async def outcome(decode: str, path: Path = path) -> list[float | None] | None:
            try:
                return [frame.time for frame in (await read(path, decode))[0]]
            except SourceError:
                return None

        found, (beside, source) = await asyncio.gather(outcome("gpu"), read(sound))
        by_cpu = await outcome("cpu")
        assert [frame.time for frame in beside] == [frame.time for frame in expected]
        assert not source.counts
        assert (found is None) == (by_cpu is None)
        if found is None or by_cpu is None:
            outcomes["error"] += 1
        else:
            outcomes["same" if found == by_cpu else "fewer" if len(found) < len(by_cpu) else "more"] += 1
        del beside, source
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    print(f"pictures of damaged videos, against FFmpeg: {outcomes}")
    assert psnr((await read(sound))[0][-1].image, expected[-1].image) >= 40
    assert free[20] - min(free[21:]) < 64 * 2**20


async def test_memory_is_flat(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", size=(1280, 720), count=30)
    figures = []
    for _ in range(40):
        async with video.open(path, decode="gpu") as frames:
            async for frame in frames:
                assert frame.is_on_device
        del frame
        gc.collect()
        torch.cuda.empty_cache()
        figures.append((torch.cuda.mem_get_info()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    assert figures[9][0] - figures[-1][0] < 32 * 2**20
    assert figures[-1][1] - figures[9][1] < 64 * 2**20


async def test_a_source_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", count=30)
    for _ in range(20):
        async with video.open(path, decode="gpu") as frames:
            await anext(frames)
    assert len((await read(path))[0]) == 30


async def test_sources_that_come_and_go_share_streams(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", count=5)
    await read(path)
    before = len(nvdec.Surfaces._idle[torch.cuda.current_device()])
    for _ in range(10):
        await asyncio.gather(read(path), read(path))
    assert len(nvdec.Surfaces._idle[torch.cuda.current_device()]) == max(before, 2)


async def test_a_decoder_uses_the_context_of_torch(tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    create = library.CreateDecoder

    def spy(**arguments: Any) -> Any:
        given.append(arguments["cudacontext"])
        return create(**arguments)

    monkeypatch.setattr(library, "CreateDecoder", spy)
    torch.zeros(1, device="cuda")
    await read(moving(tmp_path / "a.mp4", count=3))
    assert given == [nvdec.Surfaces(None).context]
    assert given[0] != 0
