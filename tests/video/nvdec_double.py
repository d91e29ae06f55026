"""A double of PyNvVideoCodec in host memory, which decodes with FFmpeg and is strict where the library is.

It has the names and signatures of version 2.2. Like the library it gives NV12 in memory that the next call overwrites,
rounds widths up to even ones, raises when a format changes in mid-stream, and gives damaged pictures as good ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import Any

import av
import numpy as np
import torch

from aiotrt.video import UnsupportedError

__all__ = ["HostSurfaces", "Library"]


class HostSurfaces:
    """`Surfaces` in host memory."""

    index = 0
    handle = 4711
    context = 815
    device = torch.device("cpu")

    def __init__(self, device: object) -> None:
        if device not in (None, 0, "cuda:0"):
            raise UnsupportedError(f"device={device!r} cannot decode: there is one")
        self._is_current = False
        self.is_released = False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True

    def synchronize(self) -> None:
        pass

    @contextlib.contextmanager
    def use(self) -> Any:
        self._is_current = True
        yield
        self._is_current = False

    def surface(self, pointer: int, rows: int, width: int) -> torch.Tensor:
        assert self._is_current
        return torch.frombuffer((ctypes.c_uint8 * (rows * width)).from_address(pointer), dtype=torch.uint8).view(rows, width)

    def upload(self, pixels: Any) -> torch.Tensor:
        assert self._is_current
        return torch.from_numpy(np.array(pixels))

    def complete(self) -> object:
        assert self._is_current
        return "complete"

    def order(self, tensor: torch.Tensor, event: object) -> None:
        assert event == "complete"


class _Codecs:
    H264 = "h264"
    HEVC = "hevc"


class _Latencies:
    NATIVE = 0
    LOW = 1


class _Flags:
    ENDOFPICTURE = 0x08


class _Colours:
    NATIVE = 0


class PacketData:
    __slots__ = ("bsl", "bsl_data", "decode_flag", "pts")

    def __init__(self) -> None:
        self.bsl = self.bsl_data = self.decode_flag = self.pts = 0


class Frame:
    """A decoded frame: `width` is even."""

    def __init__(self, memory: np.ndarray[Any, Any], height: int, number: int) -> None:
        self._memory = memory
        self._height = height
        self._number = number

    def getPTS(self) -> int:  # noqa: N802
        return self._number

    def framesize(self) -> int:
        return int(self._memory.shape[1] * self._height * 1.5)

    def GetPtrToPlane(self, index: int) -> int:  # noqa: N802
        assert index == 0
        return int(self._memory.ctypes.data)


class Decoder:
    def __init__(self, library: Library, codec: str) -> None:
        self._library = library
        self._context: Any = av.CodecContext.create(codec, "r")
        self._context.thread_count = 1
        self._size: tuple[int, int] | None = None
        self._memories: list[np.ndarray[Any, Any]] = []
        self._is_ended = False

    def Decode(self, packet: PacketData) -> list[Frame]:  # noqa: N802
        assert type(packet) is PacketData
        assert not self._is_ended, "nothing may follow the end"
        assert threading.current_thread() is not threading.main_thread(), "decoding blocks: not on the loop's thread"
        self._library.calls += 1
        if self._library.fails_at == self._library.calls:
            raise self._library.failure
        for memory in self._memories:
            memory[:] = 0xEE
        self._memories.clear()
        given: Any = None
        if packet.bsl:
            assert packet.decode_flag == _Flags.ENDOFPICTURE
            data = ctypes.string_at(packet.bsl_data, packet.bsl)
            assert b"\x00\x00\x01" in data[:4]
            given = av.Packet(data)
            given.pts = given.dts = packet.pts
        else:
            self._is_ended = True
        try:
            frames = self._context.decode(given)
        except av.FFmpegError:
            frames = []
        return [self._frame(frame) for frame in frames]

    def _frame(self, frame: Any) -> Frame:
        height, width = frame.height, frame.width
        if (self._size or (height, width)) != (height, width):
            raise RuntimeError("Reconfigure Not supported when width/height > maxwidth/maxheight")
        self._size = height, width
        half, stored = (height + 1) // 2, width + width % 2
        memory = np.zeros((height + half, stored), np.uint8)
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
        memory[:height, :width] = planes[0][:height, :width]
        memory[height:, ::2] = planes[1][:half, : stored // 2]
        memory[height:, 1::2] = planes[2][:half, : stored // 2]
        self._memories.append(memory)
        return Frame(memory, height, frame.pts)


class Library:
    """The module.

    Attributes:
        limits: the answer of `GetDecoderCaps`.
        sessions: the number of decoders that were created.
        calls: the number of calls of `Decode`.
        fails_at: the call that raises `failure`.
    """

    cudaVideoCodec = _Codecs  # noqa: N815
    DisplayDecodeLatencyType = _Latencies
    VideoPacketFlag = _Flags
    OutputColorType = _Colours
    PacketData = PacketData

    def __init__(self) -> None:
        self.limits = {"supported": 1, "width_min": 48, "width_max": 4096, "height_min": 16, "height_max": 4096}
        self.sessions = 0
        self.calls = 0
        self.fails_at: int | None = None
        self.failure: Exception = RuntimeError("NVDEC_API_CALL failed\nwith code 700")

    def GetDecoderCaps(self, gpuid: int, codec: str) -> dict[str, int]:  # noqa: N802
        assert (gpuid, codec) in ((0, "h264"), (0, "hevc"))
        return self.limits

    def CreateDecoder(  # noqa: N802
        self,
        *,
        gpuid: int,
        codec: str,
        cudacontext: int,
        cudastream: int,
        usedevicememory: bool,
        outputColorType: int,  # noqa: N803
        latency: int,
    ) -> Decoder:
        assert (gpuid, usedevicememory, outputColorType) == (0, True, _Colours.NATIVE)
        assert (cudacontext, cudastream) == (HostSurfaces.context, HostSurfaces.handle)
        assert latency in (_Latencies.NATIVE, _Latencies.LOW)
        self.sessions += 1
        return Decoder(self, codec)
