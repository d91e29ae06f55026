"""Engines run a model's computation. `open_engine` chooses the kind of engine for a source."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from aiotrt.building import cached_engine, check_sidecar
from aiotrt.building.builder import device_index, gpu_record
from aiotrt.building.files import check_readable, digest
from aiotrt.building.profiles import Examples, ProfileArgument
from aiotrt.devices.base import Device
from aiotrt.engines.base import Engine, Execution
from aiotrt.engines.module import ModuleEngine
from aiotrt.errors import EngineError

__all__ = ["Engine", "EngineOptions", "Execution", "is_file", "open_engine", "usual_device"]


@dataclass(frozen=True)
class EngineOptions:
    """The options of `load` that concern the engine; `load` documents each.

    Attributes:
        threads: how many CPU threads one run on the host device may use.
        runtime: the TensorRT to build and run with.
        sha256: the file's checksum.
        allow_host_code: whether CPU code inside an engine may run.
        precision: the precision to build with.
        profiles: the optimisation profiles to build with.
        examples: the example inputs to derive a profile from, if `profiles` is None.
    """

    threads: int = 1
    runtime: str | None = None
    sha256: str | None = None
    allow_host_code: bool = False
    precision: str | None = None
    profiles: Iterable[ProfileArgument] | ProfileArgument | None = None
    examples: Examples | None = None


def is_file(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether `source` names a file."""
    return isinstance(source, (str, os.PathLike))


def usual_device(source: object) -> str:
    """Return the device for ``device="auto"``.

    For an ONNX file this is the GPU if there is one and a TensorRT is installed, else the host device. For other sources it
    is "auto".
    """
    if is_file(source) and Path(source).suffix.lower() == ".onnx":
        found = any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))
        return "cuda" if found and torch.cuda.is_available() else "host"
    return "auto"


def open_engine(source: object, device: Device, options: EngineOptions) -> Engine:
    """Load an engine. Blocks, and may build one first, for seconds to minutes: call it in a worker thread.

    Args:
        source: a path to an ``.onnx``, ``.engine`` or ``.plan`` file, a torch module, an exported program or a function.
        device: the device that will run it.
        options: see `EngineOptions`.

    Raises:
        EngineError: the file is missing, empty, a directory, not readable, of an unknown kind or damaged; it does not match
            its checksum or the record beside it; or it is for another device.
        InputError: an ONNX file cannot be built with these options.
        MissingDependencyError: a package that this kind of engine needs is missing.
    """
    if not is_file(source):
        return ModuleEngine(source, device)
    path = Path(source)
    check_readable(path)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        if options.sha256 is not None and digest([path]) != options.sha256.lower():
            raise EngineError(f"{path}: its SHA-256 is {digest([path])}, expected {options.sha256.lower()} (sha256=)")
        if device.torch_device.type == "cpu":
            from aiotrt.engines.onnx import OnnxEngine

            return OnnxEngine(path, options.threads)
        built = cached_engine(
            path,
            runtime=options.runtime,
            device=device.torch_device,
            precision=options.precision,
            profiles=options.profiles,
            examples=options.examples,
        )
        return _open_tensorrt(built, device, EngineOptions(runtime=options.runtime))
    if suffix in (".engine", ".plan"):
        if device.torch_device.type == "cuda":
            check_sidecar(path, gpu=gpu_record(device_index(device.torch_device)))
        return _open_tensorrt(path, device, options)
    raise EngineError(f"{path}: unknown kind of file {suffix!r}; expected .onnx, .engine or .plan")


def _open_tensorrt(path: Path, device: Device, options: EngineOptions) -> Engine:
    from aiotrt.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(
        path, device, runtime=options.runtime, sha256=options.sha256, allow_host_code=options.allow_host_code
    )
