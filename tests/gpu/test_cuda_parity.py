"""Bit for bit: a replay gives what the same program gives without a graph, over random inputs and changing shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch

import aiotrt

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio, pytest.mark.timeout(300)]


def resnet() -> torch.nn.Module:
    import torchvision

    network: torch.nn.Module = torchvision.models.resnet50(weights=None)
    return network.eval().cuda()


def vit() -> torch.nn.Module:
    import timm

    network: torch.nn.Module = timm.create_model("vit_small_patch16_224", pretrained=False)
    return network.eval().cuda()


class Dynamic(torch.nn.Module):
    """Every batch size is another program."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x).softmax(-1)
        return result


def dynamic() -> torch.nn.Module:
    return Dynamic().eval().cuda()


CASES: list[tuple[Callable[[], torch.nn.Module], list[tuple[int, ...]]]] = [
    (resnet, [(1, 3, 224, 224), (2, 3, 160, 192)]),
    (vit, [(1, 3, 224, 224), (3, 3, 224, 224)]),
    (dynamic, [(n, 64) for n in range(1, 9)]),
]


@pytest.mark.parametrize(("make", "shapes"), CASES, ids=["resnet50", "vit", "dynamic"])
@pytest.mark.parametrize("where", ["host", "device"])
async def test_graph_and_no_graph_are_bit_equal(
    make: Callable[[], torch.nn.Module], shapes: list[tuple[int, ...]], where: str
) -> None:
    network = make()
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(shapes[i % len(shapes)], np.float32) for i in range(200)]
    values: list[object] = list(inputs) if where == "host" else [torch.from_numpy(x).cuda() for x in inputs]
    async with (
        aiotrt.load(network, device="cuda", slots=3) as captured,
        aiotrt.load(network, device="cuda", slots=1, graphs=False) as plain,
    ):
        for start in range(0, 200, 20):
            chunk = values[start : start + 20]
            got = await asyncio.gather(*(captured(x) for x in chunk))
            for x, result in zip(chunk, got, strict=True):
                expected = await plain(x)
                if where == "host":
                    np.testing.assert_array_equal(result, expected)
                else:
                    assert torch.equal(result, expected)
        assert captured.statistics().fallbacks == ()
        assert plain.statistics().replays == 0
