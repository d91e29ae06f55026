"""One-shot timers with sub-millisecond resolution, for an asyncio or uvloop event loop.

The loops' own timers round to a millisecond: asyncio's selector rounds up, so a shorter sleep takes one, and libuv rounds
to the nearest, so a shorter one does not sleep at all. `TimerFd` arms a Linux timerfd that the loop watches like a socket;
`ThreadTimer` does the same with a sleeping thread, where there is no timerfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["ThreadTimer", "Timer", "TimerFd", "open_timer"]


class Timer(Protocol):
    """Calls back once on the loop's thread, after the time last set."""

    def set(self, delay: float) -> None:
        """Fire in `delay` seconds, instead of whenever it was set to fire before."""
        ...

    def close(self) -> None:
        """Never fire again. Idempotent."""
        ...


class _TimeSpec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class TimerFd:
    """A timerfd on the monotonic clock, watched by the loop. The callback must read it.

    Raises:
        OSError: the system has no timerfd, or no file descriptors left.

    Attributes:
        read: reads it; raises BlockingIOError where it has not fired, or was set again since.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._spec = _TimeSpec()
        self._fd = _libc_timerfd_create()
        self.read: Callable[[], object] = functools.partial(os.read, self._fd, 8)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        loop.add_reader(self._fd, callback)

    def set(self, delay: float) -> None:
        nanoseconds = max(1, int(delay * 1e9))  # zero would disarm it, and the wake-up would be lost
        self._spec.seconds, self._spec.nanoseconds = divmod(nanoseconds, 1_000_000_000)
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(self._spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        if self._close_fd.alive:
            # The loop must forget the descriptor before its number can be used for another file. A closed loop has.
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            self._close_fd()


class ThreadTimer:
    """A thread that sleeps on a condition and then calls the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._condition = threading.Condition()
        self._due: float | None = None
        self._closed = False
        threading.Thread(target=self._run, name="aiotrt-timer", daemon=True).start()

    def set(self, delay: float) -> None:
        with self._condition:
            self._due = time.monotonic() + delay
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed and (self._due is None or (left := self._due - time.monotonic()) > 0):
                    self._condition.wait(None if self._due is None else left)
                if self._closed:
                    return
                self._due = None
            with contextlib.suppress(RuntimeError):  # the loop was closed under us; close() follows or never will
                self._loop.call_soon_threadsafe(self._fire)

    def _fire(self) -> None:
        if not self._closed:
            self._callback()


def open_timer(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Timer:
    """The best timer that this system and this loop offer."""
    if hasattr(_libc, "timerfd_create"):
        return TimerFd(loop, callback)
    return ThreadTimer(loop, callback)


# PyDLL, not CDLL: it keeps the interpreter lock, since neither call can block and giving the lock away for a microsecond
# can cost milliseconds when another thread wants it. os.timerfd_create exists only from Python 3.13.
_libc: Final = ctypes.PyDLL(None, use_errno=True)


def _libc_timerfd_create() -> int:
    nonblocking, close_on_exec = os.O_NONBLOCK, os.O_CLOEXEC
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, nonblocking | close_on_exec)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create failed")
    return fd
