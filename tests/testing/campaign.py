"""What the two scripts share that try changes of the runtime: their options, what they complain of, and the page."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.testing.mutation import Mutation
from tests.testing.portfolio import laws
from tests.testing.search import Finding, Key, Memory, Pool, keys, look

__all__ = ["Campaign", "cell"]

PAGE: Final = Path(__file__).parents[2] / "docs" / "seeded-defects.md"
#: The page's parts, in order, each under its heading.
PARTS: Final = {"statements": "Statements taken out", "mutants": "Mutants", "tables": "The statements, one by one"}
#: How long to look for a law that finds a change, in seconds of processor time.
PATIENCE: Final = 20.0
#: Likewise for one that is explained, except afresh; and in a check.
LITTLE: Final = 6.0

Explained = Mapping[tuple[str, str, str, int], str]
Writer = Callable[[Sequence[Mutation], Sequence[Key], dict[int, Finding], int], dict[str, str]]


@dataclass(frozen=True)
class Campaign:
    """A set of changes, each of which a law must find, or somebody must explain.

    Attributes:
        name: of its section of the memory.
        mutations: the changes.
        explained: why nothing finds some of them.
        written: the parts of the page that tell of it.
    """

    name: str
    mutations: Callable[[], list[Mutation]]
    explained: Explained
    written: Writer

    def explanations(self) -> dict[Key, str]:
        """By change."""
        return {Key(*key): why for key, why in self.explained.items()}

    def main(self, doc: str | None) -> int:
        """The script; its exit status."""
        assert doc is not None
        parser = argparse.ArgumentParser(description=doc.split("\n")[0])
        parser.add_argument("--check", action="store_true", help="write nothing, and look only for what is not remembered")
        parser.add_argument("--afresh", action="store_true", help="forget what found them before")
        parser.add_argument("--only", default="", help="those whose file:line, function or text contains this")
        parser.add_argument("--processes", type=int, default=2)
        parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds of processor time to look for each")
        complaints = self.run(**vars(parser.parse_args()))
        for complaint in complaints:
            print(complaint)
        return bool(complaints)

    def run(
        self, *, check: bool, afresh: bool = False, only: str = "", processes: int = 2, patience: float = PATIENCE
    ) -> list[str]:
        """Try them. Remembers what finds them unless told to `check`, and writes the page if all were tried.

        Returns what is wrong: changes that are neither found nor explained, and explanations that are stale.
        """
        start = time.perf_counter()
        todo = self.mutations()
        names, why = keys(todo), self.explanations()
        which = [i for i, mutation in enumerate(todo) if only in str(mutation)]
        memory = Memory("" if afresh else self.name)
        findings: dict[int, Finding] = {}
        pool = Pool(processes, self.mutations)
        try:
            seconds = dict.fromkeys(which, min(LITTLE, patience) if check else patience)
            if not afresh:
                seconds |= {i: 0.0 if check else min(LITTLE, patience) for i in which if names[i] in why}
            look(pool, todo, memory, seconds, findings)
        finally:  # interrupted, it goes on from here the next time
            pool.close()
            if not check:
                Memory(self.name).keep(names, findings)
        complaints = [f"EXPLAINED, and not there  {key}" for key in why if key not in set(names)]
        for i in which:
            finding = findings.get(i, Finding())
            if finding.law and names[i] in why:
                complaints.append(f"FOUND, though explained  {todo[i]}  by {finding.law}@{finding.seed}: {finding.how}")
            elif not finding.law and names[i] not in why:
                tried = f"{finding.reached} laws reach it, {finding.schedules} schedules tried"
                complaints.append(f"NOT FOUND  {todo[i]}  ({tried})")
        if not check and not only:
            _rewrite(self.written(todo, names, findings, len(laws())))
        found = sum(bool(finding.law) for finding in findings.values())
        print(f"{len(which)} changes, {found} found, {len(complaints)} complaints; {time.perf_counter() - start:.0f} s")
        return complaints


def cell(text: str) -> str:
    """Fit for a cell of a table."""
    return text.replace("|", "\\|")


def _rewrite(parts: dict[str, str]) -> None:
    """Put these parts into the page, and leave the others."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    kept = dict(re.findall(r"<!-- (\w+) -->\n## .*?\n(.*?)(?=<!-- |\Z)", page, re.DOTALL))
    text = "# Seeded defects\n\nWritten by scripts, part by part; do not edit.\n"
    for name, heading in PARTS.items():
        body = parts.get(name) or kept.get(name)
        if body:
            text += f"\n<!-- {name} -->\n## {heading}\n{body.rstrip()}\n"
    PAGE.write_text(text, encoding="utf-8")
