"""The benchmarks of decoding run, on the host, and give what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_decoding, bench_jpeg_endpoint


def test_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--json", "--device", "host", "--size", "160x90", "--out", str(tmp_path)]
    assert bench_decoding.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["way"], row["callers"]) for row in found["runs"]] == [
        (way, callers) for callers in (1, 32) for way in ("Pillow in threads", "Decoder")
    ]
    assert all(row["rate"] > 0 for row in found["runs"])
    assert list(tmp_path.glob("decoding-host*.json"))
    assert bench_decoding.main(words[:1] + words[2:6]) == 0
    assert "images/s" in capsys.readouterr().out


def test_jpeg_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--json", "--device", "host", "--model", "tiny", "--size", "160x90", "--connections", "3"]
    assert bench_jpeg_endpoint.main([*words, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] == {}
    assert [row["way"] for row in found["ways"]] == ["Pillow in threads", "decoded on the device"]
    assert all(row["rate"] > 0 and row["rounds"][0]["cpu_seconds"] >= 0 for row in found["ways"])
