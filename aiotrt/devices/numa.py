"""The processors near a GPU, on a machine with several NUMA nodes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["near", "stay_near"]


def near(bus_id: str, root: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """Return the processors on the NUMA node of a PCI device; none if the system does not know them.

    Args:
        bus_id: the device's PCI bus id, such as ``0000:3b:00.0``.
        root: the folder in which the system describes its PCI devices.
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
    """Bind the calling thread to those of these processors that it may use.

    Memory is then allocated near them too, because it is on the node of the thread that uses it first. Nothing changes if
    the thread may use none of them, or if the system lacks the call or refuses it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        allowed = os.sched_getaffinity(0) & processors
        if allowed:
            os.sched_setaffinity(0, allowed)
