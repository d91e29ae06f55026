"""Images: bounded on each side, decoded in pieces, and within one bound on the memory of all that are decoded at once."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from aiotrt.decoding import pillow
from aiotrt.decoding.threads import memory
from aiotrt.errors import InputError
from aiotrt.serving import BodyTooLargeError, decode_image
from aiotrt.serving.images import decode_off_loop
from tests.serving.test_fastapi import png, vast

GIB = 1 << 30


@pytest.mark.parametrize("size", [(1, 50_000_000), (50_000_000, 1), (65_536, 1), (1, 65_536)])
def test_a_side_is_bounded_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it is decoded"))
    with pytest.raises(BodyTooLargeError, match="at most 65,535 are taken on one side"):
        decode_image(vast(*size), 50_000_000)


def test_the_longest_side() -> None:
    assert decode_image(png(65_535, 1), 1 << 20).shape == (1, 65_535, 3)
    assert decode_image(png(1, 65_535), 1 << 20).shape == (65_535, 1, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("stored", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pieces_make_the_whole(stored: str, mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow, "_PIECE", 40)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (11, 13, 3), np.uint8)).convert(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    noise.save(file, "TIFF" if stored == "CMYK" else "PNG", exif=exif)
    turned = noise.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else noise
    expected = np.array(turned.convert(mode)).reshape(turned.height, turned.width, -1)
    np.testing.assert_array_equal(decode_image(file.getvalue(), 1000, mode), expected)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.full((40, 60, 3), (200, 30, 30), np.uint8)
    for turned, options in ((pixels, {}), (pixels.transpose(1, 0, 2), {"exif": exif})):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "AVIF", quality=95, **options)
        found = decode_image(file.getvalue(), 2400)
        assert found.shape == turned.shape
        assert np.abs(found.astype(int) - turned).max() < 10
        with pytest.raises(BodyTooLargeError, match="60 x 40 pixels; at most 2,399 are taken"):
            decode_image(file.getvalue(), 2399)
        with pytest.raises(InputError, match="not an image that can be read"):
            decode_image(file.getvalue()[:-100], 2400)


def test_an_error_names_no_object() -> None:
    with pytest.raises(InputError, match=r"\(5 bytes\): its format is none of JPEG, PNG, WEBP, (AVIF, )?BMP, GIF, TIFF"):
        decode_image(b"GIF89", 1000)


@pytest.mark.asyncio
@pytest.mark.every_loop
async def test_images_that_are_decoded_at_once_have_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, lock = threading.Event(), threading.Lock()
    running = most = 0
    decode = pillow.pixels

    def held(*arguments: Any) -> pillow.Pixels:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(30)
        with lock:
            running -= 1
        return decode(*arguments)

    monkeypatch.setattr(pillow, "needed", lambda *_: 400 << 20)
    monkeypatch.setattr(pillow, "pixels", held)
    calls = [asyncio.create_task(decode_off_loop(png(), 1000, "RGB")) for _ in range(5)]
    while running < 2:
        await asyncio.sleep(0)
    await turns()
    gate.set()
    assert {pixels.shape for pixels in await asyncio.gather(*calls)} == {(10, 20, 3)}
    assert most == 2


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.every_loop
async def test_memory_goes_to_one_after_the_other_and_comes_back() -> None:
    order: list[int] = []
    gates = [asyncio.Event() for _ in range(4)]

    async def take(i: int, size: int) -> None:
        async with memory(size):
            order.append(i)
            await gates[i].wait()

    tasks = [asyncio.create_task(take(i, size)) for i, size in enumerate((GIB // 2, GIB, 5 * GIB, 1))]
    await turns()
    assert order == [0], "a small one does not overtake those that wait for more"
    tasks[1].cancel()  # holds half of what it needs
    gates[0].set()
    await turns()
    assert order == [0, 2], "with more than there is, when nothing else is decoded"
    gates[2].set()
    await turns()
    assert order == [0, 2, 3]
    gates[3].set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), asyncio.CancelledError, type(None), type(None)]
    async with memory(GIB):
        pass


@pytest.mark.parametrize(("form", "most"), [("PNG", 12), ("JPEG", 12), ("BMP", 12), ("WEBP", 20), ("AVIF", 20)])
def test_what_an_image_takes_is_not_underestimated(form: str, most: int) -> None:
    if form not in pillow.FORMATS:
        pytest.skip("Pillow was built without it")
    with pillow.opened(png(100, 100, form), 10_000) as image:
        assert 7 * 10_000 <= pillow.needed(image, "RGB") <= most * 10_000
