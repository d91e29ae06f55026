# cython: language_level=3, boundscheck=False, wraparound=False
"""The compiled build's calls of the driver and of Linux.

The driver's functions are a table of pointers that is filled at run time, so that building takes no CUDA, and a test can fill
the table with functions of its own.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from .core cimport Slot, System


cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    int CLOCK_MONOTONIC

cdef extern from "<sys/timerfd.h>" nogil:
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int, int)
    int timerfd_settime(int, int, const itimerspec*, itimerspec*)
    int TFD_NONBLOCK
    int TFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void*, size_t)
    int c_close "close"(int)


cdef struct Memcpy3D:  # the driver's CUDA_MEMCPY3D
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

cdef enum:
    SUCCESS = 0
    NOT_READY = 600
    MEMORY_TYPE_DEVICE = 2
    EVENT_DISABLE_TIMING = 2

cdef struct Table:
    int (*graph_launch)(void*, void*) noexcept nogil
    int (*event_create)(void**, unsigned int) noexcept nogil
    int (*event_destroy)(void*) noexcept nogil
    int (*event_record)(void*, void*) noexcept nogil
    int (*event_query)(void*) noexcept nogil
    int (*context_current)(void**) noexcept nogil
    int (*set_copy)(void*, void*, const Memcpy3D*, void*) noexcept nogil

cdef Table driver

#: The driver's functions that `fill` needs.
NAMES = (
    "cuGraphLaunch", "cuEventCreate", "cuEventDestroy_v2", "cuEventRecord", "cuEventQuery", "cuCtxGetCurrent",
    "cuGraphExecMemcpyNodeSetParams",
)


def fill(addresses):
    """Fill the table: addresses by the driver's names."""
    driver.graph_launch = <int (*)(void*, void*) noexcept nogil><size_t>addresses["cuGraphLaunch"]
    driver.event_create = <int (*)(void**, unsigned int) noexcept nogil><size_t>addresses["cuEventCreate"]
    driver.event_destroy = <int (*)(void*) noexcept nogil><size_t>addresses["cuEventDestroy_v2"]
    driver.event_record = <int (*)(void*, void*) noexcept nogil><size_t>addresses["cuEventRecord"]
    driver.event_query = <int (*)(void*) noexcept nogil><size_t>addresses["cuEventQuery"]
    driver.context_current = <int (*)(void**) noexcept nogil><size_t>addresses["cuCtxGetCurrent"]
    driver.set_copy = <int (*)(void*, void*, const Memcpy3D*, void*) noexcept nogil><size_t>addresses[
        "cuGraphExecMemcpyNodeSetParams"
    ]


cdef int failed(str doing, int status) except -1:
    raise RuntimeError(f"{doing}: the driver answered {status}")


cdef class CudaSlot(Slot):
    """A slot on CUDA."""
    cdef void* graph
    cdef void* stream
    cdef void* event
    cdef void* context
    cdef void* node_in
    cdef void* node_out
    cdef Memcpy3D copy_in
    cdef Memcpy3D copy_out

    def __init__(self, double estimate, size_t graph, size_t stream):
        Slot.__init__(self, estimate)
        if driver.graph_launch == NULL:
            raise RuntimeError("the table of the driver's functions is empty: call fill() first")
        self.graph = <void*>graph
        self.stream = <void*>stream
        cdef int status = driver.event_create(&self.event, EVENT_DISABLE_TIMING)
        if status == SUCCESS:
            status = driver.context_current(&self.context)
        if status != SUCCESS:
            failed("creating an event", status)

    def set_copies(
        self, size_t node_in, size_t node_out, unsigned long long into, unsigned long long out_of, size_t bytes_in,
        size_t bytes_out,
    ):
        """Name the graph's copies: nodes, the graph's own addresses, sizes."""
        memset(&self.copy_in, 0, sizeof(Memcpy3D))
        memset(&self.copy_out, 0, sizeof(Memcpy3D))
        self.node_in = <void*>node_in
        self.node_out = <void*>node_out
        self.copy_in.src_memory_type = self.copy_in.dst_memory_type = MEMORY_TYPE_DEVICE
        self.copy_out.src_memory_type = self.copy_out.dst_memory_type = MEMORY_TYPE_DEVICE
        self.copy_in.dst_device = into
        self.copy_out.src_device = out_of
        self.copy_in.width = bytes_in
        self.copy_out.width = bytes_out
        self.copy_in.height = self.copy_in.depth = self.copy_out.height = self.copy_out.depth = 1

    cpdef int launch(self) except -1:
        cdef int status = driver.graph_launch(self.graph, self.stream)
        if status == SUCCESS:
            status = driver.event_record(self.event, self.stream)
        if status != SUCCESS:
            failed("launching", status)
        return 0

    cpdef int copy_and_launch(self, unsigned long long source, unsigned long long destination) except -1:
        cdef int status = SUCCESS
        if self.copy_in.src_device != source:
            self.copy_in.src_device = source
            status = driver.set_copy(self.graph, self.node_in, &self.copy_in, self.context)
        if status == SUCCESS and self.copy_out.dst_device != destination:
            self.copy_out.dst_device = destination
            status = driver.set_copy(self.graph, self.node_out, &self.copy_out, self.context)
        if status != SUCCESS:
            failed("setting a copy's address", status)
        return self.launch()

    cpdef bint query(self) except -1:
        cdef int status = driver.event_query(self.event)
        if status == SUCCESS:
            return True
        if status != NOT_READY:
            failed("polling an event", status)
        return False

    def close(self):
        if self.event != NULL:
            driver.event_destroy(self.event)
            self.event = NULL


cdef class LinuxSystem(System):
    """The monotonic clock and a timerfd."""
    cdef public int descriptor

    def __init__(self):
        self.descriptor = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self.descriptor < 0:
            raise OSError("timerfd_create failed")

    cpdef double now(self) except -1:
        cdef timespec time
        clock_gettime(CLOCK_MONOTONIC, &time)
        return time.tv_sec + 1e-9 * time.tv_nsec

    cpdef int set_timer(self, double seconds) except -1:
        cdef itimerspec spec
        cdef long long nanoseconds = <long long>(seconds * 1e9)
        if nanoseconds < 1:  # 0 would disarm it
            nanoseconds = 1
        memset(&spec, 0, sizeof(spec))
        spec.it_value.tv_sec = nanoseconds // 1000000000
        spec.it_value.tv_nsec = nanoseconds % 1000000000
        return timerfd_settime(self.descriptor, 0, &spec, NULL)

    cpdef bint clear(self) except -1:
        cdef uint64_t count
        return read(self.descriptor, &count, sizeof(count)) == sizeof(count)

    def close(self):
        c_close(self.descriptor)
