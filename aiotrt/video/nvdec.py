"""Decode into device memory with NVDEC, through PyNvVideoCodec. Every function here blocks: `feeds` runs them in a thread.

FFmpeg opens the source and reads its packets, as for the CPU. Its filter makes Annex B data of a packet, NVDEC decodes that
to NV12, and torch converts that to RGB on the decoder's stream. Each packet has a number, which comes back as the timestamp
of its picture, so that a picture gets exactly the time of its packet.

NVDEC conceals damage without a report. So the packets since the last keyframe are kept, and if one of them is damaged as far
as can be seen, FFmpeg decodes all of them and those up to the next keyframe: the pictures and reports are the CPU's.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from aiotrt._install import install_hint
from aiotrt.video.bitstream import SETS, Headers, parameter_sets
from aiotrt.video.colours import Conversion
from aiotrt.video.decoding import UPRIGHT, Decoded, Decoder, Opening, Orientation
from aiotrt.video.frames import Array, Picture
from aiotrt.video.reports import Kind, SourceError, UnsupportedError

__all__ = ["DevicePicture", "GpuDecoder", "Surfaces", "load_library"]

log = logging.getLogger("aiotrt.video")

FORMATS: Final = ("yuv420p", "yuvj420p")
PENDING: Final = 64  # packets without a picture, after which the decoder counts as stuck; no stream reorders as many
GROUP: Final = 1024  # packets that are kept since the last keyframe
TIMES: Final = 2 * GROUP  # times that are kept


def load_library() -> Any:
    """Import PyNvVideoCodec.

    Raises:
        UnsupportedError: it is not installed, or does not work with this driver.
    """
    try:
        import PyNvVideoCodec
    except ModuleNotFoundError as error:
        if error.name == "PyNvVideoCodec":
            raise UnsupportedError(f"decoding on the GPU needs PyNvVideoCodec; {install_hint('decode')}") from None
        raise UnsupportedError(f"PyNvVideoCodec cannot be imported: {_first_line(error)}") from error
    except Exception as error:  # the driver is too old, or lacks its video libraries
        raise UnsupportedError(f"PyNvVideoCodec does not work with this driver: {_first_line(error)}") from error
    return PyNvVideoCodec


class Surfaces:
    """The device memory and the stream of one decoder.

    Args:
        device: such as "cuda:1" or 1; None for the current one.

    Raises:
        UnsupportedError: there is no such GPU.
    """

    #: The streams of closed decoders, by device. Torch caches memory for each stream, so sources that reconnect reuse them.
    _idle: Final[dict[int, list[torch.cuda.Stream]]] = {}

    def __init__(self, device: str | int | None) -> None:
        if not torch.cuda.is_available():
            raise UnsupportedError("decoding on the GPU needs one, and torch finds none")
        try:
            self.index = int(torch.cuda._utils._get_device_index(device, optional=True))
            self.device = torch.device("cuda", self.index)
            idle = self._idle.setdefault(self.index, [])
            try:
                self._stream = idle.pop()
            except IndexError:
                self._stream = torch.cuda.Stream(self.device)
        except Exception as error:
            raise UnsupportedError(f"device={device!r} cannot decode: {_first_line(error)}") from error

    @property
    def handle(self) -> int:
        """The stream's handle, on which NVDEC copies its pictures."""
        return int(self._stream.cuda_stream)

    @property
    def context(self) -> int:
        """The calling thread's CUDA context, which is torch's; 0 if the thread has not used the device yet."""
        context = ctypes.c_void_p()
        ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
        return context.value or 0

    def release(self) -> None:
        """Leave the stream to another decoder. Pictures remain usable."""
        self._idle[self.index].append(self._stream)

    def synchronize(self) -> None:
        """Wait for the stream's work, which may read the decoder's memory."""
        self._stream.synchronize()

    def use(self) -> AbstractContextManager[Any]:
        """Make the stream the current one."""
        return torch.cuda.stream(self._stream)

    def surface(self, pointer: int, rows: int, width: int) -> torch.Tensor:
        """Return a view of the decoder's memory, which is valid until the next call of the decoder."""
        interface = {"shape": (rows, width), "typestr": "|u1", "data": (pointer, False), "version": 3, "strides": None}
        memory = type("Memory", (), {"__cuda_array_interface__": interface})
        return torch.as_tensor(memory(), device=self.device)

    def upload(self, pixels: Array) -> torch.Tensor:
        """Copy an array to the device."""
        return torch.from_numpy(np.array(pixels)).to(self.device)

    def complete(self) -> Any:
        """Return an event after the stream's work so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def order(self, tensor: torch.Tensor, event: Any) -> None:
        """Let the current stream wait for the event, and keep the tensor's memory until the stream's work is complete."""
        current = torch.cuda.current_stream(self.device)
        if current != self._stream:
            current.wait_event(event)
            tensor.record_stream(current)


class DevicePicture:
    """A decoded picture in device memory, RGB.

    Args:
        pixels: (height, width, 3) bytes as displayed.
        surfaces: of the decoder. Its stream's work so far includes the writing of the pixels.
        aspect: the ratio of a displayed pixel's width to its height.
    """

    is_on_device = True

    def __init__(self, pixels: torch.Tensor, surfaces: Surfaces, aspect: float) -> None:
        self._pixels = pixels
        self._surfaces = surfaces
        self._complete = surfaces.complete()
        self.pixel_aspect = aspect

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3) of the picture as displayed."""
        return tuple(self._pixels.shape)

    @property
    def tensor(self) -> torch.Tensor:
        """The pixels, ordered for the current stream."""
        self._surfaces.order(self._pixels, self._complete)
        return self._pixels

    def array(self) -> Array:
        """Copy the pixels to the host."""
        pixels: Array = self.tensor.cpu().numpy()
        pixels.flags.writeable = False
        return pixels


