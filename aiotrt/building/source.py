"""The ONNX file that an engine is built from: reads and checks it, and repairs names that TensorRT would reject."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiotrt._install import install_hint
from aiotrt.building.files import check_readable, digest, foreign, is_inside
from aiotrt.building.profiles import Dynamic
from aiotrt.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

__all__ = ["Source", "fit_precision", "mend", "read_onnx", "tensors"]

#: Matches a meaningful name of a symbolic dimension. Exporters also write placeholders: "?", "-1", "*", "None".
_NAME: Final = re.compile(r"(?!(?:none|unk|unknown|dynamic|any)$)[a-z_].*", re.IGNORECASE)
#: The maximum size of a protocol buffer, in bytes.
_LIMIT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX file that was read.

    Attributes:
        path: the file's path.
        model: the parsed file; external weights are not loaded.
        external: the files with external weights.
    """

    path: Path
    model: onnx.ModelProto
    external: tuple[Path, ...]

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs that a caller must pass. Old exporters list the weights as inputs too; these are left out."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in weights]

    @property
    def shapes(self) -> list[Dynamic] | None:
        """The inputs' shapes, for profiles; None if an input may have any rank."""
        shapes = []
        for value in self.inputs:
            tensor = value.type.tensor_type
            if not tensor.HasField("shape"):
                return None
            sizes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim)
            shapes.append(Dynamic(value.name, sizes, tuple(d.dim_param or None for d in tensor.shape.dim)))
        return shapes

    def sha256(self) -> str:
        """Return the SHA-256 of the file and of the files with its weights."""
        return digest([self.path, *self.external])


def read_onnx(path: Path) -> Source:
    """Read and check an ONNX file.

    Raises:
        EngineError: the file is missing, empty, a directory, truncated or not an ONNX model; or its external data is
            missing, truncated or outside its folder.
        MissingDependencyError: the package onnx is not installed.
    """
    check_readable(path)
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"{path.name}: reading an ONNX file needs the package onnx; {install_hint('onnx')}"
        ) from error
    data = path.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf raises a class of its own, whose module differs between versions
        raise EngineError(
            f"{path}: not an ONNX model, or truncated ({len(data):,} bytes){foreign(data)}: {error}; copy or export it again"
        ) from error
    # Garbage can parse as a valid message without any known field.
    if not model.ir_version or not model.graph.output:
        raise EngineError(f"{path}: not an ONNX model{foreign(data)}: it declares no outputs; export it again")
    return Source(path, model, _external_files(path, model))


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant of a graph: initializers, and constants inside nodes and their subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from tensors(subgraph)


def mend(source: Source) -> list[str]:
    """Repair the model in place for TensorRT, without changing what it computes.

    TensorRT requires dimensions of one name to be equal, and some exporters give all unknown dimensions the same
    placeholder: PP-OCR's classifier names both height and width "?". Such names are removed.

    Returns:
        A text for each repair.
    """
    changes = []
    for value in source.inputs:
        for i, dimension in enumerate(value.type.tensor_type.shape.dim):
            name = dimension.dim_param
            if (name and not _NAME.match(name)) or dimension.dim_value < 0:
                shown = repr(name) if name else str(dimension.dim_value)
                changes.append(
                    f"input {value.name!r}: removed the name {shown} of dimension {i}, which is only a placeholder"
                )
                dimension.Clear()
    return changes


