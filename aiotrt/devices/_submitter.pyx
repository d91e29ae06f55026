"""The compiled form of `CudaGraph.submit` and of an event's query.

The driver's functions are a table of pointers that `fill` fills at run time, so that building takes no CUDA, and a test can
fill the table with functions of its own. Nothing here gives up the interpreter lock: no call blocks, and another thread that
takes the lock meanwhile may keep it for milliseconds.
"""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free


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
    unsigned long long address  # of the caller's memory that the node names; 0 where nobody knows

cdef enum:
    SUCCESS = 0
    NOT_READY = 600
    ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE

cdef struct Table:
    int (*graph_launch)(void*, void*) noexcept
    int (*event_record)(void*, void*) noexcept
    int (*event_query)(void*) noexcept
    int (*stream_query)(void*) noexcept
    int (*stream_wait)(void*, void*, unsigned int) noexcept
    int (*set_copy)(void*, void*, const Memcpy3D*, void*) noexcept

cdef Table driver

#: The driver's functions that `fill` needs.
NAMES = (
    "cuGraphLaunch", "cuEventRecord", "cuEventQuery", "cuStreamQuery", "cuStreamWaitEvent", "cuGraphExecMemcpyNodeSetParams",
)


def fill(addresses):
    """Fill the table.

    Args:
        addresses: of the functions, by the names in `NAMES`.
    """
    driver.graph_launch = <int (*)(void*, void*) noexcept><uintptr_t>addresses["cuGraphLaunch"]
    driver.event_record = <int (*)(void*, void*) noexcept><uintptr_t>addresses["cuEventRecord"]
    driver.event_query = <int (*)(void*) noexcept><uintptr_t>addresses["cuEventQuery"]
    driver.stream_query = <int (*)(void*) noexcept><uintptr_t>addresses["cuStreamQuery"]
    driver.stream_wait = <int (*)(void*, void*, unsigned int) noexcept><uintptr_t>addresses["cuStreamWaitEvent"]
    driver.set_copy = <int (*)(void*, void*, const Memcpy3D*, void*) noexcept><uintptr_t>addresses[
        "cuGraphExecMemcpyNodeSetParams"
    ]


cdef class Probe:
    """Asks one event whether it is complete.

    Args:
        event: it; its `address` is the driver's handle, and 0 before its first record.

    Raises:
        RuntimeError: the driver answered neither yes nor no. `Device.query` says what that means.
    """
    cdef void* _handle
    cdef object _event

    def __init__(self, event):
        self._event = event  # which owns the handle
        self._handle = NULL

    def __call__(self):
        cdef int status
        if self._handle == NULL:
            self._handle = <void*><uintptr_t>self._event.address
            if self._handle == NULL:
                return True  # as CUDA says of an event that was never recorded
        status = driver.event_query(self._handle)
        if status == SUCCESS:
            return True
        if status == NOT_READY:
            return False
        raise RuntimeError(f"querying an event failed ({status})")


cdef class Submitter:
    """What `CudaGraph.submit` does, for calls with all inputs and results in device memory, or without copies.

    Args:
        bare: the executable graph without copies.
        direct: the one with a copy for each input and output; 0 if there is none.
        context: whose memory the copies are in.
        ports: of `direct`, inputs first: the node, the buffer's address and its size in bytes.
        inputs: how many of the ports are inputs.
        fallback: submits what this does not, with the same arguments.
        fail: raises the error of a driver's status, given what was done.
    """
    cdef void* _bare
    cdef void* _direct
    cdef void* _context
    cdef Port* _ports
    cdef Py_ssize_t _inputs, _count
    cdef object _fallback, _fail

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
        if event.address == 0 or (n == 0 and len(sources) > 0):
            return self._fallback(stream, origin, mark, inputs, sources, outputs, results, event)
        if n:
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
            if driver.stream_query(caller) != SUCCESS:  # any other answer is dealt with by what is done instead
                origin.record(mark)
                stream.wait(mark)
        status = driver.graph_launch(graph, queue)
        if status != SUCCESS:
            self._fail("launching a graph", status)
        status = driver.event_record(<void*><uintptr_t>event.address, queue)
        if status != SUCCESS:
            self._fail("recording an event", status)

    def prepare(self, results):
        """See `Graph.prepare`."""
        cdef Py_ssize_t i
        if self._direct != NULL and len(results) == self._count - self._inputs:
            for i in range(self._inputs, self._count):
                self._point(&self._ports[i], results[i - self._inputs])

    cdef bint _point(self, Port* port, tensor) except -1:
        """Copy from or to this memory; False if a copy of this kind cannot."""
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
