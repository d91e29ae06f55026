"""`build`, on TensorRT-RTX's own builder, which needs no GPU."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper, numpy_helper

from aiotrt.building import BuildProgress, build, check_sidecar, sidecar_path
from aiotrt.building.files import digest
from aiotrt.engines.tensorrt_plan import read_plan
from aiotrt.errors import AiotrtError, EngineError, InputError, MissingDependencyError
from tests.building import models

trt = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx; it runs without a GPU")


def refused(error: type[AiotrtError], model: Path, out: Path, *says: str, **options: Any) -> None:
    """Building raises this, says all of this, and leaves nothing behind."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(error) as caught:
        build(model, out, **options)
    for text in says:
        assert text in str(caught.value)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.proof), "fp16"])
@pytest.mark.parametrize("name", models.OCR)
def test_the_three_models_of_pp_ocr(name: str, precision: str, tmp_path: Path) -> None:
    """With dynamic shapes; the classifier as it stands is refused, for two of its dimensions share the name "?"."""
    profile = models.OCR[name][1]
    out = build(models.ocr(name), tmp_path / "a.engine", precision=precision, profiles=[profile], optimization_level=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "a.engine.json"]
    plan = read_plan(out.read_bytes())
    assert (plan.product, plan.version, plan.size) == ("tensorrt_rtx", trt.__version__, out.stat().st_size)
    sidecar = check_sidecar(out, product="tensorrt_rtx")
    assert sidecar is not None
    assert sidecar.precision == precision
    assert sidecar.profiles == [{"x": [list(shape) for shape in profile["x"]]}]
    assert [(item["name"], item["dtype"], item["shape"]) for item in sidecar.inputs] == [
        ("x", "float32", [None, 3, None, None])
    ]
    assert [item["dtype"] for item in sidecar.outputs] == ["float32"], "inputs and outputs keep their types"
    assert bool(sidecar.mended) == (name != "detector")


