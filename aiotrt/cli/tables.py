"""Tables on standard output, drawn with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["open_console", "show"]


def open_console() -> Console:
    """Where tables go.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingDependencyError(f"the table is drawn with rich; {install_hint('cli')}, or use --json") from error
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # into a file or a pipe nothing should be cut to a screen's width
    return console


def show(console: Console, *parts: RenderableType) -> None:
    """Print tables and lines."""
    with console.capture() as drawn:
        for part in parts:
            console.print(part)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # rich fills cells up with spaces
