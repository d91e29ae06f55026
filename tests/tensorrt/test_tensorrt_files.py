"""What a file says of itself, and what becomes of files that cannot be loaded: the error names file, cause and next step."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib
import importlib.util
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import aiotrt
from aiotrt.building.sidecar import Sidecar, sidecar_path
from aiotrt.devices import open_device
from aiotrt.engines import Engine, EngineOptions, Execution, open_engine, tensorrt_runtime
from aiotrt.engines.tensorrt_plan import HEADER_BYTES, Plan, read_plan
from aiotrt.engines.tensorrt_runtime import open_product
from tests.tensorrt.double import Border, Network, TensorRTDouble
from tests.tensorrt.tools import AFFINE, MANY, PROFILES, affine, engine_of, save


def real_plan(capabilities: tuple[str, ...] = ("SM80", "SM89")) -> bytes:
    """An engine that the real builder of TensorRT-RTX wrote, with no GPU."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="the real header is NOT checked in this run")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (2, 3))
    y = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    network.mark_output(y)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        if not hasattr(trt.ComputeCapability, name):
            pytest.skip(f"TensorRT-RTX {trt.__version__} does not build for {name}")
        assert config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    return bytes(builder.build_serialized_network(network, config))


# Headers...


def test_the_header_of_a_real_engine() -> None:
    data = real_plan()
    plan = read_plan(data[:HEADER_BYTES])
    assert plan.product == "tensorrt_rtx"
    assert plan.version == importlib.import_module("tensorrt_rtx").__version__
    assert plan.size == len(data)
    assert plan.offset == 0
    assert plan.capabilities == ("SM80", "SM89")


@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])
def test_the_header_tells_the_gpus(capability: str) -> None:
    assert read_plan(real_plan((capability,))).capabilities == (capability,)


def test_a_real_engine_where_there_is_no_gpu(tmp_path: Path) -> None:
    """It is read as far as its header, and not a step further: TensorRT would segfault."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "real.engine"
    path.write_bytes(real_plan())
    program = f"""
import pathlib, sys
import aiotrt
from aiotrt.devices import open_device
from aiotrt.engines.tensorrt import TensorRTEngine
try:
    TensorRTEngine(pathlib.Path({str(path)!r}), open_device("host"))
except aiotrt.EngineError as error:
    print(error)
assert not [name for name in sys.modules if name.split(".")[0] in ("tensorrt", "tensorrt_rtx", "tensorrt_lean")]
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=50)
    assert "CUDA" in done.stdout
    assert str(path) in done.stdout


def test_headers_of_tensorrt() -> None:
    header = b"ftrt" + bytes(4) + bytes(16) + bytes((10, 13, 3, 9))
    assert str(read_plan(header.ljust(64, b"\1"))) == "TensorRT 10.13.3.9"
    assert read_plan(header.ljust(64, b"\1")).size is None
    assert read_plan(b"ptrt" + bytes(60)).product == "tensorrt"
    assert read_plan(b"ptrt" + bytes(60)).version is None
    for data in (b"", b"ftr", b"not an engine at all", bytes(64), b"\2\0\0\0{}"):
        assert read_plan(data).product is None
    newer = read_plan(b"vtrt\1\0\0\0" + bytes(60))  # of which the tag alone can be relied on
    assert (newer.product, newer.version, newer.size) == ("tensorrt_rtx", None, None)


def test_the_text_that_ultralytics_puts_before_the_plan(tmp_path: Path) -> None:
    double = TensorRTDouble()
    text = json.dumps({"task": "detect", "names": {"0": "person"}}).encode()
    path = tmp_path / "yolo.engine"
    path.write_bytes(len(text).to_bytes(4, "little") + text + double.plan(AFFINE))
    engine = engine_of(path, double)
    assert engine.plan.offset == 4 + len(text)
    assert engine.plan.product == "tensorrt_rtx"
    engine.close()


# Files that cannot be loaded...


