"""What files say of their pictures and of their clock: turned, mirrored, not square, beginning late, beside cover art."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from aiotrt import video
from aiotrt.errors import InputError
from aiotrt.video import Frame, SourceError

HEIGHT, WIDTH = 64, 96
ONE = 1 << 16
#: By the matrix that shows it (a, b, c, d): what becomes of the pixels, as `ffmpeg -autorotate` does it.
TURNS: dict[tuple[int, int, int, int], Any] = {
    (1, 0, 0, 1): lambda pixels: pixels,
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1),
    (-1, 0, 0, -1): lambda pixels: np.rot90(pixels, 2),
    (0, -1, 1, 0): lambda pixels: np.rot90(pixels, 1),
    (-1, 0, 0, 1): lambda pixels: pixels[:, ::-1],
    (1, 0, 0, -1): lambda pixels: pixels[::-1],
    (0, 1, 1, 0): lambda pixels: pixels.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
}


def quarters() -> np.ndarray[Any, Any]:
    """A picture whose four corners differ."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return picture


def film(path: Path, count: int = 3, *, offset: float = 0.0, aspect: Fraction | None = None) -> Path:
    """Pictures of `quarters`, each brighter than the one before in the fourth, ten a second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"g": "10", "bf": "0", "qp": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(count):
            picture = quarters()
            picture[32:, 48:] = i * 4
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((offset + i / 10) * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path, matrix: Sequence[int]) -> None:
    """Write a display matrix into the header of an MP4's track."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4
    assert data[at] == 0  # its version, on which what stands before the matrix depends
    a, b, c, d = (value * ONE for value in matrix)
    data[at + 40 : at + 76] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


async def frames_of(path: Path, **options: Any) -> list[Frame]:
    async with video.open(path, **options) as frames:
        return [frame async for frame in frames]


def number_of(frame: Frame) -> int:
    return round(float(frame.image[48, 72].mean()) / 4)


@pytest.mark.asyncio
@pytest.mark.parametrize("matrix", TURNS)
async def test_pictures_come_as_they_are_to_be_shown(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = film(tmp_path / "phone.mp4")
    stored = (await frames_of(path))[0].image
    turn(path, matrix)
    for frame in await frames_of(path):
        expected = TURNS[matrix](stored)
        assert frame.shape == frame.image.shape == expected.shape
        assert np.abs(frame.image[:20].astype(int) - expected[:20]).max() < 16
        assert np.abs(frame.image[:, :20].astype(int) - expected[:, :20]).max() < 16
        with pytest.raises(ValueError, match="read-only"):
            frame.image[0] = 0


@pytest.mark.asyncio
async def test_a_turn_that_is_no_quarter_turn_is_not_made(tmp_path: Path) -> None:
    path = film(tmp_path / "tilted.mp4")
    turn(path, (1, 1, -1, 1))
    assert [frame.shape for frame in await frames_of(path)] == [(HEIGHT, WIDTH, 3)] * 3


@pytest.mark.asyncio
@pytest.mark.parametrize("is_turned", [False, True])
async def test_pixels_that_are_not_square_are_said_to_be(is_turned: bool, tmp_path: Path) -> None:
    path = film(tmp_path / "anamorphic.mp4", aspect=Fraction(4, 3))
    if is_turned:
        turn(path, (0, 1, -1, 0))
    assert [frame.pixel_aspect for frame in await frames_of(path)] == [pytest.approx(0.75 if is_turned else 4 / 3)] * 3
    assert [frame.pixel_aspect for frame in await frames_of(film(tmp_path / "square.mp4"))] == [1.0] * 3
    async with video.open([quarters()], name="array") as frames:
        assert [frame.pixel_aspect async for frame in frames] == [1.0]


@pytest.mark.asyncio
@pytest.mark.parametrize("offset", [0.0, 600.0])
@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
async def test_times_are_since_the_beginning_of_the_file(extension: str, offset: float, tmp_path: Path) -> None:
    path = film(tmp_path / f"recording.{extension}", 40, offset=offset)
    times = [frame.time for frame in await frames_of(path)]
    assert times == pytest.approx([i / 10 for i in range(40)], abs=1e-3)
    later = await frames_of(path, start=2.0)
    assert [number_of(frame) for frame in later] == list(range(20, 40))
    assert [frame.time for frame in later] == pytest.approx([i / 10 for i in range(20, 40)], abs=1e-3)


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The boxes of an MP4 at one level: the name of each, and all of its bytes."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return found


@pytest.mark.asyncio
async def test_cover_art_is_not_the_film(tmp_path: Path) -> None:
    path = tmp_path / "covered.mp4"
    with av.open(str(path), "w") as container:
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        still = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(still), *cover.encode(None)])
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        container.mux(stream.encode(None))
    parts = dict(boxes(path.read_bytes()))
    inside = boxes(parts[b"moov"][8:])
    inside.sort(key=lambda box: box[0] != b"udta")  # the cover is in there, and a reader's first video then
    parts[b"moov"] = parts[b"moov"][:8] + b"".join(box for _, box in inside)
    path.write_bytes(b"".join(parts.values()))
    assert [frame.shape for frame in await frames_of(path)] == [(HEIGHT, WIDTH, 3)] * 5
    assert [frame.shape for frame in await frames_of(path, stream=1)] == [(HEIGHT, WIDTH, 3)] * 5
    assert [frame.shape for frame in await frames_of(path, stream=0)] == [(32, 32, 3)]
    with pytest.raises(SourceError, match=r"covered\.mp4: stream=2, but it has only 2 video streams"):
        await frames_of(path, stream=2)
    with pytest.raises(InputError, match="stream must be at least 0, got -1"):
        video.open(path, stream=-1)


@pytest.mark.asyncio
async def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 16000, 16000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
    with pytest.raises(
        SourceError,
        match=r"bomb\.png: the size of its pictures cannot be read: they are damaged, or over max_pixels=67,108,864",
    ):
        await frames_of(path)
