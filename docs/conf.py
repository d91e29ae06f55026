"""Sphinx configuration. Built with -n -W: a reference that leads nowhere is an error."""

from __future__ import annotations

from sphinx.pycode import ModuleAnalyzer

import aiotrt

project = "aiotrt"
author = "The aiotrt authors"
project_copyright = "The aiotrt authors"
version = release = aiotrt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"aiotrt {release}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_type_aliases: dict[str, str] = {}
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_preprocess_types = True

# Names of other projects have no page here to link to, and their inventories are not fetched: the build needs no
# network. Nothing of aiotrt's own belongs in this list.
nitpicky = True
_elsewhere = [
    # the standard library; builtins and typing are known to Sphinx
    "array", "asyncio", "collections", "concurrent", "contextlib", "dataclasses", "datetime", "enum", "logging", "os",
    "pathlib", "threading", "types",
    # other packages
    "anyio", "cuda", "fastapi", "numpy", "np", "onnx", "onnxruntime", "prometheus_client", "starlette", "tensorrt",
    "tensorrt_lean", "tensorrt_rtx", "torch",
]  # fmt: skip
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(_elsewhere)})(\..*)?"),
    ("py:.*", r"(.*\.)?[RST]"),
    ("py:class", r"Devices|Path|PathLike|ProfileArgument|Report|Span|Stack"),  # type variables and aliases have no page
    ("py:class", "WebSocket"),  # imported for type checkers only
    ("py:class", r"aiotrt\.serving\.kserve\.(binary|servable)\..*"),  # internal types have no page
]

# The overloads of `load` are for type checkers; readers want its options and their defaults.
_analyzer = ModuleAnalyzer.for_module("aiotrt.model")
_analyzer.analyze()
_analyzer.overloads.pop("load", None)
