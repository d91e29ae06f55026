"""The header of a serialised engine, which identifies the product that wrote it without loading it.

The layout is little-endian. For TensorRT-RTX it was observed in engines of version 1.6. For TensorRT the tag, the
serialisation number and the position of the version are those that NVIDIA's `trtexec --getPlanVersionOnly` reads; the rest
of that header is unknown and not used here.

======  ==================  ==========================================================================================
offset  field               values
======  ==================  ==========================================================================================
0       tag                 ``vtrt``: TensorRT-RTX; ``ftrt``: TensorRT 8.6 and later; ``ptrt``: older TensorRT
4       serialisation       0
16      size of the plan    bytes; TensorRT-RTX only
24      version             four bytes: major, minor, patch, build
32      GPUs it was built   bit set of compute capabilities; TensorRT-RTX only
        for
======  ==================  ==========================================================================================

Ultralytics writes the length of a JSON text (four bytes) and the text before the plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiotrt.building.files import foreign
from aiotrt.errors import EngineError

__all__ = ["HEADER_BYTES", "Plan", "check_plan", "read_plan"]

HEADER_BYTES: Final = 64
_MAX_METADATA: Final = 1 << 20
_RTX: Final = b"vtrt"
_OLD: Final = b"ptrt"
_PRODUCTS: Final = {_RTX: "tensorrt_rtx", b"ftrt": "tensorrt", _OLD: "tensorrt"}
_CAPABILITIES: Final = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")  # by bit, of TensorRT-RTX


@dataclass(frozen=True, slots=True)
class Plan:
    """The header of a serialised engine.

    Attributes:
        product: ``"tensorrt"`` or ``"tensorrt_rtx"``, the module that wrote it; None if unknown.
        version: the version that wrote it, such as ``"1.6.1.120"``; None if unknown.
        size: the number of bytes from the tag to the end; None if unknown.
        offset: the number of bytes before the tag.
        capabilities: the GPUs that it was built for, such as ``"SM89"``; empty if unknown.
    """

    product: str | None
    version: str | None
    size: int | None = None
    offset: int = 0
    capabilities: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(self.product or "", "an unknown product")
        return f"{name} {self.version}" if self.version else name


def read_plan(data: bytes | memoryview) -> Plan:
    """Read the header of a serialised engine.

    Args:
        data: the file's first bytes: `HEADER_BYTES` bytes are enough for a plan without Ultralytics' text before it.
    """
    offset = _metadata(data)
    header = bytes(data[offset : offset + HEADER_BYTES])
    tag = header[:4]
    product = _PRODUCTS.get(tag)
    # Another serialisation has another layout, or the header is damaged.
    if product is None or tag == _OLD or len(header) < 36 or header[4:8] != bytes(4):
        return Plan(product, None, offset=offset)
    version = ".".join(map(str, header[24:28]))
    if tag != _RTX:
        return Plan(product, version, offset=offset)
    size = int.from_bytes(header[16:24], "little")
    bits = int.from_bytes(header[32:36], "little")
    capabilities = tuple(name for i, name in enumerate(_CAPABILITIES) if bits >> i & 1)
    return Plan(product, version, size, offset, capabilities)


def check_plan(path: Path, plan: Plan, head: bytes, nbytes: int) -> None:
    """Refuse a file that cannot be an intact engine, before TensorRT gets it.

    Args:
        path: the file, for messages.
        plan: its header.
        head: its first bytes.
        nbytes: its size.

    Raises:
        EngineError: the file is of another known kind, truncated, or longer than its header says.
    """
    if plan.product is None and (kind := foreign(head)):
        raise EngineError(f"{path}: not a TensorRT engine{kind}")
    got = nbytes - plan.offset
    if plan.product is not None and got < HEADER_BYTES:
        raise EngineError(
            f"{path}: the file is truncated: the header of an engine has {HEADER_BYTES} bytes, but the file has {got:,}; "
            "copy or build it again"
        )
    if plan.size is not None and plan.size != got:
        damage = "truncated" if got < plan.size else "damaged, or has data appended to it"
        raise EngineError(
            f"{path}: the file is {damage}: its header (of {plan}) says {plan.size:,} bytes, but it has {got:,}; "
            "copy or build it again"
        )


def _metadata(data: bytes | memoryview) -> int:
    """Return the number of bytes of Ultralytics' text before the plan."""
    length = int.from_bytes(data[:4], "little")
    text = bytes(data[4 : 4 + length]) if 2 <= length <= min(_MAX_METADATA, len(data) - 4) else b""
    if not text.startswith(b"{"):
        return 0
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return 0
    return 4 + length
