# Types for the compiled build. programs.py is the source, and runs without this file.

cdef class Program:
    cdef object __weakref__
    cdef public object _closers, _device, _steps, _stream, estimate, fallbacks, graph, inputs, key, names, outputs, spare
    cdef public list input_views, makers, output_views, staged_inputs, staged_outputs
    cdef public bint blocking, captured
    cdef public long slot, used
    cdef public object nbytes

cdef class ProgramCache:
    cdef object __weakref__
    cdef public dict _holders, _programs
    cdef public object max_bytes, max_entries, nbytes
    cdef public long uses
