"""The types of the options of `load`, for its overloads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypedDict

from aiotrt.batching.queue import Batching
from aiotrt.building.profiles import ProfileArgument
from aiotrt.devices import Devices

__all__ = ["EngineLoadOptions", "LoadOptions"]


class LoadOptions(TypedDict, total=False):
    """The options of `load` on which the type of results does not depend; see `load`."""

    device: Devices
    slots: int
    overlap: bool
    max_queue: int | None
    batching: Batching | None
    graphs: bool
    warmup: object
    signatures: Literal["any", "fixed"]
    preprocess: Callable[..., object] | None
    graph_cache_entries: int
    graph_cache_bytes: int
    hang_timeout: float | None
    retry: bool
    progress: Literal["predict", "spin", "interval"]
    threads: int
    runtime: Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"] | None
    precision: Literal["fp32", "fp16", "bf16"] | None
    profiles: Iterable[ProfileArgument] | ProfileArgument | None
    sha256: str | None
    allow_host_code: bool


class EngineLoadOptions(LoadOptions, total=False):
    """All options of `load`."""

    outputs: Literal["numpy", "torch", "device"] | None
    postprocess: Callable[..., object] | None
