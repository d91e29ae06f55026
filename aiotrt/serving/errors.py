"""Errors as HTTP answers: which status, what the body says, and when to come back."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse

from aiotrt.decoding.errors import ImageError, ImageTooLargeError
from aiotrt.errors import (
    AiotrtError,
    DeadlineError,
    DeviceError,
    EngineError,
    InputError,
    ModelBrokenError,
    ModelClosedError,
    OverloadedError,
    QueueFullError,
    ResourceError,
)

__all__ = [
    "FROM_CLIENT",
    "BodyError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "BusyError",
    "Problem",
    "UnsupportedMediaTypeError",
    "add_exception_handlers",
    "problem",
]

#: Attribute of a request's state: the client chose the dtype and shape of what the handler passes to a model.
FROM_CLIENT: Final = "aiotrt_array"
_log: Final = logging.getLogger("aiotrt")
#: What Python shows of an object that has no other text.
_OBJECT: Final = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


class BodyError(InputError):
    """A request's body is not what is taken; 422, or 400 from `aiotrt serve`."""


class BodyTooLargeError(BodyError):
    """A request's body is over the limit; 413."""


class UnsupportedMediaTypeError(BodyError):
    """A request's body is of a kind that is not taken here; 415."""


class BodyTimeoutError(AiotrtError, TimeoutError):
    """A client took too long to send its request; 408."""


class BusyError(AiotrtError):
    """The server has as many bytes of requests in memory as it may; 503."""


#: The first that fits, in this order. A `TimeoutError` is a deadline of the application's own, as `asyncio.timeout` sets.
_STATUS: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (BodyTooLargeError, 413, "too_large"),
    (ImageTooLargeError, 413, "too_large"),
    (UnsupportedMediaTypeError, 415, "unsupported_media_type"),
    (BodyTimeoutError, 408, "request_timeout"),
    (BodyError, 422, "invalid_input"),
    (ImageError, 422, "invalid_input"),
    (QueueFullError, 503, "queue_full"),
    (BusyError, 503, "busy"),
    (OverloadedError, 503, "overloaded"),
    (ModelBrokenError, 503, "model_broken"),
    (ModelClosedError, 503, "model_closed"),
    (DeviceError, 503, "device_error"),
    (ResourceError, 503, "no_resources"),
    (TimeoutError, 504, "deadline_exceeded"),
    (EngineError, 500, "engine_error"),
    (AiotrtError, 500, "server_error"),
)


@dataclass(frozen=True)
class Problem:
    """An error as a client sees it.

    Attributes:
        status: the HTTP status.
        kind: a word for programs.
        message: a sentence for people.
        retry_after: whole seconds after which it is worth trying again, if it is.
    """

    status: int
    kind: str
    message: str
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's headers say about it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def problem(error: Exception, wait: float | None = None, *, is_clients: bool = False) -> Problem:
    """What to answer.

    Args:
        error: what was raised.
        wait: how many seconds the queue takes at the rate that was measured; None if that is not known.
        is_clients: whether an `InputError` that no body raised may be the client's doing; otherwise it is the server's.
    """
    status, name = next(((status, name) for kind, status, name in _STATUS if isinstance(error, kind)), (500, "server_error"))
    if is_clients and isinstance(error, InputError) and status == 500:
        status, name = 422, "invalid_input"
        _log.warning("a model refused what the client sent, or what was made of it: %s", error, exc_info=error)
    message = _OBJECT.sub("an object", str(error))
    if status == 504:
        if not message or isinstance(error, DeadlineError):  # the same, whoever found it out
            message = "the deadline passed before the result was there"
    elif status == 500:
        # What our own code or the engine says may name files and functions: the log gets it, the client does not.
        _log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
        message = "the model failed for this input" if name == "engine_error" else "the server failed"
    if isinstance(error, OverloadedError):
        # Predicted from few calls at first; the whole queue takes longer than what is too much of it.
        wait = error.seconds if wait is None else min(error.seconds, wait)
    is_full = isinstance(error, (QueueFullError, BusyError, OverloadedError))
    return Problem(status, name, message, min(max(math.ceil(wait or 1.0), 1), 60) if is_full else None)


def add_exception_handlers(app: Starlette) -> None:
    """Let `app` (FastAPI or Starlette) answer aiotrt's errors, and deadlines, with their status and JSON.

    The body is ``{"detail": "a sentence", "type": "a_word"}``. An `InputError` that a model raises is the client's (422)
    where the array came from `array_body`, and the application's own (500) elsewhere; it is logged with its traceback.
    503 for a full queue has ``Retry-After``, from the rate at which the models were measured to complete requests.
    """
    for kind in (AiotrtError, TimeoutError):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    found = problem(error, _wait(request), is_clients=getattr(request.state, FROM_CLIENT, False))
    return JSONResponse({"detail": found.message, "type": found.kind}, found.status, found.headers)


def _wait(connection: HTTPConnection) -> float | None:
    models: Any = getattr(connection.state, "aiotrt", None)
    if models is None:
        return None
    wait: float | None = models.monitor.seconds_to_wait()
    return wait