def refused(path: Path, double: TensorRTDouble, *says: str, **options: Any) -> None:
    with pytest.raises(aiotrt.EngineError) as caught:
        engine_of(path, double, **options)
    message = str(caught.value)
    del caught  # its traceback keeps what failed
    for part in (path.name, *says):
        assert part in message, f"{part!r} is not in {message!r}"


def test_missing_empty_and_truncated(tmp_path: Path) -> None:
    double = TensorRTDouble()
    refused(tmp_path / "gone.engine", double, "no such file")
    refused(tmp_path, double, "cannot be read")
    path = tmp_path / "x.engine"
    path.touch()
    refused(path, double, "empty")
    data = double.plan(AFFINE)
    for size in (64, 100, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, double, "truncated", f"{len(data):,}", f"{size:,}", "again")
    for size in (4, 63):
        path.write_bytes(data[:size])
        refused(path, double, "truncated", "64", f"has {size};", "again")
    path.write_bytes(data + b"more")
    refused(path, double, "appended")
    assert double.calls["deserialize_cuda_engine"] == 0


@pytest.mark.parametrize("position", [0, 4, 16, 24, 70, 100, -1])
def test_bit_flips(tmp_path: Path, position: int) -> None:
    double = TensorRTDouble()
    data = bytearray(double.plan(AFFINE))
    data[position] ^= 0x40
    path = tmp_path / "flipped.engine"
    path.write_bytes(bytes(data))
    refused(path, double)


def test_random_bytes_never_do_worse_than_an_engine_error(tmp_path: Path) -> None:
    double = TensorRTDouble()
    path = tmp_path / "noise.engine"
    for data in (b"\0", b"{}", b"<html>", b"version https://git-lfs", b"\xff" * 300, b"vtrt", b"\10\0\0\0" + b"{" * 80):
        path.write_bytes(data)
        refused(path, double)


def test_foreign(tmp_path: Path) -> None:
    path = save(tmp_path / "rtx.engine", TensorRTDouble(), AFFINE)
    refused(path, TensorRTDouble("tensorrt", "10.13.3.9"), "written by TensorRT-RTX 1.6.1.120", "[rtx]", "build")
    path = save(tmp_path / "full.plan", TensorRTDouble("tensorrt", "10.13.3.9"), AFFINE)
    refused(path, TensorRTDouble(), "written by TensorRT 10.13.3.9", "tensorrt_rtx cannot read", "[tensorrt]")
    refused(path, TensorRTDouble(), "no runtime 'trt'", runtime="trt")


@pytest.mark.parametrize(
    ("head", "says"),
    [(b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"PK\3\4", "zip"), (b"<!DOCTYPE html>", "HTML")],
)
def test_files_of_a_well_known_kind_are_not_shown_to_tensorrt(tmp_path: Path, head: bytes, says: str) -> None:
    double = TensorRTDouble()
    path = tmp_path / "x.engine"
    path.write_bytes(head + bytes(200))
    refused(path, double, "not a TensorRT engine", says)
    assert double.calls["Runtime"] == double.calls["deserialize_cuda_engine"] == 0


