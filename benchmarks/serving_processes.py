"""Servers in processes of their own: to start them, to wait for them, and what they use, seen from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "Used", "free_port", "resident", "started", "used"]

ROOT: Final = Path(__file__).parent.parent
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Used:
    """What a process and its children have used so far: processor seconds, and bytes of memory now, shared ones in part."""

    cpu: float
    memory: int


@contextlib.contextmanager
def started(
    words: Sequence[object], log: Path, *, python: str = sys.executable, cuda: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with these arguments, in the checkout; it and its children are ended after.

    Args:
        words: the arguments.
        log: where its output goes.
        python: the interpreter.
        cuda: whether it may see GPUs.
    """
    few = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | few | {"PYTHONUNBUFFERED": "1"} | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    with log.open("ab") as output:
        process = subprocess.Popen(
            [python, *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """One that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def resident(pid: int) -> int:
    """Bytes of memory of this process, shared ones too; quicker to read than `used`."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def used(pid: int) -> Used:
    """By this process and all it has started."""
    cpu, memory = 0.0, 0
    for one in _family(pid):
        with contextlib.suppress(OSError):  # it may just have ended
            fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / _TICKS
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii")
            memory += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    return Used(cpu, memory)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _family(int(child))
