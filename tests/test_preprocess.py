"""Ready-made preprocessing: against the reference libraries where they are installed, and against their formulas."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import aiotrt
from aiotrt.errors import InputError
from aiotrt.preprocess import CentreCrop, Letterbox, Resize, padded
from aiotrt.video import Preprocess

SIZES = [(480, 640), (640, 480), (1080, 1920), (37, 53), (640, 640), (300, 1), (1, 300), (333, 777)]
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def image(height: int, width: int, device: str = "cpu") -> torch.Tensor:
    random = torch.Generator().manual_seed(height * width)
    smooth = functional.interpolate(torch.rand(1, 3, 9, 9, generator=random), (height, width), mode="bicubic")[0]
    noise = torch.rand(3, height, width, generator=random)
    return ((smooth * 0.8 + noise * 0.2) * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().to(device)


def fit(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size and position of the image in Ultralytics' ``LetterBox`` of version 8, with ``auto=False``."""
    ratio = min(size / height, size / width)
    resized = round(height * ratio), round(width * ratio)
    down, right = (size - resized[0]) / 2, (size - resized[1]) / 2
    return resized, (round(down - 0.1), round(right - 0.1))


def linear(pixels: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """OpenCV's ``INTER_LINEAR``, without its rounding."""
    for axis, length in ((0, height), (1, width)):
        old = pixels.shape[axis]
        where = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        first = np.floor(where).astype(int)
        share = np.expand_dims(where - first, (1, 2) if axis == 0 else (0, 2))
        second = np.minimum(first + 1, old - 1)
        pixels = pixels.take(first, axis) * (1 - share) + pixels.take(second, axis) * share
    return pixels


def letterboxed(pixels: np.ndarray[Any, Any], resize: Callable[..., Any], size: int) -> np.ndarray[Any, Any]:
    (height, width), (top, left) = fit(pixels.shape[0], pixels.shape[1], size)
    found = np.full((size, size, 3), 114.0)
    found[top : top + height, left : left + width] = resize(pixels, height, width)
    return found.transpose(2, 0, 1)[None]


@pytest.mark.parametrize("shape", [size for size in SIZES if 1 not in size], ids=str)
@pytest.mark.parametrize("size", [640, 320])
def test_letterbox(shape: tuple[int, int], size: int) -> None:
    given = image(*shape)
    found = Letterbox(size)(given) * 255
    np.testing.assert_allclose(found.numpy(), letterboxed(given.numpy(), linear, size), atol=2e-3)


@pytest.mark.parametrize("shape", [size for size in SIZES if 1 not in size], ids=str)
def test_letterbox_of_opencv(shape: tuple[int, int]) -> None:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        pytest.skip("OpenCV is not installed")
    given = image(*shape)
    expected = letterboxed(given.numpy(), lambda p, h, w: cv2.resize(p, (w, h), interpolation=cv2.INTER_LINEAR), 640)
    difference = np.abs((Letterbox(640)(given) * 255).numpy() - expected)
    assert difference.max() <= 1.01
    assert difference.mean() < 0.3  # of its rounding


def test_boxes_of_a_letterbox() -> None:
    letterbox = Letterbox(640)
    size = torch.tensor([480, 800])
    (height, width), (top, left) = fit(480, 800, 640)
    boxes = torch.tensor([[left, top, left + width, top + height], [left - 9.0, 0, 320, 320]])
    found = letterbox.boxes(boxes, size)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 800, 480], [0, 0, 400, 240]]))


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("size", [560, 32])
def test_resize(shape: tuple[int, int], size: int) -> None:
    given = image(*shape)
    # As in RF-DETR's `predict`: to_tensor, resize of torchvision without antialiasing, and normalise.
    resized = functional.interpolate(given.permute(2, 0, 1)[None].float() / 255, (size, size), mode="bilinear")
    found = Resize(size)(given)
    torch.testing.assert_close(found, (resized - MEAN) / DEVIATION, atol=2e-3, rtol=0)
    torch.testing.assert_close(found, Preprocess(size)(given), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", SIZES[:5], ids=str)
def test_centre_crop(shape: tuple[int, int]) -> None:
    given = image(*shape)
    height, width = (256 * length // min(shape) for length in shape)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    planar = given.permute(2, 0, 1)[None].float()
    resized = functional.interpolate(planar, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255)
    expected = (resized[..., top : top + 224, left : left + 224] / 255 - MEAN) / DEVIATION
    assert_nearly_equal(CentreCrop()(given), expected)


@pytest.mark.parametrize("shape", SIZES[:5], ids=str)
def test_centre_crop_of_torchvision(shape: tuple[int, int]) -> None:
    try:
        presets = importlib.import_module("torchvision.transforms._presets")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision is not installed: {error}")
    given = image(*shape)
    expected = presets.ImageClassification(crop_size=224)(given.permute(2, 0, 1))[None]
    assert_nearly_equal(CentreCrop()(given), expected)


def assert_nearly_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for a few values that are rounded to the other side."""
    difference = (found - expected).abs() * 255 * DEVIATION
    assert difference.max() <= 1.01
    assert (difference > 0.5).float().mean() < 1e-2


FUNCTIONS: dict[str, Any] = {"letterbox": Letterbox(96), "resize": Resize(64), "centre crop": CentreCrop(64, 56)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_canvas_changes_nothing(name: str, shape: tuple[int, int], device: str) -> None:
    given = image(*shape, device="cuda" if device == "cuda" else "cpu")
    canvas, size = padded(given, 128)
    assert canvas.shape == (-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128, 3)
    outside = torch.ones(canvas.shape[:2], dtype=torch.bool)
    outside[: shape[0], : shape[1]] = False
    canvas[outside.to(canvas.device)] = 255
    function = FUNCTIONS[name]
    torch.testing.assert_close(function(canvas, size.to(canvas.device)), function(given), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.asyncio
async def test_one_graph_for_many_sizes(name: str, device: str) -> None:
    function = FUNCTIONS[name]
    network = torch.nn.Identity()
    place = "cuda" if device == "cuda" else "cpu"
    sizes = [(90, 120), (33, 60), (128, 128), (1, 1), (77, 100)]
    async with aiotrt.load(network, device=device, preprocess=function, slots=1) as model:
        for shape in sizes:
            given = image(*shape, device=place)
            found = await model(*padded(given, 128))
            torch.testing.assert_close(torch.as_tensor(found), function(given).to(found.dtype), atol=1e-3, rtol=0)
        statistics = model.statistics()
        assert statistics.captures == 1
        assert not statistics.fallbacks
        given = image(90, 120, device=place)
        alone = await model(given)  # a size of its own, as a function of one input
        torch.testing.assert_close(torch.as_tensor(alone), function(given), atol=1e-3, rtol=0)


def test_wrong_arguments() -> None:
    for make in (lambda: Letterbox(0), lambda: Resize(-1), lambda: CentreCrop(0), lambda: CentreCrop(200, 224)):
        with pytest.raises(InputError):
            make()
