"""aiotrt in FastAPI and Starlette: models with the application's life, bodies, errors, health and metrics.

::

    app = FastAPI(lifespan=serving.lifespan(detector="detector.onnx"))
    serving.install(app)
    Detector = Annotated[aiotrt.Model, Depends(serving.get("detector"))]
    Page = Annotated[npt.NDArray[np.uint8], Depends(serving.image_body(max_bytes=10 << 20))]


    @app.post("/detect", openapi_extra=serving.image_request)
    async def detect(page: Page, detector: Detector) -> list[Box]:
        async with asyncio.timeout(0.5):  # 504
            return boxes(await detector(normalise(page)))

`aiotrt.serving.kserve` is a whole server that speaks the Open Inference Protocol, and ``aiotrt serve`` runs it.
"""

from __future__ import annotations

from aiotrt._install import install_hint
from aiotrt.errors import MissingDependencyError

try:
    import fastapi  # noqa: F401
    import orjson  # noqa: F401
    import PIL  # noqa: F401
    import prometheus_client  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(f"aiotrt.serving needs {error.name}; {install_hint('serving')}") from error

from aiotrt.serving.bodies import array_body, array_request, decode_array, image_body, image_request
from aiotrt.serving.disconnect import CancelOnDisconnect
from aiotrt.serving.errors import (
    BodyError,
    BodyTimeoutError,
    BodyTooLargeError,
    BusyError,
    UnsupportedMediaTypeError,
    add_exception_handlers,
)
from aiotrt.serving.health import install, livez, metrics, readyz
from aiotrt.serving.images import decode_image
from aiotrt.serving.models import Models, Source, Standing, get, lifespan, models_of
from aiotrt.serving.status import status_page

__all__ = [
    "BodyError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "BusyError",
    "CancelOnDisconnect",
    "Models",
    "Source",
    "Standing",
    "UnsupportedMediaTypeError",
    "add_exception_handlers",
    "array_body",
    "array_request",
    "decode_array",
    "decode_image",
    "get",
    "image_body",
    "image_request",
    "install",
    "lifespan",
    "livez",
    "metrics",
    "models_of",
    "readyz",
    "status_page",
]
