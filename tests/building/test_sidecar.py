"""The record beside an engine: it belongs to that engine, or loading says why not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from aiotrt.building.sidecar import Sidecar, check_sidecar, sidecar_path
from aiotrt.errors import EngineError

ADA = {"name": "NVIDIA L4", "compute_capability": "8.9"}
HOPPER = {"name": "NVIDIA H200", "compute_capability": "9.0"}


def make(folder: Path, **changes: Any) -> Path:
    """An engine and its record."""
    engine, data = folder / "a.engine", b"an engine"
    engine.write_bytes(data)
    record = Sidecar(
        engine={"file": engine.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        source={"file": "a.onnx", "sha256": "0" * 64},
        product="tensorrt",
        version="10.9.0.34",
        versions={},
        gpu=ADA,
        compute_capabilities=[],
        precision=None,
        profiles=[{"x": [[1], [2], [3]]}],
        inputs=[],
        outputs=[],
        options={},
        mended=[],
        warnings=[],
        seconds=1.0,
        date="2026-01-01T00:00:00+00:00",
    )
    sidecar_path(engine).write_text(dataclasses.replace(record, **changes).to_json())
    return engine


def test_it_reads_what_was_written(tmp_path: Path) -> None:
    engine = make(tmp_path)
    sidecar = check_sidecar(engine, product="tensorrt", gpu=ADA)
    assert sidecar is not None
    assert sidecar.to_json() == sidecar_path(engine).read_text()
    assert str(sidecar) == "built from a.onnx by TensorRT 10.9.0.34 on NVIDIA L4 at 2026-01-01T00:00:00+00:00"


def test_no_record_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.engine").write_bytes(b"x")
    assert check_sidecar(tmp_path / "a.engine") is None
    with pytest.raises(EngineError, match="no such file"):
        check_sidecar(tmp_path / "b.engine")


def test_an_engine_that_changed(tmp_path: Path) -> None:
    engine = make(tmp_path)
    engine.write_bytes(b"an Engine")
    with pytest.raises(EngineError, match=r"damaged, or is not the engine that a\.engine\.json describes"):
        check_sidecar(engine)
    engine.write_bytes(b"an engin")
    with pytest.raises(EngineError, match=r"has 8 bytes, but a\.engine\.json says 9"):
        check_sidecar(engine)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"engine": 3}',
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff\xfe",
        "[" * 200_000,
    ],
)
def test_a_damaged_record(tmp_path: Path, text: str | bytes) -> None:
    engine = make(tmp_path)
    sidecar_path(engine).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(EngineError, match=r"a\.engine\.json: the engine's record is damaged"):
        check_sidecar(engine)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {}},
        {"engine": {"size": None, "sha256": ""}},
        {"source": {}},
        {"source": {"file": "a"}},
        {"gpu": {"name": "L4"}},
    ],
)
def test_a_record_that_lacks_something(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="record is damaged"):
        check_sidecar(make(tmp_path, **change))


def test_entries_of_a_later_aiotrt_are_passed_over(tmp_path: Path) -> None:
    engine = make(tmp_path)
    entries = json.loads(sidecar_path(engine).read_text())
    sidecar_path(engine).write_text(json.dumps({**entries, "of_tomorrow": 1}))
    assert check_sidecar(engine) is not None


def test_a_record_that_an_earlier_aiotrt_wrote(tmp_path: Path) -> None:
    engine = make(tmp_path)
    entries = json.loads(sidecar_path(engine).read_text())
    assert list(entries)[-1] == "layers", "last, since it is long and not what one opens the file for"
    del entries["layers"]
    sidecar_path(engine).write_text(json.dumps(entries))
    sidecar = check_sidecar(engine)
    assert sidecar is not None
    assert sidecar.layers == ()


def test_another_product_or_gpu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"by TensorRT 10\.9\.0\.34 on NVIDIA L4 .*, which TensorRT-RTX cannot run"):
        check_sidecar(make(tmp_path), product="tensorrt_rtx")
    with pytest.raises(EngineError, match=r"compute capability 8\.9, but NVIDIA H200 has 9\.0; build it on this GPU"):
        check_sidecar(make(tmp_path), gpu=HOPPER)
    assert check_sidecar(make(tmp_path, product="tensorrt_rtx"), gpu=HOPPER) is not None
    assert check_sidecar(make(tmp_path, gpu=None), gpu=HOPPER) is not None


HOSTILE: tuple[object, ...] = (None, True, 3, -1, 2.5, "text", "size", [], [1], {}, {"a": 1})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Sidecar)])
def test_a_record_with_any_other_type_is_damaged_or_right(tmp_path: Path, field: str) -> None:
    engine = make(tmp_path)
    entries = json.loads(sidecar_path(engine).read_text())
    for value in HOSTILE:
        sidecar_path(engine).write_text(json.dumps(entries | {field: value}))
        try:
            read = check_sidecar(engine, product="tensorrt", gpu={"name": "L4", "compute_capability": "8.9"})
        except EngineError:
            continue
        assert read is not None
        assert str(read)


@pytest.mark.parametrize(
    ("field", "name"), [("engine", "size"), ("engine", "sha256"), ("source", "sha256"), ("source", "file")]
)
def test_an_entry_with_any_other_type_is_named(tmp_path: Path, field: str, name: str) -> None:
    engine = make(tmp_path)
    entries = json.loads(sidecar_path(engine).read_text())
    wrong: tuple[object, ...] = (None, True, [], {}, "9" if name == "size" else 9)
    for value in wrong:
        changed = entries | {field: entries[field] | {name: value}}
        sidecar_path(engine).write_text(json.dumps(changed))
        if name == "file":  # only shown
            check_sidecar(engine)
        else:
            with pytest.raises(EngineError, match=rf"record is damaged.*{field}\.{name} is "):
                check_sidecar(engine)
