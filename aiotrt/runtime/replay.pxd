# Types for the compiled build. replay.py is the source, and runs without this file.
from aiotrt.completion.waiter cimport Waiter

cdef class Replay(Waiter):
    cdef public object event, failure
    cdef public bint is_given
    cdef public long number
