"""Seeded defects: remove each acting statement of the runtime, one at a time, and require a law to fail.

    python -m tests.testing.seeded_defects            # all of them; writes reports/seeded-defects.md
    python -m tests.testing.seeded_defects --afresh   # the same without the memory
    python -m tests.testing.seeded_defects --check    # trusts the explanations and writes no page
    python -m tests.testing.seeded_defects --only executor.py:181

The list is computed from the files of `RUNTIME`, so a wait, a gate, a wake-up or a hand-over that is added later is on it.
An acting statement calls something, awaits something, or changes an attribute or an item. Attributes set in `__init__` are
left out, because nothing runs without them.

A run first tries the schedules remembered in `reports/found.json`, then searches for the statements that these do not find,
and remembers what finds them. It exits with status 1 if a statement is neither found nor explained in `EXPLAINED`, or if an
explanation is stale. The last line it prints is the summary.
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
    "runtime.launch", "runtime.request", "runtime.route", "runtime.executor", "runtime.hold", "lease", "buffers",
    "runtime.handshake",
    "completion.hub", "completion.waiter", "runtime.programs", "runtime.slots", "model", "runtime.mapping",
    "batching.batcher", "batching.batch", "batching.group", "batching.item", "batching.queue", "batching.stacked",
)  # fmt: skip

#: What a statement is for, by what stands in it; the first that fits. The rest are steps from one of these to the next.
KINDS: Final = (
    ("log", r"_log\.|_ignore\("),
    ("count", r"counters\.|\.count\(|self\.(polls|wakes) \+="),
    ("warning", r"warnings\.warn"),
    ("check", r"\bcheck\w*\(|_check_\w+\(written|_check_broadcast|_check_written|_check_preprocessed|\.settle\("),
    ("wait", r"\.wait\((?!\[)|\.order\(|follow\(|synchronize\(|await_gates|prepare_thread|hold\.open"),
    ("gate", r"gates|open_gates|consum|_state\.take|ready_events|bound_inputs|when_passed|_events"),
    ("event", r"\.record\(|mark_consumed|_trt_|carry\(|_event = "),
    ("keep-alive", r"keep\(|_kept|release_when_idle|closer|close\(|retire|slot\.request|_remove\(|nbytes|holders|evict"),
    ("wake-up", (r"set_result|set_exception|reject|call_soon|call_exception|\bwatch\(|_arm|_enlist|on_done|then\(|told\("
                 r"|passed|_report|_check_idle|_fail|fail\(|break_down|lost_track|await |\.set\(|_poll|_soon|lanes|lane.due"
                 r"|cancel|forget|done\(|_idle|replays|lane|error|_alarm|_wake|_pump|_expire|_held")),
    ("hand-over", (r"move\(|withdraw|abandon|_serve|begin|_granted|queued|release|discard|_left|launches|_line|_free"
                   r"|states\[|leave|reclaim|drop|refuse|closing|is_|resume|slot\b|_tickets|_gone|_is_closed|popleft|users"
                   r"|_door|_queue|_enter|_admit|admit|\.batch|\.place")),
)  # fmt: skip


def mutations() -> list[Mutation]:
    """The removal of each acting statement."""
    every = [mutation for name in RUNTIME for mutation in deletions(importlib.import_module(f"aiotrt.{name}"))]
    return [mutation for mutation in every if not mutation.place.name.endswith(("__init__", "__setattr__"))]


def kind_of(mutation: Mutation) -> str:
    """The purpose of the statement, in a word."""
    text = mutation.place.text
    return next((kind for kind, pattern in KINDS if re.search(pattern, text)), "step")


def _written(todo: Sequence[Mutation], names: Sequence[Key], findings: dict[int, Finding], laws: int) -> dict[str, str]:
    """Render the parts of the report."""
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
Each acting statement of the runtime (it calls something, awaits something, or changes an attribute or an item) was removed,
one at a time. The laws ran on the rest, under seeded schedules of the simulated GPU, until one failed. Written by
`python -m tests.testing.seeded_defects`.

**{len(todo)} statements, {len(found)} found** by {laws} laws, {len(todo) - len(found)} not found, of which {explained} are
explained. The found ones took {sum(finding.schedules for finding in found)} schedules, \
{sum(finding.schedules for finding in found) / max(len(found), 1):.1f} each.

| purpose | statements | found | not found |
|---|---|---|---|
{chr(10).join(summary)}

The tables below name the law that failed, `@` its schedule, how it failed, and the number of schedules tried until then.
"""
    tables = ""
    for file, body in rows.items():
        lines = ["| line | in | purpose | removed | found by | how |", "|---|---|---|---|---|---|", *body]
        tables += f"\n### `{file}`\n\n" + "\n".join(lines) + "\n"
    return {"statements": head, "tables": tables}


DEFECTS: Final = Campaign("statements", mutations, EXPLAINED, _written)

if __name__ == "__main__":
    sys.exit(DEFECTS.main(__doc__))
