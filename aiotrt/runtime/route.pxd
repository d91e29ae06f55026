# Types for the compiled build. route.py is the source, and runs without this file.

cdef class Route:
    cdef object __weakref__
    cdef public object _any_holds, _holds, _index, _is_pinned, _large, holders, kind, on_host, shapes, specs
    cdef public list _signature
    cdef public long long nbytes
    cdef public bint on_device
    cpdef bint matches(self, values) except -1
    cpdef bint _has_pinned(self, values) except -1
    cpdef bint still_matches(self, values) except -1
