"""The demo's work for a GPU: a network, images for it, and what one image takes there."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any

import torch

import aiotrt
from benchmarks.measure import Spread

__all__ = ["Workload", "await_seconds", "difference", "graph_seconds", "is_available", "workload"]


@dataclass(frozen=True)
class Workload:
    """A network on the GPU, with random weights: what it computes does not matter here, only that it is work.

    Attributes:
        name: of the network.
        device: the GPU's name.
        network: in evaluation mode, on the GPU.
        example: one image there.
    """

    name: str
    device: str
    network: torch.nn.Module
    example: torch.Tensor

    def run(self, image: torch.Tensor) -> torch.Tensor:
        """What one does without aiotrt: host image in, host result out. Blocks until the GPU is done."""
        with torch.inference_mode():
            result: torch.Tensor = self.network(image.cuda())
            return result.cpu()

    def image(self, i: int) -> torch.Tensor:
        """Image number `i`, on the host."""
        return torch.rand(tuple(self.example.shape), generator=torch.Generator().manual_seed(i))


def is_available() -> bool:
    """Whether there is a GPU that torch can use."""
    return torch.cuda.is_available()


def workload() -> Workload:
    """ResNet-50 if torchvision is installed, else a small vision transformer of timm's, else a few convolutions."""
    torch.manual_seed(0)
    network: torch.nn.Module
    if (models := _module("torchvision.models")) is not None:
        name, network = "ResNet-50", models.resnet50(weights=None)
    elif (timm := _module("timm")) is not None:
        name, network = "ViT-Small (torchvision is not installed)", timm.create_model("vit_small_patch16_224")
    else:
        name, network = "Ten convolutions (neither torchvision nor timm is installed)", _convolutions()
    example = torch.rand((1, 3, 224, 224), device="cuda")
    return Workload(name, torch.cuda.get_device_name(), network.cuda().eval(), example)


async def graph_seconds(model: aiotrt.Model, example: torch.Tensor, launches: int = 50) -> float:
    """What the GPU itself takes for one replay: many back to back, between two of its own time stamps."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    async with model.lease([tuple(example.shape)]) as slot:
        slot.inputs[0][...] = example
        await slot.replay()
        begin.record()
        for _ in range(launches):
            slot.launch()  # the current stream waits for it, on the GPU
        end.record()
        await aiotrt.wait(end)
    return float(begin.elapsed_time(end)) / 1e3 / launches


async def await_seconds(model: aiotrt.Model, example: torch.Tensor, calls: int = 500) -> Spread:
    """What one coroutine sees that awaits one result after the other; the input is on the GPU already."""
    seconds = []
    for i in range(calls + 50):
        started = time.perf_counter()
        await model(example)
        if i >= 50:  # the first ones teach aiotrt how long it takes
            seconds.append(time.perf_counter() - started)
    return Spread.of(seconds)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two results."""
    return float((a - b).abs().max())


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _convolutions() -> torch.nn.Module:
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, 64, 7, stride=4)]
    for _ in range(9):
        layers += [torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
