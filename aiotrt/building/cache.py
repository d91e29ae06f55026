"""The cache of engines that `load("model.onnx")` builds.

An engine is built once for each file content, set of options, TensorRT version and GPU, also if several processes need it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from aiotrt.building.builder import BuildOptions, build, device_index, gpu_record, make_recipe
from aiotrt.building.files import check_private, make_private, shortened
from aiotrt.building.network import Recipe
from aiotrt.building.products import Product, find_product
from aiotrt.building.profiles import Examples, profile_of
from aiotrt.building.progress import Report
from aiotrt.building.sidecar import FORMAT, check_sidecar
from aiotrt.building.source import read_onnx
from aiotrt.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["cache_directory", "cached_engine"]

_log: Final = logging.getLogger("aiotrt.building")
_REMEDY: Final = "Set AIOTRT_CACHE_DIR to a writable folder with free space, or build with aiotrt.build and load that engine"


def cache_directory() -> Path:
    """Return the folder of built engines: ``$AIOTRT_CACHE_DIR``, else ``aiotrt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    The folder also has the kernels that TensorRT-RTX compiled (``.kernels``); above a limit, the least recently used ones
    are removed. Engines are never removed: delete the folder, or files in it, whenever no process is loading a model.
    """
    if own := os.environ.get("AIOTRT_CACHE_DIR"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification requires relative paths to be ignored: they would depend on the current directory.
    return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "aiotrt"


def cached_engine(
    onnx: str | PathLike[str],
    *,
    runtime: str | None = None,
    device: int | str | torch.device | None = None,
    directory: str | PathLike[str] | None = None,
    progress: bool | Report | None = None,
    examples: Examples | None = None,
    **options: Unpack[BuildOptions],
) -> Path:
    """Return the engine for an ONNX file, and build it if the cache does not have it. Blocks: call it in a worker thread.

    If several processes need an engine at once, one builds it and the others wait. A damaged engine in the cache is built
    again. A new folder is accessible to this user only.

    Args:
        onnx: the model's file.
        runtime: as for `aiotrt.build`.
        device: as for `aiotrt.build`.
        directory: the cache's folder; by default `cache_directory`.
        progress: as for `aiotrt.build`.
        examples: inputs to derive a profile from, if `profiles` is not given.
        options: as for `aiotrt.build`.

    Raises:
        InputError: as for `aiotrt.build`.
        EngineError: as for `aiotrt.build`; or the cache is not writable, or is writable for other users.
        MissingDependencyError: as for `aiotrt.build`.
    """
    path = Path(onnx)
    product = find_product(runtime, path)
    source = read_onnx(path)
    if options.get("profiles") is None and examples is not None:
        profile = profile_of(source.shapes or (), examples)
        if profile is not None:
            options["profiles"] = profile
            _log.info("%s: without profiles=, the profile is derived from warmup=: %s", path, profile)
    recipe = make_recipe(product, **options)
    folder = cache_directory() if directory is None else Path(directory)
    model = source.sha256()
    engine = folder / f"{shortened(path.stem, 80)}-{_key(model, product, gpu_record(device_index(device)), recipe)}.engine"
    check_private(folder)
    if _is_good(engine, model):
        return engine
    with _only_one(path, engine):
        if not _is_good(engine, model):  # or another process built it while this one waited
            _log.info("%s: building %s with %s", path, engine, product)
            # The caller's may be iterators, which `make_recipe` has consumed.
            options["profiles"], options["compute_capabilities"] = recipe.profiles, recipe.targets
            try:
                build(path, engine, runtime=product.name, device=device, progress=progress, **options)
            except EngineError as error:
                if isinstance(error.__cause__, OSError):
                    raise EngineError(f"{error}. {_REMEDY}") from error
                raise
    return engine


@contextmanager
def _only_one(path: Path, engine: Path) -> Iterator[None]:
    """Hold the engine's lock. The operating system releases it when this process ends, also by a crash."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingDependencyError("the cache of built engines needs filelock; pip install filelock") from error
    lock = FileLock(engine.with_suffix(".lock"))
    try:
        make_private(engine.parent)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("%s: another process is building %s; waiting for it", path, engine)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise EngineError(f"{path}: cannot write to the engine cache, {engine.parent}: {error}. {_REMEDY}") from error
    try:
        yield
    finally:
        lock.release()


def _key(model: str, product: Product, gpu: Mapping[str, str] | None, recipe: Recipe) -> str:
    """Return an engine's key in the cache. It excludes the timing cache's path, which affects only the build time."""
    options = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name != "timing_cache"}
    parts = {"format": FORMAT, "model": model, "product": product.name, "version": product.version, "gpu": gpu, **options}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _is_good(engine: Path, model: str) -> bool:
    """Whether the engine exists, is intact, and was built from this content.

    The ONNX file may have changed between the computation of the key and the build.
    """
    if not engine.exists():
        return False
    try:
        sidecar = check_sidecar(engine)
        return sidecar is not None and sidecar.source["sha256"] == model
    except EngineError as error:
        _log.warning("%s; building it again", error)
        return False
