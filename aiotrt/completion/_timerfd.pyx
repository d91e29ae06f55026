"""The compiled build's `timers.TimerFd`: set and read without Python between the poll and Linux."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from posix.time cimport CLOCK_MONOTONIC, itimerspec
from posix.unistd cimport close, read

import os

cdef extern from "sys/timerfd.h" nogil:
    int TFD_NONBLOCK, TFD_CLOEXEC
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec* new, itimerspec* old)


cdef class TimerFd:
    """A timerfd on the monotonic clock, watched by the loop. The callback must read it.

    Raises:
        OSError: no file descriptors are left.
    """

    cdef object __weakref__
    cdef object _loop
    cdef int _fd

    def __cinit__(self, loop, callback):
        self._loop = loop
        self._fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(errno, f"timerfd_create failed: {os.strerror(errno)}")

    def __init__(self, loop, callback):
        loop.add_reader(self._fd, callback)

    def __dealloc__(self):
        if self._fd >= 0:
            close(self._fd)

    def set(self, double delay):
        """Fire in `delay` seconds, and not at the time set before."""
        cdef itimerspec time
        cdef long long nanoseconds = <long long>(delay * 1e9)
        if nanoseconds < 1:
            nanoseconds = 1  # zero would disarm it, and the wake-up would be lost
        time.it_interval.tv_sec = time.it_interval.tv_nsec = 0
        time.it_value.tv_sec = nanoseconds // 1000000000
        time.it_value.tv_nsec = nanoseconds % 1000000000
        if timerfd_settime(self._fd, 0, &time, NULL) < 0:
            raise OSError(errno, f"timerfd_settime failed: {os.strerror(errno)}")

    def read(self):
        """Read and reset the timerfd. Raises BlockingIOError if it has not fired, or was set again since it fired."""
        cdef uint64_t fired
        if read(self._fd, &fired, sizeof(fired)) < 0:
            raise OSError(errno, os.strerror(errno))  # Python makes it the subclass for this errno, such as BlockingIOError

    def close(self):
        """Never fire again. Idempotent."""
        if self._fd >= 0:
            # The loop must drop the descriptor before its number can be used for another file. A closed loop has dropped it.
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            close(self._fd)
            self._fd = -1
