"""The client of the compared servers: it knows what every answer must be, and counts those that are not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final, Self

import aiohttp

from benchmarks.serving_rivals.known import ITEMS, Known
from benchmarks.serving_rivals.work import OCTETS

__all__ = ["Asker"]

PATIENCE: Final = 30.0  # seconds, after which a request is lost


class Asker:
    """Asks one server.

    Args:
        url: the server's.
        known: what to ask, and what is right.
        wrong: counts requests without the answer that they must have, by what is wrong.
        first: the number of the first request; the others are numbered from there.

    Attributes:
        sent: how many requests.
    """

    def __init__(self, url: str, known: Known, wrong: Counter[str], first: int = 0) -> None:
        self.sent = 0
        self._first = first
        self.wrong = wrong
        self._url = url
        self._known = known
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
            headers={"Content-Type": OCTETS, "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def ask(self, since: float | None = None) -> float:
        """One request, of a number that no other has; returns the seconds until its answer.

        Args:
            since: when it should have been sent, for a clock that runs while it waits to be.
        """
        assert self._session is not None
        number, self.sent = self._first + self.sent, self.sent + 1
        item = number % ITEMS
        body = self._known.bodies[item] + number.to_bytes(8, "little")
        began = time.perf_counter() if since is None else since
        try:
            async with self._session.post(f"{self._url}/predict", data=body) as response:
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.wrong[f"lost: {type(error).__name__}"] += 1
            return time.perf_counter() - began
        seconds = time.perf_counter() - began
        if response.status != 200:
            self.wrong[f"status {response.status}"] += 1
        elif int.from_bytes(data[-8:], "little") != self._known.sums[item] + number:
            self.wrong["mismatched: another request's checksum"] += 1
        elif not self._known.is_output(data[:-8], item):
            self.wrong["mismatched: another output"] += 1
        return seconds

    async def closed(self, connections: int, end: float) -> list[float]:
        """So many clients, each of which waits for its answer before it asks again; how long each answer took.

        Args:
            connections: how many.
            end: by `time.perf_counter`, when a client with an answer stops; each sends at least one request.
        """
        took: list[float] = []

        async def client() -> None:
            took.append(await self.ask())
            while time.perf_counter() < end:
                took.append(await self.ask())

        await asyncio.gather(*(client() for _ in range(connections)))
        return took

    async def open(self, moments: Sequence[float], start: float) -> list[float]:
        """A request at each of these seconds after `start`, whatever becomes of the others; how long each answer took.

        From the moment on, not from the sending: a server that makes the client late does not look better for it.
        """
        took: list[float] = []

        async def one(due: float) -> None:
            took.append(await self.ask(due))

        async with asyncio.TaskGroup() as group:
            for moment in moments:
                due = start + moment
                if (pause := due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                group.create_task(one(due))
        return took
