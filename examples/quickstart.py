"""Many coroutines await one model; the event loop never blocks."""

from __future__ import annotations

import asyncio

import numpy as np
import torch

import aiotrt


async def heartbeat(beats: list[float]) -> None:
    """The rest of the program: notes the time at every turn that the loop gives it."""
    while True:
        beats.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)


async def main() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).eval()
    if torch.cuda.is_available():
        network.cuda()
    images = np.random.default_rng(0).random((64, 1, 3, 64, 64), np.float32)

    async with aiotrt.load(network, device="auto", slots=2, warmup=[images[0]]) as model:
        beats: list[float] = []
        rest = asyncio.create_task(heartbeat(beats))
        scores = await asyncio.gather(*(model(image) for image in images))
        rest.cancel()

        with torch.no_grad():
            expected = network(torch.from_numpy(images[7]).to(next(network.parameters()).device)).cpu().numpy()
        statistics = model.statistics()
        print(f"{len(scores)} coroutines awaited one model on {statistics.device}, each got its own {scores[7].shape} array")
        print(f"same numbers as the module itself: {np.allclose(scores[7], expected, atol=1e-5)}")
        print(f"the event loop took {len(beats)} turns for others meanwhile")


if __name__ == "__main__":
    aiotrt.run(main())
