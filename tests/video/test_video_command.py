"""``aiotrt video detect``, with a small network in RF-DETR's place."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
import torch

from aiotrt.cli import main
from aiotrt.video import rfdetr
from benchmarks.bench_rfdetr_video import StandIn
from tests.video.tools import write_video


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "detector.onnx"
    torch.onnx.export(
        StandIn().eval(), (torch.zeros(1, 3, 312, 312),), path, input_names=["x"], dynamo=False, opset_version=17
    )  # fmt: skip
    return path


def detect(*arguments: object) -> int:
    return main(["video", "detect", *map(str, arguments), "--device", "host", "--slots", "1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_video_and_json(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, out = write_video(tmp_path / "film.mp4", range(6)), tmp_path / "found.mp4"
    assert detect(film, "--model", onnx, "--threshold", 0, "--top", 3, "--out", out, "--json", "-", "--frames", 4) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert all(len(row["output"]["found"]) == 3 and row["output"]["size"] == [48, 64] for row in rows)
    assert captured.err == "film.mp4: 4 frames\n"
    with av.open(str(out)) as file:
        assert len(list(file.decode(video=0))) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_source_that_fails_is_told_and_the_others_are_done(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = write_video(tmp_path / "film.mp4", range(3))
    (tmp_path / "text.mp4").write_text("no video")
    bad = [tmp_path / "missing.mp4", tmp_path / "text.mp4"]
    assert detect(bad[0], film, bad[1], "--model", onnx, "--json", tmp_path / "x.jsonl") == 1
    captured = capsys.readouterr()
    assert "film.mp4: 3 frames\n" in captured.out
    assert "missing.mp4: 0 frames, 1 failed; " in captured.out
    assert "text.mp4: 0 frames, 1 failed; " in captured.out
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_films_that_are_cut_off_and_change_their_size(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = write_video(tmp_path / "cut.mp4", [i % 32 for i in range(100)])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    parts = [write_video(tmp_path / f"{i}.h264", range(5), size=size) for i, size in enumerate([(64, 48), (128, 80)])]
    (tmp_path / "sizes.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    sources = [cut, tmp_path / "sizes.h264"]
    assert detect(*sources, "--model", onnx, "--threshold", 0, "--top", 3, "--out", tmp_path / "{source}.mkv") == 0
    told = capsys.readouterr().out
    assert re.search(r"^cut\.mp4: \d\d frames, .*1 truncated", told, re.MULTILINE)
    assert "sizes.h264: 10 frames, 1 resolution\n" in told
    with av.open(str(tmp_path / "sizes.h264.mkv")) as file:
        assert [(frame.height, frame.width) for frame in file.decode(video=0)] == [(48, 64)] * 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_film_that_cannot_be_written_is_no_success(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = write_video(tmp_path / "film.mp4", range(3))
    assert detect(film, "--model", onnx, "--out", tmp_path / "found.abacus") == 1
    assert "film.mp4: 3 frames, 3 sink, 3 failed by VideoFile\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["missing.mp4"], 1, "missing.mp4: No such file or directory"),
        (["rtsp://127.0.0.1:9/nobody"], 1, "rtsp://127.0.0.1:9/nobody: Connection refused"),
        (["a.mp4", "--labels", "missing.txt"], 2, "--labels missing.txt: No such file or directory"),
        (["a.mp4", "--out", "missing/b.mp4"], 2, "--out missing/b.mp4: there is no folder missing"),
        (["a.mp4", "--json", "missing/b.jsonl"], 2, "--json missing/b.jsonl: there is no folder missing"),
        (["a.mp4", "--out", "./a.mp4"], 2, "that is the source a.mp4, which would be overwritten"),
        (["a.mp4", "b.mp4", "--out", "{source}"], 2, "that is the source a.mp4, which would be overwritten"),
        (["a.mp4", "found-a.mp4", "--out", "found-{source}"], 2, "that is the source found-a.mp4, which would be"),
        (["a b.mp4", "a_b.mp4", "--out", "{source}"], 2, "that is the source a_b.mp4, which would be overwritten"),
        (["x/a.mp4", "a.mp4_0", "y/a.mp4", "--out", "{source}"], 2, "that is the source a.mp4_0, which would be"),
        (["file:a.mp4", "--out", "a.mp4"], 2, "that is the source file:a.mp4, which would be overwritten"),
        (
            ["a b.mp4", "a_b.mp4", "--out", "f-{source}"],
            2,
            "that is also the video of 'a b.mp4', which would be overwritten",
        ),
        (["a.mp4", "--out", "b.mp4", "--json", "./b.mp4"], 2, "that is also the video of 'a.mp4', which would be"),
        (["a.mp4", "--json", "x.onnx", "--model", "x.onnx"], 2, "that is the file of --model, which would be overwritten"),
        (["a.mp4", "--top", "0"], 2, "--top 0: expected at least 1"),
        (["a.mp4", "b.mp4", "--out", "c.mp4"], 2, "put {source} into the name"),
        (["a.mp4", "--model", "x.onnx", "--weights", "y.pth"], 2, "give one of the two"),
    ],
)
def test_what_cannot_be(arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect(*arguments) == status
    assert says in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["video", "detect", "--help"])
    assert "aiotrt video detect street.mp4 --weights" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_no_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, path = write_video(tmp_path / "film.mp4", range(2)), tmp_path / "a.onnx"
    torch.onnx.export(torch.nn.ReLU(), (torch.zeros(1, 3, 312, 312),), path, input_names=["x"], dynamo=False)
    assert detect(film, "--model", path) == 1
    assert f"{path}: cannot be used as a detector: expected boxes (1, n, 4)" in capsys.readouterr().err


# RF-DETR...


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rfdetr", None)
    assert detect(write_video(tmp_path / "a.mp4", range(2))) == 1
    assert "pip install rfdetr" in capsys.readouterr().err


def test_weights_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect(write_video(tmp_path / "a.mp4", range(2)), "--weights", tmp_path / "w.pth") == 1
    assert "w.pth: there is no such file" in capsys.readouterr().err


def test_random_weights_are_said_loudly_and_are_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package: Any = ModuleType("rfdetr")

    class Network(StandIn):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)  # so that the weights are drawn from whatever the generator gives
            self.boxes = torch.nn.Conv2d(3, 4, 32, stride=32)

        def export(self) -> None:
            self.is_exported = True

    class Model:
        def __init__(self, pretrain_weights: object, device: str) -> None:
            assert (pretrain_weights, device) == (None, "cpu")
            self.model = type("Inner", (), {"model": Network()})()

    package.RFDETRSegNano = Model
    monkeypatch.setitem(sys.modules, "rfdetr", package)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second = rfdetr.network(), rfdetr.network()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.is_exported
    assert not first.training
    assert torch.equal(first.boxes.weight, second.boxes.weight)  # type: ignore[union-attr,arg-type]
    assert "RANDOM WEIGHTS" in caplog.text
