"""Await work that aiotrt knows nothing about: somebody else's event, on somebody else's stream."""

from __future__ import annotations

import asyncio

import torch

import aiotrt
from aiotrt.devices import open_device


def submit() -> tuple[torch.Tensor, object]:
    """Some library's function: starts work on a stream of its own, and returns the result and an event after it."""
    if torch.cuda.is_available():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            matrix = torch.full((2048, 2048), 0.5, device="cuda")
            result = matrix @ matrix
            event = torch.cuda.Event()
            event.record()
        return result, event

    # With no GPU, a stream of the host device stands in: a thread that works in order.
    worker = open_device("host").stream()
    matrix = torch.full((512, 512), 0.5)
    result = torch.empty_like(matrix)
    worker.run(lambda: torch.mm(matrix, matrix, out=result))
    done = worker.record()
    worker.close()  # what was submitted still runs
    return result, done


async def main() -> None:
    result, event = submit()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    rest = asyncio.create_task(others())
    await aiotrt.wait(event)
    rest.cancel()
    print(f"done: every element is {result.unique().tolist()}")
    print(f"the loop was free while it ran: {turns} turns for others")


if __name__ == "__main__":
    aiotrt.run(main())
