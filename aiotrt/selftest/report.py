"""What checks answer: passed, failed or not applicable, with the reason; and the report that is made of the answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CheckFailed", "Finding", "NotApplicable", "Outcome", "Report", "Result"]


class Outcome(enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class CheckFailed(Exception):
    """What was promised does not hold.

    Args:
        detail: what was expected, and what came.
        figures: what was measured all the same.
    """

    def __init__(self, detail: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.figures = dict(figures or {})


class NotApplicable(CheckFailed):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What a check that passed has to say.

    Attributes:
        detail: a line for people.
        figures: what was measured, for programs: what JSON can hold.
    """

    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How one check ended.

    Attributes:
        name: the check's.
        outcome: how it ended.
        detail: a line: what was found, or why it failed or does not apply.
        seconds: how long it took.
        figures: what was measured.
    """

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    figures: Mapping[str, Any]


@dataclass
class Report:
    """All results of one run.

    Attributes:
        file: what was verified.
        seed: of the random inputs.
        results: in the order in which the checks ran.
    """

    file: str
    seed: int
    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(result.outcome is not Outcome.FAILED for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
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
