"""The folder of generated reports, at the top of the checkout. Git ignores it and `make clean` removes it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["REPORTS", "write_report"]

REPORTS: Final = Path(__file__).parents[2] / "reports"


def write_report(path: Path, text: str) -> None:
    """Write a report whole, and create its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
