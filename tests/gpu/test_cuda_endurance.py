"""Nothing grows: device memory and resident memory over 100,000 awaits, 10,000 cancellations and changing shapes."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path

import pytest
import torch

import aiotrt
from tests.tools import Affine, frame, turns

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio, pytest.mark.timeout(300)]


def resident() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def test_memory_is_flat() -> None:
    chance = random.Random(0)
    shapes = [(2, 3), (4, 3), (8, 3)]
    async with aiotrt.load(
        Affine(), device="cuda", slots=4, max_queue=None, warmup=[frame(0, shape) for shape in shapes]
    ) as model:

        async def worker(n: int) -> None:
            for i in range(n):
                result = await model(frame(i % 1000, chance.choice(shapes)))
                assert result[0, 0] == 3 * (i % 1000) + 1

        async def cancelled(n: int) -> None:
            for i in range(n):
                task = asyncio.ensure_future(model(frame(i, chance.choice(shapes))))
                await turns(chance.choice([0, 1, 2, 5]))
                task.cancel()
                await asyncio.wait([task])

        async def round_of(awaits: int, cancellations: int) -> tuple[int, int]:
            await asyncio.gather(*(worker(awaits // 50) for _ in range(50)), cancelled(cancellations))
            gc.collect()
            return torch.cuda.memory_allocated(), resident()

        await round_of(10_000, 1_000)
        device_before, host_before = await round_of(1_000, 100)
        device_after, host_after = await round_of(100_000, 10_000)
        assert device_after == device_before
        assert host_after - host_before < 16 << 20