class _Shown(NamedTuple):
    """A picture in the form that `Decoder.read` expects."""

    time: float | None
    picture: Picture | None
    is_corrupt: bool = False


class _Damage(Exception):
    """A packet is damaged, or NVDEC failed for it: FFmpeg decodes."""


class _Format(NamedTuple):
    """The pictures between two changes of the stream's format."""

    height: int
    width: int
    orientation: Orientation
    conversion: Conversion
    aspect: float


class _Session:
    """A decoder of the GPU for one format."""

    def __init__(self, library: Any, codec: str, surfaces: Surfaces, form: _Format, low_delay: bool) -> None:
        self._library = library
        self._surfaces = surfaces
        self._form = form
        latency = library.DisplayDecodeLatencyType
        with _failures(surfaces), surfaces.use():
            self._decoder: Any = library.CreateDecoder(
                gpuid=surfaces.index,
                codec=getattr(library.cudaVideoCodec, codec.upper()),
                # Without a context the library retains one, and ends the process if it cannot release that after a fault.
                cudacontext=surfaces.context,
                cudastream=surfaces.handle,
                usedevicememory=True,
                outputColorType=library.OutputColorType.NATIVE,
                latency=latency.LOW if low_delay else latency.NATIVE,
            )

    def decode(self, data: bytes, number: int) -> list[tuple[int, DevicePicture]]:
        """Decode one picture's data; empty data is the end. Returns the pictures that are complete, with their numbers."""
        packet = self._library.PacketData()
        packet.bsl_data = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value if data else 0
        packet.bsl = len(data)
        packet.pts = number
        if data:  # a packet is a whole picture, so it can be decoded before the next one arrives
            packet.decode_flag = self._library.VideoPacketFlag.ENDOFPICTURE
        with _failures(self._surfaces), self._surfaces.use():
            return [(int(frame.getPTS()), self._picture(frame)) for frame in self._decoder.Decode(packet)]

    def close(self) -> None:
        """Free the decoder."""
        try:
            self._surfaces.synchronize()
        except Exception as error:  # the device is lost, and its memory with it
            log.warning("a decoder cannot be closed: %s", _first_line(error))
        self._decoder = None

    def _picture(self, frame: Any) -> DevicePicture:
        """Convert a frame at once, because the next call of the decoder writes to its memory."""
        height, width, orientation, conversion, aspect = self._form
        stored, rows = width + width % 2, height + (height + 1) // 2
        if frame.framesize() != int(stored * height * 1.5):
            raise _Damage(f"the GPU gives pictures of {frame.framesize():,} bytes, which are not {width} by {height}")
        pixels = conversion(self._surfaces.surface(frame.GetPtrToPlane(0), rows, stored), height, width)
        if orientation != UPRIGHT:
            if orientation.is_transposed:
                pixels, aspect = pixels.transpose(0, 1), 1 / aspect
            flips = [i for i, flip in enumerate((orientation.flips_rows, orientation.flips_columns)) if flip]
            pixels = pixels.flip(flips).contiguous()
        return DevicePicture(pixels, self._surfaces, aspect)


