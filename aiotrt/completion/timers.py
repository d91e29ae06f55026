"""One-shot timers with sub-millisecond resolution, for an asyncio or uvloop event loop.

The loops' own timers round to a millisecond: asyncio's selector rounds up, so a shorter sleep takes a millisecond, and libuv
rounds to the nearest, so a shorter one does not sleep at all. `TimerFd` arms a Linux timerfd that the loop watches like a
socket. Elsewhere work of less than some milliseconds is seen late, by the resolution of the loop's own timers.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import importlib
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiotrt._impl import IMPLEMENTATION

__all__ = ["LoopTimer", "Timer", "TimerFd", "open_timer"]


class Timer(Protocol):
    """Calls back once on the loop's thread, after the time last set."""

    def set(self, delay: float) -> None:
        """Fire in `delay` seconds, and not at the time set before."""
        ...

    def close(self) -> None:
        """Never fire again. Idempotent."""
        ...


class TimerFd:
    """A timerfd on the monotonic clock, watched by the loop. The callback must read it.

    Raises:
        OSError: the system has no timerfd, or no file descriptors left.

    Attributes:
        read: reads the timerfd; raises BlockingIOError if it has not fired, or was set again since it fired.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._time = (ctypes.c_long * 4)()  # a struct itimerspec: seconds and nanoseconds of the interval and of the delay
        self._reference = ctypes.byref(self._time)
        self._fd = _libc_timerfd_create()
        self.read: Callable[[], object] = functools.partial(os.read, self._fd, 8)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        loop.add_reader(self._fd, callback)

    def set(self, delay: float) -> None:
        nanoseconds = int(delay * 1e9)
        if nanoseconds < 1:
            nanoseconds = 1  # zero would disarm it, and the wake-up would be lost
        self._time[2], self._time[3] = divmod(nanoseconds, 1_000_000_000)
        if _timerfd_settime(self._fd, 0, self._reference, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        if self._close_fd.alive:
            # The loop must drop the descriptor before its number can be used for another file. A closed loop has dropped it.
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            self._close_fd()


class LoopTimer:
    """The loop's own timer, where there is no timerfd."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def set(self, delay: float) -> None:
        self.close()
        self._handle = self._loop.call_later(delay, self._callback)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def open_timer(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Timer:
    """Return the timer with the best resolution that this system and this build have."""
    if _timerfd_settime is None:
        return LoopTimer(loop, callback)
    if IMPLEMENTATION == "native":
        timer: Timer = importlib.import_module("aiotrt.completion._timerfd").TimerFd(loop, callback)
        return timer
    return TimerFd(loop, callback)


# PyDLL, not CDLL: it keeps the interpreter lock, since neither call can block, and releasing the lock for a microsecond can
# cost milliseconds when another thread wants it. os.timerfd_create exists only from Python 3.13.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_timerfd_settime: Final[Any] = getattr(_libc, "timerfd_settime", None)


def _libc_timerfd_create() -> int:
    nonblocking, close_on_exec = os.O_NONBLOCK, os.O_CLOEXEC
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, nonblocking | close_on_exec)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create failed")
    return fd
