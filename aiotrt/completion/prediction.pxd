# Types for the compiled build. prediction.py is the source, and runs without this file.
cimport cython

cdef class Estimate:
    cdef public double seconds, shortest, first, _before, _since
    cdef public bint is_trusted
    cdef public int _late, _seen, _shorter
    @cython.locals(seconds=double, before=double, agrees=bint)
    cpdef between(self, double low, double high)
    @cython.locals(least=double)
    cpdef at_most(self, double seconds)
    @cython.locals(estimate=double, near=double)
    cdef _see(self, double seconds)

cdef class Lateness:
    cdef public list _mean, _deviation, ahead, _seen
    @cython.locals(bucket=int, longest=double, seen=int, rate=double, error=double)
    cpdef learn(self, double sleep, double late)
    @cython.locals(ahead=list, bucket=int, longest=double, sleep=double)
    cpdef double allowance(self, double wait) except? -1

@cython.locals(overdue=double)
cpdef double next_look(double now, double started, double predicted, double spin) except? -1
