"""What TensorRT says: all of it to `logging` as ``aiotrt.tensorrt``, and the last of its complaints kept for messages."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any, Final

__all__ = ["Log", "log_of"]

#: How many warnings and errors are kept, and how much of each.
_LINES: Final = 50
_WIDTH: Final = 500

logger: Final = logging.getLogger("aiotrt.tensorrt")
_logs: Final[dict[int, tuple[Any, Log]]] = {}  # by the module's identity, with the module, so that it stays that one's
_lock: Final = threading.Lock()


class Log:
    """One product's log. There is one for the life of the process, as `log_of` explains.

    Args:
        trt: the product's module.

    Attributes:
        logger: what TensorRT is given: its own `ILogger`.
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
        """Take one message; called by TensorRT, on any thread."""
        level = self._levels.get(severity, logging.ERROR)
        if level >= logging.WARNING:  # progress would push out the line that says what went wrong
            self._count += 1
            self._lines.append((self._count, " ".join(message[: 2 * _WIDTH].split())[:_WIDTH]))
        logger.log(level, "%s", message)

    def mark(self) -> int:
        """A point in the log, for `since`."""
        return self._count

    def since(self, mark: int) -> list[str]:
        """The warnings and errors written after `mark`, as far as they are kept, each once."""
        return list(dict.fromkeys(line for number, line in tuple(self._lines) if number > mark))


def log_of(trt: Any) -> Log:
    """The log of a product's module.

    There is only one for each, because TensorRT keeps the first logger it is given, and calls it even when the builder or
    runtime that brought it is gone.
    """
    with _lock:
        entry = _logs.get(id(trt))
        if entry is None:
            entry = _logs[id(trt)] = trt, Log(trt)
        return entry[1]


def _forwarder(trt: Any, log: Log) -> Any:
    class Forwarder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() would leave out the C++ half

        def log(self, severity: object, message: str) -> None:
            try:
                log.write(severity, message)
            except Exception:  # one that leaves here goes through TensorRT and ends the process
                pass

    return Forwarder()
