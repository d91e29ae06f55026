"""Testing without a GPU: a simulated one in virtual time that finds races, and faults at will."""
