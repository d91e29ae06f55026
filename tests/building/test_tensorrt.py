"""Building with full TensorRT, which needs a GPU: its 10 and 11 differ, and every refusal is an error. On a double."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import types
from pathlib import Path

import numpy as np
import onnx
import pytest

from aiotrt.building import build, check_sidecar
from aiotrt.errors import EngineError, InputError
from tests.building import double, models

SHAPES = {"x": ((1, 8), (2, 8), (4, 8))}


@pytest.fixture(params=["10.9.0.34", "11.4.0.106"])
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


@pytest.fixture(autouse=True)
def tensorrt(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and this TensorRT; the device is set in the thread that builds."""
    monkeypatch.setitem(sys.modules, "tensorrt", double.tensorrt(version))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda index: types.SimpleNamespace(name=f"GPU {index}", major=8, minor=9)
    )
    monkeypatch.setattr(
        "torch.cuda.set_device", lambda index: double.World.said.append(f"device {index} {threading.current_thread().name}")
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return models.relu(tmp_path / "a.onnx", (None, 8))


@pytest.mark.parametrize("precision", [None, "fp32", "fp16", "bf16"])
def test_precision(path: Path, version: str, precision: str | None, tmp_path: Path) -> None:
    out, weak = tmp_path / "a.engine", version.startswith("10.")
    if precision == "bf16" and not weak:
        with pytest.raises(EngineError, match="holds no BF16"):
            build(path, out, precision=precision, profiles=SHAPES)
        return
    build(path, out, precision=precision, profiles=SHAPES)
    lowered = weak and precision in ("fp16", "bf16")
    assert ("network 0" in double.World.said) == lowered
    assert ("network 2" in double.World.said) == (not lowered)
    expected = {"fp32": set(), None: {"TF32"}}.get(precision, {"TF32", str(precision).upper()} if weak else {"TF32"})
    assert double.World.config.flags == expected


def test_it_builds_on_the_gpu_it_is_told_and_says_so(path: Path, version: str, tmp_path: Path) -> None:
    out = tmp_path / "a.engine"
    for device, index in ((None, 1), (0, 0), ("cuda:3", 3), ("cuda", 1)):
        build(path, out, profiles=SHAPES, device=device, workspace_bytes=1 << 30)
        assert f"device {index} aiotrt-build_0" in double.World.said
        sidecar = check_sidecar(out, product="tensorrt")
        assert sidecar is not None
        assert sidecar.gpu == {"name": f"GPU {index}", "compute_capability": "8.9"}
        assert sidecar.version == version
        assert sidecar.layers == [{"name": "node_of_y", "type": "relu"}]
    assert "workspace 1073741824" in double.World.said
    with pytest.raises(InputError, match="builds for the GPU it runs on"):
        build(path, out, profiles=SHAPES, compute_capabilities=["sm89"])


def test_the_timing_cache(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, timings = tmp_path / "a.engine", tmp_path / "timings"
    build(path, out, profiles=SHAPES, timing_cache=timings)
    assert timings.read_bytes() == b"timings:"
    build(path, out, profiles=SHAPES, timing_cache=timings)
    assert timings.read_bytes() == b"timings:timings:"
    assert not caplog.records
    for useless in (b"damaged", b"another GPU's"):
        timings.write_bytes(useless)
        build(path, out, profiles=SHAPES, timing_cache=timings)
        assert timings.read_bytes() == b"timings:"
        assert "starting with an empty one" in caplog.text
        caplog.clear()
    with pytest.raises(EngineError, match="the timing cache cannot be read: Is a directory"):
        build(path, out, profiles=SHAPES, timing_cache=tmp_path)


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("builder", "cannot create a builder: pybind11"),
        ("network", "cannot create a network; check that driver"),
        ("parse", "cannot parse this model: node 3 (Nope): no such operator; export it without"),
        ("set_shape", "rejects the profile of input 'x': inconsistent"),
        ("profile", "rejects the profile {'x': "),
        ("add_optimization_profile", "rejects the profile {'x': "),
        ("build", "cannot build this model"),
    ],
)
def test_every_refusal_is_an_error(fails: str, says: str, path: Path, version: str, tmp_path: Path) -> None:
    double.World.fails = fails
    with pytest.raises(EngineError) as caught:
        build(path, tmp_path / "a.engine", profiles=SHAPES)
    assert f"{path}: TensorRT {version} {says}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_the_last_lines_of_the_log_stand_in_the_error(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    double.World.fails = "build"
    with caplog.at_level(logging.DEBUG, "aiotrt.tensorrt"), pytest.raises(EngineError) as caught:
        build(path, tmp_path / "a.engine", profiles=SHAPES)
    assert str(caught.value).endswith("last messages:\n  it began well\n  no memory")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "it began well"),
        ("DEBUG", "idle talk"),
        ("ERROR", "no memory"),
    ]


def test_a_handler_that_raises_does_no_harm(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("aiotrt.building.log.logger.log", broken)
    double.World.fails = "build"
    with pytest.raises(EngineError, match="no memory"):
        build(path, tmp_path / "a.engine", profiles=SHAPES)


def test_the_converted_model_is_what_is_parsed(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = double.OnnxParser.parse

    def note(self: double.OnnxParser, data: bytes, path: str) -> bool:
        parsed.append(data)
        return parse(self, data, path)

    monkeypatch.setattr(double.OnnxParser, "parse", note)
    build(models.matmul(tmp_path / "a.onnx", 4), tmp_path / "a.engine", precision="fp16")
    weight = onnx.numpy_helper.to_array(onnx.load_model_from_string(parsed[0]).graph.initializer[0])
    assert weight.dtype == (np.float32 if version.startswith("10.") else np.float16)


def test_the_double_has_no_names_that_tensorrt_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    pairs = [
        (double.ILogger, trt.ILogger),
        (double.Tensor, trt.ITensor),
        (double.Layer, trt.ILayer),
        (double.Network, trt.INetworkDefinition),
        (double.ParserError, trt.ParserError),
        (double.OnnxParser, trt.OnnxParser),
        (double.TimingCache, trt.ITimingCache),
        (double.Profile, trt.IOptimizationProfile),
        (double.Config, trt.IBuilderConfig),
        (double.Builder, trt.Builder),
    ]
    for ours, real in pairs:
        names = {name for name in (*vars(ours), *inspect.get_annotations(ours)) if not name.startswith("_")}
        assert names <= set(dir(real)), ours
    module = double.tensorrt("11.4.0.106")
    assert {name for name in vars(module) if not name.startswith("__")} <= set(dir(trt))
    assert {flag.name for flag in module.BuilderFlag} <= set(trt.BuilderFlag.__members__)
