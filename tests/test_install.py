"""The install commands in error messages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from aiotrt import _install
from aiotrt._install import install_hint

ROOT = Path(__file__).parents[1]


def test_a_checkout_and_a_package_have_their_own_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_install, "_PARENT", ROOT)
    assert install_hint("serving") == "pip install -e '.[serving]'"
    monkeypatch.setattr(_install, "_PARENT", tmp_path)
    assert install_hint("serving") == "pip install 'aiotrt[serving]'"


def test_hints_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for path in (ROOT / "aiotrt").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"install_hint\(['\"](\w+)['\"]\)", source)}
    assert named
    assert named <= extras.keys()
    assert not [source for source in sources if re.search(r"Error\(.*pip install 'aiotrt", source)], "use install_hint"
