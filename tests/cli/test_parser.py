"""Wrong arguments are named, with a suggestion and the usage of the right command; help; completion in a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiotrt.cli import main


@pytest.mark.parametrize(
    ("arguments", "command", "says"),
    [
        ("build --precison fp16 a.onnx", "build", "unknown option --precison; did you mean --precision?"),
        ("inspect --jsn", "inspect", "unknown option --jsn; did you mean --json?"),
        ("inspect a --jsn=1", "inspect", "unknown option --jsn; did you mean --json?"),
        ("inspect a -z", "inspect", "unknown option -z"),
        ("inspect a b c", "inspect", "expected no more arguments, got b c"),
        ("inspect a -- --json", "inspect", "expected no more arguments, got"),
        ("video detect a --polcy latest", "video detect", "unknown option --polcy; did you mean --policy?"),
        ("build a.onnx --precision fp17", "build", "argument --precision: expected one of fp32, fp16, bf16, got fp17"),
        ("biuld a.onnx --precision fp16", "", "got biuld; did you mean build?"),
        ("--verison", "", "unknown option --verison; did you mean --version?"),
        ("--json inspect a", "", "unknown option --json"),
    ],
)
def test_what_is_wrong_is_named(arguments: str, command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    prog = f"aiotrt {command}".rstrip()
    assert errors.startswith(f"usage: {prog} [-h]")
    assert f"{prog}: error: " in errors.splitlines()[-1]
    assert says in errors.splitlines()[-1]


def test_abbreviated_options_and_values_that_look_odd_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--prec=fp16", "--", "--missing.onnx"]) == 1
    assert "--missing.onnx: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("rich", [True, False])
def test_help_keeps_brackets_and_the_examples_lines(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich_argparse", reason="needs the package rich-argparse")
    else:
        monkeypatch.setitem(sys.modules, "rich_argparse", None)
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for line in ("usage: aiotrt serve ", "TOML with [server] and [models.NAME]", "\n  aiotrt serve --config models.toml "):
        assert line in text


def test_bash_completes_commands_options_choices_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs the package shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "detector.onnx").touch()
    script = capsys.readouterr().out
    for words in ("ver", "video det", "build --prec", "build --precision bf", "inspect detec"):
        # Ask bash as it asks when Tab is pressed behind the last word.
        script += f"\nCOMP_WORDS=(aiotrt {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=(); "
        script += f'COMP_TYPE=9 _shtab_aiotrt aiotrt {words.split()[-1]}; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(
        ["bash", "--norc"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout.split("\n")[:-1] == ["verify", "detect", "--precision", "bf16", "detector.onnx"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs the package shtab")
    assert main(["completion", shell]) == 0
    assert "require-graph" in capsys.readouterr().out


def test_completion_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "the script is made with shtab; pip install" in capsys.readouterr().err
