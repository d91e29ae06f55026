"""Names and paths of the models that `aiotrt serve` is given."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from aiotrt.cli.serve import _model

UNSET = ("device", "slots", "max_queue", "threads")
OPTIONS: dict[str, object] = {**dict.fromkeys(UNSET), "batching": False, "shape": []}


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("model.onnx", "model", "model.onnx"),
        ("m=model.onnx", "m", "model.onnx"),
        ("m=dt=2024-05-01/model.onnx", "m", "dt=2024-05-01/model.onnx"),
        ("dt=2024-05-01/model.onnx", "model", "dt=2024-05-01/model.onnx"),
        ("m=a=b.onnx", "m", "a=b.onnx"),
    ],
)
def test_the_first_equals_sign_ends_the_name_unless_all_of_it_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("model.onnx", "dt=2024-05-01/model.onnx", "a=b.onnx"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    settings = _model(text, argparse.Namespace(**OPTIONS))
    assert (settings.name, settings.path) == (name, Path(path))
