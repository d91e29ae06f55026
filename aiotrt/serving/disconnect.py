"""Cancel what is done for a client that has gone.

Servers tell an application that its client disconnected only when it asks, with `receive`, and a handler that has read its
body asks no more: it would run to its end for nobody. `starlette.requests.Request.is_disconnected` does not help behind
`BaseHTTPMiddleware`, which answers it before the server is asked.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CancelOnDisconnect"]

_log: Final = logging.getLogger("aiotrt")
#: Nobody reads it; access logs and other middleware do. The number is nginx's.
_CLIENT_CLOSED_REQUEST: Final = 499


class CancelOnDisconnect:
    """ASGI middleware: the handler is cancelled when its client disconnects, so that its call leaves the queue.

    Works inside and outside of other middleware; outside of it all is best, since it then cancels that too. A handler in
    a thread (``def``, not ``async def``) cannot be interrupted and ends by itself.

    Args:
        app: what to wrap.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        watch = _Watch(receive, task)
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            has_started = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                watch.is_over = True  # what is left are background tasks, and those are not for the client
            await send(message)

        pump = asyncio.create_task(watch.pump(), name="aiotrt disconnect")
        try:
            await self.app(scope, watch.receive, send_on)
        except asyncio.CancelledError:
            # Two may cancel at once: a server that ends must not be told that its cancellation was ours.
            if not watch.has_cancelled or task.uncancel() > watch.cancelling:
                raise
            watch.has_cancelled = False
            _log.debug("the client of %s has gone", scope["path"])
            if not has_started:
                # Other middleware around this one takes an application that answers nothing for one that failed.
                await send({"type": "http.response.start", "status": _CLIENT_CLOSED_REQUEST, "headers": []})
                await send({"type": "http.response.body", "body": b""})
        finally:
            watch.is_over = True
            if watch.has_cancelled:
                task.uncancel()  # the handler ended otherwise: a later `asyncio.timeout` would count one too many
            pump.cancel()


class _Watch:
    """Reads ahead by one message: the body goes on to the application, and a disconnection cancels it."""

    def __init__(self, receive: Receive, task: asyncio.Task[object]) -> None:
        self._receive = receive
        self._task = task
        # Bounded, so that a client cannot send ahead for ever.
        self._messages: asyncio.Queue[Message | Exception] = asyncio.Queue(1)
        self._last: Message | Exception | None = None
        self.cancelling = task.cancelling()
        self.has_cancelled = False
        self.is_over = False

    async def receive(self) -> Message:
        message = self._last if self._messages.empty() and self._last is not None else await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def pump(self) -> None:
        while self._last is None:
            try:
                message = await self._receive()
            except Exception as error:  # whoever asks next shall have it; without this they would wait for ever
                self._last = error
                await self._messages.put(error)
                return
            if message["type"] == "http.disconnect":
                self._last = message
                if not self.is_over:
                    self.has_cancelled = True
                    self._task.cancel()
            await self._messages.put(message)
