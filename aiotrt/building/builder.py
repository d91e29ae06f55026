"""`build`: compile an ONNX file to an engine file, with its record beside it."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import time
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

import torch

from aiotrt._workers import Workers
from aiotrt.building.files import Write, replacing
from aiotrt.building.network import Plan, Recipe, build_plan, check_targets
from aiotrt.building.products import Product, find_product
from aiotrt.building.profiles import ProfileArgument, normal_profiles
from aiotrt.building.progress import Report, make_monitor, reporter
from aiotrt.building.sidecar import Sidecar, sidecar_path
from aiotrt.building.source import fit_precision, mend, read_onnx
from aiotrt.errors import InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["BuildOptions", "build", "device_index", "gpu_record", "make_recipe"]

PRECISIONS: Final = ("fp32", "fp16", "bf16")


class BuildOptions(TypedDict, total=False):
    """The options of `build` that affect the engine."""

    precision: str | None
    profiles: Iterable[ProfileArgument] | ProfileArgument | None
    compute_capabilities: Iterable[str]
    timing_cache: str | PathLike[str] | None
    workspace_bytes: int | None
    optimization_level: int | None


def build(
    onnx: str | PathLike[str],
    out: str | PathLike[str],
    *,
    runtime: str | None = None,
    precision: str | None = None,
    profiles: Iterable[ProfileArgument] | ProfileArgument | None = None,
    compute_capabilities: Iterable[str] = (),
    timing_cache: str | PathLike[str] | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    device: int | str | torch.device | None = None,
    progress: bool | Report | None = None,
) -> Path:
    """Build a TensorRT engine from an ONNX file. Blocks for seconds to many minutes; meant for tools.

    Ctrl-C stops the build: the builder stops at its next step, no partial file remains in the output's folder, and an
    existing file is unchanged. The engine's record is written beside it, as ``<out>.json``; `aiotrt.load` checks it.

    Args:
        onnx: the model's file.
        out: the engine's file; customarily ``.engine`` or ``.plan``.
        runtime: ``"tensorrt"``, ``"tensorrt_rtx"``, or None for the one that is installed. TensorRT builds on the GPU that
            will run the engine; TensorRT-RTX needs no GPU.
        precision: None for the types in the file; ``"fp32"`` for these types, with TF32 disabled; ``"fp16"`` or ``"bf16"``
            for a lower precision than FP32. TensorRT 10 lowers the precision itself, and chooses the layers. Later versions
            and TensorRT-RTX use the types in the file. For them ``"fp16"`` converts the model first, except its inputs and
            outputs, and ``"bf16"`` needs a model that is BF16 already.
        profiles: one or more dicts that map each dynamic input to its (smallest, usual, largest) shape, or to one shape
            that is all three. For an input that the network reads as a shape, give values instead. A model without dynamic
            inputs needs none.
        compute_capabilities: for TensorRT-RTX, the GPUs to build for, such as ``["sm89", "sm120"]``; by default every
            supported GPU from Ampere on.
        timing_cache: a file in which TensorRT keeps its kernel timings from build to build. Ignored by TensorRT-RTX.
        workspace_bytes: the maximum scratch memory of one layer.
        optimization_level: 0 (builds fast) to 5 (runs fast); TensorRT's default is 3.
        device: the GPU to build on; by default torch's current one.
        progress: True for a bar on standard error, or a function that is called with a `BuildProgress`, in another
            thread. An exception that it raises stops the build and is raised here.

    Returns:
        `out`.

    Raises:
        InputError: an argument is invalid or does not fit the model, or `out` or its record would overwrite the model.
        EngineError: the model cannot be read or built, or the engine cannot be written. The message has TensorRT's last
            warnings and errors; the logger ``aiotrt.tensorrt`` has all of them.
        MissingDependencyError: a package is missing; the message names it.
    """
    product = find_product(runtime, Path(onnx))
    recipe = make_recipe(
        product,
        precision=precision,
        profiles=profiles,
        compute_capabilities=compute_capabilities,
        timing_cache=timing_cache,
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
    )
    source, out = read_onnx(Path(onnx)), Path(out)
    for file in (out, sidecar_path(out)):
        if file.resolve() in {own.resolve() for own in (source.path, *source.external)}:
            raise InputError(
                f"{file}: is the model or a file of its weights, and would be overwritten; choose another file as out"
            )
    sha256 = source.sha256()  # now: the file may change while the engine is built
    mended = mend(source)
    model = fit_precision(source, precision, weakly_typed=product.weakly_typed)
    gpu = device_index(device)
    # Both files are opened before the build and renamed after it. If the process dies between the two renames, the files
    # do not match, which `check_sidecar` reports.
    with (
        reporter(progress, out.name) as report,
        replacing(out) as write,
        replacing(sidecar_path(out)) as write_record,
    ):
        started = time.perf_counter()
        plan = _run(product, source.path, model, recipe, report, gpu, write)
        seconds = time.perf_counter() - started
        sidecar = _describe(out, source.path, sha256, product, recipe, plan, gpu, mended, seconds)
        write_record(sidecar.to_json().encode())
    return out


def make_recipe(
    product: Product,
    *,
    precision: str | None = None,
    profiles: Iterable[ProfileArgument] | ProfileArgument | None = None,
    compute_capabilities: Iterable[str] = (),
    timing_cache: str | PathLike[str] | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
) -> Recipe:
    """Normalise the options of a build, and check everything that does not need the model.

    Raises:
        InputError: an option is invalid.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision must be 'fp32', 'fp16', 'bf16' or None, got {precision!r}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise InputError(f"workspace_bytes must be at least 1, got {workspace_bytes!r}")
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise InputError(f"optimization_level must be from 0 to 5, got {optimization_level!r}")
    return Recipe(
        precision=precision,
        profiles=normal_profiles(profiles),
        targets=check_targets(product, compute_capabilities),
        timing_cache=None if timing_cache is None else Path(timing_cache),
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
    )


