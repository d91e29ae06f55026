"""The command line: ``aiotrt``, or ``python -m aiotrt``. Each command is one file here.

The exit status is 0 on success, 1 after a failure, 2 for wrong arguments, and 130 after Ctrl-C.
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

#: The commands, in the order of the help. Each module has `register(subparsers, parents)`, which adds a parser and sets its
#: `run`, a function from the arguments to the exit status.
COMMANDS: Final = (build, inspect, serve, verify, video, completion)
#: The optional packages whose versions `--version` shows.
_OPTIONAL: Final = {
    "CUDA bindings": "cuda-bindings",
    "TensorRT": "tensorrt",
    "TensorRT-RTX": "tensorrt-rtx",
    "ONNX Runtime": "onnxruntime",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments are wrong (2), or help or the version was requested (0).
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
            # The output's reader has closed the pipe. Otherwise the interpreter would report that when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="aiotrt", description="await model(frame): GPU inference for asyncio programs.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of aiotrt and what it runs on")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="show all log messages, and tracebacks of errors")
    # With `prog`, since argparse would format help to find it, and rich need not be imported where no help is shown.
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=parser.prog)
    parser.set_defaults(errors=False, parser=parser)
    for command in COMMANDS:
        command.register(subparsers, [common])
    return parser


class _Version(argparse.Action):
    """Print the versions on one line, which argparse's own action would wrap."""

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
        verbose: whether to show all messages, rather than warnings only.
        errors: whether to show errors too, for a command that continues after them. Otherwise the exception that ends the
            command reports the error.
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
    """A handler that prints to the current `sys.stderr`, which a progress bar replaces to print lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
