"""Compressed bodies: gzip and deflate, which Triton's clients support, in pieces.

A kilobyte can decompress to a megabyte. So requests are decompressed in pieces of bounded size, and each piece is counted
before the next one is made. Answers are compressed only if `Accept-Encoding` names exactly one coding, as Triton's clients
do if their user requests compression. Most HTTP libraries name all their codings in every request, and compressing tensors
costs more than it saves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from aiotrt.serving.errors import BodyError, UnsupportedMediaTypeError

__all__ = ["coding_of", "compress", "decompressed", "wanted_coding"]

#: zlib's name for each format.
_FORMATS: Final = {"gzip": 31, "deflate": 15}
#: Bytes that are passed to zlib at once, and the most that it may return at once.
_INPUT: Final = 64 << 10
_OUTPUT: Final = 1 << 20


def coding_of(header: str | None) -> str | None:
    """Return the coding that ``Content-Encoding`` names; None for none.

    Raises:
        UnsupportedMediaTypeError: the coding is not supported.
    """
    coding = (header or "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _FORMATS:
        raise UnsupportedMediaTypeError(f"the content encoding must be gzip, deflate or identity, got {coding[:40]!r}")
    return coding


def wanted_coding(header: str | None) -> str | None:
    """Return the coding if ``Accept-Encoding`` names exactly one supported coding; else None."""
    coding = (header or "").strip().lower()
    return coding if coding in _FORMATS else None


def decompressed(data: bytes | bytearray, coding: str) -> Iterator[bytes]:
    """Decompress `data`, in pieces of at most 1 MiB.

    Raises:
        BodyError: the data is damaged, truncated, or goes on after the end of the compressed stream.
    """
    decompressor = zlib.decompressobj(_FORMATS[coding])
    try:
        with memoryview(data) as view:
            for start in range(0, len(data), _INPUT):
                rest: bytes | memoryview = view[start : start + _INPUT]
                while rest and not decompressor.eof:
                    yield decompressor.decompress(rest, _OUTPUT)
                    rest = decompressor.unconsumed_tail
                if decompressor.unused_data or (rest and decompressor.eof):
                    raise BodyError(f"the body goes on after the end of its {coding}")
            while not decompressor.eof and (piece := decompressor.decompress(b"", _OUTPUT)):
                yield piece
    except zlib.error as error:
        raise BodyError(f"the body is not {coding}: {error}") from error
    if not decompressor.eof:
        raise BodyError(f"the body is cut off: its {coding} has no end")


def compress(parts: Iterable[bytes | memoryview], coding: str) -> bytes:
    """Compress these parts to one body. Slow: call it in a thread."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, _FORMATS[coding])
    return b"".join([*map(compressor.compress, parts), compressor.flush()])
