# Types for the compiled build. request.py is the source, and runs without this file.
from aiotrt.completion.waiter cimport Waiter

cdef class Times:
    cdef public double entered, granted, late, ran, seen

cdef class Request(Waiter):
    cdef public object arguments, bound, kind, origin, ready, record_readers, results, route, shapes, slot, span, specs, times, values
    cdef public bint is_lease, is_marked, is_queued, is_revoked, is_warmup

cdef class Slot:
    cdef object __weakref__
    cdef public object confirm, event, gates, lane, mark, on_done, predecessor, program, query, request, stream, turn, when_complete
    cdef public long index, launches
    cdef public bint is_forgotten
