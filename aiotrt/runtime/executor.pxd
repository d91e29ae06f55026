# Types for the compiled build. executor.py is the source, and runs without this file.
cimport cython
from aiotrt.completion.hub cimport Hub
from aiotrt.runtime.request cimport Request, Slot
from aiotrt.runtime.route cimport Route
from aiotrt.runtime.slots cimport Slots

cdef class Counters:
    cdef public long captures, cancelled, completed, evictions, failed, fallback_runs, hits, misses, rejected, replays, submitted

cdef class Executor:
    cdef object __weakref__
    cdef public object _granted, _idle, _likely, _origin, _stop_listening, _workers, broken, complete
    cdef public Counters counters
    cdef public object device, fallbacks, latest, first_shapes, hang_timeout, loop, observer, on_failure, outputs, recipe, submitting
    cdef public object specs
    cdef public list _spares, slots
    cpdef recycle(self, Request request)
    cdef public double _thread_bytes
    cdef public bint _overlap, _serving, _unified, closing, is_discarded
    cdef public long _forks
    cdef public Hub hub
    cdef public object cache
    cdef public Route _nested_route, _route
    cdef public Slots machine
    cpdef _enter(self, Request request, bint bounded, prefer)
    @cython.locals(index=long, request=Request, slot=Slot, was_queued=bint)
    cpdef _serve(self, grant)
    @cython.locals(route=Route, counters=Counters, prepares=bint)
    cpdef bint _replay(self, Slot slot, Request request, bint was_queued) except -1
    @cython.locals(route=Route)
    cpdef bint _hand_over(self, Slot slot, Request request, program) except -1
    cpdef _results(self, program, origin)
    cpdef _prepare_results(self, program, origin, bint is_current)
    @cython.locals(request=Request)
    cpdef _completed(self, Slot slot, error)
    cpdef _small_views(self, program)
    @cython.locals(counters=Counters)
    cpdef count(self, program)
    cpdef lease_completed(self, Slot slot, long number, error)
