"""The version, the modules that a native build compiles, and the record that a build writes.

The build hook runs this file alone, so it imports only the standard library.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final
from zlib import crc32

__all__ = ["COMPILED", "LIBRARY", "RECORD", "record"]

__version__ = "0.1.0"

#: The modules that a native build compiles: all of them, or none. Types for the compiler are in `.pxd` files beside them.
COMPILED: Final = (
    *(("aiotrt.completion._timerfd",) if sys.platform == "linux" else ()),
    "aiotrt.completion.hub",
    "aiotrt.completion.lane",
    "aiotrt.completion.prediction",
    "aiotrt.completion.waiter",
    "aiotrt.devices._submitter",
    "aiotrt.runtime.executor",
    "aiotrt.runtime.hold",
    "aiotrt.runtime.replay",
    "aiotrt.runtime.request",
    "aiotrt.runtime.route",
    "aiotrt.runtime.slots",
)

#: The shared library that contains all of them.
LIBRARY: Final = f"_native{EXTENSION_SUFFIXES[0]}"

#: The record of a native build, in the package. Named by the Python version, since a checkout may have several builds.
RECORD: Final = f"_native{EXTENSION_SUFFIXES[0].rpartition('.')[0]}.json"


def record(root: Path) -> dict[str, Any]:
    """Describe a native build of this version from the present sources.

    Args:
        root: the package's folder.

    Returns:
        The content of `RECORD`: the version, and a checksum of each source file that exists.
    """
    sources = {}
    for name in COMPILED:
        stem = "/".join(name.split(".")[1:])
        for suffix in (".py", ".pyx", ".pxd"):
            file = root / f"{stem}{suffix}"
            if file.is_file():
                sources[f"{stem}{suffix}"] = crc32(file.read_bytes())
    return {"version": __version__, "sources": sources}
