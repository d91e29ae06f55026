"""What `aiotrt verify` checks: that an engine, this machine and aiotrt do together what aiotrt promises.

Start reading at `checks`, which runs them in order; each of the others holds the checks of one kind.
"""

from __future__ import annotations

from aiotrt.selftest.bench import Options
from aiotrt.selftest.checks import CHECKS, Progress, verify
from aiotrt.selftest.report import Outcome, Report, Result

__all__ = ["CHECKS", "Options", "Outcome", "Progress", "Report", "Result", "verify"]
