"""Check the host name of requests, and the page that made a browser send them.

Without a token, the server's only protection is that it listens only on this machine. A browser on this machine undermines
that: any web page can make it send a POST, and a page whose host name is rebound to 127.0.0.1 can read the answers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Origins", "is_loopback"]

_LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "::1"))
_SAFE: Final = frozenset(("GET", "HEAD"))


class Origins:
    """ASGI middleware: answers 421 to foreign host names, and 403 to requests that a page of another site makes.

    Browsers name the page in ``Origin``, ``Referer`` or ``Sec-Fetch-Site``; other clients send none of these.
    ``Content-Type`` is not checked, because curl and Python's urllib send that of a form by default.

    Args:
        app: the application to wrap.
        hosts: the server's names in addition to those of the loopback interface; None for any name.
        origins: the sites whose pages may call the server, such as ``https://example.com``; ``*`` for all.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self.app = app
        self._hosts = None if hosts is None else _LOOPBACK | {host.strip("[]").lower() for host in hosts}
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and (refusal := self._refusal(scope["method"], Headers(scope=scope))) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if host and self._hosts is not None and _name(host) not in self._hosts:
            return JSONResponse({"error": f"this server is not {host[:80]!r}: start it with --allowed-host if it is"}, 421)
        origin = headers.get("origin")
        is_foreign = False
        if origin is not None or method not in _SAFE:
            page = headers.get("referer") if origin is None else origin
            is_foreign = not self._may_call(page, host) if page is not None else _is_cross_site(headers)
        if is_foreign:
            return JSONResponse({"error": "pages of other sites may not call this server; see --cors-origin"}, 403)
        return None

    def _may_call(self, page: str, host: str) -> bool:
        """Whether a page, given by its address or its origin, may call the server, whose name in the request is `host`."""
        try:
            parts = urlsplit(page.lower())
        except ValueError:
            return False
        return parts.netloc == host.lower() or not self._origins.isdisjoint(("*", f"{parts.scheme}://{parts.netloc}"))


def is_loopback(host: str) -> bool:
    """Whether a server that binds to `host` can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """Return the name in a ``Host`` header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_cross_site(headers: Headers) -> bool:
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
