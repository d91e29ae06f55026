"""Build hook of hatchling: compile the modules of `COMPILED` in aiotrt/_build.py with Cython.

AIOTRT_BUILD=python builds the pure wheel. AIOTRT_BUILD=native builds the platform wheel, and fails if a module does not
compile. Without the variable, a module that does not compile gives the pure wheel and a warning with the reason.

An editable install compiles only with AIOTRT_BUILD=native, and in place, as ``python hatch_build.py`` does.
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

#: boundscheck and wraparound stay on, as is the default, so a wrong index raises IndexError. Without nonecheck, an
#: attribute of a typed None would crash instead of raising AttributeError. Types come from .pxd files only.
DIRECTIVES = {"language_level": 3, "annotation_typing": False, "freethreading_compatible": True, "nonecheck": True}

#: Versions of Cython whose compiled closures in typed classes read invalid memory.
FAULTY = ("3.3.0",)


class NativeBuildHook(BuildHookInterface):
    """The build hook that pyproject.toml configures."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before hatchling writes the wheel, and add the files to it.

        Raises:
            ValueError: AIOTRT_BUILD is neither native nor python.
        """
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
    """Compile all modules into one shared library, and return the files to add to the package, by their path below `root`.

    One library, because every library has its own pages of code and data, and after the process sleeps, the first use of
    a page costs as much as hundreds of instructions.
    """
    import Cython
    from Cython.Build import cythonize  # first: setuptools must not be imported before the distutils it replaces
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
