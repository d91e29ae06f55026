# Types for the compiled build. slots.py is the source, and runs without this file.
cimport cython

cdef class Slots:
    cdef object __weakref__
    cdef public list states, _free
    cdef public object max_waiting, _queue
    cdef public long _counted
    @cython.locals(free=list, at=long, i=long, slot=long)
    cpdef request(self, ticket, prefer=*, bint bounded=*)
    cpdef withdraw(self, ticket)
    @cython.locals(states=list)
    cpdef move(self, long slot, event)
