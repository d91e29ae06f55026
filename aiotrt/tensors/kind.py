"""What a result is handed out as."""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["DEVICE", "NUMPY", "Kind"]


class Kind(enum.Enum):
    """What a result is handed out as."""

    NUMPY = "numpy"
    TORCH = "torch"
    DEVICE = "device"


#: By names of their own too, since an enum's attribute costs a lookup.
NUMPY: Final = Kind.NUMPY
DEVICE: Final = Kind.DEVICE
