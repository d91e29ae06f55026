"""From an ONNX file to a TensorRT engine: `build`, the cache that `load` builds into, and the sidecar it checks.

Nothing here needs an event loop, and nothing here runs an engine. `builder` tells the story; `source` reads and mends the
ONNX file, `profiles` checks which shapes the engine must take, `progress` shows and stops the builder, `sidecar` records
what was built from what, and `cache` builds each engine once per machine.
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