def test_the_classifier_is_refused_unless_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the mending is for nothing, and can go. The profile check, which would find it first, is put aside."""
    monkeypatch.setattr("aiotrt.building.builder.mend", lambda source: [])
    monkeypatch.setattr("aiotrt.building.network.check_profiles", lambda *arguments: None)
    path, profile = models.ocr("classifier"), models.OCR["classifier"][1]
    refused(EngineError, path, tmp_path / "a.engine", "cannot build", "last messages:\n  IBuilder", profiles=[profile])


def test_static_shapes_need_no_profile(tmp_path: Path) -> None:
    out = build(models.relu(tmp_path / "a.onnx", (2, 8)), tmp_path / "a.plan")
    sidecar = check_sidecar(out)
    assert sidecar is not None
    assert sidecar.profiles == []
    assert sidecar.inputs == [{"name": "x", "dtype": "float32", "shape": [2, 8]}]
    assert [layer["type"] for layer in sidecar.layers] == ["activation"]
    assert json.loads(sidecar_path(out).read_text())["source"]["file"] == "a.onnx"


def test_an_engine_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "a.engine"
    out.write_bytes(b"old")
    build(models.relu(tmp_path / "a.onnx"), out)
    assert check_sidecar(out) is not None


def test_several_profiles_and_inputs(tmp_path: Path) -> None:
    path = models.add(tmp_path / "a.onnx", ("n", 8), ("n", 8))
    profiles: list[dict[str, Any]] = [
        {"a": (1, 8), "b": (1, 8)},
        {"a": ((1, 8), (2, 8), (4, 8)), "b": ((1, 8), (2, 8), (4, 8))},
    ]
    sidecar = check_sidecar(build(path, tmp_path / "a.engine", profiles=profiles))
    assert sidecar is not None
    assert sidecar.profiles[0] == {"a": [[1, 8]] * 3, "b": [[1, 8]] * 3}
    assert len(sidecar.profiles) == 2


def test_external_data(tmp_path: Path) -> None:
    size = 256
    path = models.external(tmp_path / "a.onnx", size)
    for precision, least in ((None, 4 * size * size), ("fp16", 2 * size * size)):
        out = build(path, tmp_path / "a.engine", precision=precision)
        assert out.stat().st_size > least, "the weights are in it"


def test_the_record_is_of_what_was_read(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    expected = digest([path])
    sidecar = check_sidecar(build(path, tmp_path / "a.engine", progress=lambda progress: path.write_bytes(b"new")))
    assert sidecar is not None
    assert sidecar.source["sha256"] == expected


def test_an_input_that_is_read_as_a_shape(tmp_path: Path) -> None:
    """Its profile gives values."""
    path = models.reshape(tmp_path / "a.onnx")
    build(path, tmp_path / "a.engine", profiles={"size": ((1, 1), (4, 6), (24, 24))})
    refused(InputError, path, tmp_path / "b.engine", "'size' (2)", 'profiles=[{"size": ')


def test_a_loop(tmp_path: Path) -> None:
    sidecar = check_sidecar(build(models.loop(tmp_path / "a.onnx"), tmp_path / "a.engine"))
    assert sidecar is not None
    assert {"trip_limit", "recurrence", "loop_output"} <= {layer["type"] for layer in sidecar.layers}


def test_precision_none_keeps_the_files_types(tmp_path: Path) -> None:
    import numpy as np

    weight = numpy_helper.from_array(np.eye(8, dtype=np.float16), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = models.save(tmp_path / "a.onnx", [node], {"x": (1, 8)}, initializer=[weight], elem_type=TensorProto.FLOAT16)
    for precision in (None, "fp16"):
        sidecar = check_sidecar(build(path, tmp_path / "a.engine", precision=precision))
        assert sidecar is not None
        assert sidecar.inputs[0]["dtype"] == "float16"
    refused(EngineError, path, tmp_path / "b.engine", str(path), "FP16", precision="fp32")
    refused(EngineError, path, tmp_path / "b.engine", str(path), "no BF16", precision="bf16")


def test_compute_capabilities(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    out = build(path, tmp_path / "a.engine", compute_capabilities=["sm89", "12.0", "SM_75"])
    assert read_plan(out.read_bytes()).capabilities == ("SM75", "SM89", "SM120")
    sidecar = check_sidecar(out)
    assert sidecar is not None
    assert sidecar.compute_capabilities == ["SM89", "SM120", "SM75"]
    refused(InputError, path, tmp_path / "b.engine", "'sm90'", "SM89, SM120", compute_capabilities=["sm90"])
    refused(InputError, path, tmp_path / "b.engine", "'ada'", compute_capabilities="ada")


def test_options_reach_the_builder(tmp_path: Path) -> None:
    out = build(models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine", workspace_bytes=1 << 20, optimization_level=1)
    sidecar = check_sidecar(out)
    assert sidecar is not None
    assert sidecar.options == {"workspace_bytes": 1 << 20, "optimization_level": 1}


def test_tensorrt_rtx_has_no_use_for_a_timing_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "aiotrt.tensorrt"):
        build(models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine", timing_cache=tmp_path / "timings")
    assert "timings is not used" in caplog.text
    assert not (tmp_path / "timings").exists()


# --- progress and interruption ------------------------------------------------------------------------------------------


def test_progress(tmp_path: Path) -> None:
    seen: list[BuildProgress] = []
    build(models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine", progress=seen.append)
    fractions = [progress.fraction for progress in seen]
    assert len(seen) > 10
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.8 < fractions[-1] <= 1
    assert all(progress.phase and 0 <= progress.step <= progress.steps for progress in seen)


def test_what_progress_raises_stops_the_build(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    calls = 0

    def report(progress: BuildProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Enough

    with pytest.raises(Enough):
        build(models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine", progress=report)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert calls == 5


BUILD = """
import sys
from aiotrt.building import build
def report(progress):
    if progress.phase == "Optimizing graph": print(progress.step, flush=True)
    with open(sys.argv[3], "a") as log: log.write(progress.phase + "\\n")
shapes = ((1, 3, 48, 32), (1, 3, 48, 320), (2, 3, 48, 640))
build(sys.argv[1], sys.argv[2], profiles={"x": shapes}, progress=report)
print("built", flush=True)
"""


def test_ctrl_c_stops_the_builder_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.engine").write_bytes(b"old")
    process = models.run(BUILD, models.ocr("recogniser"), folder / "a.engine", tmp_path / "phases")
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()[1]
    assert len(list(folder.iterdir())) == 3, "the old engine, and what is being written"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=50)
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    assert "built" not in output
    assert "Determining refit engines" not in (tmp_path / "phases").read_text(), "it was not only waited for"
    assert [path.name for path in folder.iterdir()] == ["a.engine"]
    assert (folder / "a.engine").read_bytes() == b"old"


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """The system itself refuses to write more, in the middle of the engine."""
    program = """
