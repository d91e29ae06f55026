"""The structure of JPEG files: whole ones pass, and no file passes that libjpeg rejects."""

from __future__ import annotations

from typing import Any

import pytest

from aiotrt.decoding.jpeg import UnsuitableError, end_of_image
from tests.decoding.corpus import damaged, encoded, on_cpu, photograph

OPTIONS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"restart_marker_blocks": 7},
    {"progressive": True, "restart_marker_rows": 1},
    {"optimize": True},
    {"quality": 100},
    {"quality": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (37, 23), (8, 300)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_files_pass_and_truncated_ones_do_not(options: dict[str, Any], size: tuple[int, int], mode: str) -> None:
    data = encoded(photograph("chelsea", size).convert(mode), **options)
    assert end_of_image(data) == len(data)
    assert end_of_image(data + b"more") == len(data)
    for end in range(0, len(data), 7):
        with pytest.raises(UnsuitableError):
            end_of_image(data[:end])


def test_a_thumbnail_is_not_the_image() -> None:
    """Its markers are inside a segment."""
    thumbnail = encoded(photograph("rocket", (16, 16)))
    data = encoded(photograph("rocket", (64, 64)), exif=b"Exif\0\0" + thumbnail)
    assert end_of_image(data) == len(data)
    with pytest.raises(UnsuitableError, match="damaged"):
        end_of_image(data[: data.index(b"\xff\xda", len(thumbnail) + 40) + 30])


def test_what_libjpeg_rejects_does_not_pass() -> None:
    passed = 0
    for data in damaged(3000, seed=1):
        try:
            end_of_image(data)
        except UnsuitableError:
            continue
        passed += 1
        found = on_cpu(data)
        assert not isinstance(found, str) or "TooLarge" in found, found
    assert passed > 1000


def test_many_segments_are_left_to_the_cpu() -> None:
    data = encoded(photograph("rocket", (16, 16)))
    for count in (400, 600):
        padded = data[:2] + b"\xff\xfe\x00\x02" * count + data[2:]
        if count < 500:
            assert end_of_image(padded) == len(padded)
        else:
            with pytest.raises(UnsuitableError, match="format"):
                end_of_image(padded)
