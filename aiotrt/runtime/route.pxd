# Types for the compiled build. route.py is the source, and runs without this file.

cdef class Route:
    cdef object __weakref__
    cdef public object _count, _holds, _index, _inputs, holders, kind, nbytes, on_device, on_host, shapes, specs
    cpdef bint matches(self, values) except -1
    cpdef bint still_matches(self, values) except -1
