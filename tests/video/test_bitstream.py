"""Headers of H.264 and HEVC, as encoders write them and as damage leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from hypothesis import given
from hypothesis import strategies as st

from aiotrt.video.bitstream import Headers, parameter_sets, units
from tests.video.tools import write_video

CODECS = {"libx264": "h264", "libx265": "hevc"}


def pictures(folder: Path, encoder: str, extension: str) -> tuple[bytes, list[bytes]]:
    """The container's header of a video, and the Annex B data of its packets."""
    path = write_video(folder / f"a.{extension}", range(12), codec=encoder, size=(160, 160))
    with av.open(str(path)) as file:
        stream: Any = file.streams.video[0]
        convert = BitStreamFilterContext(f"{CODECS[encoder]}_mp4toannexb", stream)
        header = bytes(stream.codec_context.extradata or b"")
        packets = [packet for packet in file.demux(stream) if packet.size]
        return header, [b"".join(bytes(part) for part in convert.filter(packet)) for packet in packets]


@pytest.mark.parametrize("extension", ["mp4", "ts", "mkv"])
@pytest.mark.parametrize("encoder", CODECS)
def test_what_encoders_write_is_sound(encoder: str, extension: str, tmp_path: Path) -> None:
    header, data = pictures(tmp_path, encoder, extension)
    sets = parameter_sets(CODECS[encoder], header)
    headers = Headers(CODECS[encoder], sets)
    first = headers.sequence
    assert len(first) == 1
    assert [headers.read(picture) for picture in data] == [None] * 12
    assert set(units(headers.sets)) <= set(units(sets)) | set(units(data[0]))
    assert headers.sequence == first


@pytest.mark.parametrize("encoder", CODECS)
def test_a_change_of_the_sequence_is_seen(encoder: str, tmp_path: Path) -> None:
    codec = CODECS[encoder]
    _, data = pictures(tmp_path, encoder, "ts")
    other = write_video(tmp_path / f"b.{codec if codec == 'hevc' else 'h264'}", range(1), codec=encoder, size=(192, 160))
    headers = Headers(codec, b"")
    headers.read(data[0])
    before = headers.sequence
    headers.read(other.read_bytes())
    assert headers.sequence != before


@pytest.mark.parametrize("encoder", CODECS)
def test_damage_in_headers_is_seen(encoder: str, tmp_path: Path) -> None:
    codec = CODECS[encoder]
    _, data = pictures(tmp_path, encoder, "ts")
    headers = Headers(codec, data[0])
    slice_ = next(b"\0\0\1" + unit for unit in units(data[1]) if headers.read(b"\0\0\1" + unit) is None)
    assert headers.read(b"") == "a packet contains no picture"
    assert headers.read(slice_[:3] + bytes([slice_[3] | 0x80]) + slice_[4:]) == "the forbidden bit of a unit is set"
    assert headers.read(slice_[:4]) in ("a slice ends within its header", "the header of a unit is damaged")
    assert headers.read(slice_ * 2) == "the slices of a picture are out of order"
    assert Headers(codec, b"").read(slice_) == "a slice refers to a parameter set that is missing"


def test_a_first_slice_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.h264"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25, options={"x264-params": "slices=4"})
        stream.width, stream.height, stream.pix_fmt = 160, 160, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((160, 160, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    found = list(units(path.read_bytes()))
    slices = [unit for unit in found if unit[0] & 0x1F == 5]
    assert len(slices) > 1
    headers = Headers("h264", path.read_bytes())
    assert headers.read(path.read_bytes()) is None
    assert headers.read(b"".join(b"\0\0\1" + unit for unit in slices[1:])) == "the first slice of a picture is missing"


@pytest.mark.parametrize("codec", CODECS.values())
@given(data=st.binary(max_size=200), sets=st.binary(max_size=80))
def test_noise_raises_nothing(codec: str, data: bytes, sets: bytes) -> None:
    headers = Headers(codec, parameter_sets(codec, sets))
    for noise in (data, b"\0\0\1" + data, data.replace(b"\xff", b"\0\0\1")):
        assert isinstance(headers.read(noise), (str, type(None)))
    parameter_sets(codec, b"\1" + sets)
