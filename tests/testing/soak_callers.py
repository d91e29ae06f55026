"""Callers for the soak: models whose results name the request that they answer, used in every way that there is.

Every request carries a number of its own, and every result is compared with what that number must give, element by element.
All values are small integers in float32, exact in whatever order the device adds them up, so that equality means equality.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

import aiotrt
from aiotrt.devices import Event, Stream

__all__ = ["Caller", "Images", "MismatchError", "Rows", "Sample", "Work", "difference"]

Array = np.ndarray[Any, np.dtype[np.float32]]
Arrays = tuple[Array, ...]

#: Numbers are given again after so many requests: then results are still exact.
NUMBERS: Final = 400_000
#: How many requests in a hundred are cancelled, and in a thousand have one of the shapes that are not kept captured.
CANCELLED: Final = 20
RARE: Final = 5
#: Results that each caller keeps, and looks at again later: they are its own, for ever.
KEPT: Final = 3
#: What inputs are overwritten with as soon as their call has ended.
SCRIBBLE: Final = -1e6


class MismatchError(AssertionError):
    """A result is not what its request must give."""


@dataclass(frozen=True)
class Sample:
    """One request: what goes in, and what must come out."""

    number: int
    inputs: Arrays
    expected: Arrays


class Work(abc.ABC):
    """A model, and requests for it.

    Attributes:
        name: what reports call it.
        common: sizes that are asked for all the time.
        rare: sizes that are asked for now and then, more of them than graphs are kept.
    """

    name: str
    common: Sequence[int]
    rare: Sequence[int]

    @abc.abstractmethod
    def module(self) -> torch.nn.Module:
        """The network."""

    @abc.abstractmethod
    def sample(self, size: int, number: int, chance: random.Random) -> Sample:
        """A request of this size, whose number tells its result from all others."""


class _Elementwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * 3 + 1, "total": x.sum(1)}


class Rows(Work):
    """``3 x + 1``, and the sum of each row."""

    common = (1, 4, 16)
    rare = tuple(range(17, 65))

    def __init__(self, name: str) -> None:
        self.name = name

    def module(self) -> torch.nn.Module:
        return _Elementwise()

    def sample(self, size: int, number: int, chance: random.Random) -> Sample:
        x = (number + np.arange(8 * size, dtype=np.float32) % 5).reshape(size, 8)
        return Sample(number, (x,), self.expected(x))

    def expected(self, x: Array) -> Arrays:
        return x * 3 + 1, x.sum(1)


class _Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = torch.nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            weights = torch.randint(-2, 3, layer.weight.shape, generator=generator)
            layer.weight = torch.nn.Parameter(weights.to(torch.float32), requires_grad=False)

    def forward(self, image: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.second(torch.relu(self.first(image)))
        # Rounded: whichever algorithm the device picks, it is off by less than a half.
        return {"features": torch.round(features) + number, "twice": number * 2}


class Images(Work):
    """Two convolutions over a batch of images, with each image's number added to its features."""

    common = (1, 2, 8)
    rare = (3, 4, 5, 6, 7, *range(9, 25))

    def __init__(self, name: str) -> None:
        self.name = name
        chance = np.random.default_rng(0)
        self._images = chance.integers(0, 8, (16, 3, 12, 12)).astype(np.float32)
        with torch.no_grad():
            exact = _Convolutions().double()(torch.from_numpy(self._images).double(), torch.zeros(16, 1, 1, 1))
        self._features: Array = exact["features"].float().numpy()

    def module(self) -> torch.nn.Module:
        return _Convolutions()

    def sample(self, size: int, number: int, chance: random.Random) -> Sample:
        chosen = [chance.randrange(len(self._images)) for _ in range(size)]
        numbers = (number + np.arange(size, dtype=np.float32)).reshape(size, 1, 1, 1)
        return Sample(number, (self._images[chosen], numbers), (self._features[chosen] + numbers, numbers * 2))


def values(result: Mapping[str, Any]) -> list[Any]:
    """The tensors of a result, which comes back as the dict that the module returns."""
    return list(result.values())


def difference(got: Sequence[object], sample: Sample) -> str | None:
    """How results differ from what they must be; None where they do not."""
    if len(got) != len(sample.expected):
        return f"{len(got)} results, expected {len(sample.expected)}"
    for i, (value, expected) in enumerate(zip(got, sample.expected, strict=True)):
        array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.shape != expected.shape or array.dtype != expected.dtype:
            return f"result {i} is {array.dtype} {array.shape}, expected {expected.dtype} {expected.shape}"
        if not np.array_equal(array, expected):
            wrong = array != expected
            first = tuple(int(n) for n in np.argwhere(wrong)[0])
            return (
                f"result {i} of request {sample.number} differs in {int(wrong.sum())} of {wrong.size} elements; "
                f"at {first} it is {array[first]!r}, expected {expected[first]!r}"
            )
    return None


