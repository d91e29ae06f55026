"""What the checks share: the open model, its cases, inputs with known results, and how results are compared."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch

from aiotrt.devices import Device
from aiotrt.model import Model
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.programs import Program
from aiotrt.selftest.cases import Case, Range, random_inputs
from aiotrt.selftest.report import CheckFailed
from aiotrt.tensors import take_apart

__all__ = ["Bench", "Options", "Sample", "Tensors", "as_tensors", "compare", "digest", "together", "within"]

T = TypeVar("T")
Tensors = tuple[torch.Tensor, ...]

#: Seconds that a call may take where nothing holds it. A program that hangs is a check that failed.
PATIENCE: Final = 60.0
#: Inputs with known results, over all cases; their memory is held until the end.
SAMPLES: Final = 16


@dataclass(frozen=True)
class Options:
    """What to verify, and how thoroughly.

    Attributes:
        file: the engine or ONNX file.
        device: as for `aiotrt.load`.
        slots: likewise.
        runtime: likewise.
        sha256: likewise.
        allow_host_code: likewise.
        shapes: by input, the shapes to verify at; empty for those of the engine's profiles.
        ranges: by input, the values to draw from.
        inputs: random inputs per case.
        seed: of the random inputs.
        replays: how many the endurance check makes.
        cancellations: how many calls are cancelled.
        duration: seconds to measure for.
        tolerance: how far results may be apart, as a share of the output's largest value, where the engine does not
            repeat itself.
        require_graph: whether running without a graph is a failure.
    """

    file: Path
    device: str = "auto"
    slots: int = 2
    runtime: Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"] | None = None
    sha256: str | None = None
    allow_host_code: bool = False
    shapes: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    inputs: int = 8
    seed: int = 0
    replays: int = 10_000
    cancellations: int = 200
    duration: float = 3.0
    tolerance: float = 0.01
    require_graph: bool = False


@dataclass(frozen=True)
class Sample:
    """Inputs, and what the model gives for them when nothing else runs.

    Attributes:
        case: whose shapes they have.
        inputs: on the host.
        expected: likewise.
    """

    case: Case
    inputs: Tensors
    expected: Tensors


class Bench:
    """One open model under examination.

    Args:
        model: open, with graphs.
        plain: opens the same model without graphs, with one slot.
        cases: the shapes to verify at.
        usual: the one among them to measure with.
        options: how thoroughly.
        progress: is told how far the present check is, 0 to 1.

    Attributes:
        loose: the outputs in which the engine does not repeat itself, by index: found by the parity check.
    """

    def __init__(
        self,
        model: Model,
        plain: Callable[[], Model],
        cases: Sequence[Case],
        usual: Case,
        options: Options,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        assert model._executor is not None
        self.model = model
        self.plain = plain
        self.cases = cases
        self.usual = usual
        self.options = options
        self.progress = progress
        self.executor: Executor = model._executor
        self.device: Device = self.executor.device
        self.loose: set[int] = set()
        self._samples: list[Sample] = []

    def inputs(self, case: Case, number: int) -> Tensors:
        """Random inputs; the same for the same case, number and seed."""
        seed = self.options.seed * 1_000_003 + self.cases.index(case) * 10_007 + number
        return random_inputs(case, self.options.ranges, seed)

    async def samples(self) -> list[Sample]:
        """Some inputs of every case, with their results, got one at a time."""
        if not self._samples:
            for case in self.cases:
                for number in range(max(2, SAMPLES // len(self.cases))):
                    inputs = self.inputs(case, number)
                    results = as_tensors(await within(self.model(*inputs), "a call"))
                    expected = tuple(tensor.clone() for tensor in results)  # results that change later must not change this
                    self._samples.append(Sample(case, inputs, expected))
        return self._samples

    async def pair(self) -> tuple[Sample, Sample]:
        """Two samples of the usual case, with different results where there are such."""
        first, *others = [sample for sample in await self.samples() if sample.case is self.usual]
        return first, next((s for s in others if digest(s.expected) != digest(first.expected)), others[0])

    def programs(self, case: Case) -> list[Program]:
        """What the slots run for it."""
        return list(self.executor.cache.holders((case.shapes, (), self.executor.specs.known())).values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs' names."""
        return self.programs(self.usual)[0].names.names

    # Comparing...

    def check(self, got: object, sample: Sample, what: str) -> None:
        """Compare results, on the host, with a sample's.

        Raises:
            CheckFailed: they differ; the message begins with `what`.
        """
        difference = self.difference(as_tensors(got), sample.expected)
        if difference is not None:
            other = next((s for s in self._samples if s is not sample and self._is(got, s)), None)
            owner = "; they are the results of another call's inputs" if other is not None else ""
            raise CheckFailed(f"{what} ({sample.case}): {difference}{owner}")

    def difference(self, got: Tensors, expected: Tensors) -> str | None:
        """How results differ, bit for bit, or beyond the tolerance where the engine does not repeat itself."""
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            difference = compare(a, b, self.options.tolerance if i in self.loose else None)
            if difference is not None:
                return f"output {self.outputs[i]!r} {difference}"
        return None

    def _is(self, got: object, sample: Sample) -> bool:
        mine = as_tensors(got)
        return all(a.shape == b.shape for a, b in zip(mine, sample.expected, strict=True)) and (
            self.difference(mine, sample.expected) is None
        )

    # To the device and back...

    async def on_device(self, tensors: Tensors) -> Tensors:
        """Copies on the device, complete."""

        def copy() -> Tensors:
            staged = [self._pinned(tensor).copy_(tensor) for tensor in tensors]
            moved = tuple(self.device.empty(tensor.shape, tensor.dtype) for tensor in tensors)
            self._copy(moved, staged)
            return moved

        return await asyncio.to_thread(copy)

    async def on_host(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Copies on the host of device tensors that are complete."""

        def copy() -> Tensors:
            staged = tuple(self._pinned(tensor) for tensor in tensors)
            self._copy(staged, tensors)
            return staged

        return await asyncio.to_thread(copy)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.device.pinned(tensor.shape, tensor.dtype)

    def _copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self.device.prepare_thread()
        stream = self.device.stream()
        # What was allocated just now may have been somebody's before, in the current stream's order.
        stream.wait(self.device.current_stream().record())
        for destination, source in zip(destinations, sources, strict=True):
            stream.copy(destination, source)
        stream.synchronize()
        stream.close()

    # Calls...

    @contextlib.asynccontextmanager
    async def started(self, inputs: Sequence[Tensors]) -> AsyncIterator[list[asyncio.Task[Any]]]:
        """Calls under way; those that are not done at the end of the block are cancelled."""
        calls = [asyncio.create_task(self.model(*values)) for values in inputs]
        try:
            yield calls
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run several at once, and return what they return; the first error ends the others too."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(awaitable: Awaitable[T], what: str, expected: float = 0.0) -> T:
    """Wait, but not for ever.

    Raises:
        CheckFailed: it took `PATIENCE` seconds more than the `expected` ones.
    """
    limit = expected + PATIENCE
    try:
        async with asyncio.timeout(limit):
            return await awaitable
    except TimeoutError as error:
        raise CheckFailed(f"{what} was not done after {limit:g} s") from error


def as_tensors(results: object) -> Tensors:
    """What a call returned, as a plain tuple."""
    return tuple(take_apart(results)[1])


def digest(tensors: Tensors) -> bytes:
    """Tells results apart, bit for bit."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(_bytes(tensor).numpy().tobytes())
    return sha.digest()


def compare(got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> str | None:
    """How two host tensors differ; None where they do not.

    Args:
        got: one.
        expected: the other.
        tolerance: as a share of the largest value in `expected`; None for bit for bit.
    """
    if got.dtype is not expected.dtype or got.shape != expected.shape:
        return f"is {_kind(got)}, expected {_kind(expected)}"
    differ = (_bytes(got) != _bytes(expected)).any(1)
    count = int(differ.sum())
    if count == 0:
        return None
    a, b = (_wide(tensor).flatten() for tensor in (got, expected))
    distance = float((a - b).abs().nan_to_num(nan=0.0).max())
    largest = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    odd = int(((a.isfinite() != b.isfinite()) | (a.isnan() != b.isnan())).sum())
    if tolerance is not None and distance <= tolerance * largest and odd == 0:
        return None
    beyond = "" if tolerance is None else f", which is beyond the tolerance of {tolerance:g} times {largest:.4g}"
    return f"differs in {count:,} of {len(differ):,} elements, by up to {distance:.4g}{beyond}"


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A row of bytes for each element."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).double()  # float8 goes to float32 only
