"""The names of a model's outputs, and the container of its results."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

__all__ = ["OutputNames"]


class OutputNames:
    """The names of a model's outputs, and the container they come in: bare when there is one, else a named tuple."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        # rename: engine tensor names need not be Python identifiers; those that are not stay reachable by position.
        self._container: Any = namedtuple("Outputs", self.names, rename=True)  # type: ignore[misc]  # noqa: PYI024

    def pack(self, values: Sequence[object]) -> Any:
        """The results as the caller sees them."""
        return values[0] if len(values) == 1 else self._container._make(values)
