"""The two builds of the prototype, which may be used in one process: plain Python, and compiled from the same source."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

__all__ = ["COMPILED", "PLAIN", "Build", "build", "compiled", "fill", "plain"]

PLAIN: Final = "plain"
COMPILED: Final = "compiled"

HERE: Final = Path(__file__).parent
SOURCES: Final = ("core.py", "core.pxd", "cuda_calls.pyx")
PACKAGE: Final = "compiled_prototype"
SETUP: Final = f"""
from Cython.Build import cythonize
from setuptools import Extension, setup

files = {{"core": "core.py", "cuda_calls": "cuda_calls.pyx"}}
extensions = [
    Extension(f"{PACKAGE}.{{name}}", [f"{PACKAGE}/{{file}}"], extra_compile_args=["-O2"]) for name, file in files.items()
]
directives = {{
    "language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True, "annotation_typing": False
}}
setup(name="{PACKAGE}", packages=[], ext_modules=cythonize(extensions, compiler_directives=directives))
"""
SECONDS: Final = 180  # that the compiler may take


@dataclass(frozen=True)
class Build:
    """One build.

    Attributes:
        name: PLAIN or COMPILED.
        core: the module `core`.
        calls: the module with CudaSlot and LinuxSystem.
    """

    name: str
    core: Any
    calls: Any


def build(name: str) -> Build | str:
    """The build of this name; if there is none here, the reason."""
    return plain() if name == PLAIN else compiled()


@cache
def plain() -> Build | str:
    """The plain build; where the system has no timerfd, the reason why there is none."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux's timerfd"
    core, calls = (importlib.import_module(f"benchmarks.prototype.{name}") for name in ("core", "plain_calls"))
    return Build(PLAIN, core, calls)


@cache
def compiled() -> Build | str:
    """The compiled build, made on the first call; if it cannot be made, the reason."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux's timerfd"
    if missing := [name for name in ("Cython", "setuptools") if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} cannot be imported"
    if next(filter(None, map(shutil.which, (os.environ.get("CC", "cc").split()[0], "gcc", "clang"))), None) is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        if why := _compile(Path(folder)):
            return why
        sys.path.insert(0, folder)
        try:
            core, calls = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("core", "cuda_calls"))
        except ImportError as error:
            return f"what was compiled cannot be imported: {error}"
        finally:
            sys.path.remove(folder)
        return Build(COMPILED, core, calls)  # the libraries stay mapped when their files are gone


def fill(calls: Any) -> None:
    """Fill the compiled build's table with the driver's functions."""
    library = ctypes.CDLL("libcuda.so.1")
    calls.fill({name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in calls.NAMES})


def _compile(folder: Path) -> str | None:
    """Compile into a package in this folder; returns why it failed, None if it did not."""
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for name in SOURCES:
        shutil.copyfile(HERE / name, package / name)
    (folder / "setup.py").write_text(SETUP, encoding="utf-8")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compiling failed: {error}"
    if done.returncode:
        return f"compiling failed: {(done.stderr or done.stdout).strip()[-500:]}"
    (package / "core.py").unlink()  # only the compiled one can be imported now
    return None
