"""Applications behind a real socket, and networks that can be held."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

__all__ = ["Served", "raw", "served"]


class Served(httpx.AsyncClient):
    """A client of a server that runs on this loop; `host` and `port` for those who want a socket of their own."""

    host: str
    port: int
    server: uvicorn.Server


@contextlib.asynccontextmanager
async def served(app: ASGIApp, **options: Any) -> AsyncIterator[Served]:
    """`app` behind uvicorn with these options, on a port of the loopback interface."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    config = uvicorn.Config(app, **{"log_level": "error", "lifespan": "on", "http": "h11"} | options)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            assert not task.done(), "the server ended before it had started"
            await asyncio.sleep(0.005)
        async with Served(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            client.host, client.port, client.server = host, port, server
            yield client
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        listener.close()


async def raw(client: Served, *parts: bytes, ends: bool = False) -> bytes:
    """Send these bytes over a socket of one's own and return all that comes back until the server closes it.

    Args:
        client: whose server.
        *parts: sent one after the other.
        ends: whether to say that nothing more will come.
    """
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        answer = b""
        # A server that refuses closes while more is on its way to it, which resets the connection.
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            if ends:
                writer.write_eof()
            while chunk := await reader.read(1 << 16):
                answer += chunk
        return answer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
