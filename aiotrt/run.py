"""`run`: run a coroutine in a new event loop, uvloop where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiotrt.errors import UsageError

__all__ = ["run"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine until it ends, on uvloop where it is installed, else on asyncio's own loop.

    Args:
        main: the coroutine.
        debug: asyncio's debug mode; None leaves it to ``PYTHONASYNCIODEBUG``.

    Returns the result of `main`, and raises its exceptions. Ctrl-C cancels `main` and then raises `KeyboardInterrupt`.

    Raises:
        UsageError: an event loop is running on this thread already, as in a notebook. `main` is closed.
    """
    if asyncio._get_running_loop() is not None:
        main.close()
        name = getattr(main, "__name__", "main")
        raise UsageError(f"aiotrt.run() was called inside a running event loop: write 'await {name}()' there")
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        return runner.run(main)
