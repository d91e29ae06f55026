"""Choose the implementation: the modules of `COMPILED` as extension modules ("native"), or as plain Python ("python").

Both are made from the same `.py` files. `aiotrt/__init__.py` imports this module before any other of the package, so the
choice is made once and holds for all of them. ``AIOTRT_IMPL=native`` or ``AIOTRT_IMPL=python`` in the environment asks for
one. Without it, native runs where there are extension modules, and python where there are none.

Extension modules that are incomplete, of another version, older than their sources or broken raise `ImplementationError`.
aiotrt never falls back to plain Python silently, because a program would become slower with no sign of why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

from aiotrt._build import COMPILED, RECORD, __version__, record

__all__ = ["IMPLEMENTATION", "Implementation", "ImplementationError"]

Implementation = Literal["native", "python"]

VARIABLE: Final = "AIOTRT_IMPL"
REMEDY: Final = f"install aiotrt again (in a checkout: make native), or set {VARIABLE}=python to run plain Python"


class ImplementationError(ImportError):
    """The implementation that was asked for, or the one that is installed, cannot run."""


def _file(root: Path, name: str, suffix: str) -> Path:
    return root.joinpath(*name.split(".")[1:-1], name.rpartition(".")[2] + suffix)


def _extensions(root: Path) -> dict[str, Path]:
    """Find the extension modules that this Python would import."""
    candidates = ((name, _file(root, name, suffix)) for name in COMPILED for suffix in reversed(EXTENSION_SUFFIXES))
    return {name: file for name, file in candidates if file.is_file()}


def _choose(asked: str, root: Path, extensions: Mapping[str, Path]) -> Implementation:
    """Choose the implementation and check that it is complete.

    Args:
        asked: the value of `VARIABLE`, empty where it is not set.
        root: the package's folder.
        extensions: the extension modules there.
    """
    if asked not in ("", "native", "python"):
        raise ImplementationError(f"{VARIABLE} must be native or python, got {asked!r}")
    if asked == "python" or not (asked or extensions):
        return "python"
    if not extensions:
        python = ".".join(map(str, sys.version_info[:2]))
        raise ImplementationError(
            f"{VARIABLE}=native, but aiotrt {__version__} has no compiled modules for Python {python} here: "
            f"unset {VARIABLE}, or install aiotrt with AIOTRT_BUILD=native and a C compiler (in a checkout: make native)"
        )
    missing = [name for name in COMPILED if name not in extensions]
    if missing:
        raise ImplementationError(
            f"aiotrt is compiled in part: {', '.join(extensions)} compiled, {', '.join(missing)} not: {REMEDY}"
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
    """Find the modules of `COMPILED` in the chosen implementation. Python itself always prefers extension modules."""

    def __init__(self, root: Path, implementation: Implementation, extensions: Mapping[str, Path]) -> None:
        self._root = root
        self._implementation = implementation
        self._extensions = extensions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in COMPILED:
            return None
        if self._implementation == "native":
            file = self._extensions[fullname]
            return spec_from_file_location(fullname, file, loader=_NativeLoader(fullname, str(file)))
        file = _file(self._root, fullname, ".py")
        if not file.is_file():
            raise ImplementationError(f"{fullname} exists compiled only, and aiotrt runs as plain Python", name=fullname)
        return spec_from_file_location(fullname, file, loader=SourceFileLoader(fullname, str(file)))


class _NativeLoader(ExtensionFileLoader):
    """Load an extension module, and raise `ImplementationError` where that fails."""

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
        except (ImplementationError, ModuleNotFoundError):  # of a module that this one imports: not this file's fault
            raise
        except Exception as error:
            raise ImplementationError(
                f"{self.name} is compiled, but cannot be imported ({type(error).__name__}: {error}): {REMEDY}",
                name=self.name,
                path=self.path,
            ) from error


def _install() -> Implementation:
    root = Path(__file__).parent
    extensions = _extensions(root)
    implementation = _choose(os.environ.get(VARIABLE, ""), root, extensions)
    if extensions:
        sys.meta_path.insert(0, _Finder(root, implementation, extensions))
    return implementation


#: The implementation that runs in this process.
IMPLEMENTATION: Final = _install()
