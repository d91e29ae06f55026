"""Outside asyncio every entry point says what is missing, whatever ran in the process before, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video

PICTURE = np.zeros((2, 4, 3), np.uint8)


def add(x: torch.Tensor) -> torch.Tensor:
    return x + 1


async def enters() -> None:
    async with aiotrt.load(add, device="host"):
        pass


async def awaits() -> None:
    _ = await aiotrt.load(add, device="host")


async def waits() -> None:
    await aiotrt.wait(object())


async def opens_a_source() -> None:
    async with video.open([PICTURE], name="door"):
        pass


async def enters_a_pipeline() -> None:
    async with video.Pipeline(lambda frame: frame, [PICTURE], lambda result: None):  # type: ignore[arg-type, return-value]
        pass


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it as another library's loop would."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration:
        pass
    finally:
        coroutine.close()


USES: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    use.__name__: use for use in (enters, awaits, waits, opens_a_source, enters_a_pipeline)
}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("use", USES)  # by name, as laws are told apart
def test_it_says_that_asyncio_is_needed(use: str, before: bool) -> None:
    if before:
        asyncio.run(enters())
    with pytest.raises(aiotrt.UsageError, match=r"needs asyncio, and no asyncio event loop runs on this thread"):
        drive(USES[use]())
