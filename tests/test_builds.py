"""Compiled or plain: what the build hook makes, and which of the two runs. On small copies, so that no test needs torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import aiotrt
from aiotrt import _build
from aiotrt._build import COMPILED, LIBRARY, RECORD

ROOT = Path(__file__).parents[1]
PACKAGE = Path(aiotrt.__file__).parent
FIRST, SECOND = "aiotrt.completion.prediction", "aiotrt.runtime.slots"

needs_hatchling = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("hatchling", "Cython", "setuptools")),
    reason="needs the extra: build",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project with the hook, the choice and the two modules, small, and nothing else."""
    package = tmp_path / "project" / "aiotrt"
    for name in (FIRST, SECOND):
        module = package.joinpath(*name.split(".")[1:]).with_suffix(".py")
        module.parent.mkdir(parents=True)
        (module.parent / "__init__.py").touch()
        module.write_text("def double(x):\n    return 2 * x\n")
    text, n = re.subn(r"(?s)(COMPILED: Final =) \(.*?\n\)", rf"\1 {FIRST, SECOND}", (PACKAGE / "_build.py").read_text())
    assert n == 1
    (package / "_build.py").write_text(text)
    shutil.copy(PACKAGE / "_impl.py", package)
    (package / "__init__.py").write_text("from aiotrt import _build, _impl\n")
    for file in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, package.parent)
    return package.parent


def put_library(project: Path, *, version: str = _build.__version__) -> None:
    """Put a file there that has the name of the shared library and cannot be imported, and its record."""
    package = project / "aiotrt"
    (package / LIBRARY).write_bytes(b"no extension module")
    build = runpy.run_path(str(package / "_build.py"))
    (package / RECORD).write_text(json.dumps({**build["record"](package), "version": version}))


def choose(project: Path, asked: str | None, *modules: str) -> list[str]:
    """What a new process says: the implementation, and the suffixes of the files of modules that it imports."""
    program = (
        "import importlib, sys\n"
        "from aiotrt import _impl\n"
        "files = [importlib.import_module(name).__file__ for name in sys.argv[1:]]\n"
        "print(_impl.IMPLEMENTATION, *[file.rpartition('.')[2] for file in files])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "AIOTRT_IMPL"}
    if asked is not None:
        environment["AIOTRT_IMPL"] = asked
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *modules], check=False, cwd=project, env=environment, capture_output=True,
        text=True, timeout=50,
    )  # fmt: skip
    if done.returncode:
        raise ImportError(done.stderr.splitlines()[-1])
    return done.stdout.split()


def hook(project: Path, target: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", project / "out"], check=False, cwd=project,
        env={**os.environ, "NO_COLOR": "1", "AIOTRT_BUILD": "", **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=50,
    )  # fmt: skip


def wheels(project: Path) -> list[Path]:
    return list(project.glob("out/*.whl"))


# --- what runs ------------------------------------------------------------------------------------------------------------


def test_this_process_runs_what_was_asked_for() -> None:
    assert aiotrt.__impl__ == (os.environ["AIOTRT_IMPL"] or aiotrt.__impl__)
    for name in COMPILED:
        if PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py").exists():
            file = Path(str(sys.modules[name].__file__))
            assert (file.suffix == ".py") == (aiotrt.__impl__ == "python")
        elif name in sys.modules:  # of these there is no plain form
            assert aiotrt.__impl__ == "native"


def test_compiled_modules_are_plain_python() -> None:
    for name in COMPILED:
        source = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if source.exists():
            assert "cython" not in source.read_text().lower()
    modules = {PACKAGE.joinpath(*name.split(".")[1:]) for name in COMPILED}
    types = {file.with_suffix("") for suffix in ("pxd", "pyx") for file in PACKAGE.rglob(f"*.{suffix}")}
    assert types <= modules, "types of modules that COMPILED does not list"


@pytest.mark.parametrize("asked", [None, "", "python"])
def test_without_extensions_python_runs(copy: Path, asked: str | None) -> None:
    assert choose(copy, asked, FIRST, SECOND) == ["python", "py", "py"]


def test_native_without_extensions_is_an_error(copy: Path) -> None:
    with pytest.raises(ImportError, match=r"AIOTRT_IMPL=native, but .* without compiled modules .* AIOTRT_BUILD=native"):
        choose(copy, "native")


@pytest.mark.parametrize("asked", ["Native", "cython", "0"])
def test_an_unknown_implementation_is_an_error(copy: Path, asked: str) -> None:
    with pytest.raises(ImportError, match=f"AIOTRT_IMPL must be native or python, got '{asked}'"):
        choose(copy, asked)


@pytest.mark.parametrize("asked", [None, "native"])
class TestUnusableExtensions:
    """Each is an error that says what to do, whether native was asked for or not."""

    def test_another_version(self, copy: Path, asked: str | None) -> None:
        put_library(copy, version="0.0.9")
        with pytest.raises(ImportError, match=r"compiled modules of aiotrt are of version 0\.0\.9, .* install aiotrt again"):
            choose(copy, asked)

    @pytest.mark.parametrize("content", [None, "", "[]", "{}"])
    def test_no_record(self, copy: Path, asked: str | None, content: str | None) -> None:
        put_library(copy)
        if content is None:
            (copy / "aiotrt" / RECORD).unlink()
        else:
            (copy / "aiotrt" / RECORD).write_text(content)
        with pytest.raises(ImportError, match=r"of version unknown, .* install aiotrt again"):
            choose(copy, asked)

    def test_a_source_that_changed(self, copy: Path, asked: str | None) -> None:
        put_library(copy)
        with (copy / "aiotrt" / "runtime" / "slots.py").open("a") as file:
            file.write("x = 1\n")
        with pytest.raises(ImportError, match=r"runtime/slots.py changed since aiotrt was compiled: .*make native"):
            choose(copy, asked)

    def test_types_that_are_new(self, copy: Path, asked: str | None) -> None:
        put_library(copy)
        (copy / "aiotrt" / "runtime" / "slots.pxd").touch()
        with pytest.raises(ImportError, match=r"runtime/slots.pxd changed since aiotrt was compiled"):
            choose(copy, asked)

    def test_a_file_that_cannot_be_imported(self, copy: Path, asked: str | None) -> None:
        put_library(copy)
        with pytest.raises(
            ImportError, match=rf"{SECOND} is compiled, but cannot be imported \(ImportError: .*_IMPL=python"
        ):
            choose(copy, asked, SECOND)


def test_python_runs_beside_a_library_of_any_kind(copy: Path) -> None:
    put_library(copy, version="0.0.9")
    assert choose(copy, "python", FIRST, SECOND) == ["python", "py", "py"]


def test_python_does_not_import_a_module_that_exists_compiled_only(copy: Path) -> None:
    put_library(copy)
    (copy / "aiotrt" / "runtime" / "slots.py").unlink()
    with pytest.raises(ImportError, match=f"No module named '{SECOND}'"):
        choose(copy, "python", SECOND)


# --- what the build makes -------------------------------------------------------------------------------------------------


@needs_hatchling
def test_a_pure_build_says_so(copy: Path) -> None:
    done = hook(copy, AIOTRT_BUILD="python", CC="false")
    assert done.returncode == 0, done.stdout
    assert "aiotrt: not compiled, plain Python\n" in done.stdout
    (wheel,) = wheels(copy)
    assert wheel.name.endswith("-py3-none-any.whl")


@needs_hatchling
def test_a_compiler_that_fails_gives_the_pure_wheel_and_the_reason(copy: Path) -> None:
    put_library(copy)  # left in the checkout by an earlier build; no part of the wheel
    done = hook(copy, CC="false")
    assert done.returncode == 0, done.stdout
    assert re.search(r"aiotrt: not compiled, plain Python, because compiling failed \(\w+: .*false.*\)\n", done.stdout)
    (wheel,) = wheels(copy)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".c", ".json", ".pxd"))]


