"""The outcomes of checks with their reasons, and the report of all outcomes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CheckFailed", "Finding", "NotApplicable", "Outcome", "Report", "Result"]


class Outcome(enum.Enum):
    """The outcome of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class CheckFailed(Exception):
    """Raised by a check that fails.

    Args:
        detail: what was expected, and what occurred.
        figures: measurements up to the failure.
    """

    def __init__(self, detail: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.figures = dict(figures or {})


class NotApplicable(CheckFailed):
    """Raised by a check that does not apply; the message is the reason."""


@dataclass(frozen=True)
class Finding:
    """The findings of a check that passed.

    Attributes:
        detail: a line of text.
        figures: measurements for programs, in JSON types.
    """

    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        name: of the check.
        outcome: passed, failed or not applicable.
        detail: a line of text: the findings, or why it failed or does not apply.
        seconds: its duration.
        figures: measurements, in JSON types.
    """

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    figures: Mapping[str, Any]


@dataclass
class Report:
    """All results of one verification.

    Attributes:
        file: the verified file.
        seed: of the random inputs.
        results: in the order in which the checks ran.
    """

    file: str
    seed: int
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.outcome is not Outcome.FAILED for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON types."""
        return {
            "file": self.file,
            "passed": self.passed,
            "seed": self.seed,
            "checks": [
                {
                    "name": result.name,
                    "outcome": result.outcome.value,
                    "detail": result.detail,
                    "seconds": round(result.seconds, 3),
                    "figures": dict(result.figures),
                }
                for result in self.results
            ],
        }
