"""The command that installs an extra, for error messages."""

from __future__ import annotations

from pathlib import Path

__all__ = ["install_hint"]

_PARENT = Path(__file__).parents[1]


def install_hint(extra: str) -> str:
    """Return the command that installs an extra: for the published package, or for a checkout where aiotrt runs from one."""
    checkout = (_PARENT / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install 'aiotrt[{extra}]'"