class Caller:
    """Somebody who uses one model, one step after the other, and checks every result.

    Args:
        name: what reports call it.
        model: the model, open on this loop.
        work: what the model does.
        numbers: of requests, shared by all callers.
        sides: streams other than the current one.
        counts: what was done, of all callers of a loop.
        seed: of its choices.
        partner: a model with the same work to chain to. It must not chain to others itself: whoever holds one slot and
            waits for another is safe only in one order.
        device: where the model is; "host", or torch's name for it.
        is_batching: whether the model takes single items.

    Attributes:
        doing: what it is in the middle of; None between steps.
        since: since when, on the monotonic clock.
    """

    def __init__(
        self,
        name: str,
        model: aiotrt.Model,
        work: Work,
        numbers: Iterator[int],
        sides: Sequence[Stream],
        counts: Counter[str],
        seed: int,
        partner: aiotrt.Model | None = None,
        *,
        device: str,
        is_batching: bool = False,
    ) -> None:
        self.name = name
        self.doing: str | None = None
        self.since = 0.0
        self._model = model
        self._work = work
        self._numbers = numbers
        self._sides = sides
        self._counts = counts
        self._chance = random.Random(seed)
        self._partner = partner
        self._device = device
        self._on_device = device != "host"
        self._is_batching = is_batching
        self._kept: deque[tuple[Sample, list[Any]]] = deque()
        self._ways: dict[Callable[[], Coroutine[Any, Any, None]], int] = {self.call: 6, self.map: 1}
        if not is_batching:
            self._ways |= {self.lease: 3, self.replay: 2}
            if self._on_device:
                self._ways[self.call_from_device] = 4
            if partner is not None:
                self._ways[self.chain] = 1

    async def run(self, until: Callable[[], float]) -> None:
        """One step after the other, until then, which may change meanwhile."""
        while time.monotonic() < until():
            (way,) = self._chance.choices(list(self._ways), list(self._ways.values()))
            what = way.__name__
            self.since = time.monotonic()
            self.doing = what
            if self._chance.randrange(100) < CANCELLED:
                self.doing += ", cancelled"
                await self._cancelled(way())
            else:
                try:
                    await way()
                    self._counts[what] += 1
                except aiotrt.QueueFullError:
                    self._counts["rejected"] += 1
            self.doing = None
            await asyncio.sleep(0)  # a rejected call is over at once: the others must have their turn

    # The ways to use a model...

    async def call(self) -> None:
        """From host memory, which is overwritten as soon as the call has ended; the result is looked at again later."""
        sample = self._sample()
        inputs: list[Any] = [array.copy() for array in sample.inputs]
        if self._chance.random() < 0.5:
            inputs = [torch.from_numpy(array) for array in inputs]
        try:
            results = values(await self._model(*(value[0] for value in inputs) if self._is_batching else inputs))
        finally:
            for value in inputs:
                value[...] = SCRIBBLE
        if self._is_batching:
            results = [value[None] for value in results]
        self._check(results, sample)
        self._kept.append((sample, results))
        if len(self._kept) > KEPT:
            earlier, results = self._kept.popleft()
            self._check(results, earlier, "looked at again, a result has changed: ")

    async def call_from_device(self) -> None:
        """From device memory that is still being written on another stream; the result is read on a third one."""
        sample = self._sample()
        tensors = self._moved(sample, carried=self._chance.random() < 0.5)
        results = values(await self._model(*tensors))
        copies, done = self._read(lambda: results, sample)
        await aiotrt.wait(done)
        self._check(copies, sample)

    async def map(self) -> None:
        """Several in order; sometimes not to the end."""
        samples = [self._sample() for _ in range(self._chance.randint(1, 6))]
        last = self._chance.randrange(len(samples)) if self._chance.random() < 0.25 else None
        frames = [tuple(a[0] if self._is_batching else a for a in sample.inputs) for sample in samples]
        source: Any = frames if self._chance.random() < 0.5 else _later(frames)
        count = 0
        async with contextlib.aclosing(self._model.map(source, in_flight=self._chance.randint(1, 4))) as results:
            async for result in results:
                got = values(result)
                self._check([np.asarray(value)[None] for value in got] if self._is_batching else got, samples[count])
                count += 1
                if count - 1 == last:
                    return
        if count != len(samples):
            raise MismatchError(f"a map over {len(samples)} frames gave {count} results")

    async def replay(self) -> None:
        """A lease with results on the host."""
        kind: Literal["numpy", "torch"] = "numpy" if self._chance.random() < 0.5 else "torch"
        size = self._size()
        async with self._model.lease(self._shapes(size), outputs=kind) as slot:
            for _ in range(self._chance.randint(1, 3)):
                sample = self._sample(size)
                self._write(slot, sample, from_device=self._on_device and self._chance.random() < 0.5)
                self._check(values(await slot.replay()), sample)

    async def lease(self) -> None:
        """A lease that is left before its results are there: consumers on other streams read them when they are."""
        size = self._size()
        read = []
        event: Event | None = None
        async with self._model.lease(self._shapes(size)) as slot:
            from_device = self._on_device and self._chance.random() < 0.5
            for _ in range(self._chance.randint(1, 3)):
                if event is not None and not from_device:
                    await aiotrt.wait(event)  # before that, the launch reads the staging memory that is written next
                sample = self._sample(size)
                self._write(slot, sample, from_device=from_device)
                event = slot.launch()
                for _ in range(self._chance.randint(1, 2)):
                    side = self._chance.choice(self._sides)
                    side.wait(event)
                    read.append((sample, *self._read(lambda: [output.tensor for output in slot.outputs], sample, side)))
                    slot.consumed(side)
        for sample, copies, done in read:
            await aiotrt.wait(done)
            self._check(copies, sample)

    async def chain(self) -> None:
        """From one model's output buffer into another's input buffer, on the device."""
        assert self._partner is not None
        assert isinstance(self._work, Rows)
        size = self._size()
        sample = self._sample(size)
        async with (
            self._model.lease(self._shapes(size)) as first,
            self._partner.lease(self._shapes(size), outputs="numpy") as second,
        ):
            self._write(first, sample, from_device=False)
            first.launch()
            second.inputs[0][...] = first.outputs[0]
            expected = self._work.expected(sample.expected[0])
            self._check(values(await second.replay()), Sample(sample.number, sample.inputs, expected))

    # Their parts...

    async def _cancelled(self, step: Coroutine[Any, Any, None]) -> None:
        """Begin it, and cancel it at some time."""
        task = asyncio.ensure_future(step)
        if self._chance.random() < 0.7:
            for _ in range(self._chance.choice((0, 1, 2, 3, 5, 10, 30))):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._chance.uniform(0, 5e-3))
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            self._counts["cancelled"] += 1
        elif (error := task.exception()) is None:
            self._counts["done before it was cancelled"] += 1
        elif isinstance(error, aiotrt.QueueFullError):
            self._counts["rejected"] += 1
        else:
            raise error

    def _size(self) -> int:
        if self._is_batching:
            return 1
        return self._chance.choice(self._work.rare if self._chance.randrange(1000) < RARE else self._work.common)

    def _sample(self, size: int | None = None) -> Sample:
        return self._work.sample(self._size() if size is None else size, next(self._numbers) % NUMBERS, self._chance)

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        return [array.shape for array in self._work.sample(size, 0, self._chance).inputs]

    def _write(self, slot: aiotrt.Lease, sample: Sample, *, from_device: bool) -> None:
        values: Sequence[object] = sample.inputs
        if from_device:
            values = tensors = self._moved(sample)
            for tensor in tensors:  # which are dropped here, while the current stream still copies them
                tensor.record_stream(torch.cuda.current_stream())
        for buffer, value in zip(slot.inputs, values, strict=True):
            buffer[...] = value

    def _moved(self, sample: Sample, *, carried: bool = False) -> list[torch.Tensor]:
        """The inputs on the device, in memory of another stream's, which is still writing them. CUDA only.

        The current stream waits for that, or the tensors carry the event.
        """
        side = self._chance.choice(self._sides)
        tensors: list[torch.Tensor] = []

        def move() -> None:
            for array in sample.inputs:
                staged = torch.from_numpy(array).pin_memory()
                tensors.append(staged.to(self._device, non_blocking=True))

        side.run(move)
        ready = side.record()
        if carried:
            for tensor in tensors:
                tensor._trt_ready_event = ready  # type: ignore[attr-defined]
        else:
            event: Any = ready
            torch.cuda.current_stream().wait_event(event)
        return tensors

    def _read(
        self, outputs: Callable[[], Sequence[torch.Tensor]], sample: Sample, side: Stream | None = None
    ) -> tuple[list[torch.Tensor], Event]:
        """Copies on the host of what is on the device, and the event after which they are there."""
        side = self._chance.choice(self._sides) if side is None else side
        copies = [torch.empty(array.shape, pin_memory=self._on_device) for array in sample.expected]

        def copy() -> None:
            for destination, source in zip(copies, outputs(), strict=True):
                destination.copy_(source, non_blocking=True)

        side.run(copy)
        return copies, side.record()

    def _check(self, got: Sequence[object], sample: Sample, what: str = "") -> None:
        self._counts["results checked"] += 1
        found = difference(got, sample)
        if found is not None:
            raise MismatchError(f"{self.name}, {self.doing}: {what}{found}")


async def _later(frames: Sequence[object]) -> AsyncIterator[object]:
    for frame in frames:
        await asyncio.sleep(0)
        yield frame
