"""The messages of gRPC, against the definition that tritonclient ships."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import service_pb2

from aiotrt.serving.kserve.messages import messages

#: What the protocol has in other messages: ours are flat.
NESTED = {
    "TensorMetadata": service_pb2.ModelMetadataResponse.TensorMetadata,
    "InferInputTensor": service_pb2.ModelInferRequest.InferInputTensor,
    "InferRequestedOutputTensor": service_pb2.ModelInferRequest.InferRequestedOutputTensor,
    "InferOutputTensor": service_pb2.ModelInferResponse.InferOutputTensor,
    "ModelIndex": service_pb2.RepositoryIndexResponse.ModelIndex,
}
TOP = [name for name in messages if hasattr(service_pb2, name)]


def said(field: FieldDescriptor) -> tuple[Any, ...]:
    values = field.enum_type and [(value.name, value.number) for value in field.enum_type.values]
    oneof = field.containing_oneof and [one.name for one in field.containing_oneof.fields]
    # A field of a message has presence with and without an alternative.
    return field.name, field.number, field.type, field.is_repeated, values, None if field.message_type else oneof


def check(ours: Any, theirs: Any) -> int:
    compared = 0
    by_number = {field.number: field for field in theirs.fields}
    for field in ours.fields:
        assert said(field) == said(by_number[field.number]), f"{theirs.full_name}.{field.name}"
        compared += 1
        if field.message_type is not None:
            other = by_number[field.number].message_type
            assert field.message_type.GetOptions().map_entry == other.GetOptions().map_entry
            compared += check(field.message_type, other)
    return compared


@pytest.mark.parametrize("name", [*TOP, *NESTED])
def test_every_field_is_as_in_the_protocol(name: str) -> None:
    theirs = NESTED.get(name) or getattr(service_pb2, name)
    assert check(messages[name].DESCRIPTOR, theirs.DESCRIPTOR) >= len(messages[name].DESCRIPTOR.fields)


def test_nearly_all_are_compared_and_the_pools_are_apart() -> None:
    assert len(TOP) + len(NESTED) > 30  # the others are compared as types of fields
    assert messages["ModelInferRequest"].DESCRIPTOR.file.pool is not service_pb2.ModelInferRequest.DESCRIPTOR.file.pool


def test_health_is_as_grpc_has_it() -> None:
    assert messages["HealthCheckRequest"](service="x").SerializeToString() == b"\x0a\x01x"
    assert messages["HealthCheckResponse"](status="SERVING").SerializeToString() == b"\x08\x01"
    assert messages["HealthCheckResponse"](status="NOT_SERVING").SerializeToString() == b"\x08\x02"
    assert messages["HealthCheckResponse"](status="SERVICE_UNKNOWN").SerializeToString() == b"\x08\x03"
