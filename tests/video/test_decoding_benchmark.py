"""The benchmark of decoders runs, and its figures are of what it ran."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_video_decoding


@pytest.mark.timeout(120)
def test_it_prints_a_record_for_each_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_video_decoding, "SIZE", (144, 192))
    monkeypatch.setattr(bench_video_decoding, "WARM", 0.5)
    monkeypatch.setattr(bench_video_decoding, "load_detector", lambda device, slots: (load(device, slots), "mean"))
    words = ["--json", "--device", "host", "--decode", "cpu", "--streams", "1", "2", "--seconds", "1", "--rounds", "1"]
    assert bench_video_decoding.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "host"
    assert [(run["decode"], run["streams"]) for run in found["runs"]] == [("cpu", 1), ("cpu", 2)]
    for run in found["runs"]:
        assert 0 < run["frames_per_second"] < 31 * run["streams"]
        assert 0 <= run["age_p50"] <= run["age_p99"]
        assert run["cpu_cores"] > 0


def load(device: str, slots: int) -> object:
    import aiotrt

    return aiotrt.load(lambda frame: frame.float().mean(), device=device, slots=slots)
