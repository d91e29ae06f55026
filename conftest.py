"""Which tests a run selects, and a count of those that it leaves out, with the reason.

There are two tiers. A plain run is what a person needs to trust a change: every test body once, on asyncio's own loop.
`--proof` runs everything: each body on every loop and under every group of seeds, and tests marked `proof`. A body runs on
all loops in both tiers where its module is marked `every_loop`, because there the loop matters.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

GPU: Final = "need an NVIDIA GPU: make gpu-tests, on a machine that has one"
PROOF: Final = "belong to the full proof (other loops, other seeds, long searches): make proof, or pytest --proof"
INTERPRETED: Final = "change code objects of the runtime: run them without AIOTRT_IMPL=native"
SERIAL: Final = "measure time and run alone, after or before this"
OTHER: Final = "deselected by -m or -k"

#: Of the seeds of a law, or the groups of them, so many are in the plain run.
GROUPS: Final = 1

# Tests replace functions and code objects, which compiled modules do not allow: plain Python runs unless asked otherwise.
# This line must run before anything imports aiotrt.
os.environ.setdefault("AIOTRT_IMPL", "python")

# Tests hold streams, and what is in another stream must not wait for them in the same hardware queue, of which there are 8.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

_deselected = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="run everything: all loops, all seeds, tests marked proof")


def pytest_report_header() -> str:
    implementation = os.environ["AIOTRT_IMPL"] or "native where it is compiled"
    return f"aiotrt: {implementation}; choose with AIOTRT_IMPL=native or AIOTRT_IMPL=python"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For a run of serial tests alone, skip the import of all modules that have none."""
    if config.option.markexpr.startswith("serial") and collection_path.name.startswith("test_"):
        return "mark.serial" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        counts = items[0].config.stash.setdefault(_deselected, Counter())
        counts.update(_reason(item) for item in items)


@pytest.hookimpl(trylast=True)  # after -m and -k, so that torch is asked only when a gpu test is about to run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.proof:
        left = [item for item in items if _is_proof(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not _is_proof(item)]
    if os.environ["AIOTRT_IMPL"] != "python":
        left = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("interpreted")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch sees none"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of a process of pytest-xdist, where the collecting is done
    if output is not None:
        counts: Counter[str] = session.config.stash.get(_deselected, Counter())
        output["deselected"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are processors, because tests of servers and of subprocesses wait a fifth of the time."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counts = getattr(node, "workeroutput", {}).get("deselected")
    if counts is not None:  # every process collects the same
        node.config.stash[_deselected] = Counter(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(_deselected, Counter())
    if counts:
        terminalreporter.section("tests not run")
        for reason in (GPU, SERIAL, INTERPRETED, PROOF, OTHER):
            if counts[reason]:
                terminalreporter.line(f"{counts[reason]:6} {reason}")


def _reason(item: pytest.Item) -> str:
    expression = item.config.option.markexpr
    if item.get_closest_marker("gpu") and "not gpu" in expression:
        return GPU
    if _is_proof(item) and not item.config.option.proof:
        return PROOF
    if item.get_closest_marker("interpreted") and os.environ["AIOTRT_IMPL"] != "python":
        return INTERPRETED
    return SERIAL if item.get_closest_marker("serial") and "not serial" in expression else OTHER


def _is_proof(item: pytest.Item) -> bool:
    """Whether the item is in the full proof only."""
    if item.get_closest_marker("proof"):
        return True
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if any(isinstance(parameters.get(name), int) and parameters[name] >= GROUPS for name in ("group", "seed")):
        return True
    loop = _loop_of(item)
    return loop is not None and loop != "asyncio" and not item.get_closest_marker("every_loop")


def _loop_of(item: pytest.Item) -> str | None:
    """The name of the item's event loop, of `tests.conftest.LOOPS`."""
    factory = getattr(getattr(item, "callspec", None), "params", {}).get("_asyncio_loop_factory")
    if factory is None:
        return None
    from tests.conftest import LOOPS

    return next((name for name, made in LOOPS.items() if made is factory), None)
