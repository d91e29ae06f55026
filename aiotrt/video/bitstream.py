"""Read the headers of H.264 and HEVC in Annex B form: parameter sets, and the damage that headers show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["Headers", "parameter_sets", "units"]

START: Final = b"\x00\x00\x00\x01"
#: Types of parameter sets, by codec. The last is the picture parameter set, the one before it the sequence parameter set.
SETS: Final = {"h264": (7, 8), "hevc": (32, 33, 34)}


def units(data: bytes) -> Iterator[bytes]:
    """Yield the NAL units of Annex B data, without start codes and trailing zeros."""
    at = data.find(b"\x00\x00\x01")
    while at >= 0:
        following = data.find(b"\x00\x00\x01", at + 3)
        unit = data[at + 3 : following if following >= 0 else len(data)].rstrip(b"\x00")
        if unit:
            yield unit
        at = following


def parameter_sets(codec: str, extradata: bytes) -> bytes:
    """Return the parameter sets of a container's header in Annex B form; empty if the header cannot be read."""
    if not extradata or extradata[:3] == b"\x00\x00\x01" or extradata[:4] == START:
        return extradata
    found: list[bytes] = []
    try:
        if codec == "h264":  # avcC: the sequence parameter sets, then the picture parameter sets
            at = 5
            for mask in (0x1F, 0xFF):
                count, at = extradata[at] & mask, at + 1
                at = _take(extradata, at, count, found)
        else:  # hvcC: arrays of units of one type
            at = 23
            for _ in range(extradata[22]):
                count = int.from_bytes(extradata[at + 1 : at + 3], "big")
                at = _take(extradata, at + 3, count, found)
    except IndexError:
        return b""
    return b"".join(START + unit for unit in found)


def _take(data: bytes, at: int, count: int, found: list[bytes]) -> int:
    for _ in range(count):
        size = data[at] << 8 | data[at + 1]
        found.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return at


class Headers:
    """The parameter sets of a stream so far, and checks of its slice headers.

    Damage inside the coded data of a slice cannot be seen here, because that would need the entropy decoding.

    Args:
        codec: "h264" or "hevc".
        sets: the parameter sets of the container's header, in Annex B form.
    """

    def __init__(self, codec: str, sets: bytes) -> None:
        self._codec = codec
        self._sets: dict[tuple[int, int], bytes] = {}
        for unit in units(sets):
            self._keep(unit)

    @property
    def sets(self) -> bytes:
        """All parameter sets, in Annex B form, in the order in which they refer to each other."""
        return b"".join(START + self._sets[key] for key in sorted(self._sets))

    @property
    def sequence(self) -> tuple[bytes, ...]:
        """The sequence parameter sets. If they change, so may the size and the format of the pictures."""
        wanted = SETS[self._codec][-2]
        return tuple(unit for (type_, _), unit in sorted(self._sets.items()) if type_ == wanted)

    def read(self, data: bytes) -> str | None:
        """Read the units of one picture and keep its parameter sets. Returns the damage that was seen, or None."""
        last = -1
        for unit in units(data):
            if unit[0] & 0x80:
                return "the forbidden bit of a unit is set"
            if self._keep(unit):
                continue
            try:
                address = self._slice(unit)
            except IndexError:
                return "a slice ends within its header"
            if isinstance(address, str):
                return address
            if address is not None:
                if last < 0 < address:
                    return "the first slice of a picture is missing"
                if 0 <= address <= last:
                    return "the slices of a picture are out of order"
                last = address if address >= 0 else max(last, 0)
        return None if last >= 0 else "a packet contains no picture"

    def _keep(self, unit: bytes) -> bool:
        type_ = unit[0] & 0x1F if self._codec == "h264" else unit[0] >> 1 & 0x3F
        if type_ not in SETS[self._codec]:
            return False
        self._sets[type_, _identity(self._codec, type_, unit)] = unit
        return True

    def _slice(self, unit: bytes) -> int | str | None:
        """Return a slice's address: -1 for an HEVC slice that is not the first. A string is damage; None is no slice."""
        if self._codec == "h264":
            type_ = unit[0] & 0x1F
            if type_ not in (1, 5):
                return None
            bits = _Bits(unit[1:32])
            address, kind, set_ = bits.golomb(), bits.golomb(), bits.golomb()
            if kind > 9:
                return "a slice has an unknown type"
        else:
            type_ = unit[0] >> 1 & 0x3F
            if len(unit) < 3 or not unit[1] & 7:
                return "the header of a unit is damaged"
            if type_ > 31 or unit[0] & 1 or unit[1] >> 3:  # decoders ignore further layers, such as alpha
                return None
            bits = _Bits(unit[2:32])
            address = 0 if bits.take(1) else -1
            if 16 <= type_ <= 23:
                bits.take(1)
            set_ = bits.golomb()
        if (SETS[self._codec][-1], set_) not in self._sets:
            return "a slice refers to a parameter set that is missing"
        return address


class _Bits:
    """Reader of bits, without emulation prevention."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\x00\x00\x03", b"\x00\x00")
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros | self.take(zeros)) - 1 if zeros else 0


def _identity(codec: str, type_: int, unit: bytes) -> int:
    """Return the number of a picture parameter set. A sequence parameter set is taken for the only one of its stream."""
    if type_ != SETS[codec][-1]:
        return 0
    try:
        return _Bits(unit[1 if codec == "h264" else 2 : 32]).golomb()
    except IndexError:
        return 0
