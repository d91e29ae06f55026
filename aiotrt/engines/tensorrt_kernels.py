"""What TensorRT-RTX compiles for an engine on the GPU at hand: shared by its contexts, kept for later processes.

Compiling takes seconds for each context and each new shape (5 s and 1 to 9 s for the PP-OCR models on an H200), and a model
has a context for each slot and shape. With one cache for all of them each kernel is compiled once, and with a file, once on
that machine. The file is TensorRT's own format, which it checks against product, version, GPU and driver when it reads it.
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
#: Bytes of compiled kernels that are kept, of all engines together.
ROOM: Final = 4 << 30


class Kernels:
    """The compiled kernels of one engine.

    They are kept in `cache_directory`, under the engine's name and checksum, and those that were used least recently are
    removed past `ROOM`. A file that cannot be read or written costs time and nothing else, so it is only logged.

    Args:
        path: the engine's file.
        digest: its SHA-256.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._file = cache_directory() / f"{path.stem[:80]}-{digest[:32]}.kernels"
        self._cache: RuntimeCache | None = None
        self._kept = 0  # bytes of compiled kernels in the file
        self._lock = threading.Lock()

    def attach(self, config: RuntimeConfig) -> None:
        """Contexts made with `config` use these."""
        self._cache = config.create_runtime_cache()
        try:
            check_private(self._file.parent)
            kept = self._file.read_bytes()
            os.utime(self._file)  # used now
        except FileNotFoundError:
            pass
        except EngineError as error:
            _log.warning("%s; kernels are compiled again", error)
        except OSError as error:
            _log.warning("%s: cannot be read: %s; its kernels are compiled again", self._file, error.strerror)
        else:
            with timed("%s: read %d bytes of compiled kernels", self._file, len(kept)):
                is_ours = self._cache.deserialize(kept)
            if is_ours:
                self._kept = len(kept)
            else:
                _log.info("%s: was compiled for another GPU, driver or version; compiling again", self._file)
        if not config.set_runtime_cache(self._cache):
            self._cache = None
            _log.warning("%s: TensorRT takes no runtime cache, so it compiles for each slot and shape again", self._path)

    def save(self) -> None:
        """Keep what was compiled since the last time."""
        with self._lock:
            if self._cache is None:
                return
            try:
                with timed("%s: asked what was compiled", self._path):
                    compiled = bytes(self._cache.serialize())
            except Exception as error:  # the bindings raise many unrelated classes, or give None
                _log.warning("%s: TensorRT does not tell what it compiled, which is not kept: %s", self._path, error)
                return
            # By size: TensorRT-RTX 1.6 serializes the same kernels to other bytes each time, and a new kernel adds some.
            if len(compiled) == self._kept:
                return
            try:
                make_private(self._file.parent)
                check_private(self._file.parent)
                with replacing(self._file) as write:
                    write(compiled)
                _log.debug("%s: kept %d bytes of compiled kernels", self._file, len(compiled))
                _make_room(self._file)
            except (EngineError, OSError) as error:
                _log.warning("%s: its compiled kernels are not kept for the next time: %s", self._path, error)
            self._kept = len(compiled)

    def close(self) -> None:
        """The engine is going."""
        with self._lock:
            self._cache = None


@contextlib.contextmanager
def timed(what: str, *arguments: object) -> Iterator[None]:
    """Log at level DEBUG how long a part of loading took."""
    started = time.perf_counter()
    yield
    _log.debug(f"{what} in %.3f s", *arguments, time.perf_counter() - started)


def _make_room(newest: Path) -> None:
    """Remove the kernels that were used least recently, past `ROOM`; never the newest.

    Who uses a file that is removed has read it, so this costs the next process time, and nobody else anything.
    """
    files = []
    for file in newest.parent.glob("*.kernels"):
        with contextlib.suppress(FileNotFoundError):  # another process made room too
            status = file.stat()
            files.append((status.st_mtime_ns, status.st_size, file))
    total = 0
    for _, nbytes, file in sorted(files, reverse=True):
        total += nbytes
        if total > ROOM and file != newest:
            file.unlink(missing_ok=True)
            _log.info("%s: removed, as kernels that were used more recently take up the room there is", file)
