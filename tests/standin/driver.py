"""Compile the stand-in driver and the module that calls it, and read its log."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["Driver", "Kind", "Logged", "missing", "submitter"]

HERE: Final = Path(__file__).parent
SOURCE: Final = Path(__file__).parents[2] / "aiotrt" / "devices" / "_submitter.pyx"
SETUP: Final = """
from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    name="submitter", packages=[],
    ext_modules=cythonize([Extension("submitter", ["submitter.pyx"], extra_compile_args={flags})], language_level=3),
)
"""


class Kind(IntEnum):
    """What the driver was asked to do."""

    GRAPH_LAUNCH = 0
    EVENT_RECORD = 1
    EVENT_QUERY = 2
    STREAM_QUERY = 3
    STREAM_WAIT = 4
    SET_COPY = 5
    SET_CONTEXT = 6


class _Call(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_long), ("a", ctypes.c_size_t), ("b", ctypes.c_size_t), ("source", ctypes.c_ulonglong),
        ("destination", ctypes.c_ulonglong), ("bytes", ctypes.c_size_t), ("is_plain", ctypes.c_int),
    )  # fmt: skip


class Logged(NamedTuple):
    """One call: of what kind, on what, and of a copy what it copies."""

    kind: Kind
    a: int
    b: int
    copy: tuple[int, int, int] | None = None  # source, destination, bytes


class Driver:
    """The stand-in, in a library of its own.

    Args:
        folder: to compile in.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "driver.so"
        flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1"]
        subprocess.run([compiler(), *flags, str(HERE / "driver.c"), "-o", str(library)], check=True, timeout=60)
        self.library = ctypes.CDLL(str(library))
        self.library.call_at.restype = ctypes.POINTER(_Call)

    def addresses(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The functions' addresses, by name."""
        return {name: ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value for name in names}

    def answer(self, kind: Kind, status: int) -> None:
        """Make each later call of this kind answer so."""
        self.library.set_answer(int(kind), status)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, launches are logged and do not return."""
        self.library.hold(1)
        try:
            yield
        finally:
            self.library.hold(0)

    def wait_held(self, count: int) -> None:
        """Block until so many launches are held."""
        self.library.wait_held(count)

    def take(self) -> list[Logged]:
        """The calls since the last `take`; the answers become 0 again."""
        calls = [self.library.call_at(i).contents for i in range(self.library.call_count())]
        for call in calls:
            assert call.kind != Kind.SET_COPY or call.is_plain, "a copy is of one row in device memory"
        found = [
            Logged(
                Kind(call.kind), call.a, call.b,
                (call.source, call.destination, call.bytes) if call.kind == Kind.SET_COPY else None,
            )
            for call in calls
        ]  # fmt: skip
        self.library.reset()
        return found


def compiler() -> str:
    """The C compiler."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc").split()[0], "gcc", "clang"))), "")


def missing() -> str | None:
    """What is not installed here, of what compiling takes."""
    if not sys.platform.startswith("linux") or not compiler():
        return "there is no C compiler"
    names = [name for name in ("Cython", "setuptools") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(names)} cannot be imported" if names else None


@cache
def submitter(folder: Path, *flags: str) -> Any:
    """Compile aiotrt's module there, and import it under a name of its own."""
    shutil.copyfile(SOURCE, folder / "submitter.pyx")
    (folder / "setup.py").write_text(SETUP.format(flags=["-O1", *flags]), encoding="utf-8")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("submitter.*.so")
    spec = importlib.util.spec_from_file_location("submitter", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
