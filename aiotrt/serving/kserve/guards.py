"""What stands before every request: the token, and how many bytes of requests may be in memory."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from aiotrt.serving.bodies import read_body
from aiotrt.serving.errors import BusyError

__all__ = ["BearerToken", "Budget"]

#: Probes have no token, and learn no more than whether the server is ready. Nor has who opens the status page, which has
#: nothing to show before it was given one.
_OPEN: Final = frozenset(("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"))


class BearerToken:
    """ASGI middleware: 401 for whoever does not send the token; probes excepted.

    Args:
        app: what to wrap.
        token: what must come as ``Authorization: Bearer``.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._expected = b"bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "lifespan" and scope["path"] not in _OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, token = given.partition(b" ")
            # In a time that does not tell how much of it was right.
            if not hmac.compare_digest(scheme.lower() + b" " + token.strip(), self._expected):
                answer = JSONResponse({"error": "the token is missing or wrong"}, 401, {"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Budget:
    """How many bytes of requests are in memory at once, over all clients.

    Args:
        limit: how many may be.
        longest: how many one body may have.
        timeout: seconds that sending it may take.
    """

    def __init__(self, limit: int, longest: int, timeout: float) -> None:
        self.used = 0
        self._limit = limit
        self._longest = longest
        self._timeout = timeout

    @contextmanager
    def reserve(self, request: Request) -> Iterator[None]:
        """Room for this request's body, until it is left.

        Raises:
            BusyError: there is none.
        """
        length = request.headers.get("content-length", "")
        # Who does not say how much is coming may send as much as anybody; who says too much is told so when it is read.
        size = min(int(length) if length.isascii() and length.isdecimal() else self._longest, self._longest)
        if self.used + size > self._limit:
            raise BusyError(
                f"requests of {self.used:,} bytes are in memory already, at most {self._limit:,} are taken at once"
            )
        self.used += size
        try:
            yield
        finally:
            self.used -= size

    async def read(self, request: Request) -> bytearray:
        """The body. Raises as `read_body` does."""
        return await read_body(request, self._longest, self._timeout)
