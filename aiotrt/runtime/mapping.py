"""`Model.map`: runs many inputs in order, with a bounded number in flight and without a task per item."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from aiotrt.completion.waiter import Waiter
from aiotrt.errors import InputError

__all__ = ["map_in_order"]


P = TypeVar("P", bound=Waiter)


class _Taker(Protocol[P]):
    """The executor; or with batching, the `Gatherer` that collects items for it."""

    def submit(self, values: Sequence[object], named: Mapping[str, object], *, bounded: bool = True) -> P: ...

    def abandon(self, request: P, /) -> None: ...


async def map_in_order(
    executor: _Taker[P], frames: Iterable[object] | AsyncIterable[object], limit: int
) -> AsyncGenerator[Any, None]:
    """Run the frames and yield the results in order, as `Model.map` documents."""
    given: object = limit
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InputError(f"in_flight must be an integer of at least 1, got {limit!r}")
    source = _Source(frames)
    pending: deque[P] = deque()
    failure: BaseException | None = None
    try:
        while True:
            while not source.is_exhausted and failure is None and len(pending) < limit:
                try:
                    if not await source.ready(pending[0] if pending else None):
                        break  # the oldest result came before the next item
                    pending.append(_submit_item(executor, source.take()))
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
            if pending:
                result = await pending[0]
                pending.popleft()
                yield result
            elif failure is not None:
                raise failure
            elif source.is_exhausted:
                return
    finally:
        for request in pending:
            request.cancel()
            executor.abandon(request)
        await source.aclose()


class _Source:
    """The items of an iterable or asynchronous iterable, taken one at a time."""

    def __init__(self, frames: Iterable[object] | AsyncIterable[object]) -> None:
        self.is_exhausted = False
        self._context = contextvars.copy_context()  # one for all items: a source may reset later what it has set
        self._next: asyncio.Future[object] | None = None
        self._async: AsyncIterator[object] | None = None
        if isinstance(frames, AsyncIterable):
            self._async = aiter(frames)
        else:
            self._sync = iter(frames)

    async def ready(self, other: Waiter | None) -> bool:
        """Wait for the next item or for `other`, whichever is first; False if there is no item yet."""
        if self._async is None:
            return True
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(_anext(self._async), context=self._context)
        futures: set[Any] = {self._next} if other is None else {self._next, other}
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return self._next.done()

    def take(self) -> object:
        """Return the next item, which is ready.

        Raises:
            StopIteration: there is no more item; `is_exhausted` is true from now on.
        """
        try:
            if self._async is None:
                return next(self._sync)
            assert self._next is not None
            future, self._next = self._next, None
            item = future.result()
            if item is _END:
                raise StopIteration
            return item
        except StopIteration:
            self.is_exhausted = True
            raise

    async def aclose(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # retrieved, so that asyncio does not report it: nothing takes this item any more


_END = object()


async def _anext(source: AsyncIterator[object]) -> object:
    return await anext(source, _END)


def _submit_item(executor: _Taker[P], item: object) -> P:
    if isinstance(item, Mapping):
        return executor.submit((), item, bounded=False)
    return executor.submit(item if isinstance(item, tuple) else (item,), {}, bounded=False)
