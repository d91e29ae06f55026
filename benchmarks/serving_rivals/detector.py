"""A detector that one graph can run from pixels to boxes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

__all__ = ["Detector"]


class Detector(nn.Module):
    """torchvision's RetinaNet with ResNet-50, with random weights; its best anchors without suppression of overlaps.

    Args:
        size: pixels of a side of its square images.
        count: how many boxes it finds in each image.

    Raises:
        ImportError: torchvision is not installed.
    """

    anchors: torch.Tensor

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        # Imported by name: the type checker need not know it.
        network: Any = importlib.import_module("torchvision.models.detection").retinanet_resnet50_fpn(
            weights=None, weights_backbone=None
        )
        listed: Any = importlib.import_module("torchvision.models.detection.image_list").ImageList
        self.count = count
        self.backbone, self.head = network.backbone, network.head
        images = torch.zeros(1, 3, size, size)
        with torch.no_grad():
            features = list(self.backbone.eval()(images).values())
        (anchors,) = network.anchor_generator(listed(images, [(size, size)]), features)
        self.register_buffer("anchors", anchors)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """From images (n, 3, size, size) to (n, count, 6): score, class, and two corners in pixels; best first."""
        found = self.head(list(self.backbone(images).values()))
        logits, classes = found["cls_logits"].max(-1)
        best, at = logits.topk(self.count)
        low, high = self.anchors[at].split(2, -1)
        shift, growth = found["bbox_regression"].gather(1, at[..., None].expand(-1, -1, 4)).split(2, -1)
        centre = (low + high) / 2 + shift * (high - low)
        half = growth.clamp(max=4).exp() * (high - low) / 2
        facts = [best.sigmoid()[..., None], classes.gather(1, at)[..., None].to(best.dtype), centre - half, centre + half]
        return torch.cat(facts, -1)
