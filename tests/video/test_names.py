"""Files whose names have a colon, as recordings that are named by their time."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotrt import video
from tests.video.tools import picture, write_video

pytestmark = pytest.mark.asyncio


async def same(frame: video.Frame) -> int:
    return frame.index


NAMES = ["12:30:00.mp4", "door:2.mp4", "http:out.mp4"]


@pytest.mark.parametrize("name", NAMES)
async def test_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "a.mp4", range(3))
    (tmp_path / "a.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, Path(name), f"./{name}", tmp_path / name, f"file:{name}"):
        async with video.open(path) as frames:
            assert frames.name == (name if not str(path).startswith("file:") else frames.name)
            assert len([frame async for frame in frames]) == 3


@pytest.mark.parametrize("name", NAMES)
async def test_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    source = video.open([picture(i) for i in range(3)], name="s", fps=10)
    async with video.Pipeline(same, {"s": source}, [video.VideoFile(name)]) as pipeline:
        await pipeline.wait()
    assert (tmp_path / name).stat().st_size > 0
    async with video.open(Path(name)) as frames:
        assert len([frame async for frame in frames]) == 3


async def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(video.SourceError, match=r"12:30:00\.mp4"):
        async with video.open(Path("12:30:00.mp4")):
            pass
