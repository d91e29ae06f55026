"""Who is compared, and the settings that each may choose among: those that the kind of server has, for this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

__all__ = ["MISSING", "OURS", "Contender", "contenders", "interpreter", "same_server", "versions"]

BATCH: Final = 8  # the largest
OURS: Final = "aiotrt"
MISSING: Final = "not installed"

_TOLD: Final = ("litserve", "fastapi", "starlette", "uvicorn", "httptools", "uvloop", "onnxruntime", "torch")
_ASK: Final = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Contender:
    """A kind of server.

    Attributes:
        name: what it is called in the results.
        program: of `benchmarks.serving_rivals`.
        is_batched: whether it makes batches.
        candidates: the settings to choose among.
    """

    name: str
    program: str
    is_batched: bool
    candidates: Sequence[Mapping[str, Any]]


def contenders(device: str) -> list[Contender]:
    """All of them.

    On the host the engine's threads and the runs at once share the processors: one run that uses all, one on each, or twice
    as many, so that one is always ready to go. On CUDA only the runs at once matter. The likeliest come first, for those who
    have no time to try all.
    """
    cores = len(os.sched_getaffinity(0))
    waits: tuple[float, ...]
    if device == "cuda":
        shared = [(1, 2), (1, 4), (1, 1), (1, 8)]
        processes, waits = [(1, 2), (1, 4), (1, 1)], (0.001, 0.005)
    else:
        shared = [(1, cores), (1, 2 * cores), (cores, 1), (cores, 2)]
        processes, waits = [(1, cores), (cores, 1)], (0.0, 0.002, 0.01)
    every, batch = {"sizes": list(range(1, BATCH + 1))}, {"max_batch": BATCH}
    plain = [{"threads": threads, "at_once": count} for threads, count in shared]
    slots = [{"threads": threads, "slots": count} for threads, count in shared]
    workers = [{"threads": threads, "workers": count} for threads, count in processes]
    spinning = [] if device == "cuda" else [{"threads": cores, "at_once": 1, "spin": True}]
    return [
        Contender("FastAPI, thread pool", "plain", is_batched=False, candidates=[*plain, *spinning]),
        Contender(
            "LitServe",
            "litserve",
            is_batched=False,
            candidates=[*workers, *({**one, "fast_queue": True} for one in workers)],
        ),
        Contender(
            "LitServe, batches",
            "litserve",
            is_batched=True,
            candidates=[{**one, **batch, "batch_timeout": wait} for one, wait in product(workers, waits)],
        ),
        Contender(OURS, "aiotrt", is_batched=False, candidates=slots),
        Contender(
            f"{OURS}, batches",
            "aiotrt",
            is_batched=True,
            # Padding to powers of two saves graphs, which cost nothing on the host, where padding does.
            candidates=[{**one, **batch, **(every if device == "host" else {})} for one in slots],
        ),
    ]


def versions(python: str = sys.executable) -> dict[str, str | None]:
    """What an interpreter has installed; None for what it has not.

    Raises:
        CalledProcessError: it cannot be asked.
        OSError: there is none.
    """
    asked = subprocess.run([python, "-c", _ASK, *_TOLD], check=True, capture_output=True, timeout=60)
    found: dict[str, str | None] = json.loads(asked.stdout)
    return found


def interpreter(asked: str | None) -> tuple[str, dict[str, str | None]] | None:
    """The interpreter that LitServe is to run in, by default this one, and what it has; None if that has no LitServe."""
    python = asked or sys.executable
    found = versions(python)
    return (python, found) if found["litserve"] else None


def same_server(*installed: Mapping[str, str | None]) -> dict[str, str]:
    """The parser and the loop that uvicorn is to use in every interpreter: the quicker ones where all have them."""
    return {
        "http": "httptools" if all(one["httptools"] for one in installed) else "h11",
        "loop": "uvloop" if all(one["uvloop"] for one in installed) else "asyncio",
    }
