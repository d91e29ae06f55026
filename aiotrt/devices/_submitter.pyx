"""The compiled form of `CudaGraph.submit` and of an event's query, and threads that copy host inputs and launch.

The driver's functions are in a table of pointers that `fill` fills at run time. So building needs no CUDA, and a test can
fill the table with its own functions. No function here releases the interpreter lock: no call blocks, and another thread
that takes the lock meanwhile may keep it for milliseconds. The threads that copy never take the lock.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pythread cimport (
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_release_lock,
    PyThread_start_new_thread,
    PyThread_type_lock,
)
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    static int aiotrt_load(int *p) { int v = *(volatile int *)p; _ReadWriteBarrier(); return v; }
    static void aiotrt_store(int *p, int v) { _ReadWriteBarrier(); *(volatile int *)p = v; }
    #else
    static int aiotrt_load(int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static void aiotrt_store(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    #endif
    """
    int load "aiotrt_load"(int*) noexcept nogil
    void store "aiotrt_store"(int*, int) noexcept nogil


cdef struct Memcpy3D:  # CUDA_MEMCPY3D of the driver API
    size_t src_x, src_y, src_z, src_lod
    int src_memory_type
    const void* src_host
    unsigned long long src_device
    void* src_array
    void* src_reserved
    size_t src_pitch, src_height
    size_t dst_x, dst_y, dst_z, dst_lod
    int dst_memory_type
    void* dst_host
    unsigned long long dst_device
    void* dst_array
    void* dst_reserved
    size_t dst_pitch, dst_height
    size_t width, height, depth

cdef struct Port:
    void* node
    Memcpy3D copy
    bint is_input
    unsigned long long address  # of the caller's memory that the node is set to; 0 where that is unknown

cdef enum:
    SUCCESS = 0
    NOT_READY = 600
    ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE

cdef struct Table:
    int (*graph_launch)(void*, void*) noexcept nogil
    int (*event_record)(void*, void*) noexcept nogil
    int (*event_query)(void*) noexcept
    int (*stream_query)(void*) noexcept
    int (*stream_wait)(void*, void*, unsigned int) noexcept
    int (*set_copy)(void*, void*, const Memcpy3D*, void*) noexcept
    int (*set_context)(void*) noexcept nogil

cdef Table driver

#: The driver's functions that `fill` needs.
NAMES = (
    "cuGraphLaunch", "cuEventRecord", "cuEventQuery", "cuStreamQuery", "cuStreamWaitEvent", "cuGraphExecMemcpyNodeSetParams",
    "cuCtxSetCurrent",
)


def fill(addresses):
    """Fill the table.

    Args:
        addresses: the addresses of the functions, by the names in `NAMES`.
    """
    driver.graph_launch = <int (*)(void*, void*) noexcept nogil><uintptr_t>addresses["cuGraphLaunch"]
    driver.event_record = <int (*)(void*, void*) noexcept nogil><uintptr_t>addresses["cuEventRecord"]
    driver.set_context = <int (*)(void*) noexcept nogil><uintptr_t>addresses["cuCtxSetCurrent"]
    driver.event_query = <int (*)(void*) noexcept><uintptr_t>addresses["cuEventQuery"]
    driver.stream_query = <int (*)(void*) noexcept><uintptr_t>addresses["cuStreamQuery"]
    driver.stream_wait = <int (*)(void*, void*, unsigned int) noexcept><uintptr_t>addresses["cuStreamWaitEvent"]
    driver.set_copy = <int (*)(void*, void*, const Memcpy3D*, void*) noexcept><uintptr_t>addresses[
        "cuGraphExecMemcpyNodeSetParams"
    ]


cdef class Probe:
    """A function that queries whether one event is complete.

    Args:
        event: the event; its `address` is the driver's handle, and 0 before its first record.

    Raises:
        RuntimeError: the driver returned an error. `Device.query` finds out what it means.
    """
    cdef void* _handle
    cdef object _event

    def __init__(self, event):
        self._event = event  # it owns the handle
        self._handle = NULL

    def __call__(self):
        cdef int status
        if self._handle == NULL:
            self._handle = <void*><uintptr_t>self._event.address
            if self._handle == NULL:
                return True  # in CUDA an event that was never recorded is complete
        status = driver.event_query(self._handle)
        if status == SUCCESS:
            return True
        if status == NOT_READY:
            return False
        raise RuntimeError(f"querying an event failed ({status})")


