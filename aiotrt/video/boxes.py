"""An asynchronous mailbox: the producer waits for room, the consumer waits for an item."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from aiotrt.video.policies import Mailbox, Policy

__all__ = ["Box"]

T = TypeVar("T")


class Box(Generic[T]):
    """A mailbox between one producing and one consuming task.

    Args:
        policy: which items are kept.

    Attributes:
        mail: the waiting items and the counts of dropped ones.
        is_closed: whether the producer has ended.
    """

    def __init__(self, policy: Policy) -> None:
        self.mail: Mailbox[T] = Mailbox(policy)
        self.is_closed = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self.mail)

    async def wait_for_room(self) -> None:
        """Wait until there is room for one item. Cancelling changes nothing."""
        while not self.mail.has_room:
            await self._change()

    def put(self, item: T, now: float) -> None:
        """Add an item; there must be room for it."""
        self.mail.put(item, now)
        self._changed.set()

    async def wait_for_item(self) -> bool:
        """Wait for an item; return False if the box is closed and empty. Cancelling changes nothing."""
        while not len(self.mail):
            if self.is_closed:
                return False
            await self._change()
        return True

    def take(self, now: float) -> T | None:
        """Take the next item; None if all waiting items were stale."""
        item = self.mail.take(now)
        self._changed.set()
        return item

    def close(self) -> None:
        """Mark the end. Items in the box can still be taken."""
        self.is_closed = True
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
