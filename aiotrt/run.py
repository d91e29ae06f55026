"""`run`: an event loop for a program, the fast one where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine to its end, on uvloop where it is installed and on asyncio's own loop elsewhere.

    Args:
        main: the coroutine.
        debug: asyncio's debug mode; None leaves it to ``PYTHONASYNCIODEBUG``.

    Returns what `main` returns, and raises what it raises. Ctrl-C cancels `main` and then raises `KeyboardInterrupt`.
    Must not be called inside a running loop.
    """
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        return runner.run(main)
