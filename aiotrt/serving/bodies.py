"""Request bodies: images and arrays, as dependencies. Read with a limit on the loop, decoded in a thread.

Nothing that a client sends is trusted: sizes are checked against what was sent before memory is allocated for them, and
nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from aiotrt.decoding.decoder import decode_image
from aiotrt.decoding.threads import COPIED, off_loop
from aiotrt.devices import Device
from aiotrt.errors import InputError
from aiotrt.serving.errors import FROM_CLIENT, BodyError, BodyTimeoutError, BodyTooLargeError, UnsupportedMediaTypeError
from aiotrt.serving.images import FORMATS, Pixels, body_errors, decode_off_loop
from aiotrt.serving.json_body import from_base64, loads, numbers, said

__all__ = [
    "array_body",
    "array_request",
    "decode_array",
    "image_body",
    "image_request",
    "is_possible",
    "read_body",
]

Array: TypeAlias = npt.NDArray[Any]

#: Of an .npy file's head; numpy writes less than 128 bytes.
_NPY_HEAD: Final = 4096
#: Of numbers in JSON; images in it are strings, which cost less.
_MAX_JSON: Final = 4 << 20


@overload
def image_body(
    *,
    max_bytes: int = 20 << 20,
    max_pixels: int = 50_000_000,
    mode: Literal["RGB", "L", "RGBA"] = "RGB",
    field: str = "file",
    timeout: float = 30.0,
    device: Literal[False] = False,
) -> Callable[[Request], Coroutine[Any, Any, Pixels]]: ...
@overload
def image_body(
    *,
    max_bytes: int = 20 << 20,
    max_pixels: int = 50_000_000,
    mode: Literal["RGB", "L", "RGBA"] = "RGB",
    field: str = "file",
    timeout: float = 30.0,
    device: Literal[True] | str | torch.device | Device,
) -> Callable[[Request], Coroutine[Any, Any, torch.Tensor]]: ...
def image_body(
    *,
    max_bytes: int = 20 << 20,
    max_pixels: int = 50_000_000,
    mode: Literal["RGB", "L", "RGBA"] = "RGB",
    field: str = "file",
    timeout: float = 30.0,
    device: bool | str | torch.device | Device = False,
) -> Callable[[Request], Coroutine[Any, Any, Pixels | torch.Tensor]]:
    """A dependency: the image in the body, as pixels (height, width, channels), turned as the camera was held.

    The body is the image file itself (``image/*`` or ``application/octet-stream``), a form with the file in `field`
    (``multipart/form-data``), or JSON: ``{"image": "<base64>"}``, where a ``data:`` URL will do too.

    Args:
        max_bytes: of the body; more is 413.
        max_pixels: of the image, checked before it is unpacked; more is 413. So is a side of more than 65,535, and more than
            twice `PIL.Image.MAX_IMAGE_PIXELS`, some 179 million, which is for the whole process and yours to set. Images
            that would take more than 1 GiB together while they are decoded wait for each other.
        mode: Pillow's name for what the pixels should be. Of 16 bits the upper 8 are taken.
        field: the form's field.
        timeout: seconds that sending the body may take; more is 408.
        device: decode to a torch tensor on this device: True for the current GPU, or the CPU where there is none. JPEG files
            are decoded on the GPU, as `aiotrt.decoding.Decoder` does. False for an array in host memory.

    Raises:
        InputError: `device` is given with another mode than "RGB".
    """
    if device is not False and mode != "RGB":
        raise InputError(f"image_body(device=...) gives RGB; got mode={mode!r}")

    async def dependency(request: Request) -> Pixels | torch.Tensor:
        kind = _media_type(request)
        if kind == "multipart/form-data":
            data = await _uploaded(request, field, max_bytes, timeout)
        elif kind in ("", "application/octet-stream", "application/json") or kind.startswith("image/"):
            data = await read_body(request, max_bytes, timeout)
        else:
            raise UnsupportedMediaTypeError(
                "expected an image (content type image/* or application/octet-stream), multipart/form-data or "
                f"application/json, got content type {kind[:80]!r}; with curl add -H 'Content-Type: image/png'"
            )
        if kind == "application/json":
            data = await off_loop(lambda: _image_in_json(data), len(data), json=len(data))
        if device is False:
            return await decode_off_loop(data, max_pixels, mode)
        with body_errors():
            place = "auto" if device is True else device
            return await decode_image(data, place, max_bytes=max_bytes, max_pixels=max_pixels)

    return dependency


def array_body(
    dtype: npt.DTypeLike | None = None, *, max_bytes: int = 64 << 20, field: str = "file", timeout: float = 30.0
) -> Callable[[Request], Coroutine[Any, Any, Array]]:
    """A dependency: the array in the body.

    The body is an ``.npy`` file (``application/x-npy`` or ``application/octet-stream``), a form with one in `field`
    (``multipart/form-data``), or JSON: nested lists of numbers, by themselves or as ``{"array": ...}``, of at most 4 MiB.

    Args:
        dtype: what it must be; JSON is converted to it. None for whatever an ``.npy`` file says, and float32 for JSON.
        max_bytes: of the body; more is 413.
        field: the form's field.
        timeout: seconds that sending the body may take; more is 408.
    """
    wanted = None if dtype is None else np.dtype(dtype)

    async def dependency(request: Request) -> Array:
        setattr(request.state, FROM_CLIENT, True)
        kind = _media_type(request)
        if kind == "application/json":
            data = await read_body(request, min(max_bytes, _MAX_JSON), timeout)
            return await off_loop(lambda: _array_in_json(data, wanted or np.dtype(np.float32)), len(data), json=len(data))
        if kind == "multipart/form-data":
            data = await _uploaded(request, field, max_bytes, timeout)
        elif kind in ("", "application/octet-stream", "application/x-npy"):
            data = await read_body(request, max_bytes, timeout)
        else:
            raise UnsupportedMediaTypeError(
                "expected an .npy file (content type application/x-npy or application/octet-stream), multipart/form-data or "
                f"application/json, got content type {kind[:80]!r}; with curl add -H 'Content-Type: application/x-npy'"
            )
        array = await off_loop(lambda: decode_array(data), len(data), COPIED)
        if wanted is not None and array.dtype != wanted:
            raise BodyError(f"the array: expected dtype {wanted}, got {array.dtype}")
        return array

    return dependency


def decode_array(data: bytes | bytearray) -> Array:
    """The array in an ``.npy`` file, without a copy where `data` can be written to.

    Raises:
        BodyError: it is not one, or its head does not agree with its length.
    """
    file = io.BytesIO(data[: _NPY_HEAD + 16])
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(file, max_header_size=_NPY_HEAD)
    except Exception as error:  # the head is a Python literal: reading it can fail in every way that parsing can
        raise BodyError(f"the body is not an .npy file ({len(data):,} bytes): {error}") from error
    if dtype.kind not in "biuf" or dtype.subdtype is not None:
        raise BodyError(f"the array: expected numbers or booleans, got dtype {dtype}")
    start = file.tell()
    size = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    if size != len(data) - start:
        raise BodyError(f"the array: {shape} of {dtype} needs {size:,} bytes, and {len(data) - start:,} were sent")
    # `True` is an integer to the head's reader, and to nobody after it.
    if any(extent < 0 or isinstance(extent, bool) for extent in shape) or not is_possible(shape):
        raise BodyError(f"the array: no array has the shape {said(shape)}")
    flat = np.frombuffer(data, dtype, math.prod(shape), start)
    array = flat.reshape(shape, order="F" if is_fortran else "C")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def is_possible(shape: Sequence[int]) -> bool:
    """Whether an array can have these extents. Even where one is 0, numpy fails for others whose product is too large."""
    return len(shape) <= 32 and math.prod(extent or 1 for extent in shape) < 1 << 48


async def read_body(request: Request, limit: int, timeout: float | None = None, body: bytearray | None = None) -> bytearray:
    """Read the body, and append it to `body` if that is given.

    Raises:
        BodyTooLargeError: it is, or says it is, over `limit` bytes.
        BodyTimeoutError: it did not arrive within `timeout` seconds.
    """
    body = bytearray() if body is None else body
    async with _arriving(timeout):
        receive = limited(request, limit)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BodyError("the client disconnected before it had sent the whole body")
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return body


def limited(request: Request, limit: int) -> Callable[[], Coroutine[Any, Any, Message]]:
    """The request's `receive`, which raises `BodyTooLargeError` where the body passes `limit` bytes."""
    length = request.headers.get("content-length", "")
    announced = int(length) if length.isascii() and length.isdecimal() else 0
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive() if announced <= limit else {"body": b""}
        received += len(message.get("body", b""))
        if max(received, announced) > limit:
            raise BodyTooLargeError(f"the body has more than {limit:,} bytes, which is all that is taken")
        return dict(message)

    return receive


@contextlib.asynccontextmanager
async def _arriving(seconds: float | None) -> AsyncIterator[None]:
    """`asyncio.timeout` that says whose fault it is."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise BodyTimeoutError(f"the body did not arrive within {seconds:g} seconds") from error


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _uploaded(request: Request, field: str, limit: int, timeout: float) -> bytearray:
    """The file in one field of a form."""
    form_request = Request(request.scope, limited(request, limit))
    async with _arriving(timeout):
        try:
            form = await form_request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise BodyError(f"the form cannot be read: {error.detail}") from error
    try:
        file = form.get(field)
        if not isinstance(file, UploadFile):
            raise BodyError(f"expected a form with a file in the field {field!r}, got the fields {said(sorted(form))}")
        content = await file.read()
        return await off_loop(lambda: bytearray(content), len(content), COPIED)
    finally:
        await form.close()


def _image_in_json(data: bytearray) -> bytearray:
    found = loads("the body", data)
    text = found.get("image") if isinstance(found, Mapping) else None
    if not isinstance(text, str):
        raise BodyError('expected JSON like {"image": "<base64>"}')
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return from_base64(text)
    except ValueError as error:
        raise BodyError(f'"image" is not base64: {error}') from error


def _array_in_json(data: bytearray, dtype: np.dtype[Any]) -> Array:
    found = loads("the body", data)
    if isinstance(found, Mapping):
        if list(found) != ["array"]:
            raise BodyError(f'expected JSON like {{"array": [[1, 2], [3, 4]]}}, got the keys {said(list(found))}')
        found = found["array"]
    return numbers("the array", found, dtype)


def _error(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ERROR}}, **more}


_ERROR: Final = {
    "type": "object",
    "properties": {"detail": {"type": "string"}, "type": {"type": "string"}},
    "required": ["detail", "type"],
}
_ERRORS: Final[dict[str, Any]] = {
    "408": _error("The body took too long to arrive."),
    "413": _error("The body, or the image in it, is too large."),
    "415": _error("The content type is not taken."),
    # FastAPI merges its own schema into this one where a handler has parameters: there `detail` is a list.
    "422": {
        "description": "The body cannot be read, or the model does not take it.",
        "content": {"application/json": {"schema": {"type": "object", "required": ["detail"]}}},
    },
    "503": _error(
        "Not now: too much to do, or the model is not ready.",
        headers={"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds, where there is too much to do."}},
    ),
    "504": _error("The deadline passed before there was a result."),
}


def _binary(media_types: tuple[str, ...], field: str, json: Mapping[str, Any]) -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    content: dict[str, Any] = {kind: {"schema": file} for kind in media_types}
    content["multipart/form-data"] = {"schema": {"type": "object", "properties": {field: file}, "required": [field]}}
    content["application/json"] = {"schema": json}
    return {"requestBody": {"required": True, "content": content}, "responses": _ERRORS}


#: For a route's ``openapi_extra=``: what `image_body` and `array_body` take and which errors there are, so that the
#: description and its page say it.
image_request: Final = _binary(
    (*(f"image/{name.lower()}" for name in FORMATS), "application/octet-stream"),
    "file",
    {"type": "object", "properties": {"image": {"type": "string", "format": "byte"}}, "required": ["image"]},
)
array_request: Final = _binary(
    ("application/x-npy",),
    "file",
    {"type": "object", "properties": {"array": {"type": "array", "items": {}}}, "required": ["array"]},
)
