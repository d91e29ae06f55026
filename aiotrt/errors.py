"""Exceptions of aiotrt: the cause of each, and whether the model is still usable.

::

    AiotrtError
    ├── InputError (ValueError)     an argument does not fit the model; nothing was submitted; the model is usable
    ├── UsageError (RuntimeError)   a call at the wrong time or from the wrong place (another event loop, a lease that has
    │                               ended, before the first launch); nothing was submitted; the model is usable
    ├── EngineError                 the engine file or module is damaged, incompatible or of another format, or it raised; at
    │                               load: no model exists; in a call: only that call failed, the model is usable
    ├── QueueFullError              all slots are busy and the queue is full; nothing was submitted; try later
    ├── DeadlineError (TimeoutError)   a call's ``deadline=`` passed before its result was available; the model is usable
    │   └── OverloadedError         the result is predicted to miss the deadline, by `.seconds`; nothing was submitted
    ├── ModelClosedError            the model is closed or was never opened; no call on it can succeed
    ├── ModelBrokenError            an earlier error, `__cause__`, broke the model; load it again; after a DeviceError on
    │                               CUDA, do so in a new process
    ├── DeviceError                 the device reported a fault; every pending await on that device raises it, and its models
    │   │                           are broken, except those with other devices; `.code` and `.name` are the driver's own
    │   └── DeviceHangError         work is overdue past `hang_timeout`; the model is broken; its memory is never freed,
    │                               because the device may still be using it
    ├── ResourceError               the process has no thread or file descriptor left, or the device no memory for an image;
    │                               at load: no model exists; in a call: only that call failed, the model is usable
    └── MissingDependencyError (ImportError)   a package is not installed; the message says which, and how to install it

A message names the object at fault, what was expected, what was given, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "AiotrtError",
    "DeadlineError",
    "DeviceError",
    "DeviceHangError",
    "EngineError",
    "InputError",
    "MissingDependencyError",
    "ModelBrokenError",
    "ModelClosedError",
    "OverloadedError",
    "QueueFullError",
    "ResourceError",
    "UsageError",
]


class AiotrtError(Exception):
    """Base class of all errors that aiotrt raises deliberately."""


class InputError(AiotrtError, ValueError):
    """An input has the wrong name, dtype, rank, size of a dimension, layout or device.

    Nothing was submitted and the model is usable: correct the input and call again. Also raised by `aiotrt.build` for an
    argument that is invalid or does not fit the model; nothing was written then.
    """


class UsageError(AiotrtError, RuntimeError):
    """A call was made at the wrong time or from the wrong place.

    Examples: from another event loop or thread than the one that opened the model, on a lease after its block has ended,
    for outputs before a launch. Nothing was submitted and the model is usable.
    """


class EngineError(AiotrtError):
    """An engine is damaged, of another format or incompatible, or it raised while it ran.

    Raised by `load`: no model exists and nothing is left behind. Raised by a call: only that call failed, and the model
    is usable.
    """


class QueueFullError(AiotrtError):
    """Every slot is busy, and `max_queue` callers are waiting already.

    Nothing was submitted. Wait and call again, or raise `max_queue`, or answer your own client with "busy". A batching
    model also raises it from a queued call that a newer one replaced, if `Batching.overload` is set so.
    """


class DeadlineError(AiotrtError, TimeoutError):
    """A call's ``deadline=`` passed before its result was available.

    An item that was still queued is never submitted; otherwise its result is dropped. The model is usable.
    """


class OverloadedError(DeadlineError):
    """At the measured rate, a call's result would be available only after its ``deadline=``.

    The call was rejected at once: nothing was submitted, and the model is usable. Try later, or answer your own client with
    "busy".

    Args:
        message: the text of the error.
        seconds: how late the result would be.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class ModelClosedError(AiotrtError):
    """The model is closed, is closing, or was never opened."""


class ModelBrokenError(AiotrtError):
    """An earlier error broke the model; `__cause__` is that error.

    Every later call raises this at once. Load a new model; after a `DeviceError` on CUDA, do so in a new process, because a
    CUDA context does not recover from a fault.
    """


class DeviceError(AiotrtError):
    """The device reported a fault.

    Args:
        message: the operation that failed.
        code: the driver's or runtime's status code; -1 where there is none.
        name: the code's name, such as ``cudaErrorIllegalAddress``.
    """

    def __init__(self, message: str, *, code: int = -1, name: str = "unknown") -> None:
        super().__init__(f"{message}: {name} ({code})" if code != -1 else message)
        self.code = code
        self.name = name


class DeviceHangError(DeviceError):
    """Work on the device is overdue past `hang_timeout`.

    The model is broken. Its buffers are never freed, because the device may still write to them.
    """


class ResourceError(AiotrtError):
    """The process has no thread or no file descriptor left, or the device has no memory for an image that was decoded.

    Raised by `load`: no model exists and nothing is left behind. Raised by a call: only that call failed, and the model
    is usable. Close files and connections, end threads, or raise the limits (``ulimit -n``, ``ulimit -u``). For an image,
    decode fewer at once, or free memory of the device.
    """


class MissingDependencyError(AiotrtError, ImportError):
    """A required package is not installed; the message says which one, and how to install it."""
