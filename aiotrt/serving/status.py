"""A page that shows what the models do, live, and the JSON behind it. Nothing on it comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib.resources import files
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, Router

import aiotrt
from aiotrt.errors import ModelClosedError
from aiotrt.serving.history import KEPT, PERIOD
from aiotrt.serving.models import Models, models_of

__all__ = ["status_page"]

_PAGE: Final = files("aiotrt.serving").joinpath("status.html").read_text()


def status_page() -> Router:
    """The status page, for an application of your own: ``app.mount("/status", serving.status_page())``.

    The page itself holds no data. What it shows it fetches from ``status.json`` beside it, once a second, with the bearer
    token that its reader enters, if one is asked for.
    """
    return Router(
        [
            Route("/", _page, include_in_schema=False),
            Route("/status.json", _status, include_in_schema=False),
        ]
    )


async def _page(request: Request) -> Response:
    return HTMLResponse(_PAGE, headers=_HEADERS)


async def _status(request: Request) -> Response:
    """What there is; of the samples, those after the number that is asked for."""
    models = models_of(request)
    after = request.query_params.get("after", "")
    history = models.monitor.history
    return JSONResponse(
        {
            "version": aiotrt.__version__,
            "implementation": aiotrt.__impl__,
            "at": time.time(),
            "ready": models.is_ready,
            "draining": models.is_draining,
            "period": PERIOD,
            "kept": KEPT,
            "models": [_described(models, name) for name in models.names()],
            "newest": history.number,
            "samples": history.after(int(after) if after.isascii() and after.isdecimal() and len(after) < 16 else 0),
        },
        headers={"Cache-Control": "no-store"},
    )


def _described(models: Models, name: str) -> dict[str, Any]:
    standing, reason = models.standing(name)
    described: dict[str, Any] = {"name": name, "standing": standing.value.lower(), "reason": reason}
    try:
        now = models[name].statistics()
    except ModelClosedError:
        return described
    slots = now.free + now.claimed + now.preparing + now.in_flight + now.readable + now.draining + now.broken
    return described | {
        "device": now.device,
        "slots": slots,
        "devices": [
            {"device": one.device, "broken": one.is_broken, "in_flight": one.in_flight, "completed": one.completed}
            for one in now.devices
        ],
        "totals": {"completed": now.completed, "replays": now.replays, "fallback_runs": now.fallback_runs},
    }


def _hash(element: str) -> str:
    """Of what stands in the only element of this name, as a browser checks it."""
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", _PAGE, re.DOTALL)
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_HEADERS: Final = {
    # Model names are shown as text; if ever one were not, nothing that it brought along could run.
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{_hash('script')}'; style-src 'sha256-{_hash('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
