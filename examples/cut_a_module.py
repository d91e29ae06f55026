"""Give `load` the part of a detector that a graph can hold, and run the rest without one."""

from __future__ import annotations

import torch

import aiotrt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Propose(torch.nn.Module):
    """The network: a box and a score for each cell of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = self.network(image).flatten(2).squeeze(0).T
        return cells[:, :4], cells[:, 4].sigmoid()


class Select(torch.nn.Module):
    """How many boxes are kept depends on their scores, so the CPU must see a value: no graph can hold this."""

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep = scores > 0.5
        return boxes[keep], scores[keep]


async def main() -> None:
    torch.manual_seed(0)
    propose, select = Propose().to(DEVICE), Select()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = select(*propose(image.to(DEVICE)))[0].cpu()

    # One call for both. The first is captured; the second runs after it on the same stream, submitted by a worker thread.
    async with aiotrt.load(propose, postprocess=select) as model:
        boxes, _ = await model(image)
        print(f"with postprocess=: {len(boxes)} of 64 boxes, as expected: {torch.allclose(boxes, expected)}")
        print(f"parts without a graph: {len(model.statistics().fallbacks)}")

    # Or the second on the CPU, where the results of host inputs come anyway. Then the whole call is one graph.
    async with aiotrt.load(propose) as model:
        boxes, _ = select(*await model(image))
        print(f"on the CPU: {len(boxes)} of 64 boxes, as expected: {torch.allclose(boxes, expected)}")
        print(f"parts without a graph: {len(model.statistics().fallbacks)}")


if __name__ == "__main__":
    aiotrt.run(main())
