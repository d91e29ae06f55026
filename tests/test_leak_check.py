"""The leak check of every test finds a leak made on purpose, in the first module of a run and in the last."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Leaves a model open, a lease without its end and a hub with a user, one in each test; and one test that leaks nothing.
LEAKS = """
import asyncio
import socket

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.completion.hub import Hub


def opened():
    return aiotrt.load(lambda x: x + 1, device="host", warmup=np.zeros(3, np.float32))


def test_a_model_is_never_closed():
    async def main():
        cycle = [await opened()]
        cycle.append(cycle)  # found by a collection alone

    asyncio.run(main())


def test_a_socket_in_a_cycle_is_never_closed():
    cycle = [socket.socket()]
    cycle.append(cycle)


hubs = []


def test_a_hub_keeps_a_user():
    async def main():
        hubs.append(Hub.acquire())  # else the hub goes with its loop, and nothing is left

    asyncio.run(main())


def test_nothing_is_leaked():
    async def main():
        async with opened() as model:
            await model(np.zeros(3, np.float32))

    asyncio.run(main())
"""
#: Modules between the first and the last: real ones, so that there is something to freeze.
BETWEEN = ("test_prediction.py", "test_waiters.py")
LEAKING = ["test_a_hub_keeps_a_user", "test_a_model_is_never_closed", "test_a_socket_in_a_cycle_is_never_closed"]


@pytest.mark.timeout(120)
def test_leaks_are_found_in_the_first_module_and_in_the_last(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("pyproject.toml", "conftest.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in BETWEEN:
        shutil.copy(ROOT / "tests" / name, tests)
    for name in ("test_a_first.py", "test_z_last.py"):
        (tests / name).write_text(LEAKS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not gpu", "-n", "0", "-rEfp", "-q"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    for name in ("test_a_first.py", "test_z_last.py"):
        found = re.findall(rf"^ERROR tests/{name}::(\w+)", run.stdout, re.MULTILINE)
        assert sorted(found) == LEAKING, run.stdout
        assert f"PASSED tests/{name}::test_nothing_is_leaked" in run.stdout, run.stdout
    assert run.returncode == 1, run.stdout
    assert len(re.findall(r"^ERROR", run.stdout, re.MULTILINE)) == 2 * len(LEAKING), run.stdout
    assert not re.search(r"^FAILED", run.stdout, re.MULTILINE), run.stdout
