"""The benchmark of real networks: what it says of each, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_real_networks import Result, compare, main, table
from benchmarks.real_networks import ZOO


def test_there_are_many_networks_of_every_kind() -> None:
    names = [entry.name for entry in ZOO]
    assert len(set(names)) == len(names) >= 40
    kinds = ("torchvision", "timm", "transformers", "torch ", "torch_geometric", "torchaudio")
    assert all(any(name.startswith(kind) for name in names) for kind in kinds)


X = torch.arange(6.0).view(2, 3)
DIFFERENT: list[tuple[object, object, str]] = [
    (X, X.clone(), ""),
    ({"a": X, "n": 1}, {"a": X, "n": 1}, ""),
    (X / 0, X / 0, ""),  # nan and inf are what they are
    (X, X + 1e-3, "differs by 0.001"),
    ([X, X], (X, X), "differs in structure: tuple for list"),
    ({"a": X, "n": 1}, {"a": X, "n": 2}, "differs in structure"),
    (X, X.double(), "differs in shape or dtype: torch.float64"),
    (X, X[:1], "differs in shape or dtype"),
]


@pytest.mark.parametrize(("expected", "got", "says"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_results_are_compared_bit_for_bit(expected: object, got: object, says: str) -> None:
    assert compare(expected, got).startswith(says)
    assert bool(compare(expected, got)) == bool(says)


def result(how: str = "graph", parity: str = "bit for bit", call: float = 10.0, eager: float = 100.0, **more: Any) -> Result:
    return Result("a network", how, parity, call, eager, 1.5, **more)


def test_what_is_as_it_should_be() -> None:
    assert result().is_good
    assert result("not installed", "", 0, 0).is_good
    assert result("no graph", call=114.0).is_good
    assert not result("no graph", call=116.0).is_good
    assert not result("failed", reason="EngineError: no").is_good
    assert not result(parity="differs by 1e-7").is_good
    assert result(parity="eager repeats itself no better (differs by 1e-7)").is_good
    shown = table([result(), result("no graph", call=200.0, reason="a | b\nc"), result("not installed", "", 0, 0)])
    assert "| a network | graph | bit for bit | 10 | 100 | 10.00 | 1.5 |  |" in shown
    assert "a / b c" in shown
    assert shown.endswith("2 networks: 1 as a graph, 1 not as they should be\n- a network")


def test_it_runs_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert main(["--device", "host", "--quick", "--only", "^torch (LSTM|Multihead)", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [(one["name"], one["how"], one["parity"]) for one in found] == [
        ("torch LSTM", "graph", "bit for bit"), ("torch MultiheadAttention", "graph", "bit for bit"),
    ]  # fmt: skip
    assert "2 networks: 2 as a graph, 0 not as they should be" in capsys.readouterr().out
    assert main(["--device", "host", "--quick", "--only", "^torch", "--part", "99/99", "--json", str(file)]) == 0
