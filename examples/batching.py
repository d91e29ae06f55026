"""Dynamic batching: single items in, single results out; whoever waits when the device becomes free shares a batch."""

from __future__ import annotations

import asyncio

import numpy as np
import torch

import aiotrt

ON_CUDA = torch.cuda.is_available()


async def main() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10),
    ).eval()  # fmt: skip
    if ON_CUDA:
        network.cuda()
    images = np.random.default_rng(0).standard_normal((100, 3, 64, 64), np.float32)  # an item has no batch axis

    options = aiotrt.Batching(max_size=16, overload="drop_oldest")
    async with aiotrt.load(network, slots=1, max_queue=64, batching=options, warmup=[images[0]]) as model:
        # A hundred callers at once, and room for 64: the oldest make way.
        results = await asyncio.gather(*map(model, images), return_exceptions=True)
        served = {i: result for i, result in enumerate(results) if isinstance(result, np.ndarray)}
        dropped = sum(isinstance(result, aiotrt.QueueFullError) for result in results)
        print(f"{len(served)} served, {dropped} made way for newer ones")

        with torch.no_grad():
            expected = network(torch.from_numpy(images).to("cuda" if ON_CUDA else "cpu")).cpu().numpy()
        same = all(np.allclose(result, expected[i], atol=1e-2) for i, result in served.items())
        print(f"each got its own {served[99].shape} array: {same}")

        # An urgent call, and one whose time is up before the device sees it.
        label = await model(images[0], priority=0, deadline=10.0)
        try:
            await model(images[1], deadline=0.0)
        except aiotrt.DeadlineError:
            print(f"urgent: class {label.argmax()}; too late: dropped")

        statistics = model.statistics()
        print(f"batches by size: {dict(statistics.batches)}, {statistics.padding} rows of padding")


if __name__ == "__main__":
    aiotrt.run(main())
