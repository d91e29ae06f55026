"""Before and after a detector: against the obvious way to do it, and as a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from aiotrt.errors import InputError

HEIGHT, WIDTH = 45, 61


def outputs(seed: int = 0, masks: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.rand(1, 20, 4, generator=generator), torch.randn(1, 20, 7, generator=generator)]
    return [*found, torch.randn(1, 20, 9, 9, generator=generator)] if masks else found


def test_preprocess_is_resize_and_normalise() -> None:
    frame = torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8)
    image = frame.permute(2, 0, 1)[None] / 255
    resized = torch.nn.functional.interpolate(image, (24, 24), mode="bilinear", align_corners=False)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    got = video.Preprocess(24)(frame)
    assert torch.allclose(got, (resized - mean) / deviation, atol=1e-5)
    assert video.Preprocess(24, torch.float16)(frame).dtype is torch.float16


def test_postprocess_one_detection_at_a_time() -> None:
    boxes, logits, masks = outputs()
    found = video.detections(video.Postprocess(HEIGHT, WIDTH, top=10)(boxes, logits, masks), (HEIGHT, WIDTH), threshold=0)
    scores = logits.sigmoid()[0]
    expected = sorted(((float(scores[q, c]), q, c) for q in range(20) for c in range(7)), reverse=True)[:10]
    assert len(found) == 10
    for i, (score, query, number) in enumerate(expected):
        assert found.scores[i] == pytest.approx(score)
        assert found.classes[i] == number
        x, y, w, h = boxes[0, query].tolist()
        corners = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1) * (WIDTH, HEIGHT, WIDTH, HEIGHT)
        assert found.boxes[i] == pytest.approx(corners, abs=1e-3)
        mask = torch.nn.functional.interpolate(masks[:, [query]], (HEIGHT, WIDTH), mode="bilinear")[0, 0] > 0
        assert found.masks is not None
        assert np.array_equal(found.masks[i], mask.numpy())


def test_equal_scores_stay_in_their_order() -> None:
    boxes, logits, _ = outputs()
    found = video.Postprocess(HEIGHT, WIDTH, top=9)(boxes, torch.zeros_like(logits))
    assert found["classes"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_outputs_in_any_order_and_without_masks() -> None:
    boxes, logits, masks = outputs()
    after = video.Postprocess(HEIGHT, WIDTH, top=5)
    usual = after(boxes, logits, masks)
    other = after(masks, logits, boxes)
    assert all(torch.equal(usual[name], other[name]) for name in usual)
    assert "masks" not in after(boxes, logits)
    with pytest.raises(InputError, match="expected boxes"):
        after(boxes)


def test_the_threshold() -> None:
    results = video.Postprocess(HEIGHT, WIDTH, top=20)(*outputs())
    found = video.detections(results, (HEIGHT, WIDTH), threshold=0.8)
    assert 0 < len(found) < 20
    assert (found.scores >= 0.8).all()
    assert found.masks is not None
    assert len(found.boxes) == len(found.classes) == len(found.masks) == len(found)


@pytest.mark.asyncio
async def test_both_are_captured_with_the_network(device: str) -> None:
    kind = aiotrt.devices.open_device(device).torch_device

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = torch.nn.ParameterList([t.to(kind) for t in outputs()]).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(number * x.mean() for number in self.numbers)

    before, after = video.Preprocess(24), video.Postprocess(HEIGHT, WIDTH)
    frame = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    network: Any = Network()
    expected = after(*network(before(torch.from_numpy(frame).to(kind))))
    async with aiotrt.load(network, device=device, preprocess=before, postprocess=after, warmup=[frame]) as model:
        got = await model(frame)
        assert model.statistics().fallbacks == ()
    for name, tensor in expected.items():
        assert np.array_equal(got[name], tensor.cpu().numpy())
