# Types for the compiled build. waiter.py is the source, and runs without this file.
from aiotrt.completion.lane cimport Pending

cdef class Waiter(Pending):
    cdef public bint _asyncio_future_blocking, _is_cancelled, is_done
    cdef public object _callback, _context, _error, _loop, _message, _others, _value
    cpdef resolve(self, value)
    cpdef wake(self)
    cpdef wake_soon(self)
