"""Print tables on standard output, with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["open_console", "show"]


def open_console() -> Console:
    """Create the console for tables.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingDependencyError(f"tables need rich; {install_hint('cli')}, or use --json") from error
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # do not truncate lines in a file or a pipe
    return console


def show(console: Console, *parts: RenderableType) -> None:
    """Print tables and lines of text."""
    with console.capture() as drawn:
        for part in parts:
            console.print(part)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # rich pads cells with spaces