cdef class Submitter:
    """The compiled `CudaGraph.submit`, for three kinds of calls; it passes others to `fallback`.

    These are calls with all inputs and results in device memory, calls without copies, and calls with the sources and
    results of the last `remember`.

    Args:
        bare: the handle of the executable graph without copies.
        direct: the handle of the executable graph with a copy for each input and output; 0 if there is none.
        context: the handle of the context of the memory that the copies are in.
        ports: the copies of `direct`, inputs first: the node, the buffer's address and its size in bytes.
        inputs: how many of the ports are inputs.
        fallback: submits other calls; it has the same arguments as `submit`.
        fail: raises the error of a driver call, given a description of the call and the driver's status.
    """
    cdef void* _bare
    cdef void* _direct
    cdef void* _context
    cdef Port* _ports
    cdef Py_ssize_t _inputs, _count
    cdef object _fallback, _fail
    cdef object _copying, _sources, _results, _version
    cdef void* _remembered

    def __cinit__(self):
        self._ports = NULL

    def __init__(self, uintptr_t bare, uintptr_t direct, uintptr_t context, ports, Py_ssize_t inputs, fallback, fail):
        cdef Py_ssize_t i
        cdef Port* port
        self._bare = <void*>bare
        self._direct = <void*>direct
        self._context = <void*>context
        self._inputs = inputs
        self._count = len(ports)
        self._fallback = fallback
        self._fail = fail
        self._ports = <Port*>calloc(self._count + 1, sizeof(Port))
        if self._ports == NULL:
            raise MemoryError
        for i in range(self._count):
            node, buffer, nbytes = ports[i]
            port = &self._ports[i]
            port.node = <void*><uintptr_t>node
            port.is_input = i < inputs
            port.copy.src_memory_type = port.copy.dst_memory_type = ON_DEVICE
            if port.is_input:
                port.copy.dst_device = buffer
            else:
                port.copy.src_device = buffer
            port.copy.width = nbytes
            port.copy.height = port.copy.depth = 1

    def __dealloc__(self):
        free(self._ports)

    def submit(self, stream, origin, mark, inputs, sources, outputs, results, event):
        """See `Graph.submit`."""
        cdef int status
        cdef void* queue
        cdef void* caller
        cdef void* graph = self._bare
        cdef Py_ssize_t i, n
        n = len(results)
        if sources is self._sources and results is self._results and event.address and self._copying.version == self._version:
            graph = self._remembered
        elif event.address == 0 or (n == 0 and len(sources) > 0):
            return self._fallback(stream, origin, mark, inputs, sources, outputs, results, event)
        elif n:
            if self._direct == NULL or n != self._count - self._inputs or len(sources) != self._inputs:
                return self._fallback(stream, origin, mark, inputs, sources, outputs, results, event)
            graph = self._direct
            for i in range(self._count):
                tensor = sources[i] if i < self._inputs else results[i - self._inputs]
                if not self._point(&self._ports[i], tensor):
                    return self._fallback(stream, origin, mark, inputs, sources, outputs, results, event)
        queue = <void*><uintptr_t>stream.handle
        if origin is not None:
            caller = <void*><uintptr_t>origin.handle
            if driver.stream_query(caller) != SUCCESS:  # after an error too, which the next calls report
                origin.record(mark)
                stream.wait(mark)
        status = driver.graph_launch(graph, queue)
        if status != SUCCESS:
            self._fail("launching a graph", status)
        status = driver.event_record(<void*><uintptr_t>event.address, queue)
        if status != SUCCESS:
            self._fail("recording an event", status)

    def remember(self, copying, uintptr_t graph, sources, results):
        """Launch this graph for these sources and results, as long as the version of `copying` does not change."""
        self._copying, self._remembered = copying, <void*>graph
        self._sources, self._results, self._version = sources, results, copying.version

    def prepare(self, results):
        """See `Graph.prepare`."""
        cdef Py_ssize_t i
        if self._direct != NULL and len(results) == self._count - self._inputs:
            for i in range(self._inputs, self._count):
                self._point(&self._ports[i], results[i - self._inputs])

    cdef bint _point(self, Port* port, tensor) except -1:
        """Set a copy to this memory; False if the memory is not on the device."""
        cdef unsigned long long address = tensor.data_ptr()
        cdef int status
        if address == port.address:
            return True
        if not tensor.is_cuda:
            return False
        if port.is_input:
            port.copy.src_device = address
        else:
            port.copy.dst_device = address
        port.address = 0
        status = driver.set_copy(self._direct, port.node, &port.copy, self._context)
        if status != SUCCESS:
            self._fail("setting the address of a copy", status)
        port.address = address
        return True


