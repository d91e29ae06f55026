"""Decoding into device memory, with a double of the library that decodes in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from aiotrt.errors import InputError
from aiotrt.video import Frame, Kind, SourceError, UnsupportedError, nvdec
from tests.video import nvdec_double, test_decoding, test_sources
from tests.video.nvdec_double import HostSurfaces, Library
from tests.video.tools import Remember, number_of, write_video

pytestmark = pytest.mark.asyncio
open_on_cpu = video.open

#: Tests of the CPU path that hold for the GPU path as well.
BODIES: list[Callable[[Path], Coroutine[Any, Any, None]]] = [
    test_sources.test_a_variable_frame_rate_keeps_its_times,
    test_sources.test_start_begins_there_and_not_at_the_keyframe_before,
    test_sources.test_a_limit,
    test_sources.test_a_loop_goes_on_in_time,
    test_sources.test_a_folder,
    test_sources.test_no_frames,
    test_sources.test_a_file_that_ends_too_soon_says_how_much_is_missing,
    test_sources.test_a_file_without_a_number_of_frames_that_ends_too_soon_says_when,
    test_sources.test_a_file_that_ends_before_its_index_says_that_it_is_no_video,
    test_sources.test_damage_in_the_middle_is_left_out_and_counted,
    test_sources.test_another_size_in_mid_stream,
    test_sources.test_a_huge_picture_is_refused_before_it_is_decoded,
    test_sources.test_a_stream_that_becomes_huge_goes_on_without_its_huge_pictures,
    test_decoding.test_a_turn_that_is_no_quarter_turn_is_not_made,
]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = Library()
    monkeypatch.setattr(nvdec, "load_library", lambda: library)
    monkeypatch.setattr(nvdec, "Surfaces", HostSurfaces)
    monkeypatch.setattr(video, "open", functools.partial(video.open, decode="gpu"))
    yield library
    nvdec._capabilities.cache_clear()


async def read(source: video.Source) -> list[Frame]:
    async with source:
        return [frame async for frame in source]


def psnr(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    error = float(((one.astype(float) - other) ** 2).mean())
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def moving(path: Path, *, size: tuple[int, int] = (320, 240), count: int = 30, **options: Any) -> Path:
    """A video of moving stripes. Options are of the stream: `codec`, `colorspace`, `color_range`, `format`, `encoder`."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(options.get("codec", "libx264"), rate=25, options=options.get("encoder", {"g": "10"}))
        stream.width, stream.height, stream.pix_fmt = width, height, options.get("format", "yuv420p")
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        for name in ("colorspace", "color_range"):
            if name in options:
                setattr(stream.codec_context, name, options[name])
        for i in range(count):
            waves = [
                128 + 90 * np.sin(rows / 19 + i / 3),
                128 + 90 * np.cos(columns / 23 - i / 5),
                40 + (rows + columns + i) % 160,
            ]
            frame: Any = av.VideoFrame.from_ndarray(np.stack(waves, 2).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(i * 90000 / 25), Fraction(1, 90000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


async def compare(path: Path, **options: Any) -> tuple[list[Frame], list[Frame]]:
    """Read a video both ways, and compare times, shapes and pixels."""
    found, expected = await read(video.open(path, **options)), await read(open_on_cpu(path, **options))
    assert [frame.time for frame in found] == [frame.time for frame in expected]
    assert [frame.shape for frame in found] == [frame.shape for frame in expected]
    assert [frame.pixel_aspect for frame in found] == [frame.pixel_aspect for frame in expected]
    assert min(psnr(a.image, b.image) for a, b in zip(found, expected, strict=True)) >= 40
    return found, expected


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("test_"))
async def test_as_on_the_cpu(body: Callable[[Path], Coroutine[Any, Any, None]], tmp_path: Path) -> None:
    await body(tmp_path)


@pytest.mark.parametrize("matrix", test_decoding.TURNS)
async def test_turned_pictures(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    await test_decoding.test_pictures_come_as_they_are_to_be_shown(matrix, tmp_path)


@pytest.mark.parametrize("is_turned", [False, True])
async def test_pixels_that_are_not_square(is_turned: bool, tmp_path: Path) -> None:
    await test_decoding.test_pixels_that_are_not_square_are_said_to_be(is_turned, tmp_path)


@pytest.mark.parametrize("offset", [0.0, 600.0])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_times_and_starts(extension: str, offset: float, tmp_path: Path) -> None:
    await test_decoding.test_times_are_since_the_beginning_of_the_file(extension, offset, tmp_path)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_both_codecs_with_reordered_pictures(codec: str, extension: str, tmp_path: Path, library: Library) -> None:
    path = moving(tmp_path / f"a.{extension}", codec=codec, encoder={"g": "10", "bf": "3", "x265-params": "log-level=0"})
    found, _ = await compare(path)
    assert len(found) == 30
    assert all(frame.is_on_device and frame.device_image is not None for frame in found)
    assert library.sessions == 1


@pytest.mark.parametrize("size", [(64, 48), (66, 50), (130, 98)])
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("colorspace", [1, 5, 9])
async def test_the_streams_own_colours(size: tuple[int, int], color_range: int, colorspace: int, tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", size=size, count=6, colorspace=colorspace, color_range=color_range)
    await compare(path)


async def test_frames_are_tensors_and_arrays(tmp_path: Path) -> None:
    frame = (await read(video.open(write_video(tmp_path / "a.mp4", range(3)))))[2]
    tensor = frame.device_image
    assert tensor is not None
    assert tuple(tensor.shape) == frame.shape
    assert tensor.dtype == torch.uint8
    assert frame.dtype == np.uint8
    assert frame.is_converted
    assert np.array_equal(np.asarray(frame), tensor.numpy())
    assert torch.equal(torch.utils.dlpack.from_dlpack(frame), tensor)
    with pytest.raises(ValueError, match="read-only"):
        frame.image[0] = 0
    assert (await read(open_on_cpu(tmp_path / "a.mp4")))[0].device_image is None


async def test_a_pipeline_takes_the_tensor_and_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(picture: object) -> None:
        raise AssertionError("pixels were copied to the host")

    monkeypatch.setattr(nvdec.DevicePicture, "array", refuse)
    sink = Remember()

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean()

    async with aiotrt.load(Mean(), device="host") as model:
        sources = {name: video.open(write_video(tmp_path / f"{name}.mp4", range(20))) for name in "ab"}
        async with video.Pipeline(model, sources, sink) as pipeline:
            await pipeline.wait()
            status = pipeline.status()
    for name in "ab":
        assert sink.indices(name) == list(range(20))
        assert [round(float(r.output) / 8) for r in sink.results if r.frame.source == name] == list(range(20))
    assert status.completed == 40
    assert all("convert" not in source.latency for source in status.sources.values())


async def test_auto_says_that_the_gpu_decodes(tmp_path: Path) -> None:
    source, reports = open_on_cpu(write_video(tmp_path / "a.mp4", range(3)), decode="auto"), list[video.Report]()
    source.listener = reports.append
    assert all(frame.is_on_device for frame in await read(source))
    assert [(report.kind, report.detail) for report in reports] == [(Kind.DECODER, "the GPU decodes")]


def without_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "PyNvVideoCodec", None)


def broken_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UnsupportedError("PyNvVideoCodec does not work with this driver: Driver version is too old")

    monkeypatch.setattr(nvdec, "load_library", fail)


def no_decoder(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.limits["supported"] = 0


def no_nvdec(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**arguments: object) -> None:
        raise RuntimeError("Could not dynamically load libnvcuvid.so.1.\nPlease ensure ...")

    monkeypatch.setattr(library, "GetDecoderCaps", fail)


def too_large(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.limits |= {"width_max": 60}


REFUSALS: list[tuple[Callable[[Library, pytest.MonkeyPatch], None], dict[str, Any], str]] = [
    (without_library, {}, "needs PyNvVideoCodec; pip install"),
    (broken_library, {}, "does not work with this driver: Driver version is too old"),
    (no_decoder, {}, "this GPU has no decoder for h264"),
    (no_nvdec, {}, "NVDEC cannot be used: Could not dynamically load libnvcuvid"),
    (too_large, {}, "its pictures are 64 by 48, and this GPU decodes 48 by 16 to 60 by 4096"),
    (lambda *_: None, {"format": "yuv420p10le"}, "decodes 8 bits and 4:2:0 without alpha .*, not yuv420p10le"),
    (lambda *_: None, {"format": "yuv422p"}, "not yuv422p"),
    (lambda *_: None, {"format": "yuv444p"}, "not yuv444p"),
    (lambda *_: None, {"codec": "mjpeg", "format": "yuvj420p", "encoder": {}}, "decodes H.264 and HEVC, not mjpeg"),
]


@pytest.mark.parametrize(("change", "options", "says"), REFUSALS, ids=[says[:30] for *_, says in REFUSALS])
async def test_what_the_gpu_cannot_decode(
    change: Any, options: dict[str, Any], says: str, tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = moving(tmp_path / "a.mp4", size=(64, 48), count=5, **options)
    change(library, monkeypatch)
    with pytest.raises(SourceError, match=says):
        async with open_on_cpu(path, decode="gpu", reconnect=video.Backoff(first=30)):
            pass
    source, reports = open_on_cpu(path, decode="auto"), list[video.Report]()
    source.listener = reports.append
    frames = await read(source)
    assert len(frames) == 5
    assert not any(frame.is_on_device for frame in frames)
    assert [report.kind for report in reports] == [Kind.DECODER]
    assert reports[0].detail.startswith("the CPU decodes: ")


async def test_interlaced_pictures_are_refused_when_they_come(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", size=(64, 64), encoder={"x264-params": "interlaced=1:keyint=10"})
    with pytest.raises(SourceError, match="its pictures are interlaced"):
        await read(video.open(path))
    source = open_on_cpu(path, decode="auto")
    frames = await read(source)
    assert [frame.time for frame in frames] == [frame.time for frame in await read(open_on_cpu(path))]
    assert source.counts == {Kind.DECODER: 2}


async def test_options_that_exclude_each_other_or_do_not_exist() -> None:
    with pytest.raises(InputError, match="'cpu', 'gpu' or 'auto'"):
        open_on_cpu("a.mp4", decode="tpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exclude each other"):
        open_on_cpu("a.mp4", decode="gpu", hardware="cuda")


@pytest.mark.parametrize("at", [1, 2, 8, 20, 31])
async def test_a_failure_of_the_gpu_is_decoded_on_the_cpu(at: int, tmp_path: Path, library: Library) -> None:
    path = moving(tmp_path / "a.mp4", encoder={"g": "10", "bf": "2"})
    library.fails_at = at
    source = video.open(path)
    found = await read(source)
    expected = await read(open_on_cpu(path))
    lost = 2 if at == 31 else 0  # at the end; they count as damaged
    expected = expected[: len(expected) - lost]
    assert [frame.time for frame in found] == [frame.time for frame in expected]
    assert min(psnr(a.image, b.image) for a, b in zip(found, expected, strict=True)) >= 40
    assert source.counts == {Kind.DECODER: 1} | ({Kind.CORRUPT: lost, Kind.TRUNCATED: 1} if lost else {})


async def test_device_memory_that_is_full(tmp_path: Path, library: Library) -> None:
    path = write_video(tmp_path / "a.mp4", range(20))
    library.fails_at, library.failure = 3, RuntimeError("cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(SourceError, match="the memory of cpu is full"):
        await read(video.open(path))
    library.calls = 0
    source = open_on_cpu(path, decode="auto")
    assert [number_of(frame.image) for frame in await read(source)] == list(range(20))
    assert source.counts == {Kind.DECODER: 2}


def damage(content: bytes, seed: int) -> bytes:
    """Overwrite some places after the first eighth, with zeros or with noise."""
    damaged, random = bytearray(content), np.random.default_rng(seed)
    for _ in range(1 + seed % 4):
        at, length = int(random.integers(len(content) // 8, len(content) * 7 // 8)), int(random.integers(1, 64))
        damaged[at : at + length] = random.bytes(length) if seed % 2 else bytes(length)
    return bytes(damaged)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_damaged_videos_end_as_on_the_cpu(codec: str, extension: str, tmp_path: Path) -> None:
    path = moving(tmp_path / f"a.{extension}", size=(96, 64), codec=codec, encoder={"g": "8", "x265-params": "log-level=0"})
    content = path.read_bytes()
    alike = 0
    for seed in range(12):
        path.write_bytes(damage(content, seed))
        try:
            expected = [frame.time for frame in await read(open_on_cpu(path))]
        except SourceError:
            with pytest.raises(SourceError):
                await read(video.open(path))
            continue
        found = [frame.time for frame in await read(video.open(path))]
        # Pictures whose damage only the entropy decoding shows are given as good ones, where FFmpeg leaves them out. After
        # damage, pictures that precede the next keyframe in time are left out.
        assert len(set(expected) - set(found)) <= 4
        alike += found == expected
    assert alike >= 2


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
async def test_a_slice_that_is_missing_or_has_a_damaged_header(codec: str, tmp_path: Path, library: Library) -> None:
    path = moving(tmp_path / "a.mp4", codec=codec, encoder={"g": "10", "bf": "0", "x265-params": "log-level=0:open-gop=0"})
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        content = bytearray(path.read_bytes())
        position = next(packet for packet in packets if packet.pts and not packet.is_keyframe).pos
    assert position is not None
    content[position + 4] |= 0x80  # the forbidden bit of the packet's first unit
    path.write_bytes(bytes(content))
    source = video.open(path)
    found, expected = await read(source), open_on_cpu(path)
    assert [frame.time for frame in found] == [frame.time for frame in await read(expected)]
    assert {kind: n for kind, n in source.counts.items() if kind is not Kind.DECODER} == expected.counts
    assert source.counts[Kind.DECODER] == 1
    assert library.sessions == 2
    assert found[-1].is_on_device


site = test_sources.site


async def test_a_stream_at_a_url_that_ends_is_opened_again(tmp_path: Path, site: str) -> None:
    await test_sources.test_a_stream_at_a_url_that_ends_is_tried_again(tmp_path, site)


async def test_a_format_that_becomes_unsupported(tmp_path: Path) -> None:
    parts = [
        moving(tmp_path / f"{i}.h264", size=(96, 64), count=12, format=name) for i, name in enumerate(("yuv420p", "yuv444p"))
    ]
    path = tmp_path / "all.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    given = []
    with pytest.raises(SourceError, match="not yuv444p"):
        async with video.open(path) as frames:
            async for frame in frames:
                given.append(frame)
    assert len(given) == 12
    source = open_on_cpu(path, decode="auto")
    found, expected = await read(source), await read(open_on_cpu(path))
    assert len(found) == len(expected) == 24
    assert min(psnr(a.image, b.image) for a, b in zip(found, expected, strict=True)) >= 40
    assert source.counts == {Kind.DECODER: 2}


async def test_pictures_cropped_at_the_left(tmp_path: Path) -> None:
    whole, path = moving(tmp_path / "whole.h264", size=(96, 64), count=5), tmp_path / "cropped.h264"
    with av.open(str(whole)) as file:
        crop = av.bitstream.BitStreamFilterContext("h264_metadata=crop_left=8:crop_top=4", file.streams.video[0])
        parts = [part for packet in file.demux(video=0) if packet.size for part in crop.filter(packet)]
        path.write_bytes(b"".join(map(bytes, parts)))
    with pytest.raises(SourceError, match="cropped at the left or at the top"):
        await read(video.open(path))
    found, expected = await read(open_on_cpu(path, decode="auto")), await read(open_on_cpu(path))
    assert [frame.shape for frame in found] == [frame.shape for frame in expected]
    assert min(psnr(a.image, b.image) for a, b in zip(found, expected, strict=True)) >= 40


async def test_a_decoder_that_gives_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "PENDING", 4)
    monkeypatch.setattr(nvdec_double.Decoder, "Decode", lambda decoder, packet: [])
    source = video.open(moving(tmp_path / "a.mp4"))
    assert len(await read(source)) == 30
    assert source.counts == {Kind.DECODER: 3}  # one for each keyframe


@pytest.mark.parametrize("missing", [0, 8, 29])
async def test_a_picture_that_the_gpu_leaves_out(missing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = nvdec_double.Decoder.Decode

    def skipping(decoder: nvdec_double.Decoder, packet: nvdec_double.PacketData) -> list[nvdec_double.Frame]:
        return [frame for frame in decode(decoder, packet) if frame.getPTS() != missing]

    monkeypatch.setattr(nvdec_double.Decoder, "Decode", skipping)
    path = moving(tmp_path / "a.mp4", encoder={"g": "10", "bf": "2"})
    source = video.open(path)
    found, expected = await read(source), await read(open_on_cpu(path))
    if missing == 0:  # seen at once, so FFmpeg decodes it
        assert [frame.time for frame in found] == [frame.time for frame in expected]
        assert source.counts == {Kind.DECODER: 1}
    else:  # seen after the next keyframe or at the end
        assert len(found) == 29
        assert source.counts == {Kind.CORRUPT: 1, Kind.TRUNCATED: 1}


async def test_a_device_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="device='cuda:7' cannot decode"):
        await read(video.open(write_video(tmp_path / "a.mp4", range(3)), device="cuda:7"))


async def test_a_long_stretch_without_a_keyframe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(nvdec, "GROUP", 8)
    monkeypatch.setattr(nvdec, "TIMES", 16)
    path = moving(tmp_path / "a.mp4", count=60, encoder={"g": "50", "bf": "0"})
    await compare(path)
    library.calls, library.fails_at = 0, 30
    source = video.open(path)
    found = await read(source)
    assert [frame.time for frame in found[-10:]] == [(50 + i) / 25 for i in range(10)]
    assert source.counts[Kind.DECODER] == 1
