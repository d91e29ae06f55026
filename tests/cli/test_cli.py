"""The command line: output for people and for programs, errors in one line, and the exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import pytest
import torch

import aiotrt
from aiotrt.building import Sidecar, check_sidecar, sidecar_path
from aiotrt.building.files import digest
from aiotrt.cli import main
from aiotrt.cli.build import parse_profile, parse_size
from aiotrt.devices import open_device
from aiotrt.engines import EngineOptions
from aiotrt.engines.tensorrt import TensorRTEngine
from aiotrt.errors import InputError
from tests.building import models
from tests.tensorrt.tools import PROFILES, double_on, engine_of, save
from tests.tools import interruptible

MODULE = [sys.executable, "-m", "aiotrt"]


@pytest.fixture
def rtx() -> None:
    """For tests that build; no GPU is needed."""
    pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")


def failed(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """The one line that a command that fails prints."""
    assert main(list(map(str, arguments))) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("aiotrt: ")
    return line


def test_python_m_aiotrt() -> None:
    result = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, timeout=50, check=True)
    first, *parts = result.stdout.removesuffix("\n").split(", ")
    assert first == f"aiotrt {aiotrt.__version__} ({aiotrt.__impl__})"
    assert parts[:2] == [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for part, name in zip(parts[2:], ("CUDA bindings", "TensorRT", "TensorRT-RTX", "ONNX Runtime"), strict=True):
        assert re.fullmatch(rf"{name} \d[\w.+]*|no {name}", part)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "inspect"),
        (["build", "--help"], "aiotrt build detector.onnx -o detector.engine --precision fp16"),
        (["inspect", "--help"], "aiotrt inspect detector.engine --json"),
    ],
)
def test_help(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["build"], ["inspect", "a", "b"], ["build", "a.onnx", "--precision", "fp17"]]
)
def test_wrong_arguments_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: aiotrt" in capsys.readouterr().err


# --- build --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rtx")
def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = models.relu(tmp_path / "a.onnx", ("?", "?")), tmp_path / "b.engine"
    arguments = ["build", str(path), "-o", str(out), "--runtime", "tensorrt_rtx", "--precision", "fp16"]
    arguments += ["--profile", "x:1x8,2x8,4x8", "--profile", "x:9x9", "--compute-capability", "sm89", "--workspace", "64M"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("repaired: input 'x'", "b.engine: ", "TensorRT-RTX"):
        assert text in printed
    sidecar = check_sidecar(out)
    assert sidecar is not None
    assert sidecar.profiles == [{"x": [[1, 8], [2, 8], [4, 8]]}, {"x": [[9, 9]] * 3}]
    assert (sidecar.precision, sidecar.compute_capabilities) == ("fp16", ["SM89"])
    assert sidecar.options == {"workspace_bytes": 64 << 20}


@pytest.mark.usefixtures("rtx")
def test_build_beside_the_model_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.relu(tmp_path / "a.onnx")
    assert main(["build", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["file"] == "a.engine"
    assert (tmp_path / "a.engine").exists()


@pytest.mark.usefixtures("rtx")
def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    terminal, end = pty.openpty()
    result = subprocess.run(
        [*MODULE, "build", path],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
        timeout=50,
        check=False,
    )
    os.close(end)
    drawn = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert result.returncode == 0
    assert "a.engine" in drawn
    assert "100%" in drawn


@pytest.mark.usefixtures("rtx")
def test_build_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.relu(tmp_path / "a.onnx", (None, 8))
    assert "missing.onnx: there is no such file" in failed(capsys, 1, "build", tmp_path / "missing.onnx")
    assert failed(capsys, 2, "build", path).endswith("must accept, for instance --profile x:1x8,1x8,8x8")
    assert "no folder" in failed(capsys, 1, "build", path, "-o", tmp_path / "no" / "a.engine", "--profile", "x:1x8")
    assert "the model comes before" in failed(capsys, 2, "build", path, "--profile", "x:1,2")
    assert "smallest <= usual" in failed(capsys, 2, "build", path, "--profile", "x:2x8,1x8,2x8")
    assert "SM89" in failed(capsys, 2, "build", path, "--profile", "x:1x8", "--compute-capability", "sm1")
    bad = models.save(tmp_path / "b.onnx", [onnx.helper.make_node("Nope", ["x"], ["y"])], {"x": (1,)})
    assert failed(capsys, 1, "build", bad).endswith("(more with -v)")
    assert main(["build", str(bad), "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_build_of_what_has_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (".", "..", "/", tmp_path):
        assert failed(capsys, 1, "build", path) == f"aiotrt: {path}: is a directory; give the path of a file"


@pytest.mark.usefixtures("rtx")
def test_ctrl_c_is_status_130(tmp_path: Path) -> None:
    out = tmp_path / "a.engine"
    command = [
        *MODULE,
        "build",
        str(models.ocr("recogniser")),
        "-o",
        str(out),
        "--profile",
        "x:1x3x48x32,1x3x48x320,2x3x48x640",
        "-v",
    ]
    process = subprocess.Popen(interruptible(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("debug: "):  # TensorRT has begun
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 130, errors
    assert errors.endswith("aiotrt: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_profiles_as_they_are_written() -> None:
    three = ((1, 3), (2, 3), (4, 3))
    assert parse_profile(["x:1x3,2x3,4x3", "serving_default:0:7"]) == {"x": three, "serving_default:0": ((7,), (7,), (7,))}
    for wrong in ("x", "x:", ":1x2", "x:1,2", "x:1xa", "x:1x2,", "x:-1x2", "a.onnx"):
        with pytest.raises(InputError, match="expected INPUT:"):
            parse_profile([wrong])
    with pytest.raises(InputError, match="twice"):
        parse_profile(["x:1", "x:2"])


def test_sizes_as_they_are_written() -> None:
    assert [parse_size(text, "--x") for text in ("7", "1k", "512M", "2GiB", "2gb")] == [7, 1024, 512 << 20, 2 << 30, 2 << 30]
    for wrong in ("", "M", "1.5G", "-1", "1T"):
        with pytest.raises(InputError, match=f"--max-body '{wrong}': expected a number of bytes"):
            parse_size(wrong, "--max-body")


# --- inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    path = models.ocr("classifier")
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    for text in ("x: float32 (*, 3, ?, ?)", "opset ai.onnx 11", "PaddlePaddle", "133,777", "Conv 53", "when built"):
        assert text in table
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 3, "?", "?"]}]
    assert facts["opsets"] == {"ai.onnx": 11}
    assert facts["operators"]["Conv"] == 53


def test_inspect_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models.external(tmp_path / "a.onnx"))]) == 0
    table = capsys.readouterr().out
    assert "weights.bin, 16,384 bytes" in table
    assert "4,096 (4,096 float32)" in table


@pytest.mark.usefixtures("rtx")
def test_inspect_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.relu(tmp_path / "a.onnx", ("n", 8))
    assert main(["build", str(path), "--profile", "x:1x8,2x8,4x8"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a.engine")]) == 0
    table = capsys.readouterr().out
    for text in ("TensorRT-RTX 1.", "SM89", "x: float32 (*, 8)", "x: (1, 8) to (4, 8), usually (2, 8)", "a.onnx, SHA-256"):
        assert text in table
    assert "memory      of a slot: only TensorRT can determine it; on a GPU, add --load" in table
    assert "network     1 layer before the builder fused any (activation 1)" in table
    assert not any(line.endswith(" ") for line in table.splitlines())
    assert main(["inspect", str(tmp_path / "a.engine"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert record["profiles"] == [{"x": [[1, 8], [2, 8], [4, 8]]}]
    (layer,) = record["layers"]
    assert layer["name"]
    assert layer["type"] == "activation"


def test_inspect_engines_of_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head alone: never deserialised."""
    head = b"ftrt" + bytes(20) + bytes([10, 9, 0, 34]) + bytes(100)
    path = tmp_path / "a.plan"
    path.write_bytes(head)
    assert main(["inspect", str(path)]) == 0
    assert "TensorRT 10.9.0.34" in capsys.readouterr().out
    text = json.dumps({"task": "detect", "imgsz": [640, 640]}).encode()
    path.write_bytes(len(text).to_bytes(4, "little") + text + head)
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["metadata"]["task"] == "detect"
    assert facts["version"] == "10.9.0.34"
    assert main(["inspect", str(path)]) == 0
    assert "meta task" in capsys.readouterr().out


