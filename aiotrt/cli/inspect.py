"""``aiotrt inspect``: describe an ONNX file or an engine, without running it and without a GPU."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from aiotrt.building import check_sidecar, read_onnx
from aiotrt.building.files import check_readable, foreign
from aiotrt.building.source import mend, tensors
from aiotrt.cli.tables import open_console, show
from aiotrt.devices import open_device
from aiotrt.engines import EngineOptions, open_engine
from aiotrt.engines.tensorrt import TensorRTEngine
from aiotrt.engines.tensorrt_plan import check_plan, read_plan
from aiotrt.errors import EngineError
from aiotrt.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["describe", "register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt inspect detector.onnx
  aiotrt inspect detector.engine
  aiotrt inspect detector.engine --json
"""
#: Bytes to read: enough for a plan's header, and for the metadata that Ultralytics writes before it.
_HEAD: Final = (1 << 20) + 4096
#: The number of kinds of operators and layers in the table; --json shows all.
_KINDS: Final = 8
#: The number of layers in the table; --json shows all.
_LAYERS: Final = 8


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="describe a model or an engine",
        description="Describe an .onnx, .engine or .plan file. Without --load nothing in the file is run, so untrusted "
        "files are safe.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--load", action="store_true", help="load an engine with TensorRT on this GPU, and show what only TensorRT can read"
    )
    parser.add_argument(
        "--allow-host-code", action="store_true", help="with --load: run host code inside the engine, if you trust it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Describe the file."""
    try:
        facts = describe(arguments.file)
        if arguments.load:
            facts["loaded"] = describe_loaded(arguments.file, allow_host_code=arguments.allow_host_code)
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            _show(facts)
    except RecursionError as error:
        raise EngineError(
            f"{arguments.file}: its content, or that of its record, is nested too deeply to be shown"
        ) from error
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Describe a file. The key ``kind`` is ``"onnx"`` or ``"engine"``; the other keys depend on it.

    Raises:
        EngineError: the file is missing, empty, damaged, or neither an ONNX file nor an engine.
        MissingDependencyError: the package that reads the file is not installed.
    """
    check_readable(path)
    return _describe_onnx(path) if path.suffix.lower() == ".onnx" else _describe_engine(path)


def _describe_onnx(path: Path) -> dict[str, Any]:
    source = read_onnx(path)
    model = source.model
    inputs = [_tensor(value) for value in source.inputs]
    parameters: dict[str, int] = collections.Counter()
    for tensor in tensors(model.graph):
        parameters[_dtype(tensor.data_type)] += math.prod(tensor.dims)
    return {
        "kind": "onnx",
        "file": str(path),
        "size": path.stat().st_size,
        "external": {str(file.relative_to(path.parent)): file.stat().st_size for file in source.external},
        "sha256": source.sha256(),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": inputs,
        "outputs": [_tensor(value) for value in model.graph.output],
        "parameters": dict(parameters),
        "nodes": len(model.graph.node),
        "operators": dict(collections.Counter(node.op_type for node in model.graph.node).most_common()),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "mended_when_built": mend(source),
    }


def _describe_engine(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    plan, size = read_plan(head), path.stat().st_size
    if plan.product is None:
        raise EngineError(f"{path}: neither an ONNX file (.onnx) nor a TensorRT engine{foreign(head)}")
    check_plan(path, plan, head, size)
    sidecar = check_sidecar(path)
    return {
        "kind": "engine",
        "file": str(path),
        "size": size,
        "product": plan.product,
        "version": plan.version,
        "capabilities": list(plan.capabilities),
        "offset": plan.offset,
        "metadata": json.loads(head[4 : plan.offset]) if plan.offset else {},
        "record": None if sidecar is None else dataclasses.asdict(sidecar),
    }


def describe_loaded(path: Path, *, allow_host_code: bool = False) -> dict[str, Any]:
    """Load an engine with TensorRT on torch's current GPU, and describe it.

    Args:
        path: the engine.
        allow_host_code: whether code in the engine may run on the CPU.

    Raises:
        EngineError: the file is not an engine, or cannot be loaded on this machine.
        MissingDependencyError: TensorRT is not installed.
    """
    if path.suffix.lower() == ".onnx":
        raise EngineError(f"{path}: --load is for engines; omit it for an ONNX file")
    if not torch.cuda.is_available():
        raise EngineError(f"{path}: --load needs an NVIDIA GPU, but torch finds none on this machine")
    engine = open_engine(path, open_device("cuda"), EngineOptions(allow_host_code=allow_host_code))
    assert isinstance(engine, TensorRTEngine)
    try:
        return {
            "runtime": engine.runtime,
            "inputs": [_spec(spec) for spec in engine.inputs or ()],
            "outputs": [_spec(spec) for spec in engine.outputs],
            "profiles": [
                {name: [list(low), list(profile.usual[name]), list(high)] for name, (low, high) in profile.extents.items()}
                for profile in engine.profiles
            ],
            "slot_memory": engine.workspace,
            "layers": engine.layers,
            "layer_names": engine.layer_names(),
        }
    finally:
        engine.close()


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": spec.shape and list(spec.shape)}


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Describe an input or output; dimensions are numbers, names, or null if they are dynamic and unnamed."""
    kind = value.type.tensor_type
    shape = None
    if kind.HasField("shape"):
        shape = [dim.dim_param or (dim.dim_value if dim.dim_value > 0 else None) for dim in kind.shape.dim]
    return {"name": value.name, "dtype": _dtype(kind.elem_type), "shape": shape}


def _dtype(number: int) -> str:
    from onnx import TensorProto

    names = {"float": "float32", "double": "float64"}
    if number not in TensorProto.DataType.values():
        return f"unknown type {number}"
    name = str(TensorProto.DataType.Name(number)).lower()
    return names.get(name, name)


def _show(facts: dict[str, Any]) -> None:
    console = open_console()
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    try:
        rows = _onnx_rows(facts) if facts["kind"] == "onnx" else _engine_rows(facts)
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # the other fields of a record are not validated before
        raise EngineError(
            f"{facts['file']}: its record has another form than aiotrt writes: {error!r}; --json shows it"
        ) from error
    for label, text in rows:
        table.add_row(label, str(text))
    show(console, table)


def _onnx_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("file", f"{facts['file']}, {_size(facts['size'])}")]
    rows += [("weights in", f"{name}, {_size(size)}") for name, size in facts["external"].items()]
    opsets = ", ".join(f"{domain} {version}" for domain, version in facts["opsets"].items())
    rows.append(("format", f"ONNX, opset {opsets}, IR {facts['ir_version']}"))
    if facts["producer"]:
        rows.append(("producer", facts["producer"]))
    rows += _tensor_rows(facts)
    total = sum(facts["parameters"].values())
    split = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["parameters"].items())
    rows.append(("parameters", f"{total:,} ({split})" if split else "0"))
    rows.append(("nodes", f"{facts['nodes']:,} ({_most_common(facts['operators'])})"))
    rows += [(f"meta {key}", _short(value)) for key, value in facts["metadata"].items()]
    rows += [("when built", line) for line in facts["mended_when_built"]]
    return rows


