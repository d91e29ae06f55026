"""The choice of the product that reads an engine file, its log, and the interpretation of its log.

Only this module imports TensorRT, and only if there is a GPU: without a driver TensorRT's runtime segfaults.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, cast

from aiotrt._install import install_hint
from aiotrt.building.log import log_of
from aiotrt.engines.tensorrt_api import RTX_SURFACE, SURFACE, Api, Runtime, missing_names
from aiotrt.engines.tensorrt_plan import Plan
from aiotrt.errors import EngineError, MissingDependencyError

__all__ = ["PRODUCTS", "Product", "open_product"]

T = TypeVar("T")

#: The modules, in the order in which they are tried, with the command that installs each.
PRODUCTS: Final = {
    "tensorrt": install_hint("tensorrt"),
    "tensorrt_rtx": install_hint("rtx"),
    "tensorrt_lean": "pip install tensorrt-lean",
}
_SHOWN_LINES: Final = 8
#: Patterns of TensorRT's messages when it rejects a file, with the cause and the remedy.
_REFUSALS: Final = (
    (r"host.?code", "it contains host code", "if you trust its source, load it with allow_host_code=True"),
    (r"plugin", "it needs a plugin that is not registered here", "import or load the plugin's library before the engine"),
    (
        r"incompatible device|expecting compute|compute capability",
        "it was built for another GPU",
        "build it on or for this GPU",
    ),
    (r"version", "it was written by another version of TensorRT", "build it with the installed version"),
    (r"platform", "it was built for another operating system or CPU", "build it for this machine"),
    (r"out of memory|outofmemory", "the device's memory is exhausted", "free some, or use a smaller engine"),
)  # fmt: skip


class Product:
    """One of the three modules, with its log.

    Args:
        api: the module.
    """

    def __init__(self, api: Api) -> None:
        self.api = api
        self.name = api.__name__
        self.version = api.__version__
        self.log = log_of(api)

    @property
    def specializes(self) -> bool:
        """Whether the product compiles kernels for the shapes of a context (TensorRT-RTX)."""
        return hasattr(self.api, "DynamicShapesKernelSpecializationStrategy")

    def runtime(self) -> Runtime:
        """Create a runtime. All runtimes of a product share one logger, because TensorRT keeps only the first."""
        return self.api.Runtime(self.log.logger)

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Call TensorRT, and convert any exception to an `EngineError` with its log.

        Args:
            what: the beginning of the message, such as ``"x.engine: creating an execution context"``.
            call: calls TensorRT and nothing else: a device fault that torch reports must not become an `EngineError`.
        """
        mark = self.log.mark()
        try:
            return call()
        except Exception as error:  # of any class: the bindings raise many unrelated ones
            raise EngineError(f"{what} failed: {error}{self.said(mark)}") from error

    def must(self, what: str, call: Callable[[], T | None]) -> T:
        """Call TensorRT as `ask` does, and raise an `EngineError` if it reports failure by returning None or False."""
        mark = self.log.mark()
        result = self.ask(what, call)
        if result is None or result is False:
            raise EngineError(f"{what} failed: {self.name} {self.version} returned {result}{self.said(mark)}")
        return result

    def said(self, mark: int) -> str:
        """Format the last lines of the log since `mark`, as the end of an error message."""
        lines = self.log.since(mark)[-_SHOWN_LINES:]
        return "".join(f"\n  {self.name}: {line}" for line in lines)

    def refusal(self, path: Path, plan: Plan, nbytes: int, mark: int) -> EngineError:
        """Return the error for a rejected file, with the cause as far as the header and the log show it."""
        lines = " ".join(self.log.since(mark))
        causes = [(cause, step) for pattern, cause, step in _REFUSALS if re.search(pattern, lines, re.IGNORECASE)]
        cause, step = causes[0] if causes else ("it is damaged or not an engine", "copy or build it again")
        if not causes and plan.version is not None and not self.version.startswith(plan.version):
            cause = "it was written by another version, or is damaged"
            step = f"build it with {self.name} {self.version}"
        return EngineError(
            f"{path}: {self.name} {self.version} cannot load this file ({nbytes:,} bytes, written by {plan}): "
            f"{cause}; {step}{self.said(mark)}"
        )


_products: Final[dict[str, Product]] = {}
_products_lock: Final = threading.Lock()


def open_product(path: Path, plan: Plan, runtime: str | None, module: Api | None = None) -> Product:
    """Return the product that reads this file.

    Args:
        path: the file, for messages.
        plan: its header.
        runtime: the name of the module to use; None to choose one.
        module: an imported module to use; for tests.

    Raises:
        EngineError: no installed product reads this file, or `runtime` is not a product's name.
        MissingDependencyError: no product is installed, or the one that `runtime` names is not.
    """
    if runtime is not None and runtime not in PRODUCTS:
        raise EngineError(f"{path}: there is no runtime {runtime!r}; expected one of {', '.join(PRODUCTS)}")
    readers = _readers(plan)
    if module is None:
        installed = [name for name in PRODUCTS if importlib.util.find_spec(name) is not None]
    else:
        installed = [module.__name__]
    if runtime is not None and runtime not in installed:
        raise MissingDependencyError(f"{path}: runtime={runtime!r} is not installed here; {PRODUCTS[runtime]}")
    candidates = [runtime] if runtime is not None else installed
    if not candidates:
        hint = PRODUCTS[readers[0]]
        raise MissingDependencyError(f"{path}: running an engine written by {plan} needs {readers[0]}; {hint}")
    chosen = next((name for name in candidates if name in readers), None)
    if chosen is None:
        raise EngineError(
            f"{path}: this engine was written by {plan}, which {' and '.join(candidates)} cannot read; "
            f"install {readers[0]} ({PRODUCTS[readers[0]]}), or build the engine again with {candidates[0]}"
        )
    if module is not None:
        return Product(module)  # not cached: a test double must not replace the real product
    with _products_lock:
        # Never freed: TensorRT keeps the first logger that it gets, and crashes once that is deleted.
        product = _products.get(chosen)
        if product is None:
            product = _products[chosen] = _import(path, chosen)
        return product


def _readers(plan: Plan) -> list[str]:
    if plan.product == "tensorrt_rtx":
        return ["tensorrt_rtx"]
    if plan.product == "tensorrt":
        return ["tensorrt", "tensorrt_lean"]  # the lean one reads version-compatible engines only, and reports others
    return list(PRODUCTS)


def _import(path: Path, name: str) -> Product:
    try:
        api = importlib.import_module(name)
    except Exception as error:  # of any class: importing a broken library raises many
        raise MissingDependencyError(
            f"{path}: {name} is installed but cannot be imported ({error}); {PRODUCTS[name]}"
        ) from error
    missing = missing_names(api, SURFACE)
    if name == "tensorrt_rtx":
        missing += missing_names(api, RTX_SURFACE)
    if missing:
        raise MissingDependencyError(
            f"{path}: {name} {getattr(api, '__version__', 'of unknown version')} lacks {', '.join(missing)}; "
            "TensorRT 10.1 or TensorRT-RTX 1.4 is the oldest that works"
        )
    return Product(cast("Api", api))