@needs_hatchling
def test_a_module_that_does_not_compile_leaves_nothing_half_built(copy: Path) -> None:
    (copy / "aiotrt" / "runtime" / "slots.pxd").write_text("cdef class Absent(Unknown):\n    pass\n")
    done = hook(copy)
    assert done.returncode == 0, done.stdout
    assert "because compiling failed (CompileError: aiotrt/runtime/slots.py" in done.stdout
    (wheel,) = wheels(copy)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not list(copy.rglob(f"*{EXTENSION_SUFFIXES[0]}"))


@needs_hatchling
def test_a_native_build_that_fails_is_an_error(copy: Path) -> None:
    done = hook(copy, AIOTRT_BUILD="native", CC="false")
    assert done.returncode != 0
    assert "CompileError" in done.stdout
    assert not wheels(copy)


@needs_hatchling
def test_an_unknown_kind_of_build_is_an_error(copy: Path) -> None:
    done = hook(copy, AIOTRT_BUILD="yes")
    assert done.returncode != 0
    assert "AIOTRT_BUILD must be native or python, got 'yes'" in done.stdout


@needs_hatchling
def test_an_editable_build_does_not_compile(copy: Path) -> None:
    done = hook(copy, "wheel:editable", CC="false")
    assert done.returncode == 0, done.stdout
    assert "aiotrt: not compiled, plain Python\n" in done.stdout


@needs_hatchling
@pytest.mark.proof
def test_a_native_wheel_runs_compiled_and_plain(copy: Path, tmp_path: Path) -> None:
    done = hook(copy, AIOTRT_BUILD="native")
    assert done.returncode == 0, done.stdout
    assert "aiotrt: compiled\n" in done.stdout
    (wheel,) = wheels(copy)
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{python}-{python}" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    suffix = EXTENSION_SUFFIXES[0].rpartition(".")[2]
    assert choose(tmp_path / "installed", None, FIRST, SECOND) == ["native", suffix, suffix]
    assert choose(tmp_path / "installed", "native", SECOND) == ["native", suffix]
    assert choose(tmp_path / "installed", "python", FIRST, SECOND) == ["python", "py", "py"]
    assert not list((copy / "aiotrt").rglob(f"*{EXTENSION_SUFFIXES[0]}")), "the project itself is unchanged"


@needs_hatchling
@pytest.mark.proof
def test_an_editable_native_build_compiles_in_place(copy: Path) -> None:
    done = hook(copy, "wheel:editable", AIOTRT_BUILD="native")
    assert done.returncode == 0, done.stdout
    assert choose(copy, None, FIRST, SECOND)[0] == "native"
    assert choose(copy, "python", FIRST, SECOND)[0] == "python"