cdef struct Copy:
    void* destination
    const void* source
    size_t nbytes

cdef enum:
    CREATED, STARTED, SUBMITTED

cdef struct Work:
    Copy* copies
    Py_ssize_t count
    void* graph
    void* stream
    void* event
    void* context
    int launched, recorded  # the driver's status
    int state
    Work* next

cdef struct Thread:
    PyThread_type_lock wake  # held; released once for each piece of work
    Work* work
    Thread* next

cdef struct Pool:
    PyThread_type_lock lock  # protects the fields below
    Work* first
    Work* last
    Thread* idle
    int count  # of threads
    bint is_ended

cdef Pool pool
#: Jobs whose memory threads or the device may still use.
_running = set()


cdef void _carry_out(Work* work) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(work.count):
        memcpy(work.copies[i].destination, work.copies[i].source, work.copies[i].nbytes)
    work.launched = driver.set_context(work.context)
    if work.launched == SUCCESS:
        work.launched = driver.graph_launch(work.graph, work.stream)
        work.recorded = driver.event_record(work.event, work.stream)  # after a failure too: part of it may be there
    store(&work.state, SUBMITTED)  # last: from here on the loop's thread owns it again


cdef void _serve(void* argument) noexcept nogil:
    cdef Thread* this = <Thread*>argument
    cdef Work* work = this.work
    while work != NULL:
        _carry_out(work)
        PyThread_acquire_lock(pool.lock, 1)
        work = pool.first
        if work != NULL:
            pool.first = work.next
            PyThread_release_lock(pool.lock)
        elif pool.is_ended:
            PyThread_release_lock(pool.lock)
        else:
            this.next = pool.idle
            pool.idle = this
            PyThread_release_lock(pool.lock)
            PyThread_acquire_lock(this.wake, 1)
            work = this.work
    PyThread_acquire_lock(pool.lock, 1)
    pool.count -= 1
    PyThread_release_lock(pool.lock)


cdef void _give(Work* work, int most) noexcept:
    """Give work to an idle thread, to a new one if there are fewer than `most`, or to the next that becomes idle."""
    cdef Thread* thread
    PyThread_acquire_lock(pool.lock, 1)
    thread = pool.idle
    if thread != NULL:
        pool.idle = thread.next
    elif pool.count < most:
        thread = _thread()
        if thread != NULL:
            thread.work = work
            pool.count += 1
            PyThread_release_lock(pool.lock)
            if PyThread_start_new_thread(_serve, thread) != <unsigned long>-1:
                return
            PyThread_acquire_lock(pool.lock, 1)
            pool.count -= 1
            thread = NULL
    if thread == NULL and pool.count == 0:
        PyThread_release_lock(pool.lock)
        _carry_out(work)  # no thread can be started
        return
    if thread == NULL:
        work.next = NULL
        if pool.first == NULL:
            pool.first = work
        else:
            pool.last.next = work
        pool.last = work
        PyThread_release_lock(pool.lock)
        return
    thread.work = work
    PyThread_release_lock(pool.lock)
    PyThread_release_lock(thread.wake)


cdef Thread* _thread() noexcept:
    cdef Thread* thread = <Thread*>calloc(1, sizeof(Thread))
    if thread != NULL:
        thread.wake = PyThread_allocate_lock()
        if thread.wake == NULL:
            free(thread)
            return NULL
        PyThread_acquire_lock(thread.wake, 1)
    return thread


def begin():
    """Make the pool of threads empty: at import, and in a child process, where the parent's threads do not exist."""
    memset(&pool, 0, sizeof(pool))
    pool.lock = PyThread_allocate_lock()
    if pool.lock == NULL:
        raise MemoryError
    _running.clear()


def end():
    """Make the threads end after their present work. Returns how many have not ended yet; may be called again."""
    cdef Thread* thread
    cdef int count
    PyThread_acquire_lock(pool.lock, 1)
    pool.is_ended = True
    while pool.idle != NULL:
        thread = pool.idle
        pool.idle = thread.next
        thread.work = NULL
        PyThread_release_lock(thread.wake)
    count = pool.count
    PyThread_release_lock(pool.lock)
    return count


begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=begin)


