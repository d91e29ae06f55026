"""RF-DETR itself, with random weights: captured as its export, over a film, by the command and by the example."""

from __future__ import annotations

import json
import os
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
from aiotrt.cli import main
from aiotrt.devices import open_device
from aiotrt.video import rfdetr
from tests.video.tools import Remember, write_video

pytest.importorskip("rfdetr", reason="the package rfdetr is not here")

HEIGHT, WIDTH = 48, 64
TOP = 5


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "host" else torch.float16


def noise(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.mark.asyncio
async def test_load_takes_the_network_as_it_is(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """No capture survives its forward on CUDA, so `load` takes its export, and says so: the same bits, in a graph."""
    kind, dtype, frame = open_device(device).torch_device, dtype_on(device), noise()
    network = rfdetr.network().to(kind, dtype)
    before, after = video.Preprocess(rfdetr.SIZE, dtype), video.Postprocess(HEIGHT, WIDTH, top=TOP)
    async with aiotrt.load(
        network, device=device, slots=2, preprocess=before, postprocess=after, warmup=[frame]
    ) as model:  # fmt: skip
        got = await model(frame)
        assert model.statistics().fallbacks == ()
        assert model.statistics().captures == 2
    says = [record.message for record in caplog.records if "torch.export takes its place" in record.message]
    assert len(says) == (device == "cuda")
    by_hand: Any = network if device == "host" else rfdetr.exported(network, kind, dtype).module()
    with torch.no_grad():
        expected = after(*by_hand(before(torch.from_numpy(frame).to(kind))))
    for name, tensor in expected.items():
        assert np.array_equal(getattr(got, name), tensor.cpu().numpy()), name


@pytest.mark.asyncio
async def test_films_at_once_get_the_bits_of_single_calls(device: str, tmp_path: Path) -> None:
    count, dtype = (4, torch.float32) if device == "host" else (32, torch.float16)
    film, remembered = write_video(tmp_path / "a.mp4", range(count), size=(WIDTH, HEIGHT)), Remember()
    program = rfdetr.exported(rfdetr.network(), open_device(device).torch_device, dtype)
    async with aiotrt.load(
        program, device=device, slots=3, preprocess=video.Preprocess(rfdetr.SIZE, dtype),
        postprocess=video.Postprocess(HEIGHT, WIDTH, top=TOP), warmup=[noise()],
    ) as model:  # fmt: skip
        async with video.Pipeline(model, {"a": film, "b": film}, remembered) as pipeline:
            await pipeline.wait()
            status = pipeline.status()
        assert model.statistics().fallbacks == ()
        for result in remembered.results:
            expected = await model(result.frame.image)
            assert all(np.array_equal(a, b) for a, b in zip(result.output, expected, strict=True))
    for name in ("a", "b"):
        assert remembered.indices(name) == list(range(count))
        assert status.sources[name].latency.keys() >= {"decode", "queue", "convert", "device", "sink"}


def test_the_command_without_weights(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, out = write_video(tmp_path / "film.mp4", range(3)), tmp_path / "found.mp4"
    words = ["video", "detect", film, "--device", device, "--threshold", 0, "--top", 2, "--out", out, "--json", "-"]
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert [len(json.loads(line)["output"]["found"]) for line in captured.out.splitlines()] == [2, 2, 2]
    assert "RANDOM WEIGHTS" in captured.err
    assert "film.mp4: 3 frames\n" in captured.err
    with av.open(str(out)) as file:
        assert len(list(file.decode(video=0))) == 3


def test_the_example(device: str, tmp_path: Path) -> None:
    film = write_video(tmp_path / "film.mp4", range(3))
    program = Path(__file__).parents[2] / "examples" / "rfdetr_segmentation.py"
    finished = subprocess.run(
        [sys.executable, str(program), str(film)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "host" else {})},
    )  # fmt: skip
    assert "film-found.mp4: 3 frames, " in finished.stdout, finished.stderr
    assert len((tmp_path / "film-found.jsonl").read_text().splitlines()) == 3
    with av.open(str(tmp_path / "film-found.mp4")) as file:
        assert len(list(file.decode(video=0))) == 3
