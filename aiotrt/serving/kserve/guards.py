"""What stands before every request: the token, and how many bytes of requests may be in memory."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiotrt.decoding.threads import off_loop
from aiotrt.serving.bodies import read_body
from aiotrt.serving.errors import BodyTooLargeError, BusyError
from aiotrt.serving.kserve.compression import coding_of, decompressed
from aiotrt.serving.models import Models

__all__ = ["BearerToken", "Body", "Budget", "Draining", "has_token"]

#: Probes have no token, and learn no more than whether the server is ready. Nor has who opens the status page, which has
#: nothing to show before it was given one.
_OPEN: Final = frozenset(("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"))


def has_token(header: bytes, token: str) -> bool:
    """Whether a header ``Authorization`` has the token. The time it takes does not tell how much of it was right."""
    scheme, _, given = header.partition(b" ")
    return hmac.compare_digest(scheme.lower() + b" " + given.strip(), b"bearer " + token.encode())


class BearerToken:
    """ASGI middleware: 401 for whoever does not send the token; probes excepted.

    Args:
        app: what to wrap.
        token: what must come as ``Authorization: Bearer``.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "lifespan" and scope["path"] not in _OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not has_token(given, self._token):
                answer = JSONResponse({"error": "the token is missing or wrong"}, 401, {"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Draining:
    """ASGI middleware: while the program ends, answers close their connection, and cancelled requests are answered 503.

    Args:
        app: what to wrap.
        models: says whether the program ends.
    """

    def __init__(self, app: ASGIApp, models: Models) -> None:
        self.app = app
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._models.is_draining:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            await self.app(scope, receive, send_on if scope["type"] == "http" else send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or not self._models.is_draining:
                raise
            if not has_started:
                answer = JSONResponse({"error": "the server ended before this request did"}, 503)
                await answer(scope, receive, send_on)


class Budget:
    """How many bytes of requests and answers are in memory at once, over all clients.

    A body's bytes count as they arrive, whatever its client announced, and until nothing refers to them any more: tensors of
    a call that was cancelled may be views of them that the device still reads.

    Args:
        limit: how many may be.
        longest: how many one body may have.
        timeout: seconds that sending it may take.
    """

    def __init__(self, limit: int, longest: int, timeout: float) -> None:
        self._limit = limit
        self._longest = longest
        self._timeout = timeout
        self._used = 0
        self._freed: deque[int] = deque()

    @property
    def used(self) -> int:
        """Bytes that are in memory now."""
        while self._freed:
            self._used -= self._freed.popleft()
        return self._used

    async def read(self, request: Request) -> Body:
        """The body of a request, decompressed.

        Raises:
            UnsupportedMediaTypeError: it is compressed in a way that is not known.
            BusyError: there is no room for more of it.
            BodyTooLargeError: as `read_body` does, or decompressed it is too large.
            BodyTimeoutError: as `read_body` does.
            BodyError: it cannot be decompressed.
        """
        coding = coding_of(request.headers.get("content-encoding"))
        body = Body(self)
        await read_body(request, self._longest, self._timeout, body)
        if coding is None:
            return body
        pieces, plain = decompressed(body, coding), Body(self)
        # The first piece of a short body here, and all others in a thread.
        while piece := await off_loop(lambda: next(pieces, b""), None if plain else len(body)):
            plain += piece
            if len(plain) > self._longest:
                raise BodyTooLargeError(
                    f"the body has more than {self._longest:,} bytes once it is decompressed, which is all that is taken"
                )
        return plain

    def add(self, size: int) -> None:
        """Count bytes of a body that arrived.

        Raises:
            BusyError: there is no room for them.
        """
        if self.used + size > self._limit:
            raise BusyError(
                f"requests and answers of {self.used:,} bytes are in memory, at most {self._limit:,} are taken at once"
            )
        self._used += size

    def free(self, size: int) -> None:
        """Count a body that is no longer in memory. May be called in any thread."""
        self._freed.append(size)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count what was made of a body, such as pixels, as long as it is needed.

        Raises:
            BusyError: there is no room for it.
        """
        self.add(size)
        try:
            yield
        finally:
            self._used -= size

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """Count an answer while it is sent. It is never refused, but leaves less room for requests."""
        self._used += size
        try:
            yield
        finally:
            self._used -= size


class Body(bytearray):
    """A request's body that counts itself."""

    __slots__ = ("_budget", "_counted")

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget
        self._counted = 0

    def reserve(self, size: int) -> None:
        """Count bytes that will be appended with `extend`, or are kept with this body. Raises as `Budget.add` does."""
        self._budget.add(size)
        self._counted += size

    def __iadd__(self, data: bytes) -> Self:  # type: ignore[misc, override]
        self.reserve(len(data))
        self.extend(data)
        return self

    def __del__(self) -> None:
        self._budget.free(self._counted)
