"""Which tests each tier selects, what is counted as left out, and the proof's table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import proof
from tests.tools import interruptible

ROOT = Path(__file__).parents[1]
TESTS = """
import asyncio

import pytest


@pytest.mark.asyncio
async def test_one_loop():
    pass


@pytest.mark.asyncio
@pytest.mark.every_loop
async def test_every_loop():
    pass


@pytest.mark.parametrize("group", range(3))
def test_seeds(group):
    pass


@pytest.mark.proof
def test_a_long_search():
    pass


@pytest.mark.serial
def test_time():
    pass


@pytest.mark.gpu
def test_a_gpu():
    pass
"""
LOOPS = 3 if sys.version_info < (3, 12) else 4


def selected(folder: Path, *arguments: str) -> str:
    (folder / "tests").mkdir(exist_ok=True)
    for name in ("pyproject.toml", "conftest.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests" / "test_some.py").write_text(TESTS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not serial", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.timeout(110)
def test_the_plain_run_has_each_body_once_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    text = selected(tmp_path, "-n", "1")
    assert f"{1 + LOOPS + 1} passed" in text
    assert re.search(r"^ +1 need an NVIDIA GPU", text, re.MULTILINE), text
    assert re.search(r"^ +1 measure time", text, re.MULTILINE), text
    assert re.search(rf"^ +{LOOPS - 1 + 2 + 1} belong to the full proof", text, re.MULTILINE), text


@pytest.mark.timeout(110)
def test_the_proof_has_everything(tmp_path: Path) -> None:
    text = selected(tmp_path, "--proof")
    assert f"{2 * LOOPS + 3 + 1} passed" in text
    assert "belong to the full proof" not in text


def test_the_proofs_table_says_what_passed_and_what_did_not(tmp_path: Path) -> None:
    good = proof.Stage("good", "prints a result", ("-c", "print('3 passed in 1 s')"))
    bad = proof.Stage("bad", "fails", ("-c", "print('1 failed'); raise SystemExit(1)"))
    silent = proof.Stage("silent", "says nothing", ("-c", ""))
    results = [proof.run(stage, tmp_path) for stage in (good, bad, silent)]
    assert [result.passed for result in results] == [True, False, False]
    assert [result.summary for result in results] == ["3 passed in 1 s", "1 failed", "no result; exit status 0"]
    text = proof.table(results)
    assert "| good | prints a result | passed | 3 passed in 1 s |" in text
    assert text.count("**FAILED**") == 2
    assert (tmp_path / "bad.log").read_text() == "1 failed\n"


def test_every_stage_of_the_proof_can_be_started() -> None:
    for stage in proof.STAGES:
        module = stage.arguments[1]
        assert stage.arguments[0] == "-m"
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists(), stage


def test_a_child_can_be_interrupted_where_its_parent_ignores_sigint() -> None:
    child = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    parent = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); subprocess.run(sys.argv[1:])"
    for command, can in (([sys.executable, "-c", child], "False"), (interruptible(sys.executable, "-c", child), "True")):
        run = subprocess.run([sys.executable, "-c", parent, *command], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == can
