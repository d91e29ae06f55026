# Types for the compiled build. request.py is the source, and runs without this file.
from aiotrt.completion.lane cimport Lane
from aiotrt.completion.waiter cimport Waiter
from aiotrt.runtime.route cimport Route

cdef class Times:
    cdef public double entered, granted, late, ran, seen

cdef class Request(Waiter):
    cdef public object arguments, batch, bound, kind, marked, origin, origins, ready, record_readers, results, shapes, span, specs
    cdef public object times, values
    cdef public Route route
    cdef public Slot slot
    cdef public bint is_lease, is_queued, is_revoked, is_warmup

cdef class Slot:
    cdef object __weakref__
    cdef public object confirm, event, mark, on_done, predecessor, query, stream, turn, when_complete
    cdef public list gates
    cdef public Lane lane
    cdef public object program
    cdef public Request request
    cdef public long index, launches
    cdef public bint is_forgotten
