"""`Decoder`: images in compressed form become tensors on a device, in batches that form while the device is busy.

Each call runs in a task of its own. A caller that is cancelled leaves at once; its task keeps its share of the memory limit
until no thread and no device works on the image any more.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Self, TypeVar

import torch
from PIL import Image

from aiotrt.completion.hub import check_asyncio, check_loop, wait
from aiotrt.decoding.errors import ImageTooLargeError
from aiotrt.decoding.jpeg import UnsuitableError, end_of_image
from aiotrt.decoding.library import Jpeg, Library, open_library, out_of_memory
from aiotrt.decoding.pillow import Data, needed, opened, pixels
from aiotrt.decoding.threads import memory, off_loop
from aiotrt.devices import Device, Event, open_device
from aiotrt.errors import DeviceError, InputError, ResourceError, UsageError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Decoder", "decode_image"]

T = TypeVar("T")

MAX_BYTES: Final = 20 << 20
MAX_PIXELS: Final = 50_000_000
_ORIENTATION: Final = 0x0112  # EXIF's number
_log: Final = logging.getLogger("aiotrt")


class _Call:
    """One image on its way.

    Attributes:
        is_held: whether a thread or the device works on it, so that its task must not be cancelled.
        is_abandoned: whether its caller was cancelled, or the decoder was closed, meanwhile.
        jpeg: the file, where the library decodes it.
        result: its pixels, or None where the library failed.
    """

    def __init__(self, result: asyncio.Future[torch.Tensor | None]) -> None:
        self.is_held = self.is_abandoned = False
        self.jpeg: Jpeg | None = None
        self.result = result

    async def held(self, work: Awaitable[T]) -> T:
        """Await work that does not end early when the caller is cancelled."""
        self.is_held = True
        try:
            return await work
        finally:
            self.is_held = False
            self.check()

    def check(self) -> None:
        if self.is_abandoned:
            raise asyncio.CancelledError


class Decoder:
    """Decodes images to tensors (height, width, 3) of uint8, RGB, on one device.

    ::

        async with Decoder("cuda") as decoder:
            image = await decoder(data)

    JPEG files are decoded by nvImageCodec on a GPU (extra ``decode``). Pillow decodes in a thread, and the pixels are copied
    to the device, for all other formats, for files that the library cannot decode or whose structure is damaged or unusual,
    and where the library is missing. Both ways have the same limits and raise the same errors. EXIF orientation is applied.

    Use it in the event loop that entered it. Leaving the block fails calls that wait, with a `UsageError`. It waits for
    calls that a thread or the device works on, whose callers get their results.

    Args:
        device: as for `aiotrt.load`; one device.
        max_bytes: of one file.
        max_pixels: of one image, checked before it is decoded. Images that take more than 1 GiB together while they are
            decoded wait for each other. That limit is shared with all other decoders of the event loop.
        max_batch: images that the library gets at once.
        hardware: whether the GPU's JPEG engines may be used, where it has them. They are faster for batches, and may
            interpolate chroma differently from libjpeg.

    Attributes:
        counts: images by what decoded them ("device" or "cpu"), "errors", "cancelled", and "batches" of the library.
        reasons: images that the CPU decoded although the device is a GPU, by reason: "format", "damaged" (the structure),
            "failed" (the library) or "no library".

    Raises:
        InputError: a limit is less than 1.
        UsageError, MissingDependencyError: there is no such device, or it needs a package that is not installed.
    """

    def __init__(
        self,
        device: str | torch.device | Device = "auto",
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        max_batch: int = 64,
        hardware: bool = False,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_pixels", max_pixels), ("max_batch", max_batch)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.device = open_device(device)
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._max_batch = max_batch
        self._hardware = hardware
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._has_warned = False  # of a failed batch
        self._is_busy = False  # whether the library's thread has a batch
        self._queue: deque[_Call] = deque()
        self._calls: dict[asyncio.Task[torch.Tensor], _Call] = {}
        self._batches: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._library: Library | None = None

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await asyncio.wait([self._opening])
            self._opening.result()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begin to open the library: what entering the block does, without waiting for it.

        Raises:
            UsageError: it was started before, or no asyncio event loop runs here.
        """
        check_asyncio("aiotrt.decoding")
        if self._loop is not None or self._is_closed:
            raise UsageError("a decoder can be entered once; make another one")
        self.device.check_loop()
        self._loop = asyncio.get_running_loop()
        self._workers = self.device.workers(1)  # for the library
        self._copiers = self.device.workers(1)  # copy what the CPU has decoded
        self._stream = None if self.device.unified else self.device.stream()  # for what the CPU has decoded
        self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        opening = self._workers.submit(open_library, self.device, hardware=self._hardware)
        self._library, reason = await asyncio.wrap_future(opening)
        _log.debug("decoding for %s: %s", self.device.name, reason or self.library)

    @property
    def library(self) -> str | None:
        """The name and version of the library that decodes JPEG files on the device; None where the CPU decodes all."""
        return None if self._library is None else self._library.name

    @property
    def has_failed(self) -> bool:
        """Whether it could not be opened, so that every call raises the reason."""
        return self._opening.done() and not self._opening.cancelled() and self._opening.exception() is not None

    async def close(self) -> None:
        """End as leaving the block does. Later calls return at once."""
        if self._loop is None:
            self._is_closed = True
            return
        if self._closing is None:
            self._is_closed = True
            self._closing = self._loop.create_task(self._close())
        await asyncio.wait([self._closing])  # goes on when this is cancelled

    async def _close(self) -> None:
        for task, call in self._calls.items():
            if not call.is_held:
                task.cancel()
        await asyncio.wait({self._opening, *self._calls, *self._batches})
        closing = self._stop()
        if closing is not None:
            await asyncio.wait([asyncio.wrap_future(closing)])

    def _stop(self) -> Future[None] | None:
        """End the threads after their last work; from any thread once the loop is closed."""
        closing = None if self._library is None else self._workers.submit(self._library.close)
        for pool in (self._workers, self._copiers):
            pool.shutdown(wait=False)
        if self._stream is not None:
            self._stream.close()
        return closing

    # Calls...

    async def __call__(self, data: Data) -> torch.Tensor:
        """Decode one image. The tensor is complete, and safe to use and to free on the caller's current stream.

        Cancellation takes effect at once. An image that the device has not begun is not decoded then.

        Raises:
            ImageError: the data is not an image, or damaged, or has 32 bits for each value.
            InputError: this is no buffer of bytes.
            ImageTooLargeError: it has more than `max_bytes` or `max_pixels`, or a side of more than 65,535.
            ResourceError: the device has no memory for the pixels; the decoder is usable.
            DeviceError: the device broke.
            UsageError: the decoder is closed, not entered, or of another event loop.
        """
        return await self.decode(data, self._max_bytes, self._max_pixels)

    async def decode(self, data: Data, max_bytes: int, max_pixels: int) -> torch.Tensor:
        """Decode one image, with limits of its own. See `__call__`."""
        self._check()
        try:
            size = memoryview(data).nbytes
        except TypeError:
            raise InputError(f"expected the bytes of an image file, got an object of type {type(data).__name__}") from None
        if size > max_bytes:
            self.counts["errors"] += 1
            raise ImageTooLargeError(f"the image has {size:,} bytes; at most {max_bytes:,} are taken")
        assert self._loop is not None
        call = _Call(self._loop.create_future())
        task = self._loop.create_task(self._decoded(call, data, max_pixels))
        self._calls[task] = call
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            call.is_abandoned = True
            if not call.is_held:
                task.cancel()
            raise
        if task.cancelled() and self._is_closed:
            raise UsageError("this decoder was closed before the image was decoded")
        tensor = task.result()
        if tensor.is_cuda:  # without this, its memory could be used again while the caller's stream still reads it
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    def _check(self) -> None:
        if self._is_closed or self._loop is None:
            raise UsageError(
                "this decoder is closed" if self._is_closed else "this decoder was not entered: use 'async with'"
            )
        check_loop(self._loop, "this decoder")
        if self.device.fault is not None:
            raise self.device.fault

    def _ended(self, task: asyncio.Task[torch.Tensor]) -> None:
        self._calls.pop(task, None)
        if task.cancelled():
            self.counts["cancelled"] += 1
        elif task.exception() is not None:  # retrieved here, because the caller may be gone
            self.counts["errors"] += 1

    async def _decoded(self, call: _Call, data: Data, max_pixels: int) -> torch.Tensor:
        if not self._opening.done():
            await asyncio.wait([self._opening])
        self._opening.result()
        is_gpu = self._library is not None
        size = memoryview(data).nbytes
        inspecting = off_loop(partial(_inspected, data, max_pixels, is_gpu=is_gpu), size)
        image, jpeg, reason = await call.held(inspecting)
        with image:
            async with memory(needed(image, "RGB")):
                if jpeg is not None:
                    call.jpeg = jpeg
                    self._queue.append(call)
                    self._pump()
                    tensor = await call.result
                    call.check()
                    if tensor is not None:
                        self.counts["device"] += 1
                        return tensor
                    reason = "failed"
                if self.device.torch_device.type == "cuda":
                    self.reasons[reason] += 1
                tensor = await self._on_cpu(call, image, size)
                self.counts["cpu"] += 1
                return tensor

    async def _on_cpu(self, call: _Call, image: Image.Image, size: int) -> torch.Tensor:
        tensor = torch.from_numpy(await call.held(off_loop(partial(pixels, image, size, "RGB"))))
        if self.device.unified:
            return tensor
        return await call.held(self._copied(tensor))

    async def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            copied, event = await asyncio.wrap_future(self._copiers.submit(self._copy, tensor))
            await wait(event)
        except DeviceError as error:
            self.device.fail(error)
            raise
        except torch.OutOfMemoryError as error:
            raise out_of_memory(tensor.shape[1], tensor.shape[0], error) from error
        return copied

    def _copy(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Event]:
        assert self._stream is not None
        copied = self.device.call(self._stream, lambda: tensor.to(self.device.torch_device))
        return copied, self._stream.record()

    # Batches...

    def _pump(self) -> None:
        """Give the library a batch, if its thread is idle and an image waits."""
        batch: list[_Call] = []
        while self._queue and not self._is_busy and len(batch) < self._max_batch:
            call = self._queue.popleft()
            if not call.result.done():  # else its caller was cancelled
                call.is_held = True
                batch.append(call)
        if batch:
            assert self._loop is not None
            self._is_busy = True
            task = self._loop.create_task(self._run(batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    async def _run(self, batch: list[_Call]) -> None:
        results: list[torch.Tensor | ResourceError | None] | DeviceError = [None] * len(batch)
        try:
            results = await self._submitted(batch)
        except DeviceError as error:
            self.device.fail(error)
            results = error
        except Exception as error:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            _log.log(level, "nvImageCodec failed for a batch of %d images, which the CPU decodes: %s", len(batch), error)
        finally:
            for index, call in enumerate(batch):
                call.is_held = False
                if not call.result.done():
                    result: Any = results if isinstance(results, DeviceError) else results[index]
                    call.result.set_exception(result) if isinstance(result, Exception) else call.result.set_result(result)

    async def _submitted(self, batch: list[_Call]) -> list[torch.Tensor | ResourceError | None]:
        library = self._library
        assert library is not None
        self.counts["batches"] += 1
        jpegs = [call.jpeg for call in batch if call.jpeg is not None]
        try:
            results, event = await asyncio.wrap_future(self._workers.submit(library.decode, jpegs))
        finally:  # the next batch is submitted while the device still works on this one
            self._is_busy = False
            self._pump()
        await wait(event)
        self._workers.submit(library.release)
        return results


def _inspected(data: Data, max_pixels: int, *, is_gpu: bool) -> tuple[Image.Image, Jpeg | None, str]:
    """Check an image's size, and whether the library can be trusted with it. Return the reason where it cannot."""
    data = bytes(data)  # the caller may change its buffer, and the device reads this later
    image = opened(data, max_pixels)
    if not is_gpu:
        return image, None, "no library"
    if image.format not in ("JPEG", "MPO"):
        return image, None, "format"
    try:
        end = end_of_image(data)
        orientation = image.getexif().get(_ORIENTATION, 1)
    except UnsuitableError as error:
        return image, None, str(error)
    except Exception:  # EXIF data that Pillow cannot read: the CPU path says what is wrong with it
        return image, None, "damaged"
    return image, Jpeg(data[:end], *image.size, orientation), ""


_decoders: Final[dict[tuple[asyncio.AbstractEventLoop, Device], Decoder]] = {}


@atexit.register
def _end() -> None:
    """Close the library before the driver shuts down. The threads' own exit handler waits for that."""
    while _decoders:
        with contextlib.suppress(Exception):
            _decoders.popitem()[1]._stop()


async def decode_image(
    data: Data,
    device: str | torch.device | Device = "auto",
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Decode one image to a tensor (height, width, 3) of uint8, RGB, on the device.

    All calls of an event loop for one device share a `Decoder`, which decodes them in batches. It is freed by the first call
    in another loop after its own loop was closed.

    Args:
        data: the file.
        device: as for `aiotrt.load`; one device.
        max_bytes: of the file.
        max_pixels: of the image, checked before it is decoded.

    Raises:
        ImageError, ImageTooLargeError, ResourceError, DeviceError: as `Decoder` does.
        UsageError: no asyncio event loop runs here, or there is no such device.
    """
    check_asyncio("aiotrt.decoding.decode_image")
    key = asyncio.get_running_loop(), open_device(device)
    decoder = _decoders.get(key)
    if decoder is None or decoder.has_failed:
        for other in [other for other in _decoders if other[0].is_closed()]:
            _decoders.pop(other)._stop()
        decoder = Decoder(key[1])
        decoder.start()
        _decoders[key] = decoder
    return await decoder.decode(data, max_bytes, max_pixels)
