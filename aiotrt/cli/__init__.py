"""The command line: ``aiotrt``, or ``python -m aiotrt``. Each command is one file here.

The exit status is 0 when all went well, 1 when something failed, 2 when the command was wrong, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Final, NoReturn

import torch

import aiotrt
from aiotrt.cli import build, completion, inspect, serve, verify, video
from aiotrt.cli.parser import Parser
from aiotrt.errors import AiotrtError, InputError, UsageError

__all__ = ["main"]

#: In the order of the help. A command has `register(subparsers, parents)`, which sets `run`: arguments to exit status.
COMMANDS: Final = (build, inspect, serve, verify, video, completion)
#: What `--version` names too, and the packages whose versions it shows.
_OPTIONAL: Final = {
    "CUDA bindings": "cuda-bindings",
    "TensorRT": "tensorrt",
    "TensorRT-RTX": "tensorrt-rtx",
    "ONNX Runtime": "onnxruntime",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; by default the process's.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments are wrong (2), or help was asked for (0).
    """
    arguments = _parser().parse_args(argv)
    with _logging(verbose=arguments.verbose, errors=arguments.errors):
        try:
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        except AiotrtError as error:
            if arguments.verbose:
                traceback.print_exc()
            else:
                first, *more = str(error).splitlines() or [type(error).__name__]
                print(f"aiotrt: {first}" + (" (more with -v)" if more else ""), file=sys.stderr)
            return 2 if isinstance(error, (InputError, UsageError)) else 1
        except KeyboardInterrupt:
            print("aiotrt: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Whoever read our output has gone. The interpreter would complain when it flushes the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="aiotrt", description="await model(frame): GPU inference for asyncio programs.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of aiotrt and what it runs on")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="show the whole log, and tracebacks of errors")
    # With `prog`, since argparse would format help to find it, and rich need not be imported where no help is shown.
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=parser.prog)
    parser.set_defaults(errors=False, parser=parser)
    for command in COMMANDS:
        command.register(subparsers, [common])
    return parser


class _Version(argparse.Action):
    """Print the versions on one line. argparse's own action would wrap it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parts = [f"aiotrt {aiotrt.__version__} ({aiotrt.__impl__})", f"Python {platform.python_version()}"]
        parts.append(f"torch {torch.__version__}")
        for title, package in _OPTIONAL.items():
            try:
                parts.append(f"{title} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                parts.append(f"no {title}")
        print(*parts, sep=", ")
        parser.exit()


@contextmanager
def _logging(*, verbose: bool, errors: bool) -> Iterator[None]:
    """Show the package's log on standard error while a command runs.

    Args:
        verbose: all of it.
        errors: those too for which no exception ends the command; otherwise they are left to the one that comes.
    """
    log = logging.getLogger("aiotrt")
    handler = _Handler()
    level = log.level
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose and not errors:
        handler.addFilter(lambda record: record.levelno < logging.ERROR)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _Handler(logging.Handler):
    """To whatever standard error is at the time: a progress bar replaces it, and makes way for the line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
