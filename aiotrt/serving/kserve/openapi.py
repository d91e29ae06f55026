"""The parts of the server's OpenAPI schema that do not follow from the types of its functions.

A test sends requests that this schema allows, and others, and checks every answer against the schema.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from aiotrt.serving.kserve import strings
from aiotrt.serving.kserve.datatypes import DATATYPES

__all__ = ["INDEX", "INFER", "LOAD", "UNLOAD", "described", "whether_ready"]

Schema: TypeAlias = dict[str, Any]

_JSON: Final = "application/json"
_BYTES: Final = "application/octet-stream"


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _or_null(schema: Schema) -> Schema:
    """Return the schema of an optional field, for which null means the same as its absence."""
    return {**schema, "type": [schema["type"], "null"]}


_STRING: Final[Schema] = {"type": "string"}
_DATATYPE: Final[Schema] = {"type": "string", "enum": [*DATATYPES, strings.NAME]}
_NUMBERS: Final[Schema] = {"type": "array", "items": {}}
_SHAPE: Final[Schema] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32}
_PARAMETERS: Final[Schema] = _or_null({"type": "object"})
_NAME: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 1024}
_TENSOR: Final = _object(
    ("name", "shape", "datatype"), name=_NAME, shape=_SHAPE, datatype=_DATATYPE, parameters=_PARAMETERS,
    data=_or_null(_NUMBERS),
)  # fmt: skip
_REQUEST: Final = _object(
    ("inputs",),
    id=_or_null({"type": "string", "maxLength": 1024}),
    parameters=_PARAMETERS,
    inputs={"type": "array", "minItems": 1, "maxItems": 256, "items": _TENSOR},
    outputs=_or_null({"type": "array", "maxItems": 256, "items": _object(("name",), name=_NAME, parameters=_PARAMETERS)}),
)
_ANSWER: Final = _object(
    ("model_name", "model_version", "outputs"),
    id=_STRING,
    model_name=_STRING,
    model_version=_STRING,
    outputs={"type": "array", "items": _TENSOR},
)
_ERROR: Final = {_JSON: {"schema": _object(("error",), error=_STRING)}}
#: The header with the number of bytes of JSON, in requests and answers in which tensors follow the JSON.
_LENGTH: Final = "Inference-Header-Content-Length"
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}


def described(*extra: str) -> dict[int | str, Schema]:
    """Return the error responses of every operation on a model, and those of the additional statuses `extra`."""
    return {
        "4XX": {"description": "The request is wrong; `error` says how.", "content": _ERROR},
        "503": {"description": "Not now: too much to do, or the model is not loaded, or broken.", "content": _ERROR},
        **{status: {"description": _SERVER[status], "content": _ERROR} for status in extra},
    }


def whether_ready(*fields: str) -> dict[int | str, Schema]:
    """Return the responses of an operation that answers 200 for yes and 503 for no."""
    types: dict[str, Schema] = {"name": _STRING, "ready": {"type": "boolean"}, "error": _STRING}
    answer = {_JSON: {"schema": _object(fields, **types)}}
    return {
        200: {"description": "Yes.", "content": answer},
        503: {"description": "No.", "content": answer},
        "4XX": {"description": "There is no such model.", "content": _ERROR},
    }


def _repository(parameters: Schema) -> dict[str, Any]:
    body = {"required": False, "content": {_JSON: {"schema": _object((), parameters=parameters)}}}
    return {"responses": described("500"), "openapi_extra": {"requestBody": body}}


_SERVER: Final = {
    "500": "The model failed; what it said is in the server's log.",
    "504": "The deadline passed before there was a result.",
}

#: For the route of `infer`.
INFER: Final[dict[str, Any]] = {
    "responses": {
        200: {
            "description": "Outputs; as bytes after the JSON, those for which that was asked.",
            "headers": {_LENGTH: {"schema": _COUNT, "description": "How many bytes are JSON, if bytes follow."}},
            "content": {_JSON: {"schema": _ANSWER}, _BYTES: {"schema": {"type": "string", "format": "binary"}}},
        },
        **described("500", "504"),
    },
    "openapi_extra": {
        "parameters": [{"name": _LENGTH, "in": "header", "required": False, "schema": _COUNT}],
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": _REQUEST}, _BYTES: {"schema": {"type": "string", "format": "binary"}}},
        },
    },
}
#: For the route of `index`.
INDEX: Final[dict[str, Any]] = {
    "responses": described(),
    "openapi_extra": {
        "requestBody": {"required": False, "content": {_JSON: {"schema": _object((), ready=_or_null({"type": "boolean"}))}}}
    },
}
#: For the route of `load`, which accepts no parameters.
LOAD: Final = _repository(_or_null({"type": "object", "maxProperties": 0}))
#: For the route of `unload`.
UNLOAD: Final = _repository(_PARAMETERS)
