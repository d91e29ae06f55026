"""Mutation testing of the deciding modules: the tests must find every small change to an operator, constant or result.

    python -m tests.testing.mutants            # all of them; writes its part of reports/seeded-defects.md
    python -m tests.testing.mutants --afresh   # the same without the memory
    python -m tests.testing.mutants --check    # trusts the explanations and writes no page
    python -m tests.testing.mutants --only prediction.py:79

`operators` defines the changes; `portfolio` collects the laws and unit tests that must find them. A mutant that nothing
finds must be explained in `EQUIVALENT`. Memory, exit status and summary line are those of `seeded_defects`.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Final

from tests.testing.campaign import Campaign, cell
from tests.testing.equivalent import EQUIVALENT
from tests.testing.mutation import Mutation
from tests.testing.operators import changes
from tests.testing.search import Finding, Key

__all__ = ["DECIDES", "MUTANTS", "mutants"]

#: The modules that decide which request gets which slot, and when.
DECIDES: Final = ("runtime.slots", "completion.prediction", "completion.hub", "runtime.executor")


def mutants() -> list[Mutation]:
    """All of them."""
    return [mutation for name in DECIDES for mutation in changes(importlib.import_module(f"aiotrt.{name}"))]


def _written(todo: Sequence[Mutation], names: Sequence[Key], findings: dict[int, Finding], laws: int) -> dict[str, str]:
    """Render the part of the report."""
    why = MUTANTS.explanations()
    total, killed, explained = Counter[str](), Counter[str](), Counter[str]()
    survivors = []
    for i, mutation in enumerate(todo):
        key = names[i]
        total[key.file] += 1
        killed[key.file] += bool(findings[i].law)
        if not findings[i].law:
            explained[key.file] += key in why
            cells = [
                f"`{key.file}:{mutation.place.line}`",
                f"`{key.function}`",
                f"`{key.text}`",
                why.get(key, "**not explained**"),
            ]
            survivors.append("| " + " | ".join(map(cell, cells)) + " |")
    rows = [f"| `{file}` | {total[file]} | {killed[file]} | {explained[file]} |" for file in total]
    everything, dead = sum(total.values()), sum(killed.values())
    part = f"""
In the deciding modules, one at a time: every comparison was flipped, every condition negated, every `not` dropped; `and` and
`or`, `+` and `-`, `*` and `/`, `min` and `max` were swapped; every constant was moved by one in both directions, and every
result dropped. Written by `python -m tests.testing.mutants`.

**{everything} mutants, {dead} found** ({dead / everything:.1%}) by {laws} laws and unit tests, {everything - dead} not
found, of which {sum(explained.values())} are explained: the mutant behaves the same, or differs in nothing that is promised.

| file | mutants | found | explained |
|---|---|---|---|
{chr(10).join(rows)}

| line | in | change | why nothing finds it |
|---|---|---|---|
{chr(10).join(survivors)}
"""
    return {"mutants": part}


MUTANTS: Final = Campaign("mutants", mutants, EQUIVALENT, _written)

if __name__ == "__main__":
    sys.exit(MUTANTS.main(__doc__))
