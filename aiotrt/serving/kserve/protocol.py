"""uvicorn's HTTP/1.1, with an end to clients that begin and do not go on.

uvicorn waits for ever for a request's line and headers, for a body that was refused, and for a client to take its answer.
Each such connection is one of those that `max_connections` allows, so that some hundreds of them, which cost their owner
nothing, would be all that the server has room for.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["protocol"]

_TIMEOUT: Final = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def protocol(patience: float) -> type[H11Protocol]:
    """The protocol for uvicorn's ``http=``.

    Args:
        patience: seconds from a connection, or the end of an answer, to the end of the next request's headers; and seconds
            for which a client may take nothing of its answer. Bodies are the application's own business.
    """

    class Bounded(_Bounded):
        seconds = patience

    return Bounded


class _Bounded(H11Protocol):
    """One connection. One timer for each of the two waits: a client can do both at once."""

    seconds: ClassVar[float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._listening: asyncio.TimerHandle | None = None
        self._talking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._listen()

    def handle_events(self) -> None:
        super().handle_events()
        cycle: Any = self.cycle  # None before the first request
        if self._listening is not None and cycle is not None and not cycle.response_complete:
            self._listening.cancel()  # a request has come: how long it takes is not the client's doing
            self._listening = None

    def on_response_complete(self) -> None:
        self._listen()  # first, since the next request may have come already
        super().on_response_complete()

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

    def _listen(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        self._listening = self.loop.call_later(self.seconds, self._tire)

    def _tire(self) -> None:
        if self.transport.is_closing():  # and the rest of an answer is not taken
            self.transport.abort()
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(_TIMEOUT)
        self.transport.close()
        self._listen()