def fit_precision(source: Source, precision: str | None, *, weakly_typed: bool) -> onnx.ModelProto:
    """Return the model, converted to the types of `precision` if the builder does not do that itself.

    Args:
        source: the model, in any types.
        precision: None for the types in the file, or ``"fp32"``, ``"fp16"``, ``"bf16"``.
        weakly_typed: whether the builder lowers the precision itself.

    Raises:
        EngineError: the file's types contradict `precision`, or the model cannot be converted.
        MissingDependencyError: the converter is not installed.
    """
    from onnx import TensorProto

    types = {tensor.data_type for tensor in tensors(source.model.graph)}
    types |= {value.type.tensor_type.elem_type for value in source.inputs}
    half, bfloat = TensorProto.FLOAT16 in types, TensorProto.BFLOAT16 in types
    if precision == "fp32" and (half or bfloat):
        kind = "FP16" if half else "BF16"
        raise EngineError(
            f"{source.path}: holds {kind} tensors, and precision='fp32' cannot restore rounded values; "
            "export the model in FP32, or leave precision= out"
        )
    if precision == "bf16" and not weakly_typed and not bfloat:
        raise EngineError(
            f"{source.path}: holds no BF16 tensors, and this TensorRT uses the types in the file; convert the model before "
            "the export (model.bfloat16() in torch) and leave precision= out, or use precision='fp16'"
        )
    if precision == "fp16" and not weakly_typed and not half:
        return _to_half(source)
    return source.model


def _to_half(source: Source) -> onnx.ModelProto:
    """Convert the model to FP16; inputs and outputs keep their types, as they do when the builder lowers the precision.

    The converter is onnxruntime's, because its origin, onnxconverter-common, is seldom maintained.
    """
    try:
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise MissingDependencyError(
            f"{source.path.name}: precision='fp16' converts the model with onnxruntime first; {install_hint('onnx')}"
        ) from error
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    try:
        _load_external(source.path, model)
        _lift_constants(model)
        # FP16 cannot represent variances below 6e-8: without this, PP-OCR's detector found text everywhere.
        kept = [*DEFAULT_OP_BLOCK_LIST, "BatchNormalization"]
        converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=kept)
        if converted.ByteSize() > _LIMIT:
            raise ValueError("the result is larger than 2 GiB")
    except Exception as error:  # the converter raises exceptions of many classes
        raise EngineError(
            f"{source.path}: onnxruntime cannot convert this model to FP16: {error}; export it in FP16 (model.half() in "
            "torch) and leave precision= out"
        ) from error
    return converted


def _load_external(path: Path, model: onnx.ModelProto) -> None:
    """Read the external weights. onnx has a function for it, which refuses symbolic links."""
    for tensor in tensors(model.graph):
        if tensor.data_location == tensor.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            with (path.parent / entry["location"]).open("rb") as file:
                file.seek(int(entry.get("offset", 0)))
                tensor.raw_data = file.read(int(entry.get("length", -1)))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")


def _lift_constants(model: onnx.ModelProto) -> None:
    """Convert Constant nodes to initializers.

    Without this the converter would round weights from a Constant node, even if their consumer stays in FP32.
    """
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            nodes.append(type(node).FromString(node.SerializeToString()))  # a copy: clearing the list deletes the original
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, 4)  # before 4 every initializer had to be an input as well


def _external_files(path: Path, model: onnx.ModelProto) -> tuple[Path, ...]:
    files: dict[Path, None] = {}
    for tensor in tensors(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry: dict[str, Any] = {item.key: item.value for item in tensor.external_data}
        location = str(entry.get("location", ""))
        if not is_inside(location):
            raise EngineError(
                f"{path}: the file of the weights {tensor.name!r}, {location!r}, is outside the model's folder"
            )
        file = path.parent / location
        if not file.is_file():
            raise EngineError(
                f"{path}: the file of its weights, {location}, is missing; copy it beside the model, or export the model "
                "again in one file (external_data=False in torch.onnx.export)"
            )
        try:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        except ValueError as error:
            raise EngineError(
                f"{path}: the offset or length of the weights {tensor.name!r} in {location} is not a number: {error}; "
                "export it again"
            ) from error
        if file.stat().st_size < end:
            raise EngineError(
                f"{path}: the file of its weights, {location}, is truncated: it has {file.stat().st_size:,} of at least "
                f"{end:,} bytes; copy it again"
            )
        files[file] = None
    return tuple(files)
