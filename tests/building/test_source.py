"""ONNX files: what is refused, what is mended, and what conversion to FP16 may cost."""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from aiotrt.building.source import fit_precision, mend, read_onnx
from aiotrt.errors import EngineError, MissingDependencyError
from tests.building import models


def refused(path: Path, *says: str) -> None:
    with pytest.raises(EngineError) as caught:
        read_onnx(path)
    assert str(path) in str(caught.value)
    for text in says:
        assert text in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "missing.onnx", "no such file")
    refused(tmp_path, "is a directory")
    path = tmp_path / "a.onnx"
    path.touch()
    refused(path, "empty")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(path, "git lfs pull")
    path.write_bytes(random.Random(0).randbytes(10_000))
    refused(path, "not an ONNX model", "10,000 bytes", "again")
    path.write_bytes(onnx.ModelProto().SerializeToString() + b"\x08\x08")  # a valid message, with nothing but a version
    refused(path, "declares no outputs")


def test_a_model_cut_short_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    data = models.matmul(tmp_path / "whole.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(data), 97):
        path.write_bytes(data[:length])
        refused(path)


def test_random_damage_is_an_engine_error_or_nothing(tmp_path: Path) -> None:
    data = models.matmul(tmp_path / "whole.onnx", 4).read_bytes()
    path, chance = tmp_path / "damaged.onnx", random.Random(1)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(EngineError):
            mend(read_onnx(path))


def test_external_data(tmp_path: Path) -> None:
    path = models.external(tmp_path / "a.onnx")
    weights = tmp_path / "weights.bin"
    source = read_onnx(path)
    assert source.external == (weights,)
    before = source.sha256()
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + b"\x01")
    assert read_onnx(path).sha256() != before, "the hash covers the weights"
    weights.write_bytes(data[:-1])
    refused(path, "weights.bin", "truncated")
    weights.unlink()
    refused(path, "weights.bin", "is missing", "copy it beside the model")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", ""])
def test_external_data_outside_the_folder_is_not_read(tmp_path: Path, location: str) -> None:
    path = models.external(tmp_path / "a.onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    refused(path, "outside the model's folder")


@pytest.mark.parametrize("key", ["offset", "length"])
def test_external_data_at_a_place_that_is_no_number(tmp_path: Path, key: str) -> None:
    path = models.external(tmp_path / "a.onnx")
    model = onnx.load(path, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.external_data]
    (entry,) = [entry for entry in tensor.external_data if entry.key == key] or [tensor.external_data.add(key=key)]
    entry.value = "abc"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"a\.onnx: the offset or length .* in weights\.bin is not a number: .*'abc'"):
        read_onnx(path)


def test_weights_may_be_linked(tmp_path: Path) -> None:
    """As the caches of model hubs have them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = models.external(tmp_path / "snapshot" / "a.onnx")
    for number, file in enumerate((path, path.with_name("weights.bin"))):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    source = read_onnx(path)
    assert source.external == (path.with_name("weights.bin"),)
    x = np.arange(64, dtype=np.float32)[None]
    assert np.array_equal(compute(fit_precision(source, "fp16", weakly_typed=False), x), x)


def test_onnx_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.relu(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        read_onnx(path)


def test_names_that_name_nothing_are_taken_away(tmp_path: Path) -> None:
    source = read_onnx(models.add(tmp_path / "a.onnx", ("batch", "?", "?"), ("p2o.DynamicDimension.0", "None", 8)))
    source.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    changes = mend(source)
    dims = [[(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim] for value in source.inputs]
    assert dims == [[("", 0), ("", 0), ("", 0)], [("p2o.DynamicDimension.0", 0), ("", 0), ("", 8)]]
    assert len(changes) == 4
    assert "input 'a': removed the name '?' of dimension 1" in changes[1]
    assert mend(source) == []


def test_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    path = models.matmul(tmp_path / "a.onnx", 4)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 4)))
    onnx.save(model, path)
    assert [value.name for value in read_onnx(path).inputs] == ["x"]


# --- precision ----------------------------------------------------------------------------------------------------------


def compute(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize("name", models.OCR)
def test_fp16_keeps_what_the_model_says(name: str) -> None:
    """Converted as it comes, PP-OCR's detector finds text everywhere: its variances are no FP16 numbers."""
    source = read_onnx(models.ocr(name))
    half = fit_precision(source, "fp16", weakly_typed=False)
    shape = models.OCR[name][1]["x"][1]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected, got = compute(source.model, x), compute(half, x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=0.02)
    assert half.ByteSize() < 0.75 * source.model.ByteSize()


def test_fp16_of_a_file_with_external_data(tmp_path: Path) -> None:
    source = read_onnx(models.external(tmp_path / "a.onnx"))
    half = fit_precision(source, "fp16", weakly_typed=False)
    assert half.graph.initializer[0].data_type == TensorProto.FLOAT16
    x = np.arange(64, dtype=np.float32)[None]
    assert np.array_equal(compute(half, x), x)
    assert source.model.graph.initializer[0].data_location == TensorProto.EXTERNAL, "the source is as it was"


def test_precision_that_the_file_contradicts(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float16), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    options: dict[str, Any] = {"initializer": [weight], "elem_type": TensorProto.FLOAT16}
    half = read_onnx(models.save(tmp_path / "half.onnx", [node], {"x": (1, 4)}, **options))
    single = read_onnx(models.matmul(tmp_path / "single.onnx", 4))
    for weakly_typed in (True, False):
        with pytest.raises(EngineError, match="holds FP16 tensors"):
            fit_precision(half, "fp32", weakly_typed=weakly_typed)
        assert fit_precision(half, "fp16", weakly_typed=weakly_typed) is half.model
        assert fit_precision(single, None, weakly_typed=weakly_typed) is single.model
        assert fit_precision(single, "fp32", weakly_typed=weakly_typed) is single.model
    with pytest.raises(EngineError, match="holds no BF16 tensors"):
        fit_precision(single, "bf16", weakly_typed=False)
    assert fit_precision(single, "bf16", weakly_typed=True) is single.model
    assert fit_precision(single, "fp16", weakly_typed=True) is single.model


def test_the_converter_is_needed_only_for_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_onnx(models.matmul(tmp_path / "a.onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime.transformers.float16", None)
    assert fit_precision(source, "fp32", weakly_typed=False) is source.model
    with pytest.raises(MissingDependencyError, match=r"\[onnx\]"):
        fit_precision(source, "fp16", weakly_typed=False)


def test_a_converter_that_fails_is_an_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_onnx(models.matmul(tmp_path / "a.onnx"))
    monkeypatch.setattr("aiotrt.building.source._LIMIT", 10)
    with pytest.raises(EngineError, match="larger than 2 GiB; export it in FP16"):
        fit_precision(source, "fp16", weakly_typed=False)
