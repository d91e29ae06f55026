"""uvicorn's HTTP/1.1, with timeouts for clients that stop in the middle, and a grace period for idle connections at the end.

uvicorn waits without a timeout for a request's line and headers, for a body that was refused, and for a client to read its
answer. Each such connection counts against `max_connections`, so some hundreds of them, which cost their owner nothing,
would block the server for all other clients. Also, uvicorn closes idle connections as soon as it shuts down, while a client
may be sending a request. Here, requests that arrive within `LINGER` seconds are answered, and the answer says that the
connection is closed.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

__all__ = ["LINGER", "protocol"]

#: Seconds for which the server keeps idle connections when it shuts down.
LINGER: Final = 0.5

#: The maximum size of a request's line and headers, in bytes; a larger head is answered 431.
_MAX_HEAD: Final = 32 << 10
#: Bytes of a head that are passed to h11 at once, because h11 checks the length only of an incomplete head.
_PIECE: Final = 4 << 10


def protocol(patience: float, max_connections: int = 1000) -> type[H11Protocol]:
    """Make the protocol class for uvicorn's ``http=``.

    Args:
        patience: the timeout in seconds from a connection, or from the first byte of its next request, to the end of the
            headers; also the seconds for which a client may read nothing of its answer. The application itself limits
            bodies.
        max_connections: the maximum number of connections; requests over further ones are answered 503.
    """

    class Bounded(_Bounded):
        seconds = patience
        most = max_connections

    return Bounded


class _Bounded(H11Protocol):
    """One connection. It has two timers, for headers and for reading answers, because both waits can be pending at once."""

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
            self._listen()  # the keep-alive timeout applies between requests, and this timer within a head
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
            self._listening.cancel()  # the head is complete: the time to answer does not depend on the client
            self._listening = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The client may never read the rest of the answer, or never finish a refused body or an incomplete head.
        rest = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if self._is_idle and (rest or self.transport.is_closing()):
            self._listen()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._listen()  # the client may never read the rest of the answer

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
                timer.cancel()  # a pending timer would keep this object and its buffers alive
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
        """Answer an incomplete or invalid request, unless the answer to the previous request has begun."""
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
        if self.transport.is_closing():  # the client does not read the rest of an answer
            self.transport.abort()
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._answer(408, f"the request's headers did not arrive within {self.seconds:g} seconds")
        self.transport.close()
        self._listen()


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 to a request over a connection above the maximum."""
    headers = {"Retry-After": "1", "Connection": "close"}
    await JSONResponse({"error": "too many connections: call again later"}, 503, headers)(scope, receive, send)
