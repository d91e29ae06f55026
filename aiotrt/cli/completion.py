"""``aiotrt completion``: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError

__all__ = ["register", "run"]

_EXAMPLES: Final = """\
examples:
  aiotrt completion bash > ~/.local/share/bash-completion/completions/aiotrt
  aiotrt completion zsh > ~/.zfunc/_aiotrt
      with fpath+=~/.zfunc before compinit in ~/.zshrc
  aiotrt completion fish > ~/.config/fish/completions/aiotrt.fish
"""


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], parents: Sequence[argparse.ArgumentParser]
) -> None:
    """Add the command to the program's."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script for completion in a shell",
        description="Print a script that completes commands, options and files. Completing starts no Python.",
        epilog=_EXAMPLES,
        parents=parents,
    )
    parser.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "fish"], help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError(f"the script is made with shtab; {install_hint('cli')}") from error
    for action in _actions(arguments.parser):
        if action.type is Path or action.dest in ("models", "sources"):  # of serve and of video: files, and more
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(arguments.parser, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
