"""The table of the eighteen defects in docs/internals/verification.md names tests that exist, in every form."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "internals" / "verification.md"


def rows() -> dict[int, list[str]]:
    """The cells of each defect's row, by its number."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| B\d+ \|", line)]
    return {int(row[0].strip("B ")): row for row in cells}


@cache
def defined(*files: str) -> frozenset[str]:
    """The functions that these files define."""
    nodes = [node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))]
    return frozenset(node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


MODELS = "tests/testing/test_origin_defects.py", "tests/testing/test_origin_habits.py"
CLEAN = ("tests/test_defects.py",)
GPU = "tests/gpu/test_cuda_laws.py", "tests/gpu/test_cuda_defects.py"


def test_all_eighteen_are_there() -> None:
    assert list(rows()) == list(range(1, 19))


@pytest.mark.parametrize("number", range(1, 19))
def test_each_form_has_a_test_that_exists(number: int) -> None:
    row = rows()[number]
    for cell, files in ((row[3], MODELS), (row[5], CLEAN), (row[6], GPU)):
        names = re.findall(r"`(\w+)`", cell)
        assert names, f"B{number} names no test of {files}"
        for name in names:
            assert name in defined(*files), f"{name} is in none of {files}"
            assert re.search(rf"(^|_)b{number}_", name), f"{name} is not a test of B{number}"


def test_no_test_of_a_defect_is_missing_from_the_table() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    tests = {name for name in defined(*MODELS, *CLEAN, *GPU) if re.match(r"(test_)?b\d+_", name)}
    assert tests - named == {"test_b3_a_thread_that_was_prepared_breaks_nothing"}  # of the simulated GPU, not of aiotrt
