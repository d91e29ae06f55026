# Types for the compiled build. route.py is the source, and runs without this file.
cimport cython

cdef class Route:
    cdef object __weakref__
    cdef public object _holds, _index, holders, kind, nbytes, on_host, shapes, specs
    cdef public list _dtypes, _sizes, _types
    cdef public long _count
    cdef public bint on_device
    @cython.locals(i=long)
    cpdef bint matches(self, values) except -1
    @cython.locals(i=long)
    cpdef bint still_matches(self, values) except -1
