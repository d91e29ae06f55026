"""The client of the compared servers: it knows what every answer must be, and counts those that are not."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import numpy as np

from benchmarks.serving_model import crops
from benchmarks.serving_rivals.work import LAG, MODELS, OCTETS, READY, Array, Job

__all__ = ["Asker", "Known"]

ITEMS: Final = 64  # different ones
PATIENCE: Final = 30.0  # seconds, after which a request is lost
#: Of the largest output: as near as FP16 comes to itself with other batches. What is whole must be equal.
TOLERANCE: Final = 0.02


class Known:
    """Items, and what the model, asked directly, says of each."""

    def __init__(self, model: str, file: Path | None, device: str) -> None:
        random = np.random.default_rng(1)
        _, height, width = shape = MODELS[model]
        is_text = model == "reader"
        items: list[Array] = (
            crops(ITEMS, width, random) if is_text else list(random.integers(0, 256, (ITEMS, *shape), np.uint8))
        )
        assert items[0].shape == (3, height, width), "the reader's items are not what its server takes"
        run = Job(model, file, device, {"threads": 1}).run()
        found = [run(item[None], np.zeros(1, np.int64)) for item in items]
        self.bodies = [item.tobytes() for item in items]
        self.outputs = [outputs[0] for outputs, _ in found]
        self.sums = [int(item.astype(np.int64).sum()) for item in items]

    def is_output(self, data: bytes, item: int) -> bool:
        """Whether this is what the model says of that item."""
        wanted = self.outputs[item]
        if len(data) != wanted.nbytes:
            return False
        output = np.frombuffer(data, wanted.dtype)
        if wanted.dtype.kind != "f":
            return bool((output == wanted).all())
        return bool(np.abs(output - wanted).max() <= TOLERANCE * np.abs(wanted).max())


class Asker:
    """Asks one server.

    Args:
        url: the server's.
        known: what to ask, and what is right.
        wrong: counts requests without the answer that they must have, by what is wrong.

    Attributes:
        sent: how many requests.
    """

    def __init__(self, url: str, known: Known, wrong: Counter[str]) -> None:
        self.sent = 0
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

    async def until_ready(self, is_running: Callable[[], bool]) -> None:
        """Wait for the server.

        Raises:
            RuntimeError: it ended.
            TimeoutError: it is not ready within two minutes.
        """
        assert self._session is not None
        async with asyncio.timeout(120):
            while True:
                if not is_running():
                    raise RuntimeError("the server ended before it was ready")
                try:
                    async with self._session.get(self._url + READY) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)

    async def lags(self) -> list[float]:
        """The server's event loop's, since this was last asked; in seconds."""
        assert self._session is not None
        async with self._session.get(self._url + LAG) as response:
            found: dict[str, Any] = json.loads(await response.read())
        lags: list[float] = found["lags"]
        return lags

    async def ask(self, since: float | None = None) -> float:
        """One request, of a number that no other has; returns the seconds until its answer.

        Args:
            since: when it should have been sent, for a clock that runs while it waits to be.
        """
        assert self._session is not None
        number, self.sent = self.sent, self.sent + 1
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

    async def closed(self, connections: int, seconds: float) -> list[float]:
        """So many clients, each of which waits for its answer before it asks again; how long each answer took."""
        end = time.perf_counter() + seconds
        took: list[float] = []

        async def client() -> None:
            while time.perf_counter() < end:
                took.append(await self.ask())

        await asyncio.gather(*(client() for _ in range(connections)))
        return took

    async def open(self, moments: Sequence[float]) -> list[float]:
        """A request at each of these seconds from now, whatever becomes of the others; how long each answer took.

        From the moment on, not from the sending: a server that makes the client late does not look better for it.
        """
        began = time.perf_counter()
        took: list[float] = []

        async def one(due: float) -> None:
            took.append(await self.ask(due))

        async with asyncio.TaskGroup() as group:
            for moment in moments:
                due = began + moment
                if (pause := due - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                group.create_task(one(due))
        return took
