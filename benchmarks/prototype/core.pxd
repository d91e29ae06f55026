# Types of core.py, for the compiled build.
cimport cython

cdef double NEVER, SPIN, MARGIN, LEARNING


cdef class Waiter:
    cdef public object loop, x, callback, context, value, error
    cdef public bint inline, is_done, is_cancelled, _asyncio_future_blocking
    cdef public double submitted, polled
    cdef public long polls

    cpdef result(self)
    cpdef finish(self)


cdef class Slot:
    cdef public object pending, owner, x, out, spare
    cdef public double estimate, last_done
    cdef public long late

    cpdef int launch(self) except -1
    cpdef int copy_and_launch(self, unsigned long long source, unsigned long long destination) except -1
    cpdef bint query(self) except -1


cdef class System:
    cpdef double now(self) except -1
    cpdef int set_timer(self, double seconds) except -1
    cpdef bint clear(self) except -1


cdef class Poller:
    cdef public object loop, spin_callback
    cdef public System system
    cdef public int descriptor
    cdef public list slots
    cdef public long count
    cdef public bint is_timed, is_spinning, is_polling
    cdef public double due, lateness, deviation

    @cython.locals(slot=Slot, waiter=Waiter, left=long, complete=bint, now=double, started=double, earliest=double)
    cpdef poll(self)
    @cython.locals(slot=Slot, waiter=Waiter)
    cpdef fail(self, error)
    @cython.locals(started=double, ran=double, seen=double)
    cpdef learn(self, Slot slot, Waiter waiter, double now)
    @cython.locals(now=double, wake=double)
    cpdef arm(self, double due)
    @cython.locals(now=double, due=double)
    cpdef watch(self, Slot slot, Waiter waiter)


cdef class Model:
    cdef public object loop, queue, allocate, is_ordered, device, dtype, shape
    cdef public Poller poller
    cdef public list free

    @cython.locals(waiter=Waiter)
    cpdef lease(self)
    @cython.locals(waiter=Waiter)
    cpdef call(self, x)
    cpdef launch(self, Slot slot, Waiter waiter)
    cpdef complete(self, Slot slot, Waiter waiter)
