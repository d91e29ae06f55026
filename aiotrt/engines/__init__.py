"""Engines: what a model runs. `open_engine` tells from the source which kind it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeGuard

from aiotrt.devices.base import Device
from aiotrt.engines.base import Engine, Execution
from aiotrt.engines.module import ModuleEngine
from aiotrt.errors import EngineError, MissingDependencyError

__all__ = ["Engine", "Execution", "is_file", "open_engine"]


def is_file(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether `source` names a file."""
    return isinstance(source, (str, os.PathLike))


def open_engine(source: object, device: Device, *, threads: int) -> Engine:
    """Load an engine. Blocks: for worker threads.

    Args:
        source: a path to an ``.onnx``, ``.engine`` or ``.plan`` file, a torch module, an exported program or a function.
        device: where it will run.
        threads: how many threads an engine on the host may use for one run.

    Raises:
        EngineError: the file is missing, empty, a directory, of an unknown kind, or damaged.
        MissingDependencyError: a package is missing that this kind of engine needs.
    """
    if not is_file(source):
        return ModuleEngine(source, device)
    path = Path(source)
    if not path.exists():
        raise EngineError(f"{path}: there is no such file")
    if path.is_dir():
        raise EngineError(f"{path}: is a directory; name the engine file in it")
    if path.stat().st_size == 0:
        raise EngineError(f"{path}: the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        if device.torch_device.type != "cpu":
            raise MissingDependencyError(
                f"{path.name}: running an ONNX file on {device.name} needs TensorRT, which aiotrt does not support yet; "
                "load it with device='host', or load a torch module or an ExportedProgram"
            )
        from aiotrt.engines.onnx import OnnxEngine

        return OnnxEngine(path, threads)
    if suffix in (".engine", ".plan"):
        raise MissingDependencyError(
            f"{path.name}: running a TensorRT engine needs TensorRT, which aiotrt does not support yet; "
            "load the .onnx file it was built from with device='host', or a torch module or an ExportedProgram"
        )
    raise EngineError(f"{path}: unknown kind of file {suffix!r}; expected .onnx, .engine or .plan")
