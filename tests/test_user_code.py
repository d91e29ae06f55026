"""What type checkers say of a user's code: as much as there is to know, and no more."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = Path(__file__).parent / "user_code.py"


def expected() -> list[int]:
    return [number for number, line in enumerate(CODE.read_text().splitlines(), 1) if line.endswith("# E")]


@pytest.mark.proof  # it takes 20 s, and pyright knows the same
def test_mypy_knows_the_types(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), str(CODE)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found = re.findall(r"user_code\.py:(\d+): error: (.*)", run.stdout)
    assert sorted({int(number) for number, _ in found}) == expected(), run.stdout + run.stderr
    assert "errors in 1 file" in run.stdout, run.stdout


def test_pyright_knows_the_types(tmp_path: Path) -> None:
    # basedpyright is pyright, and comes with all that it needs; pyright fetches itself when it is first run.
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed")
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(json.dumps({"include": [str(CODE)], "typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}))
    command = [program, "--outputjson", "--pythonpath", sys.executable, "--project", str(settings)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found = [one for one in json.loads(run.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    assert sorted({one["range"]["start"]["line"] + 1 for one in found}) == expected(), run.stdout
