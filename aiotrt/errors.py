"""What can go wrong, who is to blame, and whether the model is still usable.

::

    AiotrtError
    ├── InputError (ValueError)     you passed something the model cannot take; nothing was submitted; the model is usable
    ├── UsageError (RuntimeError)   you called at the wrong moment or from the wrong place (another event loop, a lease that
    │                               has ended, before the first launch); nothing was submitted; the model is usable
    ├── EngineError                 the engine file or module is bad, foreign or incompatible, or it raised while it ran;
    │                               at load: no model exists; in a call: that call failed alone, the model is usable
    ├── QueueFullError              all slots are busy and the queue is at its bound; nothing was submitted; try later
    ├── DeadlineError (TimeoutError)   a call's ``deadline=`` passed before its result was there; the model is usable
    │   └── OverloadedError         its result would come after it; nothing was submitted; `.seconds` is how much too late
    ├── ModelClosedError            you closed the model, or have not opened it; the call can never succeed on it
    ├── ModelBrokenError            something else broke the model, `__cause__` says what; load it again, and after a
    │                               DeviceError on CUDA do so in a new process
    ├── DeviceError                 the device answered with a fault; every pending await on that device gets it and the
    │   │                           models there are broken; `.code` and `.name` are the driver's own
    │   └── DeviceHangError         work is overdue past `hang_timeout`; the model is broken; its memory is kept for ever,
    │                               because the device may still be using it
    ├── ResourceError               the process has no thread or file descriptor left for this; at load: no model exists; in
    │                               a call: that call failed alone, the model is usable
    └── MissingDependencyError (ImportError)   a package is not installed; the message says which and how

Messages name the thing, what was expected, what came, and what to do next.
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
    """Base of every error that aiotrt raises on purpose."""


class InputError(AiotrtError, ValueError):
    """An input has the wrong name, dtype, rank, extents, layout or device.

    Nothing was submitted and the model is usable: mend the input and call again. Also raised by `aiotrt.build` for an
    argument that is wrong or does not fit the model; nothing was written then.
    """


class UsageError(AiotrtError, RuntimeError):
    """A call came at the wrong moment or from the wrong place.

    Another event loop or thread than the one that opened the model, a lease after its block has ended, outputs before a
    launch. Nothing was submitted and the model is usable.
    """


class EngineError(AiotrtError):
    """An engine is bad, foreign or incompatible, or it raised while it ran.

    Raised by `load`: no model exists and nothing is left behind. Raised by a call: that call failed, by itself, and the
    model is usable.
    """


class QueueFullError(AiotrtError):
    """Every slot is busy and `max_queue` callers wait already.

    Nothing was submitted. Wait and call again, or raise `max_queue`, or answer your own caller with "busy". A batching model
    also tells it to a call that had to make way for a newer one, if `Batching.overload` says so.
    """


class DeadlineError(AiotrtError, TimeoutError):
    """A call's ``deadline=`` passed before its result was there.

    If the item still waited, the device never sees it; if not, its result is dropped. The model is usable.
    """


class OverloadedError(DeadlineError):
    """At the pace that was measured, a call's result would come after its ``deadline=``.

    It was refused at once: nothing was submitted, and the model is usable. Try later, or answer your own caller with "busy".

    Args:
        message: what is expected.
        seconds: how much too late the result would come.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class ModelClosedError(AiotrtError):
    """The model is closed, is closing, or was never opened."""


class ModelBrokenError(AiotrtError):
    """Something broke the model earlier; `__cause__` is what.

    Every later call raises this at once. Load a new model; after a `DeviceError` on CUDA, in a new process, since a CUDA
    context does not recover from a fault.
    """


class DeviceError(AiotrtError):
    """The device answered a call with a fault.

    Args:
        message: what was being done.
        code: the driver's or runtime's status code; -1 where there is none.
        name: the code's name, such as ``cudaErrorIllegalAddress``.
    """

    def __init__(self, message: str, *, code: int = -1, name: str = "unknown") -> None:
        super().__init__(f"{message}: {name} ({code})" if code != -1 else message)
        self.code = code
        self.name = name


class DeviceHangError(DeviceError):
    """Work on the device is overdue past `hang_timeout`.

    The model is broken. Its buffers are kept for the life of the process, because the device may still write to them.
    """


class ResourceError(AiotrtError):
    """The process has no thread or no file descriptor left.

    Raised by `load`: no model exists and nothing is left behind. Raised by a call: that call failed, by itself, and the
    model is usable. Close files and connections, end threads, or raise the limits (``ulimit -n``, ``ulimit -u``).
    """


class MissingDependencyError(AiotrtError, ImportError):
    """A package that this needs is not installed; the message says which one and how to install it."""
