"""From an ONNX file to a TensorRT engine: `build`, the cache that `load` builds into, and the sidecar it checks.

This package needs no event loop and runs no engine. `builder` is the place to start reading. `source` reads and repairs the
ONNX file, `profiles` checks the shapes that the engine must accept, `progress` reports progress and cancels the builder,
`sidecar` records the inputs of each build, and `cache` builds each engine once per machine.
"""

from __future__ import annotations

from aiotrt.building.builder import build
from aiotrt.building.cache import cache_directory, cached_engine
from aiotrt.building.progress import BuildProgress
from aiotrt.building.sidecar import Sidecar, check_sidecar, sidecar_path
from aiotrt.building.source import read_onnx

__all__ = [
    "BuildProgress",
    "Sidecar",
    "build",
    "cache_directory",
    "cached_engine",
    "check_sidecar",
    "read_onnx",
    "sidecar_path",
]
