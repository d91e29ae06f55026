"""The Open Inference Protocol's names for dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

__all__ = ["DATATYPES", "Datatype", "of_torch"]


@dataclass(frozen=True)
class Datatype:
    """One datatype of the protocol.

    Attributes:
        name: the protocol's name for it.
        stored: the numpy dtype that holds its bytes. numpy lacks BF16, for which this is an integer of the same size.
        numbers: the numpy dtype for conversions from and to JSON.
        torch: the torch dtype.
    """

    name: str
    stored: np.dtype[Any]
    numbers: np.dtype[Any]
    torch: torch.dtype


def _make(name: str, numpy: str, in_torch: torch.dtype, stored: str | None = None) -> Datatype:
    return Datatype(name, np.dtype(stored or numpy).newbyteorder("<"), np.dtype(numpy), in_torch)


#: The datatypes by name, without BYTES, because a tensor cannot hold strings of different lengths; see `strings`.
DATATYPES: Final = {
    datatype.name: datatype
    for datatype in (
        _make("BOOL", "bool", torch.bool),
        _make("UINT8", "uint8", torch.uint8),
        _make("UINT16", "uint16", torch.uint16),
        _make("UINT32", "uint32", torch.uint32),
        _make("UINT64", "uint64", torch.uint64),
        _make("INT8", "int8", torch.int8),
        _make("INT16", "int16", torch.int16),
        _make("INT32", "int32", torch.int32),
        _make("INT64", "int64", torch.int64),
        _make("FP16", "float16", torch.float16),
        _make("BF16", "float32", torch.bfloat16, "uint16"),
        _make("FP32", "float32", torch.float32),
        _make("FP64", "float64", torch.float64),
    )
}
_OF_TORCH: Final = {datatype.torch: datatype for datatype in DATATYPES.values()}


def of_torch(dtype: torch.dtype) -> Datatype | None:
    """Return the datatype of this torch dtype; None if the protocol has none, as for complex numbers."""
    return _OF_TORCH.get(dtype)
