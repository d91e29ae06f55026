"""Build the sdist and both wheels, check what is in them, and run each from an empty environment.

    python -m tests.dist            # into dist/

Needs a C compiler. The wheels are made from the sdist, so a file that the sdist lacks is noticed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from aiotrt._build import LIBRARY, RECORD, __version__

ROOT: Final = Path(__file__).parents[1]
DIST: Final = ROOT / "dist"
#: What no distribution may hold.
LEFTOVERS: Final = re.compile(r"\.(c|o|pyc)$|__pycache__|\.venv")
EXTENSION: Final = re.compile(r"\.(so|pyd)$")

SMOKE: Final = ROOT / "tests" / "smoke.py"


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a command, and show its output where it fails."""
    done = subprocess.run(
        command, check=False, cwd=cwd, env={**_clean_environment(), **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\ndist: failed with status {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("AIOTRT_", "PYTHON"))}


def build(source: Path, kind: str, implementation: str = "") -> Path:
    """Build a distribution of `source` into `DIST`, and return its file."""
    before = set(DIST.iterdir())
    run(sys.executable, "-m", "build", f"--{kind}", "--outdir", DIST, source, env={"AIOTRT_BUILD": implementation})
    (file,) = set(DIST.iterdir()) - before
    return file


def check(file: Path, names: Iterable[str], *, native: bool) -> None:
    """Check the names of the files in a distribution."""
    names = set(names)
    libraries = {name for name in names if EXTENSION.search(name)}
    assert libraries == ({f"aiotrt/{LIBRARY}"} if native else set()), f"{file.name} holds the libraries {sorted(libraries)}"
    assert (f"aiotrt/{RECORD}" in names) == native, f"{file.name}: {RECORD}"
    leftovers = sorted(name for name in names if LEFTOVERS.search(name))
    assert not leftovers, f"{file.name} holds {leftovers}"


def check_metadata(files: Iterable[Path]) -> None:
    """Check with twine what the package index will show, in an environment without the project's own packages."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run(python, "-m", "pip", "install", "--no-input", "-q", "--constraint", ROOT / "constraints.txt", "twine")
        run(python, "-m", "twine", "check", "--strict", *files)


def try_out(file: Path, torch: str, expected: str, *, environment: Mapping[str, str] | None = None) -> None:
    """Install a distribution into an empty environment outside the checkout, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "env")
        venv.create(made, with_pip=True)
        python = made / "bin" / "python"
        constraints = ROOT / "constraints.txt"
        run(
            python, "-m", "pip", "install", "--no-input", "--no-compile", "-q", "--constraint", constraints, torch, file,
            env=environment, cwd=Path(folder),
        )  # fmt: skip
        run(python, "-I", SMOKE, expected, cwd=Path(folder))
        run(python, "-I", SMOKE, "python", env={"AIOTRT_IMPL": "python"}, cwd=Path(folder))
        version = run(made / "bin" / "aiotrt", "--version", cwd=Path(folder)).strip()
        assert version.startswith(f"aiotrt {__version__} ({expected}), Python "), version
        print(f"  {file.name}: {version}", flush=True)


def main() -> None:
    """Build, check and try everything."""
    DIST.mkdir(exist_ok=True)
    for old in DIST.iterdir():
        old.unlink()
    sdist = build(ROOT, "sdist")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        check(sdist, names, native=False)
        for name in ("hatch_build.py", "pyproject.toml", "LICENSE", "README.md"):
            assert name in names, f"{sdist.name} lacks {name}"
        types = {str(path.relative_to(ROOT)) for suffix in ("pxd", "pyx") for path in ROOT.glob(f"aiotrt/**/*.{suffix}")}
        assert types <= names, f"{sdist.name} lacks {sorted(types - names)}"
        pure = build(source, "wheel", "python")
        native = build(source, "wheel", "native")
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("aiotrt/**/*") if path.suffix in (".py", ".html", ".typed")}
    for wheel in (pure, native):
        with zipfile.ZipFile(wheel) as opened:
            names = set(opened.namelist())
        check(wheel, names, native=wheel is native)
        assert modules <= names, f"{wheel.name} lacks {sorted(modules - names)}"
        assert not [name for name in names if name.endswith((".pxd", ".pyx"))], f"{wheel.name} holds types for the compiler"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert pure.name.endswith("-py3-none-any.whl"), pure.name
    assert f"-{tag}-{tag}{getattr(sys, 'abiflags', '')}-" in native.name, native.name
    for file in (sdist, pure, native):
        print(f"  {file.name}: {file.stat().st_size:,} bytes", flush=True)
    check_metadata((sdist, pure, native))

    torch = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch is not None
    print("installed into empty environments:", flush=True)
    try_out(pure, torch[0], "python")
    try_out(native, torch[0], "native")
    # A compiler that fails: the sdist installs all the same.
    try_out(sdist, torch[0], "python", environment={"CC": "false"})


if __name__ == "__main__":
    main()
