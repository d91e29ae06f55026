"""Seeded defects: each statement that acts in the runtime is taken out, one at a time, and a law must fail.

    python -m tests.testing.seeded_defects            # all of them, which takes some minutes; writes docs/seeded-defects.md
    python -m tests.testing.seeded_defects --afresh   # likewise, forgetting what found them before
    python -m tests.testing.seeded_defects --check    # for a test run: writes nothing; see below
    python -m tests.testing.seeded_defects --only executor.py:181

The list is not written down anywhere: it is what stands in the files of `RUNTIME`, so a wait, a gate, a wake-up or a
hand-over that is added tomorrow is on it. A statement that acts is one that calls something, awaits something, or changes an
attribute or an item. Attributes set in `__init__` are left out: without them nothing runs at all.

`--check` tries what is remembered in `found.json`, and looks further only for a statement that is new, or that this does not
find any more. It fails if a statement is neither found nor explained in `EXPLAINED`, and if an explanation is stale.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Final

from tests.testing.campaign import Campaign, cell
from tests.testing.explained import EXPLAINED
from tests.testing.mutation import Mutation, deletions
from tests.testing.search import Finding, Key

__all__ = ["DEFECTS", "RUNTIME", "kind_of", "mutations"]

RUNTIME: Final = (
    "submission", "requests", "executor", "lease", "buffers", "handshake", "completion", "graphs", "slots", "model",
    "mapping", "gathering", "stacking", "batching",
)  # fmt: skip

#: What a statement is for, by what stands in it; the first that fits. The rest are steps from one of these to the next.
KINDS: Final = (
    ("log", r"_log\.|_ignore\("),
    ("count", r"counters\.|\.count\(|self\.(polls|wakes) \+="),
    ("warning", r"warnings\.warn"),
    ("check", r"\bcheck\w*\(|_check_\w+\(written|_check_broadcast|_check_written|_check_preprocessed|\.settle\("),
    ("wait", r"\.wait\((?!\[)|\.order\(|follow\(|synchronize\(|await_gates|prepare_thread|hold\.open"),
    ("gate", r"gates|_open_gates|consum|_state\.take|ready_events|bound_inputs|when_passed|_events"),
    ("event", r"\.record\(|mark_consumed|_trt_|carry\(|_event = "),
    ("keep-alive", r"keep_for_ever|_kept|closer|close\(|retire|slot\.request|_remove\(|nbytes|holders|evict"),
    ("wake-up", (r"set_result|set_exception|reject|call_soon|call_exception|\bwatch\(|_arm|_enlist|on_done|then\(|told\("
                 r"|passed|_report|_check_idle|_fail|fail\(|break_down|lost_track|await |\.set\(|_poll|_look|_soon|heap"
                 r"|cancel|forget|done\(|_idle|replays|lane|error|_alarm|_wake|_pump|_expire|_held")),
    ("hand-over", (r"move\(|withdraw|abandon|_serve|begin|_granted|queued|release|discard|_left|launches|_line|_free"
                   r"|states\[|leave|reclaim|drop|refuse|closing|is_|resume|slot\b|_tickets|_gone|_is_closed|popleft|users"
                   r"|_door|_queue|_enter|_admit|admit|\.batch|\.place")),
)  # fmt: skip


def mutations() -> list[Mutation]:
    """One for each statement that acts."""
    every = [mutation for name in RUNTIME for mutation in deletions(importlib.import_module(f"aiotrt.{name}"))]
    return [mutation for mutation in every if not mutation.place.name.endswith(("__init__", "__setattr__"))]


def kind_of(mutation: Mutation) -> str:
    """What the statement is for, in a word."""
    text = mutation.place.text
    return next((kind for kind, pattern in KINDS if re.search(pattern, text)), "step")


def _written(todo: Sequence[Mutation], names: Sequence[Key], findings: dict[int, Finding], laws: int) -> dict[str, str]:
    """The parts of the page."""
    kinds = [kind_of(mutation) for mutation in todo]
    why = DEFECTS.explanations()
    rows: dict[str, list[str]] = {}
    for i, mutation in enumerate(todo):
        place, finding, key = mutation.place, findings[i], names[i]
        nth = f" ({key.nth + 1})" if key.nth else ""
        if finding.law:
            by, how = f"`{finding.law}@{finding.seed}`", f"{finding.how}; {finding.schedules}"
        else:
            by, how = "**nothing**", why.get(key, "**not explained**")
        cells = [str(place.line), f"`{place.name}`{nth}", kinds[i], f"`{place.text}`", by, how]
        rows.setdefault(key.file, []).append("| " + " | ".join(map(cell, cells)) + " |")
    table = Counter((kind, bool(findings[i].law)) for i, kind in enumerate(kinds))
    summary = [
        f"| {kind} | {table[kind, True] + table[kind, False]} | {table[kind, True]} | {table[kind, False]} |"
        for kind in dict.fromkeys([*(kind for kind, _ in KINDS), "step"])
        if table[kind, True] + table[kind, False]
    ]
    found = [finding for finding in findings.values() if finding.law]
    explained = sum(not findings[i].law and key in why for i, key in enumerate(names))
    head = f"""
Each statement of the runtime that acts (that calls something, awaits something, or changes an attribute or an item) was
taken out, one at a time, and the laws were run on what was left, under seeded schedules of the simulated GPU, until one
failed. Written by `python -m tests.testing.seeded_defects`.

**{len(todo)} statements, {len(found)} found** by {laws} laws, {len(todo) - len(found)} not; of those, {explained} are
explained. Those that were found took {sum(finding.schedules for finding in found)} schedules, \
{sum(finding.schedules for finding in found) / max(len(found), 1):.1f} each.

| what it is for | statements | found | not |
|---|---|---|---|
{chr(10).join(summary)}

In the tables below: the law that failed, `@` its schedule, how it failed, and how many schedules were tried until then.
"""
    tables = ""
    for file, body in rows.items():
        lines = ["| line | in | for | removed | found by | how |", "|---|---|---|---|---|---|", *body]
        tables += f"\n### `{file}`\n\n" + "\n".join(lines) + "\n"
    return {"statements": head, "tables": tables}


DEFECTS: Final = Campaign("statements", mutations, EXPLAINED, _written)

if __name__ == "__main__":
    sys.exit(DEFECTS.main(__doc__))