cdef class CopyJob:
    """A job of `aiotrt.runtime.copy_job` for a thread that needs no interpreter lock.

    Args:
        copies: pairs of contiguous arrays of equal size in bytes: the destination and the source.
        graph: the handle of the executable graph.
        stream: the handle of the stream to launch it on.
        event: the handle of the event to record after it.
        context: the handle of the context of all three.
        kept: an object that must not be freed before the work is complete.
        threads: how many threads there may be.
        fail: raises the error of a driver call, given a description of the call, the driver's status, and whether the end of
            the work cannot be detected.
        query: returns what `Device.query` returns for the event.

    Raises:
        ValueError, BufferError, TypeError: an array is not contiguous, or numpy cannot export it.
    """
    cdef Work _work
    cdef Py_buffer* _buffers
    cdef Py_ssize_t _exported
    cdef int _threads
    cdef object _kept, _fail, _query

    def __cinit__(self):
        memset(&self._work, 0, sizeof(self._work))
        self._buffers = NULL
        self._exported = 0

    def __init__(
        self, copies, uintptr_t graph, uintptr_t stream, uintptr_t event, uintptr_t context, kept, int threads, fail, query
    ):
        cdef Py_ssize_t i, count = len(copies)
        self._kept, self._threads, self._fail, self._query = kept, threads, fail, query
        self._work.graph, self._work.stream = <void*>graph, <void*>stream
        self._work.event, self._work.context = <void*>event, <void*>context
        self._work.copies = <Copy*>calloc(count + 1, sizeof(Copy))
        self._buffers = <Py_buffer*>calloc(2 * count + 1, sizeof(Py_buffer))
        if self._work.copies == NULL or self._buffers == NULL:
            raise MemoryError
        for i in range(count):
            destination, source = copies[i]
            PyObject_GetBuffer(destination, &self._buffers[self._exported], PyBUF_SIMPLE | PyBUF_WRITABLE)
            self._exported += 1
            PyObject_GetBuffer(source, &self._buffers[self._exported], PyBUF_SIMPLE)
            self._exported += 1
            if self._buffers[2 * i].len != self._buffers[2 * i + 1].len:
                raise ValueError("a copy between arrays of different sizes")
            self._work.copies[i].destination = self._buffers[2 * i].buf
            self._work.copies[i].source = self._buffers[2 * i + 1].buf
            self._work.copies[i].nbytes = self._buffers[2 * i].len
        self._work.count = count

    def __dealloc__(self):
        self._release()

    cdef void _release(self) noexcept:
        cdef Py_buffer* buffers = self._buffers
        cdef Py_ssize_t i, exported = self._exported
        self._buffers = NULL  # first: releasing a buffer may run any code, which may call this job again
        self._exported = 0
        for i in range(exported):
            PyBuffer_Release(&buffers[i])
        free(buffers)
        free(self._work.copies)
        self._work.copies = NULL

    cdef bint _is_submitted(self) noexcept:
        if load(&self._work.state) != SUBMITTED:
            return False
        if self._buffers != NULL:  # the first call since it was submitted
            self._release()
        return True

    cdef bint _has_ended(self) noexcept:
        """Whether the device no longer uses the job's memory. For jobs whose requests were abandoned."""
        if not self._is_submitted() or self._work.recorded != SUCCESS:
            return False
        return driver.event_query(self._work.event) == SUCCESS

    cdef void _end(self) noexcept:
        self._kept = None
        _running.discard(self)

    def __call__(self):
        """See `Job`."""
        cdef int status
        if not self._is_submitted():
            return False
        if self._work.launched == SUCCESS and self._work.recorded == SUCCESS:
            status = driver.event_query(self._work.event)
            if status == SUCCESS:
                self._end()
                return True
            if status == NOT_READY:
                return False
        raise RuntimeError("a launch by a thread failed, or its event could not be queried")

    def confirm(self):
        """See `Job`."""
        if not self._is_submitted():
            return False
        if self._work.recorded != SUCCESS:
            self._end()
            self._fail("recording an event", self._work.recorded, True)
        if not self._query():
            return False
        self._end()
        if self._work.launched != SUCCESS:
            self._fail("launching a graph", self._work.launched, False)
        return True

    def start(self):
        """See `Job`."""
        cdef CopyJob job
        if self._work.state != CREATED:
            return
        for job in list(_running):
            if job._has_ended():
                job._end()
        _running.add(self)  # a thread, and then the device, use its memory
        self._work.state = STARTED
        _give(&self._work, self._threads)
