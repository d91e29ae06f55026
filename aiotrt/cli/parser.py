"""The argument parser of the command line: names what is wrong and suggests what was meant; help is drawn with rich."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors come with the usage of the right command and with a suggestion.

    argparse leaves unknown options of a command to the outermost parser, which shows its own usage; and it reports a missing
    argument before a misspelt option. Python 3.14 makes suggestions by itself, for choices only.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _formatter(), **settings})

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse, and end the program with status 2 where an argument is left over or an option is unknown."""
        args = list(sys.argv[1:] if args is None else args)
        # A command's arguments, which follow its name, are for the parser of that command.
        ends = (lambda text: not text.startswith("-")) if self._subparsers else (lambda text: text == "--")
        for text in itertools.takewhile(lambda text: not ends(text), args):
            if text.startswith("--") and text != "--":
                self._check_option(text.partition("=")[0])
        namespace, extra = super().parse_known_args(args, namespace)
        if extra:
            self._check_option(extra[0])
            self.error(f"expected no more arguments, got {' '.join(extra)}")
        return namespace, extra

    def _check_option(self, name: str) -> None:
        """End the program where `name` looks like an option and is neither one nor the beginning of one."""
        options = self._option_string_actions
        if name.startswith("-") and not any(option.startswith(name) for option in options):
            self.error(f"unknown option {name}{_suggestion(name, options)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a command's name, or the value of an option that has choices."""
        if action.choices is not None and value not in action.choices:
            expected = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"expected one of {expected}, got {value}{_suggestion(value, action.choices)}"
            )


def _suggestion(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _formatter() -> type[argparse.HelpFormatter]:
    """Return what draws the help: rich-argparse where it is installed. Descriptions and examples keep their lines."""
    try:
        from rich_argparse import RawDescriptionRichHelpFormatter
    except ImportError:
        return argparse.RawDescriptionHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        help_markup = text_markup = False  # brackets in our texts are brackets
        group_name_formatter = str  # "options:", as without rich

    return Formatter
