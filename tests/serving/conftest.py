"""Which of these tests run, and on which loops.

`make gpu` runs with a machine's own Python, which need not have what serving needs: nothing here is for a GPU.

Serving is about sockets and processes, which are slow. The loops differ below it, where everything is tested on all of them.
So these tests run on asyncio's loop, and on uvloop in the full proof. Those that are about a loop's own business
(cancellation, clocks, the end of a task) are marked ``every_loop``.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable

import pytest

from tests.conftest import LOOPS

if any(
    importlib.util.find_spec(name) is None for name in ("fastapi", "httpx", "orjson", "prometheus_client", "tritonclient")
):
    collect_ignore_glob = ["test_*.py"]
elif any(importlib.util.find_spec(name) is None for name in ("grpc", "google.protobuf")):
    collect_ignore_glob = ["test_contents.py", "test_grpc*.py", "test_messages.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ray: starts a local Ray; skipped where it is not installed")


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return LOOPS if item.get_closest_marker("every_loop") else {name: LOOPS[name] for name in ("asyncio", "uvloop")}
