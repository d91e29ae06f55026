"""`aiotrt verify`: on ONNX Runtime, on TensorRT's double, its output, its errors and its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx.helper
import pytest
from onnx import TensorProto

from aiotrt.cli import main
from aiotrt.cli.verify import parse_ranges, parse_shapes
from aiotrt.errors import InputError
from aiotrt.selftest import CHECKS, laws
from tests.building import models
from tests.tensorrt.double import Network
from tests.tensorrt.tools import AFFINE, MANY, POSITIVE, PROFILES, REPEAT, double_on, loading, save
from tests.tools import interruptible

MODULE = [sys.executable, "-m", "aiotrt"]
QUICK = ["--replays", "60", "--cancellations", "20", "--inputs", "2", "--duration", "0.06", "-q"]
NAMES = ["load", *CHECKS, "close"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "HOLD", 0.05)


def verified(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> dict[str, dict[str, Any]]:
    """The checks of a report, by name."""
    assert main(["verify", *map(str, arguments), *QUICK, "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is (status == 0)
    assert [check["name"] for check in report["checks"]] == NAMES
    return {check["name"]: check for check in report["checks"]}


def outcomes(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    """All outcomes but "passed"."""
    return {name: check["outcome"] for name, check in checks.items() if check["outcome"] != "passed"}


def failed(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The one line that a command that fails prints."""
    assert main(["verify", *map(str, arguments), "-q"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("aiotrt: ")
    return line


#: What does not apply on the host.
HOST = {"inputs are waited for": "not applicable"}


# --- what passes --------------------------------------------------------------------------------------------------------


def test_an_onnx_file_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = verified(capsys, 0, models.relu(tmp_path / "a.onnx"), "--device", "host")
    assert outcomes(checks) == HOST
    load = checks["load"]["figures"]
    assert load["runtime"].startswith("onnxruntime ")
    assert load["inputs"] == ["x: float32 (1, 8)"]
    assert checks["endurance"]["figures"]["replays"] == 60
    assert checks["endurance"]["figures"]["growth"]["allocated"] is None
    figures = checks["latency"]["figures"]
    assert figures["throughput_qps"] > 0
    for row in ("latency_ms", "enqueue_time_ms", "awaited_call_ms"):
        values = [figures[row][column] for column in ("min", "median", "p90", "p95", "p99", "max")]
        assert values == sorted(values)
        assert 0 < values[0] <= figures[row]["mean"] <= values[-1]
        assert figures[row]["runs"] >= 20
    assert set(figures["not_applicable"]) == {"h2d_latency_ms", "gpu_compute_time_ms", "d2h_latency_ms"}
    assert all(figures[row] is None for row in figures["not_applicable"])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.relu(tmp_path / "a.onnx", (None, 8))
    assert main(["verify", str(path), "--device", "host", "--shape", "x=1x8", "--shape", "x=4x8", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert " passed " in line or " not applicable " in line
    assert any("x (1, 8) | x (4, 8)" in line for line in lines)
    (throughput,) = (line for line in lines if line.startswith("Throughput: "))
    assert throughput.endswith(" qps (x (1, 8); 2 slots)")
    (heading,) = (line for line in lines if line.startswith("ms "))
    assert heading.split() == ["ms", "min", "max", "mean", "median", "p90", "p95", "p99"]
    rows = [line.split("  ")[0] for line in lines[lines.index(heading) + 1 : -2]]
    assert rows == ["Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency", "Awaited Call"]
    assert sum("not applicable: " in line for line in lines[lines.index(heading) :]) == 3
    assert lines[-1] == f"{path}: all applicable checks passed"
    assert not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize(("name", "shape"), [("classifier", "x=2x3x48x192"), ("detector", "x=1x3x64x64")])
def test_pp_ocr(name: str, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcomes(verified(capsys, 0, models.ocr(name), "--device", "host", "--shape", shape)) == HOST


def test_every_dtype_of_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["FLOAT", "FLOAT16", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL"]
    kinds = {name.lower(): TensorProto.DataType.Value(name) for name in names}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds],
        "graph",
        [onnx.helper.make_tensor_value_info(name, kind, (3, 4)) for name, kind in kinds.items()],
        [onnx.helper.make_tensor_value_info(f"{name}_out", kind, (3, 4)) for name, kind in kinds.items()],
    )
    path = tmp_path / "all.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    assert outcomes(verified(capsys, 0, path, "--device", "host", "--range", "int64=-5:9", "--range", "float=2:3")) == HOST


#: What does not apply where there is no graph.
NO_GRAPH = {"capture": "not applicable", "parity": "not applicable"}


@pytest.mark.parametrize(
    ("network", "besides"),
    [(AFFINE, {}), (PROFILES, {}), (MANY, {}), (POSITIVE, NO_GRAPH), (REPEAT, NO_GRAPH)],
    ids=["static", "profiles", "many", "data-dependent", "host-input"],
)
def test_engines(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], network: Network, besides: dict[str, str]
) -> None:
    double = double_on(device)
    path = save(tmp_path / "x.engine", double, network)
    with loading(double):
        checks = verified(capsys, 0, path, "--device", device)
    assert outcomes(checks) == besides | (HOST if device == "host" else {})
    figures = checks["endurance"]["figures"]
    assert figures["replays" if not besides else "runs_without_graph"] == 60
    load = checks["load"]["figures"]
    assert load["runtime"] == "tensorrt_rtx 1.6.1.120"
    assert load["written_by"] == "TensorRT-RTX 1.6.1.120"
    if network is PROFILES:
        assert load["cases"] == [
            "profile 0 smallest: x (1, 3)",
            "profile 0 usual: x (2, 3)",
            "profile 0 largest: x (4, 3)",
            "profile 1 smallest, profile 1 usual: x (8, 3)",
            "profile 1 largest: x (16, 3)",
        ]
        assert checks["latency"]["figures"]["shapes"] == {"x": [2, 3]}
    if besides:
        assert "without a graph" in checks["capture"]["detail"]


def test_a_graph_can_be_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double = double_on("host")
    path = save(tmp_path / "x.engine", double, POSITIVE)
    with loading(double):
        checks = verified(capsys, 1, path, "--device", "host", "--require-graph")
    assert checks["capture"]["outcome"] == "failed"
    assert "the shape of output 'y' depends on the data" in checks["capture"]["detail"]


def test_equal_seeds_give_equal_inputs(tmp_path: Path) -> None:
    """Nothing that a report says may depend on the run before it."""
    import torch

    from aiotrt.selftest.cases import Case, random_inputs
    from aiotrt.tensors import TensorSpec

    case = Case("fixed", (TensorSpec("x", (3, 4), torch.float32),), ((3, 4),), {})
    (a,), (b,), (c,) = random_inputs(case, {}, 1), random_inputs(case, {}, 1), random_inputs(case, {}, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.engine", "a.onnx"):
        path = tmp_path / name
        assert f"{name}: there is no such file" in failed(capsys, 1, path, "--device", "host")
        path.touch()
        assert "the file is empty" in failed(capsys, 1, path, "--device", "host")
    (tmp_path / "a.onnx").write_bytes(b"garbage")
    assert "a.onnx: ONNX Runtime cannot load this file (7 bytes)" in failed(
        capsys, 1, tmp_path / "a.onnx", "--device", "host"
    )
    (tmp_path / "a.engine").write_bytes(b"garbage")
    assert "run on CUDA devices" in failed(capsys, 1, tmp_path / "a.engine", "--device", "host")
    (tmp_path / "a.txt").write_bytes(b"garbage")
    assert "unknown kind of file" in failed(capsys, 1, tmp_path / "a.txt", "--device", "host")
    assert "is a directory" in failed(capsys, 1, tmp_path, "--device", "host")
    double = double_on("host")
    path = save(tmp_path / "x.engine", double, AFFINE)
    path.write_bytes(path.read_bytes()[:-9])
    with loading(double):
        assert "truncated" in failed(capsys, 1, path, "--device", "host")


def test_shapes_and_ranges_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.add(tmp_path / "a.onnx", (None, 8), (None, 8))
    host = (path, "--device", "host")
    line = failed(capsys, 2, *host)
    assert "a.onnx: the shape of input a: float32 (*, 8) is dynamic" in line
    assert line.endswith("give one with --shape a=1x8")
    assert "the shape of input b: " in failed(capsys, 2, *host, "--shape", "a=1x8")
    assert "there is no input 'c'; the inputs are a: float32 (*, 8), b:" in failed(capsys, 2, *host, "--shape", "c=1")
    assert "--shape a=1x9: expected a: float32 (*, 8), got (1, 9)" in failed(
        capsys, 2, *host, "--shape", "a=1x9", "--shape", "b=1x8"
    )
    assert "got (0, 8)" in failed(capsys, 2, *host, "--shape", "a=0x8", "--shape", "b=1x8")
    thrice = [f"--shape=a={n}x8" for n in (1, 2, 3)] + [f"--shape=b={n}x8" for n in (1, 2)]
    assert "--shape b=: given 2 times; expected once, or 3 times" in failed(capsys, 2, *host, *thrice)
    assert "--shape 'a:1x8': expected NAME=SHAPE" in failed(capsys, 2, *host, "--shape", "a:1x8")
    assert "there is no input 'c'" in failed(capsys, 2, *host, "--range", "c=0:1")
    assert "--range a=3:1: expected a smallest and a largest value" in failed(capsys, 2, *host, "--range", "a=3:1")
    double = double_on("host")
    engine = save(tmp_path / "x.engine", double, PROFILES)
    with loading(double):
        line = failed(capsys, 2, engine, "--device", "host", "--shape", "x=17x3")
        assert "--shape x=17x3: expected x: float32 (*, 3), (1, 3) to (16, 3), got (17, 3)" in line
        line = failed(capsys, 2, engine, "--device", "host", "--shape", "x=6x3")
        assert "no optimisation profile allows x (6, 3); there are 0: x (1, 3) to (4, 3); 1: x (8, 3) to (16, 3)" in line
        assert main(["verify", str(engine), "--device", "host", "--shape", "x=3x3", *QUICK, "--json"]) == 0


def test_devices_and_numbers_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.relu(tmp_path / "a.onnx")
    assert "unknown device 'gpu'" in failed(capsys, 2, path, "--device", "gpu")
    for option in (["--slots", "0"], ["--inputs", "x"], ["--duration", "-1"], ["--seed", "-1"], ["--runtime", "tensorflow"]):
        with pytest.raises(SystemExit) as caught:
            main(["verify", str(path), *option])
        assert caught.value.code == 2
        assert "usage: aiotrt verify" in capsys.readouterr().err


def test_an_onnx_file_on_a_gpu_whose_shapes_are_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built there: the error is the builder's, and says what to do here."""

    def refuse(*_: object) -> None:
        raise InputError("the shape of 'x' (*, 8) is open")

    monkeypatch.setattr("aiotrt.model.open_engine", refuse)
    assert "--shape NAME=1x3x320x320" in failed(capsys, 2, models.relu(tmp_path / "a.onnx"), "--device", "host")


def test_shapes_of_an_onnx_file_become_profiles_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def refuse(source: object, device: object, options: Any) -> None:
        seen.append(options.profiles)
        raise InputError("enough")

    monkeypatch.setattr("aiotrt.model.open_engine", refuse)
    shapes = ["--shape", "a=1x8", "--shape", "a=4x8", "--shape", "b=1x8"]
    failed(capsys, 2, models.add(tmp_path / "a.onnx", (None, 8), (None, 8)), "--device", "host", *shapes)
    assert seen == [[{"a": (1, 8), "b": (1, 8)}, {"a": (4, 8), "b": (1, 8)}]]


def test_shapes_and_ranges_as_they_are_written() -> None:
    assert parse_shapes(["x=1x3", "serving:0=7", "x=2x3"]) == {"x": [(1, 3), (2, 3)], "serving:0": [(7,)]}
    for wrong in ("x", "x=", "=1x2", "x=1,2", "x=1xa", "x=-1x2", "x=1x"):
        with pytest.raises(InputError, match="expected NAME=SHAPE"):
            parse_shapes([wrong])
    assert parse_ranges(["x=0:9", "a=b=-1.5:2"]) == {"x": (0, 9), "a=b": (-1.5, 2)}
    for wrong in ("x", "x=1", "x=1:2:3", "=1:2", "x=a:b", "x=0:inf"):
        with pytest.raises(InputError, match="expected NAME=SMALLEST:LARGEST"):
            parse_ranges([wrong])
    with pytest.raises(InputError, match="twice"):
        parse_ranges(["x=0:1", "x=0:2"])


# --- the program --------------------------------------------------------------------------------------------------------


def test_without_rich_there_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.relu(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "[cli]" in failed(capsys, 1, path)
    verified(capsys, 0, path, "--device", "host")


@pytest.mark.proof
def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*MODULE, "verify", path, "--device", "host", *QUICK[:-1]],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(end)
    drawn = b""
    with contextlib.suppress(OSError):  # which is how the other end's closing looks here
        while chunk := os.read(terminal, 1 << 16):  # all the time: a terminal that nobody reads holds up who writes
            drawn += chunk
    os.close(terminal)
    out, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    assert b"endurance" in drawn
    assert b"100%" in drawn
    assert out.decode().endswith("all applicable checks passed\n")


@pytest.mark.parametrize(
    "check",
    [pytest.param(name, marks=pytest.mark.proof) for name in ("results wait for the device", "latency")] + ["endurance"],
)
def test_ctrl_c_is_status_130(tmp_path: Path, check: str) -> None:
    command = [*MODULE, "verify", str(models.relu(tmp_path / "a.onnx")), "--device", "host", "-v", "-q"]
    command += ["--replays", "100000000" if check == "endurance" else "10", "--duration", "1000", "--inputs", "1"]
    process = subprocess.Popen(interruptible(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line == f"debug: verify: {check}\n":
            break
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=50)
    assert process.returncode == 130, errors
    assert errors == "aiotrt: interrupted\n"
    assert out == ""
