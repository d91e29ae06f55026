"""Statements of the runtime whose removal no law finds, and why: see `seeded_defects`.

By file, function, text and the how manieth of those that are alike there, counted from 0.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EXPLAINED"]

EXPLAINED: Final[dict[tuple[str, str, str, int], str]] = {}
