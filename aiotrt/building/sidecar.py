"""The record of an engine's build, a JSON file beside the engine: ``detector.engine`` has ``detector.engine.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final

from aiotrt.building.files import check_readable, digest
from aiotrt.building.products import title
from aiotrt.errors import EngineError

__all__ = ["Sidecar", "check_sidecar", "sidecar_path"]

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The record of one build.

    Attributes:
        engine: the engine file's name (``file``), ``size`` in bytes and ``sha256``.
        source: the ONNX file's name (``file``) and ``sha256``, which covers its external data.
        product: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: the product's version.
        versions: the versions of Python and of other packages that took part in the build.
        gpu: ``name`` and ``compute_capability`` of the GPU that the engine was built on; None without a GPU.
        compute_capabilities: the requested GPUs; empty for the product's default.
        precision: the requested precision; None for the types in the ONNX file.
        profiles: each maps input names to smallest, usual and largest shapes.
        inputs: ``name``, ``dtype`` and ``shape`` of each input; a dynamic size is null.
        outputs: ``name``, ``dtype`` and ``shape`` of each output.
        options: the builder's other options.
        mended: the repairs of the model before the build, as texts.
        warnings: the builder's last warnings.
        seconds: the duration of the build.
        date: the time of the build, UTC, in ISO 8601.
        format: the version of this record's layout.
        layers: ``name`` and ``type`` of each layer of the network, before the builder fused layers; empty in records of
            older versions of aiotrt.
    """

    engine: Mapping[str, Any]
    source: Mapping[str, Any]
    product: str
    version: str
    versions: Mapping[str, str]
    gpu: Mapping[str, str] | None
    compute_capabilities: Sequence[str]
    precision: str | None
    profiles: Sequence[Mapping[str, Any]]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    mended: Sequence[str]
    warnings: Sequence[str]
    seconds: float
    date: str
    format: int = FORMAT
    layers: Sequence[Mapping[str, str]] = ()  # last in the file, because there may be thousands

    def __str__(self) -> str:
        where = f" on {self.gpu['name']}" if self.gpu else ""
        return f"built from {self.source['file']} by {title(self.product)} {self.version}{where} at {self.date}"

    def to_json(self) -> str:
        """Return the text of the record's file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


#: The JSON types of the fields that this module uses; the other fields are only for human readers.
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "engine": (dict,),
    "source": (dict,),
    "product": (str,),
    "gpu": (dict, NoneType),
}


def sidecar_path(engine: Path) -> Path:
    """Return the path of an engine's record."""
    return engine.with_name(engine.name + ".json")


def check_sidecar(engine: Path, *, product: str | None = None, gpu: Mapping[str, str] | None = None) -> Sidecar | None:
    """Read the record beside an engine, and check that it is this engine's. Reads the whole engine, to hash it.

    Args:
        engine: the engine file.
        product: the product that will run the engine; None to skip this check.
        gpu: the GPU that will run the engine, in the form of `Sidecar.gpu`; None to skip this check. TensorRT-RTX's engines
            are not bound to the GPU that they were built on.

    Returns:
        The record; None if there is no record, for example beside an engine that another tool built.

    Raises:
        EngineError: the engine or the record is damaged, they do not match, or the engine is for another product or GPU.
            The version of TensorRT is not checked here, because some engines run with several; TensorRT checks it.
    """
    check_readable(engine)
    path = sidecar_path(engine)
    if not path.exists():
        return None
    sidecar = _read(path)
    again = "build the engine again, or delete the record if it is not its own"
    size = engine.stat().st_size
    if size != sidecar.engine["size"]:
        raise EngineError(f"{engine}: has {size:,} bytes, but {path.name} says {sidecar.engine['size']:,}; {again}")
    if digest([engine]) != sidecar.engine["sha256"]:
        raise EngineError(
            f"{engine}: is damaged, or is not the engine that {path.name} describes: their SHA-256 differ; {again}"
        )
    if product is not None and product != sidecar.product:
        raise EngineError(f"{engine}: was {sidecar}, which {title(product)} cannot run; build it with runtime={product!r}")
    if gpu is not None and sidecar.gpu is not None and sidecar.product == "tensorrt":
        mine, its = gpu["compute_capability"], sidecar.gpu["compute_capability"]
        if mine != its:
            raise EngineError(
                f"{engine}: was {sidecar}, compute capability {its}, but {gpu['name']} has {mine}; build it on this GPU"
            )
    return sidecar


def _check(field: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise TypeError(f"{field} is {json.dumps(value)[:40]}, expected {expected}")


def _read(path: Path) -> Sidecar:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Sidecar)}
        sidecar = Sidecar(**{name: value for name, value in entries.items() if name in known})
        for field, kinds in _KINDS.items():
            _check(field, getattr(sidecar, field), kinds)
        _check("engine.size", sidecar.engine["size"], (int,))
        for name in ("engine", "source"):
            _check(f"{name}.sha256", getattr(sidecar, name)["sha256"], (str,))
        for name in ("name", "compute_capability") if sidecar.gpu is not None else ():
            _check(f"gpu.{name}", sidecar.gpu[name], (str,))  # type: ignore[index]
        str(sidecar)  # raises if a field that it uses is missing
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{path}: the engine's record is damaged or from another version of aiotrt: {error}; "
            "build the engine again, or delete the record"
        ) from error
    return sidecar