class _failures:  # noqa: N801  # a context manager
    """Translate exceptions of PyNvVideoCodec and torch."""

    def __init__(self, surfaces: Surfaces) -> None:
        self._device = surfaces.device

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, _Damage):
            return
        text = _first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower().replace("_", " "):
            raise SourceError(f"decoding failed because the memory of {self._device} is full: {text}") from error
        raise _Damage(f"the GPU failed: {text}") from error


class GpuDecoder(Decoder):
    """A decoder that gives pictures in device memory; see the module's docstring. Not thread-safe.

    With ``decode="auto"`` it decodes on the CPU what the GPU cannot decode.

    Raises:
        UnsupportedError: the GPU cannot decode the source, and ``decode="gpu"``.
    """

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._session: _Session | None = None
        self._surfaces: Any = None
        self._sequence: tuple[bytes, ...] = ()
        self._is_software = False  # FFmpeg decodes up to the next keyframe
        self._group: list[Any] = []  # the packets since the last keyframe
        self._key = 0  # the number of the last keyframe
        self._given: set[int] = set()  # the numbers of those whose pictures were given
        self._pending: set[int] = set()  # the numbers of the session's packets that have no picture yet
        self._times: dict[int, float | None] = {}  # by the number of the packet
        self._number = 0
        self._key_time: float | None = None  # of the session's first picture
        self._is_first = True  # no session has begun yet
        self._is_refused = False  # FFmpeg decodes everything, into host memory
        self._failure: SourceError | None = None
        self._stays = False  # FFmpeg decodes from here to the end
        try:
            self._prepare()
        except UnsupportedError as error:
            if opening.decode == "gpu":
                self.close()
                raise
            self._is_refused = True
            self.notes.append((Kind.DECODER, f"the CPU decodes: {error}"))
        except BaseException:
            self.close()
            raise
        else:
            if opening.decode == "auto":
                self.notes.append((Kind.DECODER, "the GPU decodes"))

    def _prepare(self) -> None:
        """Find out whether the GPU can decode the source."""
        library = self._library = load_library()
        self._surfaces = Surfaces(self._opening.device)
        context = self._stream.codec_context
        if context is None:
            raise UnsupportedError(f"{self._opening.title}: its codec is unknown")
        codec = self._codec = str(context.codec.canonical_name)
        if codec not in SETS:
            raise UnsupportedError(f"{self._opening.title}: the GPU path decodes H.264 and HEVC, not {codec}")
        try:
            self._limits = _capabilities(library, self._surfaces.index, codec)
        except Exception as error:
            raise UnsupportedError(f"NVDEC cannot be used: {_first_line(error)}") from error
        if not self._limits.get("supported"):
            raise UnsupportedError(f"{self._opening.title}: this GPU has no decoder for {codec}")
        self._headers = Headers(codec, parameter_sets(codec, bytes(context.extradata or b"")))
        self._make_filter()
        if context.pix_fmt is not None:
            self._check(context.pix_fmt, context.height, context.width, False)

    def _make_filter(self) -> None:
        self._filter: Any = None
        try:
            self._filter = self._av.bitstream.BitStreamFilterContext(f"{self._codec}_mp4toannexb", self._stream)
        except self._av.FFmpegError:  # the container's header is damaged, so FFmpeg decodes everything
            pass

    def _check(self, pixel_format: str, height: int, width: int, is_interlaced: bool) -> None:
        reason, limits = None, self._limits
        if pixel_format not in FORMATS:
            reason = f"the GPU path decodes 8 bits and 4:2:0 without alpha (yuv420p), not {pixel_format}"
        elif is_interlaced:
            reason = "its pictures are interlaced, and the GPU would change them"
        elif height and not (
            limits.get("width_min", 0) <= width <= limits.get("width_max", width)
            and limits.get("height_min", 0) <= height <= limits.get("height_max", height)
        ):
            reason = (
                f"its pictures are {width} by {height}, and this GPU decodes {limits.get('width_min')} by "
                f"{limits.get('height_min')} to {limits.get('width_max')} by {limits.get('height_max')}"
            )
        if reason is not None:
            raise UnsupportedError(f"{self._opening.title}: {reason}")

    def _pictures(self, packet: Any) -> list[Any]:
        if self._is_refused:
            return super()._pictures(packet)
        if self._failure is not None:
            raise self._failure
        if not packet.size:  # the end
            return [*self._finish(), *(self._software(None) if self._is_software else ())]
        number, self._number = self._number, self._number + 1
        base = packet.time_base
        self._times[number] = None if packet.pts is None else float(packet.pts) * base.numerator / base.denominator
        if len(self._times) > TIMES:
            self._times = dict(list(self._times.items())[GROUP:])
            self._pending &= self._times.keys()  # pictures that NVDEC left out because they precede the first keyframe
        packet.pts = packet.dts = number
        shown: list[_Shown] = []
        try:
            if packet.is_keyframe and not self._stays:
                if self._is_software:
                    shown += self._software(None)
                    self._is_software = False
                self._group.clear()
                self._given.clear()
                self._key = number
            if len(self._group) >= GROUP:  # too many to keep: after damage FFmpeg begins in the middle
                self._group.clear()
            if len(self._given) > TIMES:
                self._given = {given for given in self._given if given > number - GROUP}
            if self._is_software:
                shown += self._software(packet)
            else:
                self._group.append(packet)
                self._on_gpu(packet, number, shown)
        except SourceError as error:
            if not shown:
                raise
            self._failure = error  # raised after these pictures
        return shown

    def _on_gpu(self, packet: Any, number: int, shown: list[_Shown]) -> None:
        """Decode a packet on the GPU if it is sound, else on the CPU."""
        try:
            data = self._annex_b(packet)
            if self._session is None or self._headers.sequence != self._sequence:
                if not packet.is_keyframe:
                    raise _Damage("no keyframe has arrived yet" if self._is_first else "the format changes at no keyframe")
                shown += self._finish()
                self._begin(packet, data)
                self._key_time = self._times[number]
                if not all(unit in data for unit in self._sequence):
                    data = self._headers.sets + data
            self._pending.add(number)
            assert self._session is not None
            self._give(self._session.decode(data, number), shown)
            if len(self._pending) > PENDING:
                raise _Damage(f"{PENDING} packets have given no picture")
        except (_Damage, SourceError) as reason:
            if self._opening.decode == "gpu" and isinstance(reason, SourceError):
                raise
            shown += self._finish(is_final=False)
            self._is_software = True
            self._stays = isinstance(reason, UnsupportedError)
            if str(reason):
                until = "" if self._stays else " up to the next keyframe"
                self.notes.append((Kind.DECODER, f"the CPU decodes{until}: {reason}"))
            self._stream.codec_context.flush_buffers()
            group, self._group = self._group, []
            for kept in group:
                shown += self._software(kept)

    def _annex_b(self, packet: Any) -> bytes:
        if packet.is_corrupt:
            raise _Damage("a packet arrived damaged")
        if self._filter is None:
            raise _Damage("the container's header is damaged")
        try:
            # The filter empties its packet, and this one is kept.
            data = b"".join(bytes(part) for part in self._filter.filter(self._av.Packet(bytes(packet))))
        except self._av.FFmpegError as error:
            self._make_filter()
            raise _Damage(self._message(error)) from error
        if (damage := self._headers.read(data)) is not None:
            raise _Damage(damage)
        return data

    def _begin(self, packet: Any, data: bytes) -> None:
        """Begin a session at a keyframe, whose format FFmpeg finds out by decoding it.

        Raises:
            UnsupportedError: the GPU cannot decode the format.
        """
        frame = _first(self._stream.codec_context, packet)
        if frame is None:
            raise _Damage("a keyframe is damaged")
        height, width, most = frame.height, frame.width, self._opening.max_pixels
        if most is not None and height * width > most:
            raise _Damage  # the source leaves the pictures out, and reports each
        self._check(frame.format.name, height, width, bool(frame.interlaced_frame))
        # The library crops at the right and at the bottom only.
        whole = self._av.CodecContext.create(self._codec, "r")
        whole.options = {"apply_cropping": "0"}
        uncropped = _first(whole, self._av.Packet(self._headers.sets + data))
        if uncropped is None:
            raise _Damage("a keyframe is damaged")
        match _offset(_luma(uncropped), _luma(frame)):
            case None:
                raise _Damage("a keyframe is damaged")
            case (0, 0):
                pass
            case _:
                raise UnsupportedError(f"{self._opening.title}: its pictures are cropped at the left or at the top")
        is_full = frame.color_range == 2 or frame.format.name == "yuvj420p"
        with _failures(self._surfaces), self._surfaces.use():
            conversion = Conversion(int(frame.colorspace), is_full, self._surfaces.device)
        form = _Format(height, width, Orientation.of(frame), conversion, self._aspect)
        self._session = _Session(self._library, self._codec, self._surfaces, form, self._opening.low_delay)
        self._sequence = self._headers.sequence

    def _give(self, found: list[tuple[int, DevicePicture]], shown: list[_Shown], *, is_last: bool = False) -> None:
        for number, picture in found:
            if number not in self._pending:
                raise _Damage("the GPU gave a picture that belongs to no packet")
            time = self._times[number]
            for missing in [] if time is None else sorted(n for n in self._pending if self._is_due(n, time)):
                if missing >= self._key and not is_last:
                    raise _Damage("a picture is missing")
                self._pending.discard(missing)  # its packet is not kept any more
                shown.append(_Shown(self._times.pop(missing), None, is_corrupt=True))
            self._pending.discard(number)
            self._given.add(number)
            del self._times[number]
            # Pictures before the first keyframe in time refer to pictures that this session has not decoded.
            if time is None or self._key_time is None or time >= self._key_time:
                shown.append(_Shown(time, picture))
            elif not self._is_first:
                shown.append(_Shown(time, None, is_corrupt=True))

    def _is_due(self, number: int, time: float) -> bool:
        """Return whether a packet's picture comes before this time, and not before the session's first keyframe."""
        found = self._times[number]
        return found is not None and (self._key_time is None or self._key_time <= found) and found < time

    def _finish(self, *, is_final: bool = True) -> list[_Shown]:
        """End the session. Returns its last pictures. Missing ones that FFmpeg will not decode again count as damaged."""
        session, self._session = self._session, None
        shown: list[_Shown] = []
        if session is not None:
            try:
                last = session.decode(b"", 0)
                # FFmpeg decodes the last group again, in order.
                self._give([found for found in last if is_final or found[0] < self._key], shown, is_last=True)
            except (_Damage, SourceError) as reason:
                self.notes.append((Kind.DECODER, f"the last pictures before a change of decoder are lost: {reason}"))
            lost = sorted(number for number in self._pending if is_final or number < self._key)
            missing = [self._times.pop(number) for number in lost]
            # Before the first keyframe in time FFmpeg gives no pictures either.
            shown += [
                _Shown(time, None, is_corrupt=True)
                for time in missing
                if time is None or self._key_time is None or time >= self._key_time
            ]
            self._pending.clear()
            self._is_first = False
            session.close()
        return shown

    def _software(self, packet: Any) -> list[_Shown]:
        """Decode a packet on the CPU, None for the end, and copy the pictures to the device."""
        context, av = self._stream.codec_context, self._av
        try:
            frames = context.decode(packet)
        except av.error.EOFError:
            frames = []
        except av.FFmpegError as error:
            self._damaged(self._message(error))
            frames = []
        if packet is None:
            context.flush_buffers()
        shown = []
        for frame in frames:
            if frame.pts in self._given:
                continue
            if frame.pts is not None:
                self._given.add(frame.pts)
            time = self._times.pop(frame.pts, None)
            shown.append(_Shown(time, None, is_corrupt=True) if frame.is_corrupt else _Shown(time, self._uploaded(frame)))
        return shown

    def _uploaded(self, frame: Any) -> Picture:
        decoded, most = Decoded(frame, self._aspect), self._opening.max_pixels
        if most is not None and frame.height * frame.width > most:
            return decoded  # the source leaves it out
        try:
            with _failures(self._surfaces), self._surfaces.use():
                return DevicePicture(self._surfaces.upload(decoded.array()), self._surfaces, decoded.pixel_aspect)
        except (_Damage, SourceError) as error:
            if self._opening.decode == "gpu":
                raise SourceError(f"{self._opening.title}: {error}") from error
            return decoded

    def _picture(self, frame: Any) -> Picture:
        return frame.picture if isinstance(frame, _Shown) else super()._picture(frame)  # type: ignore[return-value]

    def _rewind(self) -> bool:
        if not super()._rewind():
            return False
        if not self._is_refused:
            if self._session is not None:
                self._session.close()
            self._session, self._is_software, self._is_first = None, False, True
            for kept in (self._group, self._given, self._pending, self._times):
                kept.clear()
            self._make_filter()
        return True

    def close(self) -> None:
        """Close the decoder and the container."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        surfaces, self._surfaces = self._surfaces, None
        if surfaces is not None:
            surfaces.release()
        super().close()


@functools.cache
def _capabilities(library: Any, index: int, codec: str) -> dict[str, int]:
    """Ask once for each codec, because the library creates a CUDA context to answer."""
    found: dict[str, int] = library.GetDecoderCaps(gpuid=index, codec=getattr(library.cudaVideoCodec, codec.upper()))
    return found


def _first(context: Any, packet: Any) -> Any:
    """Decode a keyframe by itself on the CPU; None if it is damaged."""
    import av

    try:
        frames = context.decode(packet)
        frames += context.decode(None)
    except av.FFmpegError:
        frames = []
    context.flush_buffers()
    return frames[0] if frames and not frames[0].is_corrupt else None


def _luma(frame: Any) -> Array:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]


def _offset(whole: Array, part: Array) -> tuple[int, int] | None:
    """Return where a part of a picture begins in the whole; None if it is no part of it."""
    height, width = part.shape
    for top in range(whole.shape[0] - height + 1):
        for left in range(whole.shape[1] - width + 1):
            if np.array_equal(whole[top : top + height, left : left + width], part):
                return top, left
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
