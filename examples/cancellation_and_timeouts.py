"""A deadline on a call: the caller is free at once, the device finishes what it has, and the model goes on."""

from __future__ import annotations

import asyncio
import time

import torch

import aiotrt

ON_CUDA = torch.cuda.is_available()


def slow(x: torch.Tensor) -> torch.Tensor:
    matrix = torch.eye(1024, device=x.device)
    for _ in range(2000 if ON_CUDA else 20):
        x = x @ matrix
    return x


async def main() -> None:
    x = torch.rand(1024, 1024)
    async with aiotrt.load(slow, device="auto", slots=1, warmup=[x]) as model:
        started = time.perf_counter()  # uvloop's own clock counts whole milliseconds
        try:
            async with asyncio.timeout(0.0005):
                await model(x)
        except TimeoutError:
            waited = time.perf_counter() - started
        else:
            raise SystemExit("this machine is faster than the deadline")
        statistics = model.statistics()
        print(f"gave up after {waited * 1e3:.1f} ms: {statistics.cancelled} cancelled, {statistics.draining} slot draining")

        # The one slot is free as soon as the device is done with the abandoned work; until then this call stands in line.
        y = await model(x)
        took = time.perf_counter() - started
        statistics = model.statistics()
        print(f"the next call got the right answer after {took * 1e3:.0f} ms: {torch.equal(x, y)}")
        print(f"{statistics.completed} completed, {statistics.failed} failed, {statistics.free} slot free: {model!r}")


if __name__ == "__main__":
    aiotrt.run(main())
