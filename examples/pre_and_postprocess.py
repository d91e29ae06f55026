"""A camera frame in, detections out, in one replay: what stands around the network is captured with it."""

from __future__ import annotations

import numpy as np
import torch

import aiotrt


class SpotDetector(torch.nn.Module):
    """Scores each 16 by 16 cell by its brightness: (N, 3, H, W) to (N, 1, H/16, W/16)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.nn.Conv2d(3, 1, 16, stride=16, bias=False)
        torch.nn.init.constant_(self.pool.weight, 1 / (3 * 16 * 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.pool(images)
        return scores


def preprocess(frame: torch.Tensor) -> torch.Tensor:
    """HWC uint8, as cameras give it, to NCHW float32, as networks take it."""
    return frame.permute(2, 0, 1)[None].float() / 255


def postprocess(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three best cells, as boxes in pixels. The number is fixed, so the shapes are, and a graph can hold it."""
    best, index = scores.flatten().topk(3)
    corner = torch.stack([index % scores.shape[3], index // scores.shape[3]], dim=1) * 16
    return {"boxes": torch.cat([corner, corner + 16], dim=1), "scores": best}


async def main() -> None:
    network = SpotDetector().eval()
    if torch.cuda.is_available():
        network.cuda()
    frame = np.zeros((240, 320, 3), np.uint8)
    for x, y, brightness in ((32, 48, 255), (160, 96, 204), (288, 208, 153)):
        frame[y : y + 16, x : x + 16] = brightness

    async with aiotrt.load(network, preprocess=preprocess, postprocess=postprocess, warmup=[frame]) as model:
        found = await model(frame)
        for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
            print(f"a spot at {box}, score {score:.1f}")
        statistics = model.statistics()
        print(f"{statistics.completed} call, {statistics.replays} replay, fallbacks: {list(statistics.fallbacks)}")


if __name__ == "__main__":
    aiotrt.run(main())
