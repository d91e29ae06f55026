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
    """The `count` largest elements of each item, or all if there are fewer, the largest first.

    Args:
        what: the output, for messages.
        tensor: its elements; NaN counts as the largest.
        count: how many.
        labels: of the elements of an item, counted in the order of its memory; may be fewer.
        has_axis: whether the first dimension is that of a batch; otherwise all of it is one item.

    Returns:
        Of shape (items, count), or (count) without a batch axis: strings ``value:index``, or ``value:index:label``.

    Raises:
        BodyError: the elements are booleans.
    """
    if tensor.dtype is torch.bool:
        raise BodyError(f"{what} is BOOL, which has no largest elements")
    tensor = tensor.cpu()
    rows: npt.NDArray[Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    rows = rows.reshape(rows.shape[0], -1) if has_axis else rows.reshape(1, -1)
    # Of equal ones the first: a stable sort, from the end of an item to its begin.
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
