"""Which of the three products reads a file, its log, and what its log means.

Only this file imports TensorRT, and only when there is a GPU: TensorRT's runtime segfaults where there is no driver.
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

#: The modules, in the order in which they are tried, and how each is installed.
PRODUCTS: Final = {
    "tensorrt": install_hint("tensorrt"),
    "tensorrt_rtx": install_hint("rtx"),
    "tensorrt_lean": "pip install tensorrt-lean",
}
_SHOWN_LINES: Final = 8
#: What TensorRT says when it refuses a file, what that means, and what to do.
_REFUSALS: Final = (
    (r"host.?code", "it contains host code", "if you trust whoever made it, load it with allow_host_code=True"),
    (r"plugin", "it needs a plugin that is not registered here", "import or load the plugin's library before the engine"),
    (
        r"incompatible device|expecting compute|compute capability",
        "it was built for another GPU",
        "build it on or for this one",
    ),
    (r"version", "it was written by another version of TensorRT", "build it with the one that is installed here"),
    (r"platform", "it was built for another operating system or processor", "build it for this one"),
    (r"out of memory|outofmemory", "the device's memory is exhausted", "free some, or use a smaller engine"),
)  # fmt: skip


class Product:
    """One of the three modules, its log and its runtimes.

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
        """Whether it compiles kernels for the shapes that come (TensorRT-RTX)."""
        return hasattr(self.api, "DynamicShapesKernelSpecializationStrategy")

    def runtime(self) -> Runtime:
        """A new runtime. All of a product share one logger, for that is how many TensorRT keeps."""
        return self.api.Runtime(self.log.logger)

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Call TensorRT, and turn whatever it raises into an `EngineError` with its log.

        Args:
            what: the beginning of the message, such as ``"x.engine: creating an execution context"``.
            call: calls into TensorRT and does nothing else: a fault of the device that torch reports is no engine's error.
        """
        mark = self.log.mark()
        try:
            return call()
        except Exception as error:  # the bindings raise many unrelated classes
            raise EngineError(f"{what} failed: {error}{self.said(mark)}") from error

    def must(self, what: str, call: Callable[[], T | None]) -> T:
        """Call TensorRT, and check that it answers neither None nor False, which is how it says no."""
        mark = self.log.mark()
        answer = self.ask(what, call)
        if answer is None or answer is False:
            raise EngineError(f"{what} failed: {self.name} {self.version} answered {answer}{self.said(mark)}")
        return answer

    def said(self, mark: int) -> str:
        """The end of a message: the last lines of the log since `mark`."""
        lines = self.log.since(mark)[-_SHOWN_LINES:]
        return "".join(f"\n  {self.name}: {line}" for line in lines)

    def refusal(self, path: Path, plan: Plan, nbytes: int, mark: int) -> EngineError:
        """Why this file was refused, as far as the header and the log tell."""
        lines = " ".join(self.log.since(mark))
        causes = [(cause, step) for pattern, cause, step in _REFUSALS if re.search(pattern, lines, re.IGNORECASE)]
        cause, step = causes[0] if causes else ("it is damaged, or not an engine", "copy or build it again")
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
    """The product that reads this file.

    Args:
        path: the file, for messages.
        plan: its header.
        runtime: the module to use, where the caller says so.
        module: the module itself, already imported; for tests.

    Raises:
        EngineError: what is installed does not read this file, or `runtime` is not a product's name.
        MissingDependencyError: no product is installed, or not the one that `runtime` names.
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
        return Product(module)  # never kept: a double must not pass for the real one later
    with _products_lock:
        # Kept for ever: TensorRT keeps the first logger that it is given, and crashes when that is gone.
        product = _products.get(chosen)
        if product is None:
            product = _products[chosen] = _import(path, chosen)
        return product


def _readers(plan: Plan) -> list[str]:
    if plan.product == "tensorrt_rtx":
        return ["tensorrt_rtx"]
    if plan.product == "tensorrt":
        return ["tensorrt", "tensorrt_lean"]  # the lean one reads what was built version-compatible, and says so if not
    return list(PRODUCTS)


def _import(path: Path, name: str) -> Product:
    try:
        api = importlib.import_module(name)
    except Exception as error:  # a library that does not load raises whatever it likes
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
