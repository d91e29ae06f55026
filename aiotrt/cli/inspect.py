"""``aiotrt inspect``: what an ONNX file or an engine is, without running it and without a GPU."""

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
#: Enough for a plan's head, and for the text that Ultralytics puts before it.
_HEAD: Final = (1 << 20) + 4096
#: Kinds of operators and of layers shown in the table; --json has all.
_KINDS: Final = 8
#: Layers shown in the table; --json has all.
_LAYERS: Final = 8


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the program's."""
    parser = subparsers.add_parser(
        "inspect",
        help="say what a model or an engine is",
        description="Say what an .onnx, .engine or .plan file is. Nothing of it is run, so files from anywhere are safe, "
        "unless --load is given.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument(
        "--load", action="store_true", help="have TensorRT load an engine on this GPU, and say what only it can tell"
    )
    parser.add_argument(
        "--allow-host-code", action="store_true", help="with --load: run host code inside the engine, if you trust it"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
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
        raise EngineError(f"{arguments.file}: what it or its record says is nested too deeply to be shown") from error
    return 0


def describe(path: Path) -> dict[str, Any]:
    """What can be said of a file: ``kind`` is ``"onnx"`` or ``"engine"``, and decides about the other keys.

    Raises:
        EngineError: it is missing, empty, damaged, or neither.
        MissingDependencyError: a package is missing that reads it.
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
    """What TensorRT tells of an engine that it has loaded on torch's current GPU.

    Args:
        path: the engine.
        allow_host_code: whether code for the host inside it may run.

    Raises:
        EngineError: it is not an engine, or cannot be loaded here.
        MissingDependencyError: TensorRT is not installed.
    """
    if path.suffix.lower() == ".onnx":
        raise EngineError(f"{path}: --load is for engines; an ONNX file tells all there is without")
    if not torch.cuda.is_available():
        raise EngineError(f"{path}: --load needs an NVIDIA GPU, and torch sees none here")
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
    """An input or output; extents are numbers, names, or null where they are open and nameless."""
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
    ) as error:  # what nothing else reads of a record is not checked
        raise EngineError(f"{facts['file']}: its record is not as aiotrt writes it: {error!r}; --json shows it") from error
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
    rows.append(("nodes", f"{facts['nodes']:,} ({_commonest(facts['operators'])})"))
    rows += [(f"meta {key}", _short(value)) for key, value in facts["metadata"].items()]
    rows += [("when built", line) for line in facts["mended_when_built"]]
    return rows


def _engine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[facts["product"]]
    version = facts["version"] or "of unknown version: its header is older or newer than aiotrt knows, or damaged"
    rows = [("file", f"{facts['file']}, {_size(facts['size'])}"), ("written by", f"{title} {version}")]
    if facts["capabilities"]:
        rows.append(("for GPUs", ", ".join(facts["capabilities"])))
    rows += [(f"meta {key}", _short(value)) for key, value in facts["metadata"].items()]
    record, loaded = facts["record"], facts.get("loaded")
    if loaded is not None:
        rows.append(("loaded with", loaded["runtime"]))
        rows += _border_rows(loaded)
        rows.append(("memory", f"{_size(loaded['slot_memory'])} of activations for each slot, beside the weights"))
        names = loaded["layer_names"]
        rows.append(("layers", f"{loaded['layers']:,}" + ", the names not recorded" * (not names)))
        rows += [("layer", _short(name)) for name in names[:_LAYERS]]
        if len(names) > _LAYERS:
            rows.append(("", f"and {len(names) - _LAYERS:,} more: see --json"))
    if record is None:
        if loaded is None:
            rows.append(("record", "none: only TensorRT on a GPU can tell inputs and outputs; there, add --load"))
        return rows
    if loaded is None:
        rows += _border_rows(record)
        rows.append(("memory", "of a slot: only TensorRT on a GPU can tell; there, add --load"))
    if record["layers"]:
        kinds = collections.Counter(layer["type"] for layer in record["layers"])
        rows.append(
            (
                "network",
                f"{kinds.total():,} layer{'s' * (kinds.total() > 1)} before the builder fused any ({_commonest(kinds)})",
            )
        )
    rows.append(("precision", record["precision"] or "as in the ONNX file"))
    source, gpu = record["source"], record["gpu"]
    rows.append(("built from", f"{source['file']}, SHA-256 {source['sha256'][:16]}..."))
    where = f" on {gpu['name']} ({gpu['compute_capability']})" if gpu else " without a GPU"
    rows.append(("built", f"{record['date']} in {record['seconds']} s{where}"))
    rows += [("option", f"{name}: {value}") for name, value in record["options"].items()]
    rows += [("mended", line) for line in record["mended"]]
    rows += [("warning", line) for line in record["warnings"]]
    return rows


def _border_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = _tensor_rows(facts)
    for number, profile in enumerate(facts["profiles"]):
        for name, (low, usual, high) in profile.items():
            rows.append((f"profile {number}", f"{name}: {_extents(low)} to {_extents(high)}, usually {_extents(usual)}"))
    return rows


def _tensor_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, f"{tensor['name']}: {tensor['dtype']} {_extents(tensor['shape'])}")
        for label, key in (("input", "inputs"), ("output", "outputs"))
        for tensor in facts[key]
    ]


def _commonest(counts: Mapping[str, int]) -> str:
    """The commonest of some kinds."""
    kinds = sorted(counts.items(), key=lambda kind: -kind[1])
    more = f", and {len(kinds) - _KINDS} more kinds" if len(kinds) > _KINDS else ""
    return ", ".join(f"{name} {count:,}" for name, count in kinds[:_KINDS]) + more


def _extents(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "of unknown rank"
    return f"({', '.join('*' if extent is None else str(extent) for extent in shape)})"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