import resource, sys
from aiotrt.building import build
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
build(sys.argv[1], sys.argv[2])
"""
    path = models.matmul(tmp_path / "a.onnx")
    process = models.run(program, path, tmp_path / "a.engine")
    _, errors = process.communicate(timeout=50)
    assert "a.engine: could not be written: File too large; free some space" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_operators_that_the_parser_does_not_know(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="the_node", domain="my.ops")
    path = models.save(tmp_path / "a.onnx", [node], {"x": (1, 8)})
    says = str(path), "TensorRT-RTX", "cannot parse", "node 0 'the_node' (Frobnicate)", "export it without"
    refused(EngineError, path, tmp_path / "a.engine", *says)


def test_a_graph_that_does_not_hold_together(tmp_path: Path) -> None:
    path = models.save(tmp_path / "a.onnx", [helper.make_node("Relu", ["nowhere"], ["y"])], {"x": (1, 8)})
    refused(EngineError, path, tmp_path / "a.engine", str(path), "cannot parse")


def test_arguments(tmp_path: Path) -> None:
    path, out = models.relu(tmp_path / "a.onnx", (None, 8)), tmp_path / "a.engine"
    refused(InputError, path, out, "'fp17'", precision="fp17")
    refused(InputError, path, out, "workspace_bytes", workspace_bytes=0)
    refused(InputError, path, out, "optimization_level", optimization_level=6)
    refused(InputError, path, out, "'tensorflow'", runtime="tensorflow")
    refused(InputError, path, out, str(path), "'x' (*, 8)", "profiles=[{")
    refused(InputError, path, out, "no input 'z'", profiles={"z": (1, 8)})
    refused(InputError, path, out, "2 dimensions", profiles={"x": (1, 8, 8)})
    refused(InputError, path, out, "smallest <= usual", profiles={"x": ((2, 8), (1, 8), (2, 8))})
    refused(InputError, path, out, "smallest <= usual", profiles={"x": ((1, 8), (3, 8), (2, 8))})
    refused(InputError, path, out, "progress must be", progress=3, profiles={"x": (1, 8)})


def test_files(tmp_path: Path) -> None:
    path = models.relu(tmp_path / "a.onnx")
    refused(EngineError, tmp_path / "b.onnx", tmp_path / "a.engine", "b.onnx: there is no such file")
    refused(EngineError, path, tmp_path, "is a directory")
    refused(EngineError, path, tmp_path / "missing" / "a.engine", "a.engine: there is no folder")
    refused(EngineError, path, Path("/proc/a.engine"), "/proc")
    external = models.external(tmp_path / "c.onnx")
    (tmp_path / "link").symlink_to(path)
    record = path.rename(tmp_path / "a.engine.json")
    path.symlink_to(record)
    for model, out in ((path, path), (path, tmp_path / "link"), (record, tmp_path / "a.engine"), (external, "weights.bin")):
        refused(InputError, model, tmp_path / out, "would be overwritten; choose another file")
    (tmp_path / "weights.bin").unlink()
    refused(EngineError, external, tmp_path / "a.engine", "weights.bin, is missing")


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(MissingDependencyError, path, out, "[tensorrt]", runtime="tensorrt")
    refused(MissingDependencyError, path, out, "[rtx]", runtime="tensorrt_rtx")
    refused(MissingDependencyError, path, out, "[tensorrt]", "[rtx]")


def test_tensorrt_is_not_touched_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its builder ends the process where there is no driver."""
    path, out = models.relu(tmp_path / "a.onnx"), tmp_path / "a.engine"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="11.4.0.106"))
    refused(EngineError, path, out, "TensorRT 11.4.0.106", "torch finds no GPU", "tensorrt_rtx", runtime="tensorrt")
    build(path, out)  # what is installed and can build here
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="8.6.1"))
    refused(EngineError, path, tmp_path / "b.engine", "TensorRT 10 or newer", runtime="tensorrt")


def test_the_log_is_bounded_and_shared(tmp_path: Path) -> None:
    from aiotrt.building.log import log_of

    log = log_of(trt)
    assert log_of(trt) is log
    mark = log.mark()
    for i in range(1000):
        log.write(trt.ILogger.WARNING, f"{i} " + "x" * 10_000)
    log.write(trt.ILogger.VERBOSE, "progress")
    lines = log.since(mark)
    assert len(lines) == 50
    assert lines[-1].startswith("999 x")
    assert max(map(len, lines)) == 500


def test_importing_aiotrt_building_is_light() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import aiotrt.building
assert not {"onnx", "onnxruntime", "tensorrt_rtx", "filelock", "rich"} & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
