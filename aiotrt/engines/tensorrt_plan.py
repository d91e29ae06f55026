"""What a serialised engine says about itself in its first bytes, so that nothing need be loaded to know whose it is.

Layout, all little-endian. Of TensorRT-RTX: seen in engines that 1.6 wrote. Of TensorRT: the tag, the serialisation number
and the place of the version are what NVIDIA's `trtexec --getPlanVersionOnly` reads; the rest of that header is not known
here, and nothing below relies on it.

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

Ultralytics writes the length of a JSON text (four bytes) and the text before the plan; the plan is then found behind it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

__all__ = ["HEADER_BYTES", "Plan", "read_plan"]

HEADER_BYTES: Final = 64
_MAX_METADATA: Final = 1 << 20
_RTX: Final = b"vtrt"
_TENSORRT: Final = b"ftrt"
_OLD: Final = b"ptrt"
_CAPABILITIES: Final = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")  # by bit, of TensorRT-RTX


@dataclass(frozen=True, slots=True)
class Plan:
    """The header of a serialised engine.

    Attributes:
        product: ``"tensorrt"`` or ``"tensorrt_rtx"``, the module that wrote it; None where the header does not tell.
        version: the version that wrote it, such as ``"1.6.1.120"``; None where the header does not tell.
        size: bytes from the tag to the end, where the header tells.
        offset: bytes before the tag.
        capabilities: the GPUs it was built for, such as ``"SM89"``, where the header tells.
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
        data: the file's first bytes; `HEADER_BYTES` are enough for a bare plan, all of it where Ultralytics' text precedes.
    """
    offset = _metadata(data)
    header = bytes(data[offset : offset + HEADER_BYTES])
    tag = header[:4]
    if len(header) < 28 or header[4:8] != bytes(4):
        return Plan("tensorrt" if tag == _OLD else None, None, offset=offset)
    version = ".".join(map(str, header[24:28]))
    if tag == _RTX:
        size = int.from_bytes(header[16:24], "little")
        bits = int.from_bytes(header[32:36], "little")
        capabilities = tuple(name for i, name in enumerate(_CAPABILITIES) if bits >> i & 1)
        return Plan("tensorrt_rtx", version, size, offset, capabilities)
    if tag == _TENSORRT:
        return Plan("tensorrt", version, offset=offset)
    return Plan("tensorrt" if tag == _OLD else None, None, offset=offset)


def _metadata(data: bytes | memoryview) -> int:
    """How many bytes of Ultralytics' text precede the plan."""
    length = int.from_bytes(data[:4], "little")
    text = bytes(data[4 : 4 + length]) if 2 <= length <= min(_MAX_METADATA, len(data) - 4) else b""
    if not text.startswith(b"{"):
        return 0
    try:
        json.loads(text)
    except ValueError:
        return 0
    return 4 + length
