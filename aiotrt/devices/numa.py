"""Where a GPU is attached: the processors that are near it, on a machine with several NUMA nodes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["near", "stay_near"]


def near(bus_id: str, root: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """Return the processors on the NUMA node of a PCI device; none where the system does not say.

    Args:
        bus_id: such as ``0000:3b:00.0``.
        root: where the system describes its devices.
    """
    try:
        ranges = (root / bus_id.lower() / "local_cpulist").read_text().strip()
        found: set[int] = set()
        for one in filter(None, ranges.split(",")):
            first, _, last = one.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return set()
    return found


def stay_near(processors: set[int]) -> None:
    """Keep the calling thread, and so the memory that it is the first to use, on those of these that it may use.

    Nothing changes where that is none of them, or where the system has no such call or refuses it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        allowed = os.sched_getaffinity(0) & processors
        if allowed:
            os.sched_setaffinity(0, allowed)
