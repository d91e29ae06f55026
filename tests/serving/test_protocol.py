"""One connection of `aiotrt serve`: between requests, in the middle of a head, and when the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiotrt.serving.kserve import ModelSettings, ServerSettings, create_app
from aiotrt.serving.kserve import protocol as protocols
from tests.building import models as onnx_models
from tests.serving.test_fastapi import until_slow
from tests.serving.tools import Served, served

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Connection:
    """A client's end; `protocol` is the server's."""

    def __init__(self, client: Served, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.client, self.reader, self.writer = client, reader, writer

    @property
    def protocol(self) -> Any:
        port = self.writer.get_extra_info("sockname")[1]
        connections: set[Any] = set(self.client.server.server_state.connections)
        (found,) = (one for one in connections if one.client[1] == port)
        return found

    async def answer(self) -> bytes:
        """Head and body of the next answer, whose body is "ok"."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return head + await self.reader.readexactly(2)


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, patience: float = 30.0, most: int = 1000, **options: Any) -> AsyncIterator[Served]:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    app = create_app(ServerSettings((ModelSettings("relu", path, options={"device": "host"}, is_loaded=False),)))
    async with served(app, http=protocols.protocol(patience, most), **options) as client:
        yield client


@contextlib.asynccontextmanager
async def connected(client: Served) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        yield Connection(client, reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_between_requests_only_the_keep_alive_timeout_runs(tmp_path: Path) -> None:
    async with serving(tmp_path, timeout_keep_alive=50) as client, connected(client) as connection:
        await until_slow(lambda: len(client.server.server_state.connections) == 1)
        assert connection.protocol._listening is not None, "a new connection is to begin"
        for _ in range(3):
            connection.writer.write(LIVEZ)
            assert b"200 OK" in await connection.answer()
            protocol = connection.protocol
            while protocol.timeout_keep_alive_task is None:
                await asyncio.sleep(0)
            assert protocol._listening is None
            now = asyncio.get_running_loop().time()
            assert 40 < protocol.timeout_keep_alive_task.when() - now <= 51
        connection.writer.write(LIVEZ[:10])
        await until_slow(lambda: protocol._listening is not None)
        connection.writer.write(LIVEZ[10:])
        assert b"200 OK" in await connection.answer()
        await until_slow(lambda: protocol._listening is None)


async def test_an_idle_connection_is_closed_in_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path, timeout_keep_alive=0.1) as client, connected(client) as connection:
        connection.writer.write(LIVEZ)
        assert b"200 OK" in await connection.answer()
        assert await connection.reader.read() == b""


@pytest.mark.parametrize("is_pipelined", [False, True])
async def test_half_a_head_on_a_kept_connection_is_not_waited_for(tmp_path: Path, is_pipelined: bool) -> None:
    async with serving(tmp_path, 0.2, timeout_keep_alive=50) as client, connected(client) as connection:
        connection.writer.write(LIVEZ + (LIVEZ[:10] if is_pipelined else b""))
        assert b"200 OK" in await connection.answer()
        if not is_pipelined:
            connection.writer.write(LIVEZ[:10])
        answer = await connection.reader.read()
        assert error_of(answer) == (408, "the request's headers did not arrive within 0.2 seconds")


async def test_a_request_on_an_idle_connection_is_answered_while_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "LINGER", 5.0)
    async with serving(tmp_path) as client, connected(client) as used, connected(client) as new, connected(client) as idle:
        for connection in (used, idle):
            connection.writer.write(LIVEZ)
            assert b"connection: close" not in (await connection.answer()).lower()
        await until_slow(lambda: len(client.server.server_state.connections) == 3)
        client.server.config.app.state.models.drain()  # type: ignore[union-attr]  # as the first signal does
        idle_protocol = idle.protocol
        client.server.should_exit = True
        await until_slow(lambda: not client.server.servers[0].is_serving())
        for connection in (used, new):
            connection.writer.write(LIVEZ)
            answer = await connection.answer()
            assert b"200 OK" in answer
            assert b"connection: close" in answer.lower()
            assert await connection.reader.read() == b""
        idle_protocol._end_if_idle()  # when the time is over
        assert await idle.reader.read() == b""


async def test_before_it_ends_every_answer_closes_its_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        client.server.config.app.state.models.drain()  # type: ignore[union-attr]
        for path, status in (("/livez", 200), ("/readyz", 503), ("/v2/models/relu", 503), ("/none", 404)):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["connection"]) == (status, "close")


def error_of(answer: bytes) -> tuple[int, str]:
    """Status and message of an answer that closes its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert {b"content-type: application/json", b"connection: close", b"content-length: %d" % len(body)} <= set(lines)
    return int(answer.split()[1]), json.loads(body)["error"]


FLOOD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x-%d: %d\r\n" % (i, i) for i in range(4000))


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"GARBAGE\r\n\r\n", 400, "this is not HTTP/1.1"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400, "this is not HTTP/1.1"),
        (FLOOD + b"\r\n", 431, "the headers have more than 32,768 bytes"),
        (FLOOD, 431, "the headers have more than 32,768 bytes"),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, "the headers have more than 32,768 bytes"),
    ],
)
async def test_what_is_no_request_is_told_so_in_json(tmp_path: Path, data: bytes, status: int, says: str) -> None:
    assert len(FLOOD) > 40_000
    async with serving(tmp_path) as client, connected(client) as connection:
        await until_slow(lambda: len(client.server.server_state.connections) == 1)
        connection.protocol.data_received(data)  # in one piece, however the network would cut it
        assert error_of(await connection.reader.read()) == (status, says)


async def test_a_head_of_almost_as_much_is_taken_and_a_long_body_beside_it(tmp_path: Path) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 30_000
    async with serving(tmp_path) as client, connected(client) as connection:
        await until_slow(lambda: len(client.server.server_state.connections) == 1)
        connection.protocol.data_received(head + b"\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000) + LIVEZ)
        for _ in range(2):
            assert b"200 OK" in await connection.answer()


async def test_what_is_wrong_after_an_answer_has_begun_ends_the_connection_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as client, connected(client) as connection:
        connection.writer.write(b"POST /none HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b" 404 " in head
        connection.writer.write(b"ZZ\r\n")
        assert (await connection.reader.read()).endswith(b"}")


async def test_more_connections_than_may_be_are_told_so_in_json(tmp_path: Path) -> None:
    async with serving(tmp_path, most=2) as client:
        async with connected(client) as one, connected(client) as two:
            for connection in (one, two):
                connection.writer.write(LIVEZ)
                assert b"200 OK" in await connection.answer()
            async with connected(client) as three:
                three.writer.write(LIVEZ)
                answer = await three.reader.read()
                assert error_of(answer) == (503, "too many connections: call again later")
                assert b"retry-after: 1\r\n" in answer
        await until_slow(lambda: not client.server.server_state.connections)
        async with connected(client) as again:
            again.writer.write(LIVEZ)
            assert b"200 OK" in await again.answer()
