"""Convert a caller's value to a numpy array or a torch tensor over the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from aiotrt.errors import InputError
from aiotrt.tensors.conversion import TORCH_DTYPES, Array

__all__ = ["as_array", "as_tensor", "is_array", "shape_and_dtype"]

_ON_HOST: Final = 1  # kDLCPU of DLPack


def is_array(value: object) -> bool:
    """Whether a value is an object that numpy can convert to an array in host memory, such as a video frame or an image."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) or not hasattr(type(value), "__array__"):
        return False
    try:
        if hasattr(value, "__cuda_array_interface__"):
            return False
        return not hasattr(value, "__dlpack_device__") or int(value.__dlpack_device__()[0]) == _ON_HOST
    except Exception:  # `as_tensor` will fail too, and its error says why
        return False


def as_array(name: str, value: object) -> Array:
    """Return the value as an array over its memory, or raise an `InputError` that names the input."""
    try:
        return np.asarray(value)
    except Exception as error:
        raise InputError(f"input {name!r}: {type(value).__name__} could not be read as an array: {error}") from error


def shape_and_dtype(name: str, value: object) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and the dtype of a value, or raise an `InputError` that names the input."""
    if is_array(value):
        value = as_array(name, value)
    if isinstance(value, np.ndarray):
        dtype = TORCH_DTYPES.get(value.dtype)
        if dtype is None:
            raise InputError(f"input {name!r}: torch has no dtype for numpy's {value.dtype}")
        return value.shape, dtype
    tensor = as_tensor(name, value)
    return tuple(tensor.shape), tensor.dtype


def as_tensor(name: str, value: object) -> torch.Tensor:
    """Return a strided and detached tensor over the caller's memory, without a copy.

    Raises:
        InputError: the value is not a tensor and cannot be read as one, or is nested, sparse or a meta tensor.
    """
    tensor: torch.Tensor
    if isinstance(value, torch.Tensor):
        tensor = value
    elif hasattr(value, "__dlpack__"):
        try:
            tensor = torch.utils.dlpack.from_dlpack(value)
        except Exception as error:
            raise InputError(f"input {name!r}: {type(value).__name__} could not be read through DLPack: {error}") from error
    elif hasattr(value, "__cuda_array_interface__"):
        try:
            tensor = torch.as_tensor(value, device="cuda")
        except Exception as error:
            raise InputError(
                f"input {name!r}: {type(value).__name__} could not be read through __cuda_array_interface__: {error}"
            ) from error
    else:
        hint = "pass named inputs as model(**inputs)" if isinstance(value, Mapping) else "convert it with np.asarray(...)"
        raise InputError(
            f"input {name!r}: expected a numpy array, a torch tensor, or an object with __array__, DLPack or "
            f"__cuda_array_interface__, got {type(value).__name__}; {hint}"
        )
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"input {name!r}: expected a strided tensor, got a {layout} one; convert it with .to_dense()")
    if tensor.is_meta:
        raise InputError(f"input {name!r}: got a meta tensor, which has no data; pass a tensor on a device")
    return tensor.detach() if tensor.requires_grad else tensor
