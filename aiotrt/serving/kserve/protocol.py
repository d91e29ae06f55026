"""uvicorn's HTTP/1.1, with an end to clients that begin and do not go on, and time for those that are about to begin.

uvicorn waits for ever for a request's line and headers, for a body that was refused, and for a client to take its answer.
Each such connection is one of those that `max_connections` allows, so that some hundreds of them, which cost their owner
nothing, would be all that the server has room for. And uvicorn closes idle connections as soon as it is to end, into which a
client may just be sending: the server answers what comes within `LINGER` seconds, and says that it closes the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

__all__ = ["LINGER", "protocol"]

#: Seconds for which a server that ends keeps idle connections.
LINGER: Final = 0.5

#: Of a request's line and headers; more is 431.
_MAX_HEAD: Final = 32 << 10
#: Bytes of a head that h11 gets at once: it looks at the length only of what is not complete yet.
_PIECE: Final = 4 << 10


def protocol(patience: float, max_connections: int = 1000) -> type[H11Protocol]:
    """The protocol for uvicorn's ``http=``.

    Args:
        patience: seconds from a connection, or the next request's first byte, to the end of its headers; and seconds for
            which a client may take nothing of its answer. Bodies are the application's own business.
        max_connections: requests over more connections than these are answered 503.
    """

    class Bounded(_Bounded):
        seconds = patience
        most = max_connections

    return Bounded


class _Bounded(H11Protocol):
    """One connection. One timer for each of the two waits: a client can do both at once."""

    seconds: ClassVar[float]
    most: ClassVar[int]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._listening: asyncio.TimerHandle | None = None
        self._talking: asyncio.TimerHandle | None = None
        self.conn = h11.Connection(h11.SERVER, _MAX_HEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.app = _crowded
        self._listen()

    def data_received(self, data: bytes) -> None:
        if self._listening is None and self._is_idle:
            self._listen()  # a connection may be idle for long, but not in the middle of a head
        while len(data) > _PIECE and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            super().data_received(data[:_PIECE])
            data = data[_PIECE:]
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        is_long = len(self.conn.trailing_data[0]) > _MAX_HEAD
        status, said = (431, f"the headers have more than {_MAX_HEAD:,} bytes") if is_long else (400, "this is not HTTP/1.1")
        self._answer(status, said)
        self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self._listening is not None and not self._is_idle:
            self._listening.cancel()  # a request has come: how long it takes is not the client's doing
            self._listening = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # It may not take the rest, or go on with a body that was refused, or with half a head.
        rest = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if self._is_idle and (rest or self.transport.is_closing()):
            self._listen()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._listen()  # it may not take the rest

    def shutdown(self) -> None:
        if self._is_idle:
            self.loop.call_later(LINGER, self._end_if_idle)
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._talking is None:
            self._talking = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._talking is not None:
            self._talking.cancel()
            self._talking = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._listening, self._talking):
            if timer is not None:
                timer.cancel()  # it would keep the connection, and what it holds
        self._listening = self._talking = None
        super().connection_lost(exc)

    @property
    def _is_idle(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or cycle.response_complete

    def _end_if_idle(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _answer(self, status: int, message: str) -> None:
        """Answer what never became a request, unless an answer to the request before it has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = b'{"error":"%s"}' % message.encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (status, STATUS_PHRASES[status], len(body), body)
            )

    def _listen(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        self._listening = self.loop.call_later(self.seconds, self._tire)

    def _tire(self) -> None:
        if self.transport.is_closing():  # and the rest of an answer is not taken
            self.transport.abort()
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._answer(408, f"the request's headers did not arrive within {self.seconds:g} seconds")
        self.transport.close()
        self._listen()


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request over one connection too many."""
    headers = {"Retry-After": "1", "Connection": "close"}
    await JSONResponse({"error": "too many connections: call again later"}, 503, headers)(scope, receive, send)
