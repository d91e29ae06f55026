"""`build`: an ONNX file in, an engine file and its record out."""

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
    """The options of `build` that decide what is built."""

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
    """Build a TensorRT engine from an ONNX file. Blocks for seconds to many minutes, as a tool does.

    Ctrl-C stops it: the builder winds down at its next step, nothing is left in the output's folder, and a file that was
    there before is unchanged. Beside the engine stands its record, ``<out>.json``, which `aiotrt.load` checks.

    Args:
        onnx: the model's file.
        out: the engine's file; customarily ``.engine`` or ``.plan``.
        runtime: ``"tensorrt"``, ``"tensorrt_rtx"``, or None for what is installed. TensorRT builds on the GPU that the
            engine is for; TensorRT-RTX needs none.
        precision: None for the types as they stand in the file; ``"fp32"`` for those without TF32; ``"fp16"`` and
            ``"bf16"`` for less than FP32. TensorRT 10 lowers the precision itself, layer by layer as it sees fit; later ones
            and TensorRT-RTX take types as given, so for ``"fp16"`` the model is converted first, its inputs and outputs
            excepted, and ``"bf16"`` must be in the file already.
        profiles: one or more dicts that map each dynamic input to its (smallest, usual, largest) shape, or to one shape
            that is all three. An input that the network reads as a shape is given values instead. A model without dynamic
            inputs needs none.
        compute_capabilities: for TensorRT-RTX, the GPUs to build for, such as ``["sm89", "sm120"]``; by default every GPU
            it supports from Ampere on.
        timing_cache: a file in which TensorRT keeps its kernel timings from build to build. TensorRT-RTX has none.
        workspace_bytes: the most scratch memory that a layer may use.
        optimization_level: 0 (builds fast) to 5 (runs fast); TensorRT's default is 3.
        device: the GPU to build on; by default torch's current one.
        progress: True for a bar on standard error, or a function that is called with a `BuildProgress`, in another
            thread. What it raises stops the build and is raised here.

    Returns:
        `out`.

    Raises:
        InputError: an argument is wrong, does not fit the model, or `out` or its record would be written over the model.
        EngineError: the model cannot be read or built, or the engine cannot be written. The message has TensorRT's last
            warnings and errors; the logger ``aiotrt.tensorrt`` has all of them.
        MissingDependencyError: a package is missing; the message says which.
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
                f"{file}: is the model, or has its weights, and would be written over; name another file as out"
            )
    sha256 = source.sha256()  # now, and not of what the file may be when the engine is built
    mended = mend(source)
    model = fit_precision(source, precision, weakly_typed=product.weakly_typed)
    gpu = device_index(device)
    # Both files are opened before the work and take their places after it. Should the process die between the two, they
    # do not belong together, and `check_sidecar` says so.
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
    """The options of a build in one form, checked as far as they can be without the model.

    Raises:
        InputError: one of them is wrong.
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
    """A GPU as records have it: ``name`` and ``compute_capability``."""
    if device is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}


def device_index(device: int | str | torch.device | None) -> int | None:
    """The GPU to build on: torch's current one, unless `device` names another; None where there is none."""
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

    Raised in the builder's own thread, it would come up inside one of TensorRT's callbacks and end the process.
    """
    monitor = make_monitor(product.module, report)
    with Workers(1, "aiotrt-build") as executor:
        future = executor.submit(build_plan, product, path, model, recipe, monitor, device, write)
        try:
            future.result()
        finally:
            monitor.cancel()  # and leaving the block waits for the builder to wind down
            if monitor.error is not None:  # the caller's own function raised: that says more than "cancelled"
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
