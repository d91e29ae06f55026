"""`Decoder` with nvImageCodec on a real GPU: colours, damage, memory, and the order of streams."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from fastapi import Depends, FastAPI

import aiotrt
from aiotrt import serving
from aiotrt.decoding import Decoder, decode_image, pillow
from aiotrt.preprocess import CentreCrop, Letterbox, Resize, padded
from tests.decoding.corpus import MAX_PIXELS, PHOTOGRAPHS, damaged, encoded, on_cpu, photograph, turned
from tests.decoding.test_decoder import FILES, OTHERS
from tests.serving.tools import served

pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.asyncio]

OPTIONS: dict[str, dict[str, Any]] = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 5},
    "optimized": {"optimize": True},
    "quality 60": {"quality": 60},
}
#: Bytes of memory by which the allocators of driver, torch and process may grow once all is warm.
FLAT = 64 << 20


def psnr(found: torch.Tensor, expected: pillow.Pixels) -> float:
    """In dB; at most 99."""
    assert found.is_cuda
    assert found.dtype is torch.uint8
    assert found.is_contiguous()
    assert found.shape == expected.shape
    error = float(((found.cpu().double() - torch.from_numpy(expected).double()) ** 2).mean())
    return 99.0 if error == 0 else min(99.0, float(10 * np.log10(255**2 / error)))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
async def test_photographs_are_what_libjpeg_makes_of_them(name: str, options: str, mode: str, record_property: Any) -> None:
    if mode == "L" and options == "4:2:2":
        pytest.skip("grey has no chroma")
    data = encoded(photograph(name).convert(mode), **{"quality": 90, **OPTIONS[options]})
    expected = pillow.decode(data, MAX_PIXELS)
    async with Decoder("cuda") as decode:
        found = await decode(data)
        assert decode.counts == {"device": 1, "batches": 1}, decode.reasons
    difference = found.cpu().int() - torch.from_numpy(expected).int()
    record_property("psnr", psnr(found, expected))
    record_property("mean difference", float(difference.double().mean()))
    assert psnr(found, expected) >= 40
    assert abs(float(difference.double().mean())) < 0.5


@pytest.mark.parametrize("name", PHOTOGRAPHS)
async def test_the_jpeg_engines(name: str, record_property: Any) -> None:
    """Where a GPU has them; they may interpolate chroma in their own way."""
    data = encoded(photograph(name), quality=90)
    async with Decoder("cuda", hardware=True) as decode:
        tensors = await asyncio.gather(*(decode(data) for _ in range(16)))
        assert decode.counts["device"] == 16
    worst = min(psnr(tensor, pillow.decode(data, MAX_PIXELS)) for tensor in tensors)
    record_property("psnr", worst)
    assert worst >= 30


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
async def test_formats(name: str) -> None:
    data = (FILES | OTHERS)[name]
    expected = pillow.decode(data, MAX_PIXELS)
    async with Decoder("cuda") as decode:
        assert decode.library is not None
        found = await decode(data)
        if name in FILES:
            assert decode.counts == {"device": 1, "batches": 1}, decode.reasons
            assert psnr(found, expected) >= 36  # so small an image is mostly edges
        else:
            assert (decode.counts, decode.reasons) == ({"cpu": 1}, {"format": 1})
            np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_orientations(orientation: int) -> None:
    data = turned(orientation)
    async with Decoder("cuda") as decode:
        assert psnr(await decode(data), pillow.decode(data, MAX_PIXELS)) >= 36
        assert decode.counts["device"] == 1


async def compare(
    decode: Decoder, files: list[bytes], expected: list[pillow.Pixels | str], good: bytes, alone: torch.Tensor
) -> None:
    """Decode these files at once, beside a good one."""
    *results, neighbour = await asyncio.gather(*map(decode, [*files, good]), return_exceptions=True)
    for result, right in zip(results, expected, strict=True):
        if isinstance(right, str):
            assert f"{type(result).__name__}: {result}" == right
        else:
            assert isinstance(result, torch.Tensor), result
            assert result.shape == right.shape
    assert isinstance(neighbour, torch.Tensor)
    assert torch.equal(neighbour, alone)


async def test_damaged_files_raise_what_pillow_raises_and_memory_is_flat() -> None:
    files = list(damaged(1000))
    expected = [on_cpu(data) for data in files]
    good = encoded(photograph("coffee"))
    levels: list[tuple[int, int]] = []
    async with Decoder("cuda", max_pixels=MAX_PIXELS) as decode:
        alone = await decode(good)
        for _ in range(4):
            for start in range(0, len(files), 50):
                await compare(decode, files[start : start + 50], expected[start : start + 50], good, alone)
            gc.collect()
            torch.cuda.synchronize()
            levels.append((resident(), -torch.cuda.mem_get_info()[0]))
        assert decode.counts["device"] > 1200
    for warm, last in zip(levels[1], levels[-1], strict=True):
        assert last - warm < FLAT, levels


async def test_images_of_a_batch_are_what_they_are_alone() -> None:
    files = [encoded(photograph(name, (100 + 8 * i, 90 + i))) for i, name in enumerate(PHOTOGRAPHS * 12)]
    async with Decoder("cuda") as decode:
        together = await asyncio.gather(*map(decode, files))
        assert decode.counts["batches"] < len(files)
        for tensor, data in zip(together, files, strict=True):
            assert torch.equal(tensor, await decode(data))


async def test_memory_is_flat_over_many_images() -> None:
    data = encoded(photograph("coffee", (1920, 1080)))
    levels: list[tuple[int, int]] = []
    async with Decoder("cuda") as decode:
        for _ in range(5):
            for _ in range(4):
                await asyncio.gather(*(decode(data) for _ in range(32)))
            gc.collect()
            torch.cuda.synchronize()
            levels.append((resident(), -torch.cuda.mem_get_info()[0]))
        assert decode.counts["device"] == 640
    for warm, last in zip(levels[1], levels[-1], strict=True):
        assert last - warm < FLAT, levels


async def test_a_tensor_may_be_freed_while_the_callers_stream_reads_it() -> None:
    first, second = (encoded(photograph(name, (400, 300))) for name in ("coffee", "rocket"))
    async with Decoder("cuda") as decode:
        expected = int((await decode(first)).sum())
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            sums = []
            for _ in range(50):
                with torch.cuda.stream(stream):
                    tensor = await decode(first)
                    torch.cuda._sleep(2_000_000)
                    sums.append(tensor.sum())
                    del tensor
                    await decode(second)  # must not get that memory yet
            torch.cuda.synchronize()
            assert [int(found) for found in sums] == [expected] * 50


async def test_cancelled_callers_and_closing_while_busy() -> None:
    data = encoded(photograph("coffee", (1920, 1080)))
    decode = Decoder("cuda")
    async with decode:
        for seed in range(20):
            calls = [asyncio.create_task(decode(data)) for _ in range(20)]
            await asyncio.sleep(0.001 * seed)
            for call in calls[::2]:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, torch.Tensor) for result in results[1::2])
        calls = [asyncio.create_task(decode(data)) for _ in range(40)]
        await asyncio.sleep(0.02)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} <= {torch.Tensor, aiotrt.UsageError}
    assert not decode._calls


async def test_no_memory_on_the_device() -> None:
    data = encoded(photograph("coffee", (1920, 1080)))
    async with Decoder("cuda") as decode:
        await decode(data)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)
        try:
            for form in ("JPEG", "PNG"):
                with pytest.raises(aiotrt.ResourceError, match="no memory for the pixels of an image of 1920 x 1080"):
                    await decode(encoded(photograph("coffee", (1920, 1080)), form))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert psnr(await decode(data), pillow.decode(data, MAX_PIXELS)) >= 40


@pytest.mark.parametrize("make", [Letterbox, Resize, CentreCrop])
async def test_preprocessing_in_the_graph(make: Any) -> None:
    """One graph for all sizes, with results on the device, and what the CPU makes of the same pixels."""
    function = make()
    async with aiotrt.load(torch.nn.Identity(), device="cuda", preprocess=function, slots=1) as model:
        for size in ((1920, 1080), (1600, 1100), (1730, 1033)):
            image = await decode_image(encoded(photograph("rocket", size)), "cuda")
            found = await model(*padded(image))
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), function(image.cpu()), atol=5e-2, rtol=0)
        statistics = model.statistics()
        assert statistics.captures == 1, statistics.fallbacks


async def test_captures_beside_decoding() -> None:
    """Neither spoils the other, though the library allocates memory for images that are larger than all before."""
    files = [encoded(photograph("coffee", (200 + 60 * i, 150 + 40 * i))) for i in range(30)]
    network = torch.nn.Conv2d(3, 8, 3).cuda().eval()
    async with Decoder("cuda") as decode, aiotrt.load(network, device="cuda", slots=1) as model:

        async def captures() -> None:
            for i in range(30):
                await model(torch.rand(1, 3, 20 + i, 20, device="cuda"))

        async def images() -> None:
            for data in files:
                await asyncio.gather(*(decode(data) for _ in range(4)))

        await asyncio.gather(captures(), images())
        assert decode.counts["device"] == 120, decode.reasons
        statistics = model.statistics()
        assert (statistics.captures, statistics.fallbacks) == (30, ())


async def test_an_endpoint() -> None:
    app = FastAPI(lifespan=serving.lifespan())
    serving.install(app)

    @app.post("/")
    async def answer(image: Annotated[torch.Tensor, Depends(serving.image_body(device=True))]) -> list[int]:
        assert image.is_cuda
        return list(image.shape)

    async with served(app) as client:
        data = encoded(photograph("coffee"))
        assert (await client.post("/", content=data)).json() == [400, 600, 3]
        assert (await client.post("/", content=data[:-100])).status_code == 422
