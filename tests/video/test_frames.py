"""A frame is an array to numpy, torch and models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt import video
from aiotrt.video.frames import Frame, Held

PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def frame() -> Frame:
    return Frame("door", 0, Held(PICTURE.copy()))


def test_numpy_reads_it_without_a_copy() -> None:
    one = frame()
    assert np.asarray(one) is one.image
    assert np.array(one) is not one.image
    assert one.shape == (2, 4, 3)
    assert one.dtype == np.dtype(np.uint8)
    assert np.array_equal(np.asarray(one, dtype=np.float32), PICTURE.astype(np.float32))
    with pytest.raises(ValueError, match="without a copy"):
        one.__array__(np.float32, copy=False)


def test_torch_reads_it_without_a_copy() -> None:
    one = frame()
    tensor = torch.utils.dlpack.from_dlpack(one)
    tensor[0, 0, 0] = 99
    assert one.image[0, 0, 0] == 99


@pytest.mark.asyncio
@pytest.mark.parametrize("batching", [None, aiotrt.Batching(max_size=2)])
async def test_a_model_takes_it_and_gives_arrays(batching: aiotrt.Batching | None) -> None:
    axes = (0, 1) if batching is None else (1, 2)
    expected = PICTURE.astype(np.float32).mean((0, 1))
    async with aiotrt.load(lambda x: x.float().mean(axes), device="host", batching=batching, signatures="fixed") as model:
        result = await model(frame())
        assert isinstance(result, np.ndarray)
        assert np.allclose(result, expected)
        assert [np.allclose(each, expected) async for each in model.map([frame(), frame()])] == [True, True]
        with pytest.raises(aiotrt.InputError, match="float32"):
            await model(PICTURE.astype(np.float32))


@pytest.mark.asyncio
async def test_an_array_that_raises_is_named() -> None:
    class Bad:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            raise OSError("the file is gone")

    async with aiotrt.load(lambda x: x + 1, device="host", warmup=np.zeros(3, np.float32)) as model:
        with pytest.raises(aiotrt.InputError, match="input 'x': Bad could not be read as an array: the file is gone"):
            await model(Bad())
        assert model.statistics().free == model.slots


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("item", "given"), [((PICTURE, 0.5), "ndarray, float"), ((0.5, PICTURE, 1), "float, ndarray, int"), ((), "")]
)
async def test_a_pair_in_another_order_is_named(item: tuple[object, ...], given: str) -> None:
    with pytest.raises(video.SourceError, match=rf"expected .*\(seconds, frame\), the time first; got a tuple \({given}\)"):
        async with video.open([item], name="door") as frames:
            async for _ in frames:
                pass


@pytest.mark.asyncio
async def test_a_pair_of_a_time_and_a_frame() -> None:
    items = [(0.25, PICTURE), (np.float32(0.5), PICTURE), (None, PICTURE), (float("nan"), PICTURE)]
    async with video.open(items) as frames:
        assert [frame.time async for frame in frames][:2] == [0.25, 0.5]


@pytest.mark.asyncio
async def test_an_array_whose_device_cannot_be_asked_is_an_input_error() -> None:
    class Lies:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            raise OSError("gone")

        def __dlpack__(self, **_: object) -> object:
            raise OSError("gone")

        def __dlpack_device__(self) -> tuple[int, int]:
            raise OSError("gone")

    async with aiotrt.load(lambda x: x + 1, device="host", warmup=np.zeros(3, np.float32)) as model:
        with pytest.raises(aiotrt.InputError, match="input 'x': Lies could not be read"):
            await model(Lies())


def test_a_frame_of_other_numbers_says_so() -> None:
    assert Frame("door", 0, Held(PICTURE.astype(np.float32))).dtype == np.dtype(np.float32)