def _engine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[facts["product"]]
    version = facts["version"] or "of unknown version: aiotrt does not know its header, or the header is damaged"
    rows = [("file", f"{facts['file']}, {_size(facts['size'])}"), ("written by", f"{title} {version}")]
    if facts["capabilities"]:
        rows.append(("for GPUs", ", ".join(facts["capabilities"])))
    rows += [(f"meta {key}", _short(value)) for key, value in facts["metadata"].items()]
    record, loaded = facts["record"], facts.get("loaded")
    if loaded is not None:
        rows.append(("loaded with", loaded["runtime"]))
        rows += _io_rows(loaded)
        rows.append(("memory", f"{_size(loaded['slot_memory'])} of activations for each slot, in addition to the weights"))
        names = loaded["layer_names"]
        rows.append(("layers", f"{loaded['layers']:,}" + ", names not recorded" * (not names)))
        rows += [("layer", _short(name)) for name in names[:_LAYERS]]
        if len(names) > _LAYERS:
            rows.append(("", f"and {len(names) - _LAYERS:,} more: see --json"))
    if record is None:
        if loaded is None:
            rows.append(("record", "none: only TensorRT can read inputs and outputs; on a GPU, add --load"))
        return rows
    if loaded is None:
        rows += _io_rows(record)
        rows.append(("memory", "of a slot: only TensorRT can determine it; on a GPU, add --load"))
    if record["layers"]:
        kinds = collections.Counter(layer["type"] for layer in record["layers"])
        rows.append(
            (
                "network",
                f"{kinds.total():,} layer{'s' * (kinds.total() > 1)} before the builder fused any ({_most_common(kinds)})",
            )
        )
    rows.append(("precision", record["precision"] or "as in the ONNX file"))
    source, gpu = record["source"], record["gpu"]
    rows.append(("built from", f"{source['file']}, SHA-256 {source['sha256'][:16]}..."))
    where = f" on {gpu['name']} ({gpu['compute_capability']})" if gpu else " without a GPU"
    rows.append(("built", f"{record['date']} in {record['seconds']} s{where}"))
    rows += [("option", f"{name}: {value}") for name, value in record["options"].items()]
    rows += [("repaired", line) for line in record["mended"]]
    rows += [("warning", line) for line in record["warnings"]]
    return rows


def _io_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = _tensor_rows(facts)
    for number, profile in enumerate(facts["profiles"]):
        for name, (low, usual, high) in profile.items():
            rows.append(
                (f"profile {number}", f"{name}: {_dimensions(low)} to {_dimensions(high)}, usually {_dimensions(usual)}")
            )
    return rows


def _tensor_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, f"{tensor['name']}: {tensor['dtype']} {_dimensions(tensor['shape'])}")
        for label, key in (("input", "inputs"), ("output", "outputs"))
        for tensor in facts[key]
    ]


def _most_common(counts: Mapping[str, int]) -> str:
    """List the most common kinds and their counts."""
    kinds = sorted(counts.items(), key=lambda kind: -kind[1])
    more = f", and {len(kinds) - _KINDS} more kinds" if len(kinds) > _KINDS else ""
    return ", ".join(f"{name} {count:,}" for name, count in kinds[:_KINDS]) + more


def _dimensions(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "of unknown rank"
    return f"({', '.join('*' if size is None else str(size) for size in shape)})"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
