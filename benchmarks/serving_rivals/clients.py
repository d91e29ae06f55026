"""Processes that send requests to one server together, so that the client is not what limits it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from benchmarks.measure import run_on
from benchmarks.serving_rivals.asker import Asker
from benchmarks.serving_rivals.known import Known

__all__ = ["Asked", "Clients", "Load"]

WARM: Final = 8  # connections before a load that has none of its own

_knowledge: list[Known] = []  # in a client's process, one


@dataclass(frozen=True)
class Load:
    """Requests from so many connections for so long, or at these moments; in seconds."""

    name: str
    seconds: float = 0.0
    connections: int = 0
    moments: Sequence[float] = ()

    def share(self, index: int, count: int) -> Load:
        """One of `count` equal parts."""
        connections = len(range(index, self.connections, count))
        return Load(self.name, self.seconds, connections, self.moments[index::count])


@dataclass(frozen=True)
class Asked:
    """What clients saw.

    Attributes:
        took: seconds until each answer.
        end: when the last answer came, by `time.perf_counter`.
        cpu: each process's processor seconds.
        wrong: how many answers were not what they must be, by what is wrong.
    """

    took: list[float]
    end: float
    cpu: list[float]
    wrong: Counter[str]


class Clients:
    """A process for each four processors, and at most four.

    Args:
        known: the right answers.
        loop: the event loop's name.
    """

    def __init__(self, known: Known, loop: str) -> None:
        count = max(1, min(4, len(os.sched_getaffinity(0)) // 4))
        spawn = multiprocessing.get_context("spawn")
        # A pool for each process, so that each has exactly one share of a load.
        self._pools = [ProcessPoolExecutor(1, spawn, _learn, (known,)) for _ in range(count)]
        self._loop = loop

    def __enter__(self) -> Self:
        for started in [pool.submit(len, ()) for pool in self._pools]:
            started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown()

    def ask(self, url: str, load: Load, start: float) -> Callable[[], Asked]:
        """Warm the server up until `start`, by `time.perf_counter`, which all processes share; then put the load on it.

        Returns:
            What waits for the answers. It raises a RuntimeError if a process ended.
        """
        shares = [load.share(i, len(self._pools)) for i in range(len(self._pools))]
        shares = [share for share in shares if share.connections or share.moments]
        warm = max(1, (load.connections or WARM) // len(shares))
        futures = [
            pool.submit(_ask, self._loop, url, share, share.connections or warm, start, i << 32)
            for i, (pool, share) in enumerate(zip(self._pools, shares, strict=False))
        ]

        def result() -> Asked:
            found = [future.result() for future in futures]
            return Asked(
                [seconds for one in found for seconds in one.took],
                max(one.end for one in found),
                [seconds for one in found for seconds in one.cpu],
                sum((one.wrong for one in found), Counter()),
            )

        return result


def _learn(known: Known) -> None:
    _knowledge.append(known)


def _ask(loop: str, url: str, load: Load, warm: int, start: float, first: int) -> Asked:
    wrong: Counter[str] = Counter()

    async def main() -> Asked:
        async with Asker(url, _knowledge[0], wrong, first) as asker:
            await asker.closed(warm, start)
            began = time.process_time()
            if load.moments:
                took = await asker.open(load.moments, start)
            else:
                took = await asker.closed(load.connections, start + load.seconds)
            return Asked(took, time.perf_counter(), [time.process_time() - began], wrong)

    return run_on(loop, main())
