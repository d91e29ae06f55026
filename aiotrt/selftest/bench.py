"""Objects shared by the checks: the open model, its cases, inputs with known results, and comparison of results."""

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

#: Seconds that a call may take if nothing holds it. A longer call fails its check.
CALL_TIMEOUT: Final = 60.0
#: The number of samples, over all cases; their memory is held until the end.
SAMPLES: Final = 16


@dataclass(frozen=True)
class Options:
    """The engine to verify, and the thoroughness of the checks.

    Attributes:
        file: the engine or ONNX file.
        device: as for `aiotrt.load`.
        slots: as for `aiotrt.load`.
        runtime: as for `aiotrt.load`.
        sha256: as for `aiotrt.load`.
        allow_host_code: as for `aiotrt.load`.
        shapes: the shapes to verify at, by input; empty for those of the engine's profiles.
        ranges: the smallest and largest random value, by input.
        inputs: the number of random inputs for each case.
        seed: of the random inputs.
        replays: the number of replays in the endurance check.
        cancellations: the number of calls to cancel.
        duration: seconds for the latency measurement.
        tolerance: the allowed difference of results, as a share of the output's largest value, for outputs in which the
            engine is not deterministic.
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
    """Inputs, and the model's results for them when nothing else runs.

    Attributes:
        case: the case to whose shapes they belong.
        inputs: tensors in host memory.
        expected: the results, in host memory.
    """

    case: Case
    inputs: Tensors
    expected: Tensors


class Bench:
    """The open model under test, with its cases and samples.

    Args:
        model: open, with graphs.
        plain: creates the same model without graphs, with one slot.
        cases: the shapes to verify at.
        usual: the case to measure with.
        options: of the verification.
        progress: called with the progress of the present check, from 0 to 1.

    Attributes:
        nondeterministic: indices of the outputs in which the engine is not deterministic; set by the parity check.
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
        self.nondeterministic: set[int] = set()
        self._samples: list[Sample] = []

    def inputs(self, case: Case, number: int) -> Tensors:
        """Return random inputs, which depend only on the case, the number and the seed."""
        seed = self.options.seed * 1_000_003 + self.cases.index(case) * 10_007 + number
        return random_inputs(case, self.options.ranges, seed)

    async def samples(self) -> list[Sample]:
        """Return some inputs of every case, with their results from sequential calls."""
        if not self._samples:
            for case in self.cases:
                for number in range(max(2, SAMPLES // len(self.cases))):
                    inputs = self.inputs(case, number)
                    results = as_tensors(await within(self.model(*inputs), "a call"))
                    expected = tuple(
                        tensor.clone() for tensor in results
                    )  # a copy, which a later overwrite of the results does not change
                    self._samples.append(Sample(case, inputs, expected))
        return self._samples

    async def pair(self) -> tuple[Sample, Sample]:
        """Return two samples of the usual case, with different results if there are any."""
        first, *others = [sample for sample in await self.samples() if sample.case is self.usual]
        return first, next((s for s in others if digest(s.expected) != digest(first.expected)), others[0])

    def programs(self, case: Case) -> list[Program]:
        """Return the programs that the slots run for a case."""
        return list(self.executor.cache.holders((case.shapes, (), self.executor.specs.known())).values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.programs(self.usual)[0].names.names

    # Comparison

    def check(self, got: object, sample: Sample, what: str) -> None:
        """Compare results in host memory with those of a sample.

        Raises:
            CheckFailed: they differ; the message begins with `what`.
        """
        difference = self.difference(as_tensors(got), sample.expected)
        if difference is not None:
            other = next((s for s in self._samples if s is not sample and self._is(got, s)), None)
            owner = "; they are the results of another call's inputs" if other is not None else ""
            raise CheckFailed(f"{what} ({sample.case}): {difference}{owner}")

    def difference(self, got: Tensors, expected: Tensors) -> str | None:
        """Describe the first difference: bit for bit, or beyond the tolerance where the engine is not deterministic."""
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            difference = compare(a, b, self.options.tolerance if i in self.nondeterministic else None)
            if difference is not None:
                return f"output {self.outputs[i]!r} {difference}"
        return None

    def _is(self, got: object, sample: Sample) -> bool:
        mine = as_tensors(got)
        return all(a.shape == b.shape for a, b in zip(mine, sample.expected, strict=True)) and (
            self.difference(mine, sample.expected) is None
        )

    # Copies to the device and back

    async def on_device(self, tensors: Tensors) -> Tensors:
        """Copy tensors to the device, and wait for the copies."""

        def copy() -> Tensors:
            staged = [self._pinned(tensor).copy_(tensor) for tensor in tensors]
            moved = tuple(self.device.empty(tensor.shape, tensor.dtype) for tensor in tensors)
            self._copy(moved, staged)
            return moved

        return await asyncio.to_thread(copy)

    async def on_host(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Copy complete device tensors to host memory, and wait for the copies."""

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
        # The allocator may reuse memory whose last use is still pending on the current stream.
        stream.wait(self.device.current_stream().record())
        for destination, source in zip(destinations, sources, strict=True):
            stream.copy(destination, source)
        stream.synchronize()
        stream.close()

    # Calls

    @contextlib.asynccontextmanager
    async def started(self, inputs: Sequence[Tensors]) -> AsyncIterator[list[asyncio.Task[Any]]]:
        """Start calls; those that are not done at the end of the block are cancelled."""
        calls = [asyncio.create_task(self.model(*values)) for values in inputs]
        try:
            yield calls
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently, and return their results; the first error cancels the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(awaitable: Awaitable[T], what: str, expected: float = 0.0) -> T:
    """Wait with a timeout.

    Raises:
        CheckFailed: the operation took more than `expected` + `CALL_TIMEOUT` seconds; it is cancelled.
    """
    limit = expected + CALL_TIMEOUT
    try:
        async with asyncio.timeout(limit):
            return await awaitable
    except TimeoutError as error:
        raise CheckFailed(f"{what} was not done after {limit:g} s") from error


def as_tensors(results: object) -> Tensors:
    """Return the tensors in a call's results as a flat tuple."""
    return tuple(take_apart(results)[1])


def digest(tensors: Tensors) -> bytes:
    """Hash results; results that differ in any bit have different digests."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(_bytes(tensor).numpy().tobytes())
    return sha.digest()


def compare(got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> str | None:
    """Describe the difference of two host tensors; None if there is none.

    Args:
        got: the result.
        expected: the tensor to compare with.
        tolerance: as a share of the largest value in `expected`; None to compare bit for bit.
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
    beyond = "" if tolerance is None else f", more than the tolerance of {tolerance:g} times {largest:.4g}"
    return f"differs in {count:,} of {len(differ):,} elements, by up to {distance:.4g}{beyond}"


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a row of bytes for each element."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).double()  # float8 can only be converted to float32
