"""The programs in the documentation run as they stand, and print what the pages say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import aiotrt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

#: Pages on which every Python block is a complete program, named by its first line.
PAGES = ("index", "getting-started", "images", "overload", "roboflow")
#: A block of Python, and the block of text after it, with at most a paragraph of one line between them.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n(?:[^\n`]+\n\n)?```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def run(path: Path) -> None:
    """Run a program, and the tests in it as pytest would."""
    names = runpy.run_path(str(path), run_name="__main__")
    for name, value in names.items():
        if name.startswith("test_"):
            value()


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if page == "getting-started":
        pytest.importorskip("tqdm")
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert blocks
    for program, printed in blocks:
        named = re.match(r"# (\w+\.py)\n", program)
        assert named, f"a program of {page}.md has no name in its first line:\n{program}"
        path = tmp_path / named[1]
        path.write_text(program, encoding="utf-8")
        run(path)
        assert capsys.readouterr().out == printed, path.name
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_program_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program, printed), *_ = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    run(path)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(file: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / file).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_public_name_is_in_the_reference_once() -> None:
    named = re.findall(r"^\.\. auto\w+:: aiotrt\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(aiotrt.__all__)