def test_inspect_what_only_tensorrt_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = double_on("host")
    path = save(tmp_path / "a.engine", double, PROFILES)
    assert main(["inspect", str(path)]) == 0
    assert "add --load" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("aiotrt.cli.inspect.open_device", lambda name: open_device("host"))

    def open_engine(path: Path, device: object, options: EngineOptions) -> TensorRTEngine:
        return engine_of(path, double, allow_host_code=options.allow_host_code)

    monkeypatch.setattr("aiotrt.cli.inspect.open_engine", open_engine)
    assert main(["inspect", str(path), "--load"]) == 0
    table = capsys.readouterr().out
    for text in (
        "tensorrt_rtx 1.6.1.120",
        "x: float32 (*, 3)",
        "profile 1    x: (8, 3) to (16, 3), usually (8, 3)",
        "192 bytes of activations for each slot",
    ):
        assert text in table
    assert main(["inspect", str(path), "--load", "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)["loaded"]
    assert loaded["profiles"][0] == {"x": [[1, 3], [2, 3], [4, 3]]}
    assert (loaded["slot_memory"], loaded["layers"], loaded["layer_names"]) == (192, 1, ["compute y"])
    save(path, double, dataclasses.replace(PROFILES, host_code=True))
    assert "contains host code" in failed(capsys, 1, "inspect", path, "--load")
    assert main(["inspect", str(path), "--load", "--allow-host-code"]) == 0


def test_inspect_cannot_load(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.relu(tmp_path / "a.onnx", ("n", 8))
    assert "--load is for engines" in failed(capsys, 1, "inspect", path, "--load")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = save(tmp_path / "a.engine", double_on("host"), PROFILES)
    assert "needs an NVIDIA GPU" in failed(capsys, 1, "inspect", engine, "--load")


def test_inspect_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.engine"
    assert "no such file" in failed(capsys, 1, "inspect", path)
    path.touch()
    assert "empty" in failed(capsys, 1, "inspect", path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "zip archive" in failed(capsys, 1, "inspect", path)
    path.write_bytes(b"vtrt" + bytes(12) + (1000).to_bytes(8, "little") + bytes([1, 6, 1, 120]) + bytes(100))
    assert "truncated: its header (of TensorRT-RTX 1.6.1.120) says 1,000 bytes, but it has 128;" in failed(
        capsys, 1, "inspect", path
    )
    path.write_bytes(path.read_bytes() + bytes(1000))
    assert "appended" in failed(capsys, 1, "inspect", path)
    path.write_bytes(b"vtrt\1" + bytes(100))
    assert main(["inspect", str(path)]) == 0
    assert "TensorRT-RTX of unknown version: aiotrt does not know its header" in capsys.readouterr().out
    path.write_bytes(b"vtrt")
    assert "truncated: the header of an engine has" in failed(capsys, 1, "inspect", path)
    (tmp_path / "b.onnx").write_bytes(b"garbage")
    assert "not an ONNX model" in failed(capsys, 1, "inspect", tmp_path / "b.onnx")


def test_inspect_what_no_exporter_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor or an input of a type that onnx does not know is shown as that."""
    path = models.relu(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.initializer.add(name="w", data_type=999, dims=[4])
    model.graph.input[0].type.tensor_type.elem_type = 998
    path.write_bytes(model.SerializeToString())
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "4 (4 unknown type 999)" in table
    assert "x: unknown type 998" in table


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def test_inspect_records_that_nobody_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"vtrt" + bytes(12) + (64).to_bytes(8, "little") + bytes(40))
    record = Sidecar(
        engine={"file": path.name, "size": 64, "sha256": digest([path])},
        source={"file": "a.onnx", "sha256": "0"},
        product="tensorrt_rtx", version="1", versions={}, gpu=None, compute_capabilities=[], precision=None, profiles=[],
        inputs=[], outputs=[], options={}, mended=[], warnings=[], seconds=1.0, date="today",
    )  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"profiles": 5},
        {"inputs": [{}]},
        {"options": 1},
        {"profiles": [{"x": 1}]},
        {"layers": [{}]},
    ]
    for change in changes:
        sidecar_path(path).write_text(json.dumps({**dataclasses.asdict(record), **change}))
        assert "a.engine: its record has another form than aiotrt writes: " in failed(capsys, 1, "inspect", path)
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["record"].items() >= change.items()
    sidecar_path(path).write_text(
        json.dumps(dataclasses.asdict(record)).replace('"options": {}', f'"options": {nested(900)}')
    )
    assert "nested too deeply" in failed(capsys, 1, "inspect", path)
    sidecar_path(path).unlink()
    text = nested(100_000).encode()
    path.write_bytes(len(text).to_bytes(4, "little") + text + path.read_bytes())
    assert "neither an ONNX file (.onnx) nor a TensorRT engine" in failed(capsys, 1, "inspect", path)


def test_rich_is_needed_for_the_table_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.relu(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "[cli]" in failed(capsys, 1, "inspect", path)
    assert main(["inspect", str(path), "--json"]) == 0


def test_a_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m aiotrt inspect {models.ocr('detector')} --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=50, check=False)
    assert result.stderr == ""
