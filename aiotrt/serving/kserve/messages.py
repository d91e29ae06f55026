"""The messages of the Open Inference Protocol over gRPC, and of gRPC's health service, as classes of `google.protobuf`.

The classes are made from the table below at import, so no code has to be generated. The table lists the fields that this
server reads and writes; protocol buffers skip other fields. ``tests/serving/test_messages.py`` compares the table with the
definition that tritonclient ships. The classes have their own descriptor pool, because the process's pool may already
contain the same names, from tritonclient or KServe.

Each line is a message with its fields: name, number and type. After a type, ``*`` marks a repeated field, ``{}`` a map from
strings, and ``?`` fields of which the message has at most one. A line that begins with a space continues the line above.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["messages"]

_TABLE: Final = """
ServerLiveRequest
ServerLiveResponse live:1:bool
ServerReadyRequest
ServerReadyResponse ready:1:bool
ModelReadyRequest name:1:string version:2:string
ModelReadyResponse ready:1:bool
ServerMetadataRequest
ServerMetadataResponse name:1:string version:2:string extensions:3:string*
ModelMetadataRequest name:1:string version:2:string
ModelMetadataResponse name:1:string versions:2:string* platform:3:string inputs:4:TensorMetadata* outputs:5:TensorMetadata*
TensorMetadata name:1:string datatype:2:string shape:3:int64*

InferParameter bool_param:1:bool? int64_param:2:int64? string_param:3:string? double_param:4:double? uint64_param:5:uint64?
InferTensorContents bool_contents:1:bool* int_contents:2:int32* int64_contents:3:int64* uint_contents:4:uint32*
 uint64_contents:5:uint64* fp32_contents:6:float* fp64_contents:7:double* bytes_contents:8:bytes*
InferInputTensor name:1:string datatype:2:string shape:3:int64* parameters:4:InferParameter{} contents:5:InferTensorContents
InferRequestedOutputTensor name:1:string parameters:2:InferParameter{}
ModelInferRequest model_name:1:string model_version:2:string id:3:string parameters:4:InferParameter{}
 inputs:5:InferInputTensor* outputs:6:InferRequestedOutputTensor* raw_input_contents:7:bytes*
InferOutputTensor name:1:string datatype:2:string shape:3:int64*
ModelInferResponse model_name:1:string model_version:2:string id:3:string parameters:4:InferParameter{}
 outputs:5:InferOutputTensor* raw_output_contents:6:bytes*
ModelStreamInferResponse error_message:1:string infer_response:2:ModelInferResponse

ModelConfigRequest name:1:string version:2:string
ModelConfigResponse config:1:ModelConfig
ModelConfig name:1:string platform:2:string version_policy:3:ModelVersionPolicy max_batch_size:4:int32 input:5:ModelInput*
 output:6:ModelOutput* instance_group:7:ModelInstanceGroup* default_model_filename:8:string
 dynamic_batching:11:ModelDynamicBatching parameters:14:ModelParameter{} backend:17:string
ModelVersionPolicy latest:1:Latest
Latest num_versions:1:uint32
ModelInput name:1:string data_type:2:DataType dims:4:int64* is_shape_tensor:6:bool allow_ragged_batch:7:bool optional:8:bool
ModelOutput name:1:string data_type:2:DataType dims:3:int64* label_filename:4:string is_shape_tensor:6:bool
ModelInstanceGroup name:1:string count:2:int32 gpus:3:int32* kind:4:Kind
ModelDynamicBatching preferred_batch_size:1:int32* max_queue_delay_microseconds:2:uint64 preserve_ordering:3:bool
 priority_levels:4:uint64
ModelParameter string_value:1:string

ModelStatisticsRequest name:1:string version:2:string
ModelStatisticsResponse model_stats:1:ModelStatistics*
ModelStatistics name:1:string version:2:string last_inference:3:uint64 inference_count:4:uint64 execution_count:5:uint64
 inference_stats:6:InferStatistics
InferStatistics success:1:StatisticDuration fail:2:StatisticDuration queue:3:StatisticDuration
 compute_input:4:StatisticDuration compute_infer:5:StatisticDuration compute_output:6:StatisticDuration
 cache_hit:7:StatisticDuration cache_miss:8:StatisticDuration
StatisticDuration count:1:uint64 ns:2:uint64

ModelRepositoryParameter bool_param:1:bool? int64_param:2:int64? string_param:3:string? bytes_param:4:bytes?
RepositoryIndexRequest repository_name:1:string ready:2:bool
RepositoryIndexResponse models:1:ModelIndex*
ModelIndex name:1:string version:2:string state:3:string reason:4:string
RepositoryModelLoadRequest repository_name:1:string model_name:2:string parameters:3:ModelRepositoryParameter{}
RepositoryModelLoadResponse
RepositoryModelUnloadRequest repository_name:1:string model_name:2:string
RepositoryModelUnloadResponse

SystemSharedMemoryStatusRequest name:1:string
SystemSharedMemoryStatusResponse regions:1:SystemRegion{}
SystemRegion name:1:string key:2:string offset:3:uint64 byte_size:4:uint64
SystemSharedMemoryRegisterRequest name:1:string key:2:string offset:3:uint64 byte_size:4:uint64
SystemSharedMemoryRegisterResponse
SystemSharedMemoryUnregisterRequest name:1:string
SystemSharedMemoryUnregisterResponse
CudaSharedMemoryStatusRequest name:1:string
CudaSharedMemoryStatusResponse regions:1:CudaRegion{}
CudaRegion name:1:string device_id:2:uint64 byte_size:3:uint64
CudaSharedMemoryRegisterRequest name:1:string raw_handle:2:bytes device_id:3:int64 byte_size:4:uint64
CudaSharedMemoryRegisterResponse
CudaSharedMemoryUnregisterRequest name:1:string
CudaSharedMemoryUnregisterResponse

HealthCheckRequest service:1:string
HealthCheckResponse status:1:ServingStatus
"""
#: The enumerations by name, each with its values in the order of their numbers.
_ENUMS: Final = {
    "DataType": (
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16",
        "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
    ),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    "ServingStatus": ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"),
}  # fmt: skip
_Field: Final = descriptor_pb2.FieldDescriptorProto


def _described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="aiotrt.proto", package="aiotrt", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for line in filter(None, _TABLE.replace("\n ", " ").split("\n")):
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        for text in fields:
            _add_field(message, *text.split(":"))
    return file


def _add_field(message: Any, name: str, number: str, kind: str) -> None:
    base = kind.rstrip("*?{}")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", "1", "string")
        _add_field(entry, "value", "2", base)
        field.label, field.type = _Field.LABEL_REPEATED, _Field.TYPE_MESSAGE
        field.type_name = f".aiotrt.{message.name}.{entry.name}"
        return
    if base[0].isupper():
        field.type, field.type_name = _Field.TYPE_ENUM if base in _ENUMS else _Field.TYPE_MESSAGE, f".aiotrt.{base}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{base.upper()}")
    if kind.endswith("*"):
        field.label = _Field.LABEL_REPEATED
    elif kind.endswith("?"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0


def _classes() -> dict[str, Any]:
    file = _described()
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles([file.name], pool)
    return {name.removeprefix("aiotrt."): kind for name, kind in found.items()}


#: The message classes by name.
messages: Final = _classes()
