"""One test body on every device: on the simulated GPU under many schedules, on the host, and on a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Device, Stream, open_device
from aiotrt.testing import SimulatedDevice
from tests.simulated import in_use, run_simulated
from tests.test_conformance import Gate
from tests.tools import Affine, executor_of, frame

__all__ = ["Body", "Place", "on_every_device", "on_every_gpu"]

#: Schedules that each body runs under on the simulated GPU.
SEEDS: Final = range(25)


class Place:
    """A device, and what differs from one to another beside the name.

    Attributes:
        device: the device.
        simulated: the device, if it is a simulated one.
        has_memory: whether device memory is not host memory.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.simulated = device if isinstance(device, SimulatedDevice) else None
        self.has_memory = not device.unified
        self.tensor(0)  # CUDA loads a kernel when it is first launched, which a held stream would hold up

    def load(self, source: Any = None, *, slots: int = 1, warmup: object = None, **options: Any) -> aiotrt.Model:
        """A model of `Affine`, or of something else; warmed up for a `frame`, if for nothing else."""
        source = Affine() if source is None else source
        warmup = frame(0) if warmup is None else warmup
        model: aiotrt.Model = aiotrt.load(source, device=self.device, slots=slots, warmup=warmup, **options)
        return model

    def tensor(self, value: float, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
        """A `frame` in device memory, made on the current stream."""
        if self.simulated is not None:
            return self.simulated.tensor(frame(value, shape))
        return torch.full(shape, float(value), device=self.device.torch_device)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor in device memory; itself, where that is the host's."""
        return tensor.to(self.device.torch_device) if self.simulated is None else self.simulated.tensor(tensor)

    def empty(self, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
        """Device memory that nobody has written yet."""
        return self.device.empty(shape, torch.float32)

    def read(self, result: torch.Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What a result that is complete holds. May block on the current stream, as tests may."""
        if isinstance(result, np.ndarray):
            return result
        if self.simulated is not None:
            result = self.simulated.read(result)
        array: np.ndarray[Any, Any] = result.detach().cpu().numpy()
        return array

    def is_right(self, result: torch.Tensor | np.ndarray[Any, Any], value: float) -> bool:
        """Whether this is `Affine` of a `frame`."""
        return bool((self.read(result) == 3 * value + 1).all())

    @contextlib.contextmanager
    def gate(self, *streams: Stream) -> Iterator[Gate]:
        """These streams are held; opened at the end at the latest, so that whoever fails holds up nobody else."""
        gate = Gate(self.device)
        for stream in streams:
            gate.hold(stream)
        try:
            yield gate
        finally:
            gate.open()

    def held(self, model: aiotrt.Model) -> contextlib.AbstractContextManager[Gate]:
        """The streams of all of its slots are held."""
        return self.gate(*(slot.stream for slot in executor_of(model).slots))

    async def some_time(self) -> None:
        """Long enough for many replays, so that what has not happened after it is held."""
        await asyncio.sleep(0.02)

    async def finished(self, stream: Stream) -> None:
        """All that was submitted there so far is done, and the host knows it."""
        await asyncio.to_thread(stream.synchronize)

    def allocated(self) -> int:
        """Bytes of device memory that have an owner; 0 where that is the host's."""
        if self.simulated is not None:
            return in_use(self.simulated)
        return torch.cuda.memory_allocated(self.device.torch_device) if self.has_memory else 0

    @contextlib.contextmanager
    def captured_elsewhere(self) -> Iterator[None]:
        """Inside, another thread is in the middle of a capture, on a GPU in torch's default mode; that must succeed."""
        if self.simulated is not None:
            with self.simulated.captured_elsewhere():
                yield
            return
        entered, leave, outcome = threading.Event(), threading.Event(), list[BaseException | None]()

        def linger() -> list[torch.Tensor]:
            entered.set()
            assert leave.wait(30)
            return []

        def capture() -> None:
            try:
                if self.has_memory:
                    _capture_globally(linger)
                else:
                    self.device.capture(self.device.stream(), linger)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)
            finally:
                entered.set()

        thread = threading.Thread(target=capture)
        thread.start()
        entered.wait(30)
        try:
            yield
        finally:
            leave.set()
            thread.join()
        assert outcome == [None]


def _capture_globally(body: Callable[[], object]) -> None:
    x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    _ = x * 2.0  # loads the kernel, which no capture survives
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        _ = x * 2.0
        body()
        _ = x * 2.0


Body = Callable[[Place], Coroutine[Any, Any, None]]

_GPU: Final = pytest.param("cuda", marks=pytest.mark.gpu)


def on_every_device(body: Body) -> Callable[[str], None]:
    """A test of this body on the simulated GPU, the host and CUDA."""
    return _test(body, ["simulated", "host", _GPU])


def on_every_gpu(body: Body) -> Callable[[str], None]:
    """A test of this body where device memory is not host memory."""
    return _test(body, ["simulated", _GPU])


def _test(body: Body, where: list[Any]) -> Callable[[str], None]:
    @pytest.mark.parametrize("where", where)
    def test(where: str) -> None:
        if where != "simulated":
            asyncio.run(body(Place(open_device(where))))
            return
        for seed in SEEDS:
            device = SimulatedDevice(seed)
            try:
                run_simulated(body(Place(device)), device)
            except BaseException as error:
                error.add_note(f"under the schedule with seed {seed}")
                raise

    test.__name__, test.__qualname__ = body.__name__, body.__qualname__
    test.__doc__, test.__module__ = body.__doc__, body.__module__
    return test
