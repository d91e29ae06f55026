"""A stand-in for the CUDA driver: the functions that the compiled build calls, with a log, and answers that a test sets."""
