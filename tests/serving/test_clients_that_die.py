"""Half of the clients are killed in the middle of their requests: nobody works for the dead, and the others are served.

    AIOTRT_DEATHS=10000 python -m pytest -o faulthandler_timeout=0 tests/serving/test_clients_that_die.py

kills ten thousand in each of the two ways to queue, which takes two minutes; a usual run kills some hundreds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import aiotrt
from aiotrt.serving.kserve import ModelSettings, ServerSettings, create_app
from tests.building import models as onnx_models
from tests.serving.bystander import HEAD, infer_body
from tests.serving.test_fastapi import until_slow
from tests.serving.tools import Served, served
from tests.tools import held

DEATHS = int(os.environ.get("AIOTRT_DEATHS", "480"))
DEAD = ALIVE = 8  # of one round
SLOTS = 2
#: Where in its request a client dies: in its headers, in its body, in the queue or on the device, in its answer.
STAGES = ("head", "body", "queue", "queue", "queue", "answer")
NO_LINGER = struct.pack("ii", 1, 0)

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60 + DEATHS // 20)]


class Client:
    """One request over a connection of its own, of numbers that nobody else has."""

    def __init__(self, served_by: Served, shape: tuple[int, ...]) -> None:
        self._served_by = served_by
        self.name = f"request {next(_numbers)}"
        self.x = np.random.default_rng().standard_normal(shape).astype(np.float32)
        body, length = infer_body(self.x, self.name)
        head = b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n" % (len(body), length)
        self.head, self.request = HEAD + head, HEAD + head + body

    async def send(self, stage: str) -> None:
        """As much of the request as one sends who dies at this stage."""
        end = {"head": len(self.head) // 2, "body": len(self.head) + 40}.get(stage, len(self.request))
        self.reader, self.writer = await asyncio.open_connection(self._served_by.host, self._served_by.port)
        self.writer.write(self.request[:end])
        await self.writer.drain()

    def die(self, *, resets: bool) -> None:
        """As a process that is killed: the system closes its connection, or resets it if something was left unread."""
        connection: socket.socket = self.writer.get_extra_info("socket")
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.writer.transport.abort()

    async def check(self) -> None:
        """The whole answer, which is this client's and right."""
        answer = await self.reader.read()
        self.writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), answer[:500]
        start = body.index(b"}]}") + 3
        assert json.loads(body[:start])["id"] == self.name
        np.testing.assert_array_equal(np.frombuffer(body[start:], np.float32).reshape(self.x.shape), self.x + self.x)


_numbers = itertools.count()


@contextlib.contextmanager
def counted(model: aiotrt.Model) -> Iterator[Any]:
    """Counts since now: what the model did, in requests; with batching those are items, not launches."""
    before = model.statistics()

    def since() -> dict[str, int]:
        now = model.statistics()
        counts = {
            name: getattr(now, name) - getattr(before, name) for name in ("submitted", "completed", "cancelled", "failed")
        }
        items = [sum(size * count for size, count in s.batches.items()) for s in (before, now)]
        launches = [s.replays + s.fallback_runs for s in (before, now)]
        counts["done"] = items[1] - items[0] if now.batches else launches[1] - launches[0]
        return counts

    yield since


async def one_round(client: Served, model: aiotrt.Model, shape: tuple[int, ...], dice: random.Random) -> None:
    """Some clients, half of whom die, while the device is held: so it is known what was on it when they died."""
    alive = [(Client(client, shape), "") for _ in range(ALIVE)]
    stages = [dice.choice(STAGES) for _ in range(DEAD)]
    # The answer must be more than sockets take, or it would be sent before its client dies.
    long = (200_000, 3) if len(shape) == 2 else (600_003,)
    dead = [(Client(client, long if stage == "answer" else shape), stage) for stage in stages]
    asked = ALIVE + sum(stage in ("queue", "answer") for stage in stages)
    in_queue = stages.count("queue")
    everybody = [*alive, *dead]
    dice.shuffle(everybody)
    with counted(model) as since:
        with held(model):
            await asyncio.gather(*(one.send(stage) for one, stage in everybody))
            await until_slow(lambda: bool(since()["submitted"] == asked and model.statistics().free == 0))
            for one, stage in dead:
                if stage != "answer":
                    one.die(resets=dice.random() < 0.5)
            await until_slow(lambda: bool(since()["cancelled"] == in_queue))
            on_device, waiting = since()["done"], model.statistics().waiting
            assert waiting <= asked - in_queue, "somebody who is dead still waits"
        await asyncio.gather(*(one.check() for one, _ in alive))
        for one, stage in dead:
            if stage == "answer":
                assert (await one.reader.read(100)).startswith(b"HTTP/1.1 200 ")
                one.die(resets=dice.random() < 0.5)
        await until_slow(lambda: model.statistics().free == SLOTS)
        counts = since()
    assert counts["done"] == on_device + waiting, "the device worked for somebody who was dead before it began"
    assert (counts["submitted"], counts["completed"], counts["failed"]) == (asked, asked - in_queue, 0)
    assert model.statistics().waiting == 0


@pytest.mark.parametrize(
    "batching", [pytest.param(False, marks=pytest.mark.proof, id="one by one"), pytest.param(True, id="batches")]
)
async def test_half_of_the_clients_die(tmp_path: Path, batching: bool) -> None:
    options = {"device": "host", "slots": SLOTS} | ({"batching": {"max_size": 4}} if batching else {})
    path = onnx_models.save(
        tmp_path / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("?", "?" if batching else 3)}
    )
    shape = (3,) if batching else (1, 3)
    model_settings = ModelSettings("double", path, [shape], options)
    # Of bodies as many bytes as a round may have: what is still reserved for the dead is room that the living do not get.
    app = create_app(ServerSettings((model_settings,), max_bodies=DEAD * 3 << 20, max_body=3 << 20))
    dice = random.Random(1)
    async with served(app) as client:
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        model: aiotrt.Model = client.server.lifespan.state["aiotrt"]["double"]
        state = client.server.server_state
        readings = []
        for _ in range(4):  # what a first quarter leaves are buffers for every shape and size of batch there is
            for _ in range(DEATHS // DEAD // 4):
                await one_round(client, model, shape, dice)
                await until_slow(lambda: len(state.connections) <= 1 and not state.tasks)  # one is who asked /readyz
            readings.append(_resident())
        assert readings[-1] - readings[0] < 64 << 20, readings
        assert model.is_ready


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
