"""`Decoder` on the host, with Pillow alone and with a double of nvImageCodec: what it returns, refuses, drops and counts."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aiotrt
from aiotrt.decoding import Decoder, ImageError, ImageTooLargeError, decode_image, decoder, library, pillow, threads
from tests.decoding import double
from tests.decoding.corpus import MAX_PIXELS, damaged, encoded, on_cpu, photograph, turned

pytestmark = pytest.mark.asyncio

SMALL = photograph("coffee", (60, 40))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> double.Module:
    return double.install(monkeypatch)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def same(tensor: torch.Tensor, data: bytes) -> None:
    assert tensor.dtype is torch.uint8
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), pillow.decode(data, MAX_PIXELS))


FILES = {
    "baseline": encoded(SMALL),
    "progressive": encoded(SMALL, progressive=True),
    "4:4:4": encoded(SMALL, subsampling=0),
    "4:2:2": encoded(SMALL, subsampling=1),
    "restarts": encoded(SMALL, restart_marker_blocks=2),
    "grey": encoded(SMALL.convert("L")),
    "odd": encoded(SMALL.resize((37, 23))),
    "one pixel": encoded(SMALL.resize((1, 1))),
    "trailing": encoded(SMALL) + b"\0" * 99,
}
OTHERS = {
    "CMYK": encoded(SMALL.convert("CMYK")),
    "RGB in JPEG": encoded(SMALL, keep_rgb=True),
    "PNG": encoded(SMALL, "PNG"),
    "alpha": encoded(SMALL.convert("RGBA"), "PNG"),
    "palette": encoded(SMALL.convert("P"), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    "WebP": encoded(SMALL, "WEBP"),
    "BMP": encoded(SMALL, "BMP"),
    "GIF": encoded(SMALL, "GIF"),
    "TIFF": encoded(SMALL, "TIFF"),
}


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
async def test_formats(name: str, module: double.Module) -> None:
    data = (FILES | OTHERS)[name]
    async with Decoder("host") as decode:
        same(await decode(data), data)
        assert decode.library == "nvimgcodec 0.9.0"
        assert decode.counts == ({"device": 1, "batches": 1} if name in FILES else {"cpu": 1})
    assert module.closed == 1


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_orientations(orientation: int, module: double.Module) -> None:
    data = turned(orientation)
    async with Decoder("host") as decode:
        same(await decode(data), data)
        assert decode.counts["device"] == 1


async def test_without_the_library_pillow_decodes_everything() -> None:
    async with Decoder("host") as decode:
        for data in (FILES | OTHERS).values():
            same(await decode(data), data)
        assert decode.library is None
        assert decode.counts == {"cpu": len(FILES | OTHERS)}


async def test_batches_form_while_the_library_is_busy(module: double.Module) -> None:
    files = [encoded(SMALL.resize((20 + i, 20))) for i in range(11)]
    async with Decoder("host", max_batch=6) as decode:
        module.gate.clear()
        calls = [asyncio.create_task(decode(data)) for data in files]
        await until(lambda: module.batches == [1] and len(decode._queue) == 10)
        module.gate.set()
        for tensor, data in zip(await asyncio.gather(*calls), files, strict=True):
            same(tensor, data)
        assert module.batches == [1, 6, 4]
        assert decode.counts == {"device": 11, "batches": 3}


async def test_a_damaged_image_leaves_its_neighbours_alone(module: double.Module) -> None:
    good = FILES["baseline"]
    refused = encoded(SMALL, quality=33)
    module.refuses.add(refused)
    async with Decoder("host") as decode:
        module.gate.clear()
        files = [good, refused, good[:-200], b"GIF89", good]
        calls = [asyncio.create_task(decode(data)) for data in files]
        await until(lambda: len(decode._queue) == 2)
        module.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        for index in (0, 1, 4):
            tensor = results[index]
            assert isinstance(tensor, torch.Tensor)
            same(tensor, files[index])
        assert isinstance(results[2], ImageError)
        assert isinstance(results[3], ImageError)
        assert decode.counts == {"device": 2, "cpu": 1, "errors": 2, "batches": 2}


async def test_when_the_library_fails_for_a_batch_the_cpu_decodes_it(
    module: double.Module, caplog: pytest.LogCaptureFixture
) -> None:
    async with Decoder("host") as decode:
        for _ in range(2):
            module.error = RuntimeError("Internal error")
            same(await decode(FILES["baseline"]), FILES["baseline"])
        same(await decode(FILES["grey"]), FILES["grey"])
        assert decode.counts == {"device": 1, "cpu": 2, "batches": 3}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["a batch of 1 images" in record.getMessage() for record in warnings] == [True]


@pytest.mark.parametrize("believes", [False, True])
async def test_damaged_files_raise_what_pillow_raises(believes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library gives pixels for whatever it gets."""
    double.install(monkeypatch, believes=believes)
    files = list(damaged(1000))
    async with Decoder("host", max_pixels=MAX_PIXELS) as decode:
        results: list[Any] = []
        for start in range(0, len(files), 50):
            results += await asyncio.gather(*map(decode, files[start : start + 50]), return_exceptions=True)
        errors = 0
        for data, result in zip(files, results, strict=True):
            expected = on_cpu(data)
            if isinstance(expected, str):
                errors += 1
                assert f"{type(result).__name__}: {result}" == expected
            elif not believes:
                same(result, data)
        assert decode.counts["errors"] == errors > 300
        assert decode.counts["device"] > 300


