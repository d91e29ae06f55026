"""The checks of `aiotrt verify`: that an engine and aiotrt work on this machine as documented.

Start reading at `checks`, which runs them in order; each other module contains the checks of one kind.
"""

from __future__ import annotations

from aiotrt.selftest.bench import Options
from aiotrt.selftest.checks import CHECKS, Progress, verify
from aiotrt.selftest.report import Outcome, Report, Result

__all__ = ["CHECKS", "Options", "Outcome", "Progress", "Report", "Result", "verify"]
