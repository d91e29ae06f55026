"""A pending event that a coroutine awaits: what asyncio expects of a future, and no more.

An `asyncio.Future` wakes its task through the event loop's queue, in the next iteration. A waiter that completes inside a
poll is woken at the end of that poll instead (`Hub`), which saves the iteration. So aiotrt has its own class.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any

from aiotrt.completion.lane import Pending
from aiotrt.completion.prediction import Estimate

__all__ = ["Waiter"]

Callback = Callable[[Any], object]


class Waiter(Pending):
    """The result of work that is pending.

    Its methods are those of `asyncio.Future`, with the same meaning; `asyncio.wait` and `asyncio.shield` take it as one. It
    belongs to the thread of its loop. Unlike a future's, an exception that is never retrieved is not reported.

    Args:
        loop: the loop whose tasks may await this waiter.
    """

    __slots__ = (
        "_asyncio_future_blocking", "_callback", "_context", "_error", "_is_cancelled", "_loop", "_message", "_others",
        "_value", "is_done",
    )  # fmt: skip

    _callback: Callback | None
    _context: contextvars.Context | None
    _others: list[tuple[Callback, contextvars.Context]] | None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        query: Callable[[], bool],
        on_done: Callable[[BaseException | None], None],
        estimate: Estimate,
        hang_timeout: float | None,
    ) -> None:
        self.query = query
        self.confirm = None
        self.on_done = on_done
        self.estimate = estimate
        self.hang_timeout = hang_timeout
        self.submitted = self.notified = 0.0
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._message: Any = None
        self._callback = self._context = self._others = None

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result() if self._error is not None or self._is_cancelled or not self.is_done else self._value

    # What asyncio calls...

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop whose tasks may await this waiter."""
        return self._loop

    def add_done_callback(self, callback: Callback, *, context: contextvars.Context | None = None) -> None:
        """Call `callback` with this waiter when it is done: inside the poll that completes it, or by the loop."""
        if context is None:
            context = contextvars.copy_context()
        if self.is_done:
            self._loop.call_soon(callback, self, context=context)
        elif self._callback is None:
            self._callback = callback
            self._context = context
        elif self._others is None:
            self._others = [(callback, context)]
        else:
            self._others.append((callback, context))

    def remove_done_callback(self, callback: Callback) -> int:
        """Remove all of these callbacks; returns how many there were."""
        kept = [pair for pair in self._callbacks() if pair[0] != callback]
        removed = len(self._callbacks()) - len(kept)
        self._callback, self._context = kept.pop(0) if kept else (None, None)
        self._others = kept or None
        return removed

    def done(self) -> bool:
        """Whether it has a result or an error, or was cancelled."""
        return self.is_done

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._is_cancelled

    def result(self) -> Any:
        """Return the result.

        Raises:
            CancelledError: the waiter was cancelled.
            InvalidStateError: it is not done.
            BaseException: the error that was set.
        """
        if self._error is not None:
            raise self._error.with_traceback(self._message)
        if self._is_cancelled:
            raise asyncio.CancelledError if self._message is None else asyncio.CancelledError(self._message)
        if not self.is_done:
            raise asyncio.InvalidStateError("Result is not set.")
        return self._value

    def exception(self) -> BaseException | None:
        """Return the error, or None. Raises as `result` does if the waiter was cancelled or is not done."""
        if self._error is None:
            self.result()
        return self._error

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the waiter; False if it was done. The loop wakes its task, since another task may be running."""
        if self.is_done:
            return False
        self.is_done = self._is_cancelled = True
        self._message = msg
        self.wake_soon()
        return True

    # How it ends...

    def set_result(self, value: Any) -> None:
        """Set the result, and wake the tasks that await it in the loop's next iteration."""
        self.resolve(value)
        self.wake_soon()

    def set_exception(self, error: BaseException) -> None:
        """Set the error, and wake the tasks that await it in the loop's next iteration."""
        self.reject(error)
        self.wake_soon()

    def resolve(self, value: Any) -> None:
        """Set the result; `wake` or `wake_soon` must follow."""
        if self.is_done:
            raise asyncio.InvalidStateError("Result is set already.")
        self.is_done = True
        self._value = value

    def reject(self, error: BaseException) -> None:
        """Set the error; `wake` or `wake_soon` must follow."""
        if self.is_done:
            raise asyncio.InvalidStateError("Result is set already.")
        self.is_done = True
        self._error = error
        self._message = error.__traceback__  # restored at each raise, so that the traceback does not grow with each await

    def wake(self) -> None:
        """Run the callbacks now. No task may be running. Their exceptions go to the loop's exception handler."""
        callback, context = self._callback, self._context
        if callback is None or not self.is_done:  # woken already, and perhaps reused since
            return
        if self._others is None:
            self._callback = self._context = None
            assert context is not None
            try:
                context.run(callback, self)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                self._report(callback, error)
            return
        callbacks = self._callbacks()
        self._callback = self._context = self._others = None
        for number, (callback, context) in enumerate(callbacks):
            try:
                context.run(callback, self)
            except (KeyboardInterrupt, SystemExit):
                for other, its in callbacks[number + 1 :]:
                    self._loop.call_soon(other, self, context=its)
                raise
            except BaseException as error:
                self._report(callback, error)

    def wake_soon(self) -> None:
        """Run the callbacks in the loop's next iteration."""
        if self._callback is not None:
            for callback, context in self._callbacks():
                self._loop.call_soon(callback, self, context=context)
            self._callback = self._context = self._others = None

    def _callbacks(self) -> list[tuple[Callback, contextvars.Context]]:
        if self._callback is None:
            return []
        assert self._context is not None
        return [(self._callback, self._context), *(self._others or ())]

    def _report(self, callback: Callback, error: BaseException) -> None:
        message = f"aiotrt: the callback {callback!r} of a call raised"
        self._loop.call_exception_handler({"message": message, "exception": error})

    def __repr__(self) -> str:
        state = "cancelled" if self._is_cancelled else "done" if self.is_done else "pending"
        return f"<{type(self).__name__} {state}>"
