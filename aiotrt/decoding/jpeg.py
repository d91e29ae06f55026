"""Which JPEG files a GPU decoder can be trusted with: a strict check of their structure, without decoding them.

A GPU decoder may accept a damaged file that libjpeg rejects. So only files whose headers, tables, scans and markers are
complete and consistent go to the GPU; libjpeg decides on all others. Entropy-coded data is not decoded here. Damage inside
it that leaves the markers intact gives damaged pixels without an error, in libjpeg too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

__all__ = ["UnsuitableError", "end_of_image"]

Positions: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

_BASELINE, _PROGRESSIVE, _HUFFMAN, _EOI, _SOS, _QUANTIZATION, _RESTART = 0xC0, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
#: Application data and comments.
_SKIPPED: Final = frozenset({*range(0xE0, 0xF0), 0xFE})
_ADOBE: Final = 0xEE
#: Sampling of luma for chroma of (1, 1): 4:4:4, 4:2:2 and 4:2:0, for which both decoders interpolate chroma alike.
_SAMPLINGS: Final = frozenset({(1, 1), (2, 1), (2, 2)})
#: Segments of a file. Cameras write some ten; more than this may be meant to cost time.
_MAX_SEGMENTS: Final = 500


class UnsuitableError(Exception):
    """This file is for the CPU; the message is the reason: "format" or "damaged"."""


@dataclass
class _State:
    """What the segments read so far have declared.

    Attributes:
        components: sampling and quantization table of each component, by its id, in their order.
        tables: the Huffman tables, as (class, number).
        quantization: the numbers of the quantization tables.
        interval: units between restart markers; 0 for none.
        started: ids of components whose DC coefficients have begun.
    """

    width: int = 0
    height: int = 0
    is_progressive: bool = False
    has_adobe: bool = False
    components: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    tables: set[tuple[int, int]] = field(default_factory=set)
    quantization: set[int] = field(default_factory=set)
    interval: int = 0
    started: set[int] = field(default_factory=set)


def end_of_image(data: bytes) -> int:
    """Return the position after the image's last byte. What follows is not part of it.

    Raises:
        UnsuitableError: its structure is damaged, or it is of a kind that a GPU decoder may decode differently.
    """
    try:
        return _end(data)
    except IndexError:
        raise UnsuitableError("damaged") from None


def _end(data: bytes) -> int:
    if data[:2] != b"\xff\xd8":
        raise UnsuitableError("format")
    state = _State()
    markers: Positions | None = None
    position = 2
    for _ in range(_MAX_SEGMENTS):
        _require(data[position] == 0xFF)
        while data[position] == 0xFF:  # fill bytes
            position += 1
        marker = data[position]
        position += 1
        if marker == _EOI:
            _require(bool(state.components) and state.started == set(state.components))
            return position
        length = _word(data, position)
        segment = data[position + 2 : position + length]
        _require(length >= 2 and len(segment) == length - 2)
        position += length
        if marker == _SOS:
            _require(state.is_progressive or not state.started)  # a sequential file has one scan
            restarts = _scan(state, segment)
            if markers is None:
                markers = _markers(data, position)
            position = _after_scan(data, markers, position, restarts)
        else:
            _read(state, marker, segment)
    raise UnsuitableError("format")


def _read(state: _State, marker: int, segment: bytes) -> None:
    if marker in (_BASELINE, _PROGRESSIVE):
        _frame(state, segment, is_progressive=marker == _PROGRESSIVE)
    elif marker == _HUFFMAN:
        _huffman_tables(state, segment)
    elif marker == _QUANTIZATION:
        _require(len(segment) > 0 and len(segment) % 65 == 0, "format")  # of 8 bits
        for start in range(0, len(segment), 65):
            _require(segment[start] <= 3 and 0 not in segment[start + 1 : start + 65], "format")
            state.quantization.add(segment[start])
    elif marker == _RESTART:
        _require(len(segment) == 2)
        state.interval = _word(segment, 0)
    elif marker == _ADOBE and segment[:5] == b"Adobe":
        _require(len(segment) >= 12 and segment[11] == 1, "format")  # YCbCr
        state.has_adobe = True
    elif marker not in _SKIPPED:
        raise UnsuitableError("format")  # arithmetic coding, lossless, hierarchical, DNL


def _frame(state: _State, segment: bytes, *, is_progressive: bool) -> None:
    _require(not state.components and len(segment) >= 6)
    count = segment[5]
    _require(segment[0] == 8 and count in (1, 3), "format")
    _require(len(segment) == 6 + 3 * count)
    state.height, state.width, state.is_progressive = _word(segment, 1), _word(segment, 3), is_progressive
    _require(state.height > 0 and state.width > 0)
    for start in range(6, len(segment), 3):
        number, sampling, table = segment[start : start + 3]
        _require(number not in state.components and table <= 3)
        state.components[number] = (sampling >> 4, sampling & 15, table)
    first, *others = (component[:2] for component in state.components.values())
    known = first in _SAMPLINGS and all(other == (1, 1) for other in others) if others else first == (1, 1)
    is_rgb = bytes(state.components) == b"RGB"
    _require(known and not is_rgb and not (state.has_adobe and not others), "format")


def _huffman_tables(state: _State, segment: bytes) -> None:
    _require(len(segment) > 0)
    start = 0
    while start < len(segment):
        kind, number = segment[start] >> 4, segment[start] & 15
        counts = segment[start + 1 : start + 17]
        symbols = segment[start + 17 : start + 17 + sum(counts)]
        _require(kind <= 1 and number <= 3 and len(counts) == 16 and len(symbols) == sum(counts) <= 256)
        _require(kind == 1 or max(symbols, default=0) <= 11)  # of 8 bits
        # The codes of all lengths must fit, and leave the code of all ones unused.
        _require(sum(count << (16 - length) for length, count in enumerate(counts, 1)) < 1 << 16)
        state.tables.add((kind, number))
        start += 17 + len(symbols)


def _scan(state: _State, segment: bytes) -> int:
    """Check the header of a scan, and return how many restart markers its data must have."""
    count = segment[0]
    _require(1 <= count <= len(state.components) and len(segment) == 4 + 2 * count)
    first, last, approximation = segment[1 + 2 * count :]
    high, low = approximation >> 4, approximation & 15
    ids = [segment[1 + 2 * i] for i in range(count)]
    _require(ids == [number for number in state.components if number in ids])  # each once, in the frame's order
    if not state.is_progressive:
        _require(count == len(state.components) and (first, last, approximation) == (0, 63, 0), "format")
    elif first == 0:
        _require(last == 0)
    else:
        _require(count == 1 and first <= last <= 63 and ids[0] in state.started)
    _require(low <= 13 and high in (0, low + 1))
    for i, number in enumerate(ids):
        tables = segment[2 + 2 * i]
        _require(state.components[number][2] in state.quantization)
        if first == 0 and high == 0:
            _require((0, tables >> 4) in state.tables)
            _require(number not in state.started)
            state.started.add(number)
        _require(number in state.started)
        if last > 0:
            _require((1, tables & 15) in state.tables)
    if not state.interval:
        return 0
    return -(-_units(state, ids) // state.interval) - 1


def _units(state: _State, ids: list[int]) -> int:
    """Return how many units, each with restart markers only around it, a scan of these components has."""
    across = max(component[0] for component in state.components.values())
    down = max(component[1] for component in state.components.values())
    if len(ids) > 1:
        return -(-state.width // (8 * across)) * -(-state.height // (8 * down))
    horizontal, vertical, _ = state.components[ids[0]]
    return -(-state.width * horizontal // (8 * across)) * -(-state.height * vertical // (8 * down))


def _markers(data: bytes, start: int) -> Positions:
    """Return the positions of all markers from `start` on. numpy releases the interpreter lock for large arrays."""
    found = np.frombuffer(data, np.uint8, offset=start)
    positions = np.flatnonzero(found[:-1] == 0xFF)
    after = found[positions + 1]
    kept: Positions = positions[(after != 0) & (after != 0xFF)] + start
    return kept


def _after_scan(data: bytes, markers: Positions, position: int, restarts: int) -> int:
    """Return where the marker after the scan's data is; its restart markers must be complete and in order."""
    index = int(np.searchsorted(markers, position))
    for number in range(restarts):
        _require(index < len(markers) and data[markers[index] + 1] == 0xD0 + number % 8)
        index += 1
    _require(index < len(markers) and not 0xD0 <= data[markers[index] + 1] <= 0xD7)
    _require(markers[index] > position)  # a scan without data
    return int(markers[index])


def _word(data: bytes, position: int) -> int:
    return data[position] << 8 | data[position + 1]


def _require(condition: bool, reason: str = "damaged") -> None:
    if not condition:
        raise UnsuitableError(reason)
