"""TensorRT's log: forwarded to the logger ``aiotrt.tensorrt``, with the last warnings and errors kept for messages."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any, Final

__all__ = ["Log", "log_of"]

#: How many warnings and errors are kept, and how many characters of each.
_LINES: Final = 50
_WIDTH: Final = 500

logger: Final = logging.getLogger("aiotrt.tensorrt")
_logs: Final[dict[int, tuple[Any, Log]]] = {}  # by the module's id; the module is kept, so that its id is not reused
_lock: Final = threading.Lock()


class Log:
    """The log of one product, kept until the process ends: see `log_of`.

    Args:
        trt: the product's module.

    Attributes:
        logger: the `ILogger` to pass to TensorRT.
    """

    def __init__(self, trt: Any) -> None:
        self._levels = {
            trt.ILogger.INTERNAL_ERROR: logging.ERROR,
            trt.ILogger.ERROR: logging.ERROR,
            trt.ILogger.WARNING: logging.WARNING,
            trt.ILogger.INFO: logging.INFO,
            trt.ILogger.VERBOSE: logging.DEBUG,
        }
        self._lines: deque[tuple[int, str]] = deque(maxlen=_LINES)
        self._count = 0
        self.logger = _forwarder(trt, self)

    def write(self, severity: object, message: str) -> None:
        """Log one message; called by TensorRT, on any thread."""
        level = self._levels.get(severity, logging.ERROR)
        if level >= logging.WARNING:  # keeping progress messages too would evict the error
            self._count += 1
            self._lines.append((self._count, " ".join(message[: 2 * _WIDTH].split())[:_WIDTH]))
        logger.log(level, "%s", message)

    def mark(self) -> int:
        """Return the current position in the log, for `since`."""
        return self._count

    def since(self, mark: int) -> list[str]:
        """Return the warnings and errors after position `mark` that are still kept, without duplicates."""
        return list(dict.fromkeys(line for number, line in tuple(self._lines) if number > mark))


def log_of(trt: Any) -> Log:
    """Return the log of a product's module.

    Each module has one, because TensorRT keeps the first logger that it gets, and calls it even after the builder or
    runtime that it came with has been deleted.
    """
    with _lock:
        entry = _logs.get(id(trt))
        if entry is None:
            entry = _logs[id(trt)] = trt, Log(trt)
        return entry[1]


def _forwarder(trt: Any, log: Log) -> Any:
    class Forwarder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() would not construct the C++ object

        def log(self, severity: object, message: str) -> None:
            try:
                log.write(severity, message)
            except Exception:  # an exception that enters TensorRT's C++ code ends the process
                pass

    return Forwarder()
