"""The dtypes of torch and numpy, and conversions between the two on the host.

Host copies are numpy's: they use one thread and release the interpreter lock. torch's host copy would wake every OpenMP
thread.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import torch

from aiotrt.tensors.kind import NUMPY, Kind

__all__ = ["NUMPY_DTYPES", "TORCH_DTYPES", "Array", "dtype_name", "number", "numpy_view", "own", "widened"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TORCH_DTYPES: Final[dict[np.dtype[Any], torch.dtype]] = {
    np.dtype(name): getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
NUMPY_DTYPES: Final = {torch_dtype: numpy_dtype for numpy_dtype, torch_dtype in TORCH_DTYPES.items()}
_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def numpy_view(tensor: torch.Tensor) -> Array:
    """Return a numpy view of a host tensor; dtypes that numpy lacks are viewed as integers of their size."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():  # lazy flags, which numpy ignores: without this the signs would be wrong
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype not in NUMPY_DTYPES:
        tensor = tensor.view(_SAME_SIZE[tensor.element_size()])
    view: Array = tensor.numpy()
    return view


def number(value: object, dtype: torch.dtype) -> Array:
    """Return a number as an array of rank 0; for a dtype that numpy lacks, in the form of `numpy_view`.

    Raises:
        OverflowError, RuntimeError, TypeError, ValueError: the dtype cannot hold the number.
    """
    numpy_dtype = NUMPY_DTYPES.get(dtype)
    return numpy_view(torch.tensor(value, dtype=dtype)) if numpy_dtype is None else np.array(value, numpy_dtype)


def widened(view: Array, dtype: torch.dtype) -> Array:
    """Return the numpy result for a `numpy_view`: the view itself or, if numpy lacks `dtype`, a copy in a wider dtype."""
    if dtype in NUMPY_DTYPES:
        return view
    wide: Array = torch.from_numpy(view).view(dtype).to(torch.complex64 if dtype.is_complex else torch.float32).numpy()
    return wide


def own(view: Array, dtype: torch.dtype, kind: Kind) -> Array | torch.Tensor:
    """Copy staged results to memory that the caller owns.

    Args:
        view: the `numpy_view` of the staging buffer.
        dtype: the tensor's dtype.
        kind: NUMPY or TORCH. numpy has no bfloat16, float8 or complex32: see `widened`.
    """
    if kind is not NUMPY and torch.is_inference_mode_enabled():
        # Inference mode is per thread, so another task may have entered it. Its tensors cannot be written outside it.
        with torch.inference_mode(False):
            return own(view, dtype, kind)
    copy = view.copy()
    if kind is NUMPY:
        return widened(copy, dtype)
    tensor = torch.from_numpy(copy)
    return tensor if dtype in NUMPY_DTYPES else tensor.view(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without "torch."."""
    return str(dtype).removeprefix("torch.")
