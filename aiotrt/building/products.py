"""The installed TensorRT or TensorRT-RTX to build with."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from aiotrt._install import install_hint
from aiotrt.errors import EngineError, InputError, MissingDependencyError

__all__ = ["Product", "find_product", "title"]

_TITLES: Final = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL: Final = {"tensorrt": install_hint("tensorrt"), "tensorrt_rtx": install_hint("rtx")}


@dataclass(frozen=True, slots=True)
class Product:
    """One installed TensorRT.

    Attributes:
        name: ``"tensorrt"`` or ``"tensorrt_rtx"``, which is also its module's name.
        version: the module's ``__version__``.
        module: the module.
    """

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{title(self.name)} {self.version}"

    @property
    def weakly_typed(self) -> bool:
        """Whether the builder can lower a network's precision: TensorRT 10 can, later versions use the model's types."""
        return hasattr(self.module.BuilderFlag, "FP16")

    @property
    def offers_targets(self) -> bool:
        """Whether the builder can build for GPUs that this machine does not have (TensorRT-RTX)."""
        return hasattr(self.module, "ComputeCapability")


def title(name: str) -> str:
    """Return the product's name as NVIDIA writes it."""
    return _TITLES.get(name, name)


def find_product(runtime: str | None, onnx: Path) -> Product:
    """Find the product to build with.

    Args:
        runtime: ``"tensorrt"``, ``"tensorrt_rtx"``, or None for the one that is installed: TensorRT first on a machine with
            a GPU, TensorRT-RTX first on one without, because only that can build there.
        onnx: the file to be built, for messages.

    Raises:
        InputError: `runtime` has another value.
        MissingDependencyError: the product is not installed or cannot be imported.
        EngineError: the product is too old, or it is TensorRT and there is no GPU.
    """
    if runtime is not None and runtime not in _TITLES:
        raise InputError(f"runtime must be 'tensorrt', 'tensorrt_rtx' or None, got {runtime!r}")
    gpu = torch.cuda.is_available()
    wanted = (runtime,) if runtime is not None else ("tensorrt", "tensorrt_rtx") if gpu else ("tensorrt_rtx", "tensorrt")
    reasons = []
    for name in wanted:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: the Python package is installed, and its libraries are not
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            reasons.append(f"{title(name)}: {'not installed' if missing else error}; {_INSTALL[name]}")
            continue
        product = Product(name, str(module.__version__), module)
        if name == "tensorrt":
            _check_usable(product, gpu)
        return product
    raise MissingDependencyError(
        f"{onnx}: building an engine from it needs TensorRT. {'. '.join(reasons)}. Without TensorRT, "
        "aiotrt.load(..., device='host') runs it on the CPU, with ONNX Runtime"
    )


def _check_usable(product: Product, gpu: bool) -> None:
    if int(product.version.split(".")[0]) < 10:
        raise EngineError(f"{product} is installed, but aiotrt builds with TensorRT 10 or newer; {_INSTALL['tensorrt']}")
    if not gpu:  # without a driver its builder would end the process
        raise EngineError(
            f"{product} builds an engine on the GPU that will run it, but torch finds no GPU here; build it on a machine "
            "with that GPU, or use runtime='tensorrt_rtx', which needs no GPU to build"
        )
