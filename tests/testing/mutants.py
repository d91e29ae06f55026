"""Mutation testing of the modules that decide: every small change to an operator, a constant or a result must be found.

    python -m tests.testing.mutants            # all of them; writes its part of docs/seeded-defects.md
    python -m tests.testing.mutants --afresh   # likewise, forgetting what found them before
    python -m tests.testing.mutants --check    # writes nothing
    python -m tests.testing.mutants --only prediction.py:79

What is changed, and how, stands in `operators`; what finds it are the laws and unit tests of `portfolio`. A mutant that
nothing finds must be explained in `EQUIVALENT`.
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

#: The modules that decide who has what, and when.
DECIDES: Final = ("slots", "prediction", "completion", "executor")


def mutants() -> list[Mutation]:
    """All of them."""
    return [mutation for name in DECIDES for mutation in changes(importlib.import_module(f"aiotrt.{name}"))]


def _written(todo: Sequence[Mutation], names: Sequence[Key], findings: dict[int, Finding], laws: int) -> dict[str, str]:
    """The part of the page."""
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
In the modules that decide, every comparison was flipped, every condition negated, every `not` dropped, every `and` and `or`,
every `+` and `-`, every `*` and `/`, every `min` and `max` swapped, every constant moved by one both ways, and every result
forgotten, one at a time. Written by `python -m tests.testing.mutants`.

**{everything} mutants, {dead} found** ({dead / everything:.1%}) by {laws} laws and unit tests, {everything - dead} not; of
those, {sum(explained.values())} are explained: they do the same, or what they do differently is nobody's promise.

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
