"""The kernels that TensorRT-RTX compiles for an engine and a GPU: shared by the engine's contexts, and cached in a file.

Compilation takes seconds for each context and each new shape (5 s and 1 to 9 s for the PP-OCR models on an H200), and a
model has a context for each slot and shape. With a shared cache each kernel is compiled once per process, and with a file,
once per machine. The file is in TensorRT's own format; TensorRT checks product, version, GPU and driver when it reads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aiotrt.building.cache import cache_directory
from aiotrt.building.files import check_private, make_private, replacing
from aiotrt.engines.tensorrt_api import RuntimeCache, RuntimeConfig
from aiotrt.errors import EngineError

__all__ = ["Kernels", "timed"]

_log: Final = logging.getLogger("aiotrt")
#: The maximum size of the files of compiled kernels of all engines together, in bytes.
ROOM: Final = 4 << 30


class Kernels:
    """The compiled kernels of one engine.

    They are kept in `cache_directory`, under the engine's name and checksum. Above `ROOM` bytes the least recently used
    files are removed. A file that cannot be read or written is only logged, because it only costs time.

    Args:
        path: the engine's file.
        digest: its SHA-256.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._file = cache_directory() / f"{path.stem[:80]}-{digest[:32]}.kernels"
        self._cache: RuntimeCache | None = None
        self._kept = 0  # the size of the file, in bytes
        self._lock = threading.Lock()

    def attach(self, config: RuntimeConfig) -> None:
        """Set these kernels as the cache of the contexts that are created with `config`."""
        self._cache = config.create_runtime_cache()
        try:
            check_private(self._file.parent)
            kept = self._file.read_bytes()
            os.utime(self._file)  # marks the file as recently used
        except FileNotFoundError:
            pass
        except EngineError as error:
            _log.warning("%s; compiling its kernels again", error)
        except OSError as error:
            _log.warning("%s: cannot be read: %s; compiling its kernels again", self._file, error.strerror)
        else:
            with timed("%s: read %d bytes of compiled kernels", self._file, len(kept)):
                is_ours = self._cache.deserialize(kept)
            if is_ours:
                self._kept = len(kept)
            else:
                _log.info("%s: was compiled for another GPU, driver or version; compiling again", self._file)
        if not config.set_runtime_cache(self._cache):
            self._cache = None
            _log.warning("%s: TensorRT rejected the runtime cache, so it compiles for each slot and shape again", self._path)

    def save(self) -> None:
        """Write the kernels to the file, if new ones were compiled since the last call."""
        with self._lock:
            if self._cache is None:
                return
            try:
                with timed("%s: serialised the compiled kernels", self._path):
                    compiled = bytes(self._cache.serialize())
            except Exception as error:  # the bindings raise many unrelated classes, or return None
                _log.warning(
                    "%s: TensorRT cannot serialise its compiled kernels, which are not saved: %s", self._path, error
                )
                return
            # Compare sizes: TensorRT-RTX 1.6 serialises equal kernels to different bytes of equal size; new ones add bytes.
            if len(compiled) == self._kept:
                return
            try:
                make_private(self._file.parent)
                check_private(self._file.parent)
                with replacing(self._file) as write:
                    write(compiled)
                _log.debug("%s: wrote %d bytes of compiled kernels", self._file, len(compiled))
                _make_room(self._file)
            except (EngineError, OSError) as error:
                _log.warning("%s: its compiled kernels cannot be saved: %s", self._path, error)
            self._kept = len(compiled)

    def close(self) -> None:
        """Release the cache, before the engine is deleted."""
        with self._lock:
            self._cache = None


@contextlib.contextmanager
def timed(what: str, *arguments: object) -> Iterator[None]:
    """Log the duration of a step of loading, at level DEBUG."""
    started = time.perf_counter()
    yield
    _log.debug(f"{what} in %.3f s", *arguments, time.perf_counter() - started)


def _make_room(newest: Path) -> None:
    """Remove the least recently used files of kernels above `ROOM` bytes; never the newest.

    A process that uses a removed file has read it already, so only the next process has to compile again.
    """
    files = []
    for file in newest.parent.glob("*.kernels"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = file.stat()
            files.append((status.st_mtime_ns, status.st_size, file))
    total = 0
    for _, nbytes, file in sorted(files, reverse=True):
        total += nbytes
        if total > ROOM and file != newest:
            file.unlink(missing_ok=True)
            _log.info("%s: removed, because the cache of compiled kernels is full", file)
