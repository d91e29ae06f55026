# Types for the compiled build. lane.py is the source, and runs without this file.

cimport cython
from aiotrt.completion.prediction cimport Estimate

cdef class Pending:
    cdef object __weakref__
    cdef public object confirm, hang_timeout, on_done, query
    cdef public Estimate estimate
    cdef public double notified, submitted

cdef class Lane:
    cdef object __weakref__
    cdef public object pending, prepare
    cdef public bint is_first, is_listed, is_polled
    cdef public Estimate estimate
    cdef public double due, last_done, notified, polled, spin_until, stalled, started
    cdef public long overdue
    @cython.locals(estimate=Estimate, ran=double)
    cpdef learn(self)
    cpdef begin(self)
