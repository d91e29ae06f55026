"""The part shared by the two scripts that try changes of the runtime: options, complaints and the report."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.testing.mutation import Mutation
from tests.testing.portfolio import laws
from tests.testing.reports import REPORTS, write_report
from tests.testing.search import Finding, Key, Memory, Pool, keys, look

__all__ = ["Campaign", "cell"]

PAGE: Final = REPORTS / "seeded-defects.md"
#: The parts of the report, in order, with their headings.
PARTS: Final = {"statements": "Statements taken out", "mutants": "Mutants", "tables": "The statements, one by one"}
#: Seconds of processor time to search for a law that finds a change.
PATIENCE: Final = 45.0
#: The same for a change that is explained, except with `--afresh`.
EXPLAINED_PATIENCE: Final = 6.0

Explained = Mapping[tuple[str, str, str, int], str]
Writer = Callable[[Sequence[Mutation], Sequence[Key], dict[int, Finding], int], dict[str, str]]


@dataclass(frozen=True)
class Campaign:
    """A set of changes, each of which a law must find, or an explanation must cover.

    Attributes:
        name: of its section of the memory.
        mutations: the changes.
        explained: why nothing finds some of them.
        written: renders its parts of the report.
    """

    name: str
    mutations: Callable[[], list[Mutation]]
    explained: Explained
    written: Writer

    def explanations(self) -> dict[Key, str]:
        """The explanations, by change."""
        return {Key(*key): why for key, why in self.explained.items()}

    def main(self, doc: str | None) -> int:
        """Run the script and return its exit status: 1 if there are complaints."""
        assert doc is not None
        parser = argparse.ArgumentParser(description=doc.split("\n")[0])
        parser.add_argument("--check", action="store_true", help="trust the explanations, and write no page")
        parser.add_argument("--afresh", action="store_true", help="ignore the memory, and search for everything")
        parser.add_argument("--only", default="", metavar="TEXT", help="changes whose place or text contains TEXT")
        parser.add_argument("--processes", type=int, default=2, help="worker processes (2)")
        parser.add_argument(
            "--patience", type=float, default=PATIENCE, metavar="SECONDS",
            help=f"processor time to search for one change ({PATIENCE:.0f})",
        )  # fmt: skip
        return int(bool(self.run(**vars(parser.parse_args()))))

    def run(
        self, *, check: bool, afresh: bool = False, only: str = "", processes: int = 2, patience: float = PATIENCE
    ) -> list[str]:
        """Try the changes, remember what finds them, and print the complaints and one closing line.

        Args:
            check: do not search for changes that are explained, and do not write the page.
            afresh: ignore the memory.
            only: try the changes that contain this text, and do not write the page.
            processes: worker processes.
            patience: seconds of processor time to search for one change.

        Returns: the complaints: changes that are neither found nor explained, and stale explanations.
        """
        start = time.perf_counter()
        todo = self.mutations()
        names, why = keys(todo), self.explanations()
        which = [i for i, mutation in enumerate(todo) if only in str(mutation)]
        memory = Memory(self.name)
        if afresh:
            memory.clear()
        findings: dict[int, Finding] = {}
        pool = Pool(processes, self.mutations)
        try:
            seconds = dict.fromkeys(which, patience)
            if not afresh:
                short = 0.0 if check else min(EXPLAINED_PATIENCE, patience)
                seconds |= {i: short for i in which if names[i] in why}
            look(pool, todo, memory, seconds, findings)
        finally:  # after an interruption the next run continues from here
            pool.close()
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
        for complaint in complaints:
            print(complaint)
        found = sum(bool(finding.law) for finding in findings.values())
        explained = sum(names[i] in why and not findings.get(i, Finding()).law for i in which)
        print(
            f"{self.name}: {len(which)} changes, {found} found, {explained} explained, {len(complaints)} complaints; "
            f"{time.perf_counter() - start:.0f} s"
        )
        return complaints


def cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _rewrite(parts: dict[str, str]) -> None:
    """Replace these parts of the report, and keep the others."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    kept = dict(re.findall(r"<!-- (\w+) -->\n## .*?\n(.*?)(?=<!-- |\Z)", page, re.DOTALL))
    text = "# Seeded defects\n\nGenerated.\n"
    for name, heading in PARTS.items():
        body = parts.get(name) or kept.get(name)
        if body:
            text += f"\n<!-- {name} -->\n## {heading}\n{body.rstrip()}\n"
    write_report(PAGE, text)
