"""A waiter is what asyncio expects of a future: callbacks, errors, cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from aiotrt.completion.prediction import Estimate
from aiotrt.completion.waiter import Waiter

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]


def waiter() -> Waiter:
    return Waiter(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)


def appends(log: list[Any], what: object) -> Callable[[Any], None]:
    return lambda _: log.append(what)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("how", ["wake", "wake_soon", "set_result", "set_exception", "cancel"])
async def test_callbacks_run_once_in_order(how: str, count: int) -> None:
    one = waiter()
    log: list[Any] = []
    for number in range(count):
        one.add_done_callback(appends(log, number))
    if how.startswith("wake"):
        one.resolve(7)
    arguments: dict[str, tuple[Any, ...]] = {"set_result": (7,), "set_exception": (ValueError("no"),)}
    getattr(one, how)(*arguments.get(how, ()))
    assert log == (list(range(count)) if how == "wake" else [])
    one.wake()  # whatever comes later, nothing runs twice
    one.wake_soon()
    await asyncio.sleep(0)
    assert log == list(range(count))
    assert one.done()
    assert one.cancelled() == (how == "cancel")


async def test_a_callback_that_is_added_late_runs_in_the_next_iteration() -> None:
    one = waiter()
    log: list[Any] = []
    one.set_result(None)
    one.add_done_callback(appends(log, "late"))
    assert log == []
    await asyncio.sleep(0)
    assert log == ["late"]


async def test_callbacks_run_in_the_context_that_they_were_added_in() -> None:
    where = contextvars.ContextVar("where", default="outside")
    one = waiter()
    log: list[Any] = []
    for place in ("here", "there"):
        context = contextvars.copy_context()
        context.run(where.set, place)
        one.add_done_callback(lambda _: log.append(where.get()), context=context)
    one.resolve(None)
    one.wake()
    assert log == ["here", "there"]


async def test_all_callbacks_that_are_equal_are_removed() -> None:
    one = waiter()
    log: list[Any] = []
    first, second = appends(log, 1), appends(log, 2)
    for callback in (first, second, first, second):
        one.add_done_callback(callback)
    assert one.remove_done_callback(first) == 2
    assert one.remove_done_callback(first) == 0
    one.resolve(None)
    one.wake()
    assert log == [2, 2]
    other = waiter()
    other.add_done_callback(first)
    assert other.remove_done_callback(first) == 1
    other.add_done_callback(second)
    other.set_result(None)
    await asyncio.sleep(0)
    assert log == [2, 2, 2]


@pytest.mark.parametrize("others", [0, 2])
async def test_a_callback_that_raises_is_reported_and_the_others_run(others: int) -> None:
    loop = asyncio.get_running_loop()
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    one = waiter()
    log: list[Any] = []

    def bad(_: Any) -> None:
        raise RuntimeError("bad callback")

    one.add_done_callback(bad)
    for number in range(others):
        one.add_done_callback(appends(log, number))
    one.resolve(None)
    one.wake()
    loop.set_exception_handler(None)
    assert log == list(range(others))
    (context,) = contexts
    assert "bad callback" in str(context["exception"])
    assert "bad" in context["message"]


@pytest.mark.parametrize("others", [0, 2])
async def test_an_interrupt_in_a_callback_is_the_loops_and_the_others_run(others: int) -> None:
    one = waiter()
    log: list[Any] = []

    def struck(_: Any) -> None:
        raise KeyboardInterrupt

    one.add_done_callback(struck)
    for number in range(others):
        one.add_done_callback(appends(log, number))
    one.resolve(None)
    with pytest.raises(KeyboardInterrupt):
        one.wake()
    await asyncio.sleep(0)
    assert log == list(range(others))


async def test_it_says_what_it_ended_with() -> None:
    pending = waiter()
    for ask in (pending.result, pending.exception):
        with pytest.raises(asyncio.InvalidStateError):
            ask()
    done = waiter()
    done.set_result(3)
    assert done.result() == 3
    assert done.exception() is None
    assert not done.cancel()
    with pytest.raises(asyncio.InvalidStateError):
        done.set_result(4)
    with pytest.raises(asyncio.InvalidStateError):
        done.set_exception(ValueError())
    failed = waiter()
    failed.set_exception(ValueError("no"))
    assert isinstance(failed.exception(), ValueError)
    with pytest.raises(ValueError, match="no"):
        failed.result()
    cancelled = waiter()
    assert cancelled.cancel("enough")
    for ask in (cancelled.result, cancelled.exception):
        with pytest.raises(asyncio.CancelledError, match="enough"):
            ask()


async def test_an_error_does_not_grow_with_who_awaits_it() -> None:
    one = waiter()
    one.set_exception(ValueError("no"))
    lengths = []
    for _ in range(3):
        with pytest.raises(ValueError, match="no") as caught:
            await one
        lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(set(lengths)) == 1


async def test_an_error_says_where_it_was_raised() -> None:
    def origin() -> None:
        raise ValueError("no")

    one = waiter()
    try:
        origin()
    except ValueError as error:
        one.set_exception(error)
    with pytest.raises(ValueError, match="no") as caught:
        await one
    assert "origin" in [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
