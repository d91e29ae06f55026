"""The form in which a caller gets results."""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["DEVICE", "NUMPY", "Kind"]


class Kind(enum.Enum):
    """The form in which a caller gets results: numpy arrays, torch tensors on the host, or tensors on the device."""

    NUMPY = "numpy"
    TORCH = "torch"
    DEVICE = "device"


#: Global aliases, because access to an enum's attribute costs a lookup.
NUMPY: Final = Kind.NUMPY
DEVICE: Final = Kind.DEVICE
