"""Build hook of hatchling: compile the modules of `COMPILED` in aiotrt/_build.py with Cython.

AIOTRT_BUILD=python makes the pure wheel. AIOTRT_BUILD=native makes the platform wheel, and fails where a module does not
compile. Without it, a module that does not compile gives the pure wheel and a warning that names the reason.

An editable install compiles with AIOTRT_BUILD=native only, and in place, as ``python hatch_build.py`` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

#: boundscheck and wraparound keep Python's meaning: a wrong index raises IndexError. With nonecheck an attribute of None
#: raises AttributeError, as in Python, where a typed one would crash. Types come from .pxd files alone.
DIRECTIVES = {"language_level": 3, "annotation_typing": False, "freethreading_compatible": True, "nonecheck": True}

#: Versions whose compiled closures in typed classes read memory that is not theirs.
FAULTY = ("3.3.0",)


class NativeBuildHook(BuildHookInterface):
    """The hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before hatchling writes the wheel, and add the files to it."""
        wanted = os.environ.get("AIOTRT_BUILD", "")
        if wanted not in ("", "native", "python"):
            raise ValueError(f"AIOTRT_BUILD must be native or python, got {wanted!r}")
        if wanted == "python" or (version == "editable" and not wanted):
            self.app.display_info("aiotrt: not compiled, plain Python")
            return
        if version == "editable":
            compile_in_place(Path(self.root))
            return
        self.folder = tempfile.TemporaryDirectory()  # hatchling reads the files after this returns
        try:
            files = compile_modules(Path(self.root), Path(self.folder.name))
        except Exception as error:
            if wanted:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.app.display_warning(f"aiotrt: not compiled, plain Python, because compiling failed ({reason})")
            return
        build_data["force_include"].update({str(built): name for name, built in files.items()})
        build_data.update(pure_python=False, infer_tag=True)
        self.app.display_info("aiotrt: compiled")


def compile_modules(root: Path, folder: Path) -> dict[str, Path]:
    """Compile all modules into one shared library. Returns the files that belong in the package, by their path below `root`.

    One library, because each has pages of its own for code and data, and after a sleep of the process the first use of a
    page costs as much as hundreds of instructions.
    """
    import Cython
    from Cython.Build import cythonize  # first, since setuptools may not be imported before what it replaces
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    if Cython.__version__ in FAULTY:
        raise ImportError(f"modules that Cython {Cython.__version__} compiles crash: use another version")
    build = runpy.run_path(str(root / "aiotrt" / "_build.py"))
    flags = [] if os.name == "nt" else ["-O2", "-g0"]
    extensions = []
    for name in build["COMPILED"]:
        stem = name.replace(".", "/")
        source = next(f"{stem}{suffix}" for suffix in (".py", ".pyx") if (root / f"{stem}{suffix}").is_file())
        extensions.append(Extension(name, [source], extra_compile_args=flags))
    library = folder / build["LIBRARY"]
    with contextlib.chdir(root):  # so that tracebacks name files by their path in the project
        extensions = cythonize(
            extensions, build_dir=str(folder / "c"), force=True, quiet=True, compiler_directives=DIRECTIVES
        )
        command = build_ext(Distribution({"name": "aiotrt", "ext_modules": extensions}))
        command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "o")
        command.parallel = os.cpu_count()
        command.ensure_finalized()
        command.run()
        objects = [str(file) for file in sorted((folder / "o").rglob("*.o*"))]
        exported = [f"PyInit_{name.rpartition('.')[2]}" for name in build["COMPILED"]]
        command.compiler.link_shared_object(
            objects, str(library), library_dirs=command.library_dirs, export_symbols=exported, build_temp=command.build_temp
        )
    record = folder / build["RECORD"]
    record.write_text(json.dumps(build["record"](root / "aiotrt")) + "\n", encoding="utf-8")
    return {f"aiotrt/{file.name}": file for file in (library, record)}


def compile_in_place(root: Path) -> None:
    """Compile all modules beside their sources."""
    with tempfile.TemporaryDirectory() as folder:
        for name, built in compile_modules(root, Path(folder)).items():
            # A running process may have the old file mapped: replace it, and never write into it.
            shutil.copy2(built, root / f"{name}.new")
            (root / f"{name}.new").replace(root / name)


if __name__ == "__main__":
    compile_in_place(Path(__file__).parent)
    print("aiotrt: compiled in place")
