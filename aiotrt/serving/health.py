"""Health, metrics, and everything that an application wants of this package, in one call."""

from __future__ import annotations

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from aiotrt.serving.disconnect import CancelOnDisconnect
from aiotrt.serving.errors import add_exception_handlers
from aiotrt.serving.models import Standing, models_of

__all__ = ["install", "livez", "metrics", "readyz"]


def install(app: Starlette) -> None:
    """Add to `app` (FastAPI or Starlette) all but the lifespan.

    Answers for aiotrt's errors, the cancellation of handlers whose client has gone, and ``/livez``, ``/readyz`` and
    ``/metrics``. Call it after `app.add_middleware` for others, so that `CancelOnDisconnect` is outside of them.
    """
    add_exception_handlers(app)
    app.add_middleware(CancelOnDisconnect)
    app.router.routes.extend(
        Route(path, endpoint, include_in_schema=False)
        for path, endpoint in (("/livez", livez), ("/readyz", readyz), ("/metrics", metrics))
    )


async def livez(request: Request) -> Response:
    """The event loop turns: 200."""
    return PlainTextResponse("ok")


async def readyz(request: Request) -> Response:
    """Every model is warmed up and usable, and the program is not about to end: 200, and otherwise 503 and why.

    A model of which some devices broke is usable, and said to be degraded.
    """
    models = models_of(request)
    said = {}
    for name in models.names():
        standing, reason = models.standing(name)
        said[name] = reason or "ready" if standing is Standing.READY else reason
    body = {"ready": models.is_ready, "draining": models.is_draining, "models": said}
    return JSONResponse(body, 200 if models.is_ready else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    encode, content_type = prometheus_client.exposition.choose_encoder(request.headers.get("accept", ""))
    # The type is given as a header, since Starlette would add a charset to it that OpenMetrics already has.
    return Response(encode(models_of(request).registry), headers={"content-type": content_type})
