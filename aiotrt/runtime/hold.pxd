# Types for the compiled build. hold.py is the source, and runs without this file.
cimport cython
from aiotrt.runtime.executor cimport Executor
from aiotrt.runtime.replay cimport Replay
from aiotrt.runtime.request cimport Request, Slot

cdef class Hold:
    cdef object __weakref__
    cdef public object kind, _current, _current_mark, _ever_written, _launches, _graph, _kept, _marks, _ordered, _sources, _state
    cdef public object consumers, specs
    cdef public list _spares
    cdef public bint unified, _left, _tells
    cdef public Executor executor
    cdef public object program
    cdef public Replay _last, _unordered
    cdef public Request _request
    cdef public Slot slot
    cpdef check(self)
    cpdef replay(self)
    @cython.locals(executor=Executor, slot=Slot, replay=Replay)
    cpdef launch(self, bint is_given)
    cpdef awaited(self, Replay replay)
    @cython.locals(executor=Executor, slot=Slot)
    cpdef _launched(self, Replay replay, ordered=*)
    @cython.locals(executor=Executor, slot=Slot, replay=Replay)
    cpdef _completed(self, error)
    cpdef results(self)
    @cython.locals(launch=Replay)
    cpdef handed_out(self, output)