def gpu_record(device: int | None) -> dict[str, str] | None:
    """Return a GPU's entry in a record: ``name`` and ``compute_capability``."""
    if device is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}


def device_index(device: int | str | torch.device | None) -> int | None:
    """Return the index of the GPU to build on: torch's current one, unless `device` names another; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    return torch.cuda.current_device() if index is None else index


def _run(
    product: Product,
    path: Path,
    model: onnx.ModelProto,
    recipe: Recipe,
    report: Report | None,
    device: int | None,
    write: Write,
) -> Plan:
    """Build in another thread, so that a signal's exception is raised here at once and stops the builder.

    In the builder's own thread it would be raised inside one of TensorRT's callbacks and end the process.
    """
    monitor = make_monitor(product.module, report)
    with Workers(1, "aiotrt-build") as executor:
        future = executor.submit(build_plan, product, path, model, recipe, monitor, device, write)
        try:
            future.result()
        finally:
            monitor.cancel()  # leaving the outer block waits for the builder to stop
            if monitor.error is not None:  # the exception of the caller's function says more than "cancelled"
                raise monitor.error from None
    return future.result()


def _describe(
    out: Path,
    path: Path,
    sha256: str,
    product: Product,
    recipe: Recipe,
    plan: Plan,
    device: int | None,
    mended: list[str],
    seconds: float,
) -> Sidecar:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("aiotrt", "onnx", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    options = {
        "workspace_bytes": recipe.workspace_bytes,
        "optimization_level": recipe.optimization_level,
        "timing_cache": None if recipe.timing_cache is None else recipe.timing_cache.name,
    }
    return Sidecar(
        engine={"file": out.name, "size": plan.size, "sha256": plan.sha256},
        source={"file": path.name, "sha256": sha256},
        product=product.name,
        version=product.version,
        versions=versions,
        gpu=gpu_record(device),
        compute_capabilities=recipe.targets,
        precision=recipe.precision,
        profiles=recipe.profiles,
        inputs=plan.inputs,
        outputs=plan.outputs,
        options={name: value for name, value in options.items() if value is not None},
        mended=mended,
        warnings=plan.warnings,
        seconds=round(seconds, 3),
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        layers=plan.layers,
    )