def test_the_record_says_that_it_is_for_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before TensorRT is asked, and in words that name both."""
    path = save(tmp_path / "x.plan", TensorRTDouble("tensorrt", "10.13.3.9"), AFFINE)
    data = path.read_bytes()
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Sidecar))
    record = nothing | {
        "engine": {"file": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "source": {"file": "x.onnx", "sha256": ""},
        "product": "tensorrt",
        "gpu": {"name": "NVIDIA L4", "compute_capability": "8.9"},
    }
    sidecar_path(path).write_text(json.dumps(record))
    hopper = {"name": "NVIDIA H200", "compute_capability": "9.0"}
    monkeypatch.setattr("aiotrt.engines.gpu_record", lambda index: hopper if index == 3 else None)
    monkeypatch.setattr("aiotrt.engines.device_index", lambda device: device.index)
    cuda: Any = types.SimpleNamespace(torch_device=torch.device("cuda", 3))
    with pytest.raises(aiotrt.EngineError, match=r"x\.plan: .* on NVIDIA L4 .*, but NVIDIA H200 has 9\.0; build it on this"):
        open_engine(path, cuda, EngineOptions())


def test_a_product_that_cannot_be_imported_or_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    path = tmp_path / "x.engine"
    monkeypatch.setattr(tensorrt_runtime, "_products", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorrt" or None)
    monkeypatch.setattr(importlib, "import_module", broken)
    plan = Plan("tensorrt", "10.13.3.9")
    with pytest.raises(aiotrt.MissingDependencyError, match=r"x\.engine: tensorrt is installed.*libnvinfer.*\[tensorrt\]"):
        open_product(path, plan, None)
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(aiotrt.MissingDependencyError, match=r"x\.engine: tensorrt 8\.6\.1 lacks .*TensorRT 10\.1 or"):
        open_product(path, plan, None)
    assert tensorrt_runtime._products == {}


def test_other_version_gpu_plugin(tmp_path: Path) -> None:
    double = TensorRTDouble("tensorrt", "10.13.3.9")

    def network(**wrong: Any) -> Network:
        return Network(AFFINE.inputs, AFFINE.outputs, affine, **wrong)

    path = tmp_path / "x.plan"
    refused(save(path, double, network(version="10.3.0.26")), double, "TensorRT 10.3.0.26", "another version", "build it")
    refused(save(path, double, network(compute="8.6")), double, "another GPU", "expecting compute 9.0 got compute 8.6")
    refused(save(path, double, network(plugin="NonMax")), double, "a plugin", "Cannot find plugin: NonMax", "load")


def test_host_code(tmp_path: Path) -> None:
    double = TensorRTDouble()
    path = save(tmp_path / "x.engine", double, Network(AFFINE.inputs, AFFINE.outputs, affine, host_code=True))
    refused(path, double, "host code", "allow_host_code=True", "trust")
    engine_of(path, double, allow_host_code=True).close()


def test_checksum(tmp_path: Path) -> None:
    double = TensorRTDouble()
    path = save(tmp_path / "x.engine", double, AFFINE)
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    engine_of(path, double, sha256=good).close()
    engine_of(path, double, sha256=good.upper()).close()
    before = double.calls["deserialize_cuda_engine"]
    refused(path, double, good, "0" * 64, "not loaded", sha256="0" * 64)
    assert double.calls["deserialize_cuda_engine"] == before


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from aiotrt.engines.tensorrt import TensorRTEngine

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = save(tmp_path / "x.engine", TensorRTDouble(), AFFINE)
    with pytest.raises(aiotrt.MissingDependencyError, match=r"TensorRT-RTX 1\.6\.1\.120.*\[rtx\]"):
        TensorRTEngine(path, open_device("host"), require_cuda=False)
    with pytest.raises(aiotrt.MissingDependencyError, match="runtime='tensorrt' is not installed"):
        TensorRTEngine(path, open_device("host"), runtime="tensorrt", require_cuda=False)


def test_a_double_never_passes_for_the_real_product(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "x.engine", double, AFFINE), double)
    kept: list[object] = [product.api for product in tensorrt_runtime._products.values()]
    assert double not in kept
    engine.close()


def test_calls_that_say_no_while_loading(tmp_path: Path) -> None:
    double = TensorRTDouble()
    path = save(tmp_path / "x.engine", double, AFFINE)
    double.fail("Runtime", RuntimeError("no driver"), message="cannot talk to the driver")
    refused(path, double, "creating a runtime", "no driver", "cannot talk to the driver")
    double.mend()
    double.fail("deserialize_cuda_engine", None, message="CUDA out of memory")
    refused(path, double, "memory is exhausted", "CUDA out of memory")
    double.fail("deserialize_cuda_engine", TypeError("what"), message="odd")
    refused(path, double, "damaged", "odd")


def test_the_log_is_forwarded_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "x.engine", double, AFFINE), double)
    log = engine._product.log
    with caplog.at_level(logging.DEBUG, "aiotrt.tensorrt"):
        mark = log.mark()
        for i in range(1000):
            log.write(double.ILogger.WARNING, f"line {i}")
        log.write(double.ILogger.VERBOSE, "chatter")
        log.write(double.ILogger.INTERNAL_ERROR, "worse")
    lines = log.since(mark)
    assert len(lines) == 50
    assert lines[-1] == "worse"
    levels = {record.levelno for record in caplog.records if record.name == "aiotrt.tensorrt"}
    assert levels == {logging.DEBUG, logging.WARNING, logging.ERROR}
    engine.close()


# What an engine says of itself...


def test_specs(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "many.engine", double, MANY), double)
    assert engine.name == "many.engine"
    assert [str(spec) for spec in engine.inputs or ()] == ["x: float32 (2, 3)", "y: float16 (2, 3)", "index: int64 (2)"]
    assert [spec.name for spec in engine.outputs] == ["total", "product", "picked"]
    assert engine.uncapturable is None
    engine.close()


def test_it_keeps_the_protocols(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine: Engine = engine_of(save(tmp_path / "x.engine", double, AFFINE), double)  # the type checker's part
    host = open_device("host")
    stream = host.stream()
    execution: Execution = engine.execution(host, stream, ["x"], ((2, 3),))
    assert execution.nbytes > 0
    execution.close()
    engine.close()
    stream.close()


def test_the_limits_are_the_union_of_all_profiles(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "x.engine", double, PROFILES), double)
    assert engine.inputs is not None
    (spec,) = engine.inputs
    assert (spec.shape, spec.minimum, spec.maximum) == ((None, 3), (1, 3), (16, 3))
    assert [str(profile) for profile in engine.profiles] == ["0: x (1, 3) to (4, 3)", "1: x (8, 3) to (16, 3)"]
    engine.close()


@pytest.mark.parametrize("name", ["FLOAT", "HALF", "BF16", "FP8", "INT8", "UINT8", "INT32", "INT64", "BOOL"])
def test_every_dtype_that_torch_can_hold(tmp_path: Path, name: str) -> None:
    double = TensorRTDouble()
    network = Network((Border("x", (4,), name),), (Border("y", (4,), name),), lambda v: {"y": v["x"].clone()})
    engine = engine_of(save(tmp_path / "x.engine", double, network), double)
    assert engine.inputs is not None
    assert engine.inputs[0].dtype == engine.outputs[0].dtype
    engine.close()


@pytest.mark.parametrize("name", ["INT4", "FP4", "E8M0"])
def test_a_dtype_that_torch_cannot_hold(tmp_path: Path, name: str) -> None:
    double = TensorRTDouble()
    network = Network(AFFINE.inputs, (Border("packed", (2, 3), name),), affine)
    refused(save(tmp_path / "x.engine", double, network), double, "'packed'", name, "FLOAT")
    gc.collect()
    assert double.ended == ["engine", "runtime"]


def test_layouts_that_are_not_row_major(tmp_path: Path) -> None:
    double = TensorRTDouble()
    for border in (
        Border("x", (1, 4, 2, 2), vectorized=1, form="Four wide channel vectorized row major INT8 format"),
        Border("x", (1, 4, 2, 2), form="Channel major FP16 format where channel % 8 == 0"),
    ):
        network = Network((border,), (Border("y", (1, 4, 2, 2)),), affine)
        refused(save(tmp_path / "x.engine", double, network), double, "'x'", border.form, "linear")


def test_weight_streaming(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(
        save(tmp_path / "x.engine", double, Network(AFFINE.inputs, AFFINE.outputs, affine, streamed=9)), double
    )
    assert "streamed" in str(engine.uncapturable)
    engine.close()