async def test_limits_hold_before_anything_is_decoded(module: double.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = encoded(SMALL, quality=5)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it is decoded"))
    async with Decoder("host", max_bytes=len(FILES["baseline"]) - 1, max_pixels=2399) as decode:
        with pytest.raises(ImageTooLargeError, match=r"has [0-9,]+ bytes; at most [0-9,]+ are taken"):
            await decode(FILES["baseline"])
        with pytest.raises(ImageTooLargeError, match="60 x 40 pixels; at most 2,399 are taken"):
            await decode(smaller)
        assert decode.counts == {"errors": 2}
    assert module.batches == []


async def test_images_in_flight_share_the_memory_limit(module: double.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "needed", lambda *_: 400 << 20)
    async with Decoder("host") as decode:
        module.gate.clear()
        calls = [asyncio.create_task(decode(FILES["baseline"])) for _ in range(5)]
        await until(lambda: module.batches == [1] and len(decode._queue) == 1)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert (module.batches, len(decode._queue)) == ([1], 1)
        calls[0].cancel()  # the library still works on it
        calls[1].cancel()  # queued: its share goes to the next call
        calls[2].cancel()  # waits for memory
        await until(lambda: calls[0].done() and len(decode._queue) == 2)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert len(decode._queue) == 2, "one cancelled call and one that waits"
        module.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 3 + [torch.Tensor] * 2
        await until(lambda: not decode._calls)
        assert decode.counts["cancelled"] == 3
    async with threads.memory(1 << 30):
        pass


async def test_a_cancelled_call_leaves_at_once(module: double.Module) -> None:
    async with Decoder("host") as decode:
        module.gate.clear()
        calls = [asyncio.create_task(decode(FILES["baseline"])) for _ in range(3)]
        await until(lambda: module.batches == [1] and len(decode._queue) == 2)
        for call in calls[:2]:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        module.gate.set()
        same(await calls[2], FILES["baseline"])
        assert module.batches == [1, 1], "the one that was queued is not decoded"
        await until(lambda: decode.counts["cancelled"] == 2)


async def test_closing_while_busy(module: double.Module) -> None:
    decode = Decoder("host")
    async with decode:
        module.gate.clear()
        running, queued = (asyncio.create_task(decode(FILES["baseline"])) for _ in range(2))
        await until(lambda: module.batches == [1] and len(decode._queue) == 1)
        closing = asyncio.create_task(decode.close())
        with pytest.raises(aiotrt.UsageError, match="closed before the image was decoded"):
            await queued
        with pytest.raises(aiotrt.UsageError, match="this decoder is closed"):
            await decode(FILES["baseline"])
        closing.cancel()  # which ends the waiting, and not the closing
        assert not running.done()
        module.gate.set()
        same(await running, FILES["baseline"])
    assert module.closed == 1
    await decode.close()
    with pytest.raises(aiotrt.UsageError, match="once"):
        await decode.__aenter__()


async def test_use_before_it_is_entered() -> None:
    with pytest.raises(aiotrt.UsageError, match="async with"):
        await Decoder("host")(FILES["baseline"])


async def test_no_memory_on_the_device(module: double.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of this image, and of no other one."""

    def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
        if pixels.shape[0] == 23:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pixels

    monkeypatch.setattr(library, "turned", turned)
    async with Decoder("host") as decode:
        with pytest.raises(aiotrt.ResourceError, match="no memory for the pixels of an image of 37 x 23"):
            await decode(FILES["odd"])
        same(await decode(FILES["baseline"]), FILES["baseline"])


async def test_a_fault_of_the_device_reaches_every_caller(module: double.Module) -> None:
    device = aiotrt.devices.host.HostDevice("host of this test")
    fault = aiotrt.DeviceError("the device failed", code=700, name="cudaErrorIllegalAddress")
    async with Decoder(device) as decode:
        module.gate.clear()
        calls = [asyncio.create_task(decode(FILES["baseline"])) for _ in range(3)]
        await until(lambda: len(decode._queue) == 2)
        module.error = fault
        module.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[0] is fault
        assert device.fault is fault
        with pytest.raises(aiotrt.DeviceError, match="IllegalAddress"):
            await decode(FILES["baseline"])


async def test_the_library_gets_a_copy_of_a_buffer(module: double.Module) -> None:
    """The caller may change its own buffer once it was cancelled, and the device reads the data later."""
    data = bytearray(FILES["baseline"])
    async with Decoder("host") as decode:
        same(await decode(memoryview(data)), bytes(data))
        module.gate.clear()
        call = asyncio.create_task(decode(data))
        await until(lambda: len(module.batches) == 2)
        data[:] = bytes(len(data))
        module.gate.set()
        same(await call, FILES["baseline"])


async def test_memory_of_the_library_is_freed_when_the_device_is_done(module: double.Module) -> None:
    async with Decoder("host") as decode:
        for _ in range(20):
            await decode(FILES["baseline"])
        assert decode._library is not None
        used = decode._library._used
        await until(lambda: not used)


@pytest.mark.parametrize("seed", range(4))
async def test_callers_come_and_go(seed: int, module: double.Module) -> None:
    """Each caller gets its own image or its own error, whatever becomes of the others, and no memory stays taken."""
    random = np.random.default_rng(seed)
    files = [encoded(SMALL.resize((10 + i, 9))) for i in range(8)] + [FILES["baseline"][:-30], OTHERS["PNG"]]
    module.refuses.add(files[3])
    decode = Decoder("host", max_batch=3)

    async def caller() -> None:
        data = files[int(random.integers(len(files)))]
        try:
            same(await decode(data), data)
        except ImageError as error:
            assert f"ImageError: {error}" == on_cpu(data)  # noqa: PT017  # either may come
        except aiotrt.UsageError:
            assert decode._is_closed

    async with decode:
        callers: list[asyncio.Task[None]] = []
        for _ in range(300):
            callers.append(asyncio.create_task(caller()))
            match int(random.integers(6)):
                case 0:
                    callers[int(random.integers(len(callers)))].cancel()
                case 1:
                    module.gate.clear()
                case 2 | 3:
                    module.gate.set()
                case 4:
                    module.error = RuntimeError("Internal error") if random.random() < 0.2 else None
                case _:
                    await asyncio.sleep(random.random() * 0.004)
        asyncio.get_running_loop().call_later(0.05, module.gate.set)
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}, results
    assert not decode._calls
    assert not decode._batches
    assert module.closed == 1
    async with asyncio.timeout(5), threads.memory(1 << 30):
        pass


async def test_wrong_arguments() -> None:
    for name in ("max_bytes", "max_pixels", "max_batch"):
        limits: dict[str, Any] = {name: 0}
        with pytest.raises(aiotrt.InputError, match=f"{name} must be at least 1, got 0"):
            Decoder("host", **limits)
    text: Any = "photo.jpg"
    with pytest.raises(aiotrt.InputError, match="expected the bytes of an image file, got an object of type str"):
        await decode_image(text, "host")


async def test_decode_image_shares_a_decoder(module: double.Module) -> None:
    module.gate.clear()
    calls = [asyncio.create_task(decode_image(FILES["baseline"], "host")) for _ in range(4)]
    decoders = decoder._decoders
    await until(lambda: module.batches == [1] and len(decoders) >= 1)
    (found,) = [each for key, each in decoders.items() if key[0] is asyncio.get_running_loop()]
    await until(lambda: len(found._queue) == 3)
    module.gate.set()
    for tensor in await asyncio.gather(*calls):
        same(tensor, FILES["baseline"])
    assert module.batches == [1, 3]
    with pytest.raises(ImageTooLargeError):
        await decode_image(FILES["baseline"], "host", max_pixels=10)


@pytest.mark.parametrize("fault", ["", "None", "grey", "error"])
async def test_a_library_that_does_not_work_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nvJPEG is missing, or is for another version of CUDA."""
    module = double.Module()
    parent: Any = ModuleType("nvidia")
    parent.nvimgcodec = module
    monkeypatch.setitem(sys.modules, "nvidia", parent)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", parent)
    monkeypatch.setattr(library, "_warned", set())
    if fault == "None":
        monkeypatch.setattr(double.Decoder, "_decoded", lambda *_: None)
    elif fault == "grey":
        monkeypatch.setattr(double.Decoder, "_decoded", lambda *_: double.Image(np.full((64, 64, 3), 128, np.uint8)))
    elif fault == "error":
        module.error = RuntimeError("Internal error")
    device: Any = aiotrt.devices.host.HostDevice("GPU of this test")
    device.torch_device = torch.device("cuda", 0)
    found, reason = await asyncio.to_thread(library.open_library, device, hardware=True)
    if fault:
        assert found is None
        assert ("Internal error" if fault == "error" else "is nvJPEG installed") in reason
        assert module.closed == 1
    else:
        assert (found is not None, reason) == (True, "")


async def test_a_missing_library_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.setattr(library, "_warned", set())
    device: Any = SimpleNamespace(torch_device=torch.device("cuda", 0), name="cuda:0")
    for _ in range(2):
        found, reason = library.open_library(device, hardware=False)
        assert found is None
        assert "pip install" in reason
        assert "decode" in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert library.open_library(aiotrt.devices.open_device("host"), hardware=False) == (None, "host is no GPU")
