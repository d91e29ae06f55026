# Types for the compiled build. hub.py is the source, and runs without this file.
cimport cython
from aiotrt.completion.lane cimport Lane, Pending
from aiotrt.completion.prediction cimport Estimate, Lateness
from aiotrt.completion.waiter cimport Waiter

cdef class Hub:
    cdef object __weakref__
    cdef public object progress
    cdef public long polls, wakes
    cdef public bint is_polling, _closed, _is_told
    cdef public long _users
    cdef public object _loop, _clock, _timer, _read, _soon, _told, _waking
    cdef public list finished, lanes
    cdef public Lateness _lateness
    cdef public double _armed, _left, _slept, _spin
    @cython.locals(lane=Lane, head=Pending, estimate=Estimate, lanes=list, due=list, now=double, start=double, started=double, planned=double, earliest=double, left=long, repeats=long, is_first=bint, is_complete=bint)
    cpdef _poll(self)
    @cython.locals(timeout=object, started=double)
    cpdef _incomplete(self, Lane lane, Pending head, double now, double planned)
    @cython.locals(finished=list, waiter=Waiter)
    cpdef _wake(self, double start)
    @cython.locals(now=double, due=double, queue=object)
    cpdef add(self, Lane lane, Pending pending, when_complete=*)
    cpdef _arm(self, double now, double due, bint was_long=*)
    @cython.locals(wait=double, estimate=Estimate)
    cpdef double _first_poll(self, double now, Pending head) except? -1
    @cython.locals(estimate=Estimate, spin=double, predicted=double, wait=double)
    cpdef double _next_poll(self, double now, Lane lane, Pending head, double started) except? -1
    cpdef finish(self, Waiter waiter)
