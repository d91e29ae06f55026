"""A mailbox that tasks wait at: who puts waits for room, who takes waits for something to take."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from aiotrt.video.policies import Mailbox, Policy

__all__ = ["Box"]

T = TypeVar("T")


class Box(Generic[T]):
    """One task puts, another takes.

    Args:
        policy: what is kept.

    Attributes:
        mail: what waits, and the drops.
        is_closed: whether nothing more comes.
    """

    def __init__(self, policy: Policy) -> None:
        self.mail: Mailbox[T] = Mailbox(policy)
        self.is_closed = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self.mail)

    async def room(self) -> None:
        """Wait until one may be put."""
        while not self.mail.has_room:
            await self._change()

    def put(self, item: T, now: float) -> None:
        """Put one, for which there is room."""
        self.mail.put(item, now)
        self._changed.set()

    async def something(self) -> bool:
        """Wait until there is something to take, or nothing comes any more: false then."""
        while not len(self.mail):
            if self.is_closed:
                return False
            await self._change()
        return True

    def take(self, now: float) -> T | None:
        """The next one, unless all that waited was stale."""
        item = self.mail.take(now)
        self._changed.set()
        return item

    def close(self) -> None:
        """Nothing more comes; what is there can be taken."""
        self.is_closed = True
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
