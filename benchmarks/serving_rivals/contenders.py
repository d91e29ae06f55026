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
    as many, so that one is always ready to go. On CUDA only the runs at once matter, each with a graph of its own, and the
    largest batch. The likeliest come first, for those who have no time to try all.
    """
    if device == "cuda":
        return _on_cuda()
    cores = len(os.sched_getaffinity(0))
    shared = [(1, cores), (1, 2 * cores), (cores, 1), (cores, 2)]
    workers = [{"threads": threads, "workers": count} for threads, count in shared[::2]]
    slots = [{"threads": threads, "slots": count} for threads, count in shared]
    plain = [{"threads": threads, "at_once": count} for threads, count in shared]
    waits = [{"max_batch": BATCH, "batch_timeout": wait} for wait in (0.0, 0.002, 0.01)]
    every = {"max_batch": BATCH, "sizes": list(range(1, BATCH + 1))}  # padding saves graphs, of which there are none here
    return _field(
        [*plain, {"threads": cores, "at_once": 1, "spin": True}],
        [*workers, *({**one, "fast_queue": True} for one in workers)],
        [{**one, **wait} for one, wait in product(workers, waits)],
        slots,
        [{**one, **every} for one in slots],
    )


def _on_cuda() -> list[Contender]:
    workers = [{"workers": count, "fast_queue": fast} for count, fast in ((2, True), (1, True), (4, True), (2, False))]
    batches = [(1, 16, 0.001, True), (2, 8, 0.001, True), (1, 32, 0.002, True), (2, 16, 0.001, False)]
    return _field(
        [{"at_once": 4}, {"at_once": 8}, {"at_once": 4, "blocks": True}, {"at_once": 2}],
        workers,
        [dict(zip(("workers", "max_batch", "batch_timeout", "fast_queue"), one, strict=True)) for one in batches],
        [{"slots": slots} for slots in (3, 4, 2, 8)],
        [{"slots": slots, "max_batch": most} for slots, most in ((2, 16), (3, 8), (2, 32), (3, 16))],
    )


def _field(*candidates: Sequence[Mapping[str, Any]]) -> list[Contender]:
    kinds = [
        ("FastAPI, thread pool", "plain", False),
        ("LitServe", "litserve", False),
        ("LitServe, batches", "litserve", True),
        (OURS, "aiotrt", False),
        (f"{OURS}, batches", "aiotrt", True),
    ]
    return [Contender(*kind, candidates=own) for kind, own in zip(kinds, candidates, strict=True)]


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
