"""The classification extension: the largest elements of an output, as strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aiotrt.serving.errors import BodyError

__all__ = ["classified"]


def classified(what: str, tensor: torch.Tensor, count: int, labels: Sequence[str], *, has_axis: bool) -> npt.NDArray[Any]:
    """Return the `count` largest elements of each item, or all if there are fewer, the largest first.

    Args:
        what: the output, for messages.
        tensor: the output's elements; NaN counts as the largest.
        count: how many elements to return.
        labels: the labels of an item's elements, in row-major order; may be fewer than the elements.
        has_axis: whether the first dimension is the batch axis; otherwise the whole tensor is one item.

    Returns:
        Strings ``value:index`` or ``value:index:label``, in an array of shape (items, count), or (count) without a batch
        axis.

    Raises:
        BodyError: the elements are booleans.
    """
    if tensor.dtype is torch.bool:
        raise BodyError(f"{what} is BOOL, which has no largest elements")
    tensor = tensor.cpu()
    rows: npt.NDArray[Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    rows = rows.reshape(rows.shape[0], -1) if has_axis else rows.reshape(1, -1)
    # Among equal elements the first one comes first: a stable sort of the reversed item, read from its end.
    order = rows.shape[1] - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    form = "%f:%d" if tensor.is_floating_point() else "%d:%d"
    strings: npt.NDArray[Any] = np.array(
        [
            form % (value, index) + (f":{labels[int(index)]}" if index < len(labels) else "")
            for value, index in zip(np.take_along_axis(rows, order, 1).flat, order.flat, strict=True)
        ],
        object,
    )
    return strings.reshape(order.shape) if has_axis else strings
