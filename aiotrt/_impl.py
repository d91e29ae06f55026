"""Choose the implementation: the modules of `COMPILED` as extension modules ("native"), or as plain Python ("python").

Both are made from the same `.py` files; the extension modules are in one shared library. `aiotrt/__init__.py` imports this
module before any other of the package, so the choice is made once, for all of them. ``AIOTRT_IMPL=native`` or
``AIOTRT_IMPL=python`` in the environment selects one. Without it, native is used where the library exists, else python.

A library that is of another version, older than its sources or broken raises `ImplementationError`.
aiotrt never falls back to plain Python silently, because a program would become slower for no visible reason.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

from aiotrt._build import COMPILED, LIBRARY, RECORD, __version__, record

__all__ = ["IMPLEMENTATION", "Implementation", "ImplementationError"]

Implementation = Literal["native", "python"]

VARIABLE: Final = "AIOTRT_IMPL"
REMEDY: Final = f"install aiotrt again (in a checkout: make native), or set {VARIABLE}=python to run plain Python"


class ImplementationError(ImportError):
    """The selected implementation cannot run."""


def _choose(asked: str, root: Path) -> Implementation:
    """Choose the implementation, and check that it was compiled from these sources.

    Args:
        asked: the value of `VARIABLE`; empty if it is not set.
        root: the package's folder.

    Raises:
        ImplementationError: `asked` is no implementation, or native cannot run.
    """
    is_compiled = (root / LIBRARY).is_file()
    if asked not in ("", "native", "python"):
        raise ImplementationError(f"{VARIABLE} must be native or python, got {asked!r}")
    if asked == "python" or not (asked or is_compiled):
        return "python"
    if not is_compiled:
        python = ".".join(map(str, sys.version_info[:2]))
        raise ImplementationError(
            f"{VARIABLE}=native, but aiotrt {__version__} is installed without compiled modules for Python {python}: "
            f"unset {VARIABLE}, or install aiotrt with AIOTRT_BUILD=native and a C compiler (in a checkout: make native)"
        )
    try:
        built = json.loads((root / RECORD).read_text(encoding="utf-8"))
        version, sources = built["version"], built["sources"]
    except (OSError, ValueError, TypeError, KeyError):
        version, sources = "unknown", {}
    if version != __version__:
        raise ImplementationError(
            f"the compiled modules of aiotrt are of version {version}, and aiotrt is version {__version__}: {REMEDY}"
        )
    changed = [file for file, checksum in record(root)["sources"].items() if sources.get(file) != checksum]
    if changed:
        raise ImplementationError(f"{', '.join(changed)} changed since aiotrt was compiled: {REMEDY}")
    return "native"


class _Finder(MetaPathFinder):
    """Find the modules of `COMPILED` in the shared library."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in COMPILED:
            return None
        library = Path(__file__).with_name(LIBRARY)
        return spec_from_file_location(fullname, library, loader=_NativeLoader(fullname, str(library)))


class _NativeLoader(ExtensionFileLoader):
    """Load an extension module, or raise `ImplementationError`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        with self._explained():
            return super().create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._explained():
            super().exec_module(module)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ImplementationError, ModuleNotFoundError):  # of another module that this one imports: keep its message
            raise
        except Exception as error:
            raise ImplementationError(
                f"{self.name} is compiled, but cannot be imported ({type(error).__name__}: {error}): {REMEDY}",
                name=self.name,
                path=self.path,
            ) from error


def _install() -> Implementation:
    root = Path(__file__).parent
    implementation = _choose(os.environ.get(VARIABLE, ""), root)
    if implementation == "native":
        sys.meta_path.insert(0, _Finder())
    return implementation


#: The implementation that this process uses.
IMPLEMENTATION: Final = _install()
