"""What comes back: in the kind that went in, and the caller's own for ever."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pytest
import torch

import aiotrt
from tests.tools import Affine, TwoOutputs, frame, held, turns


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def as_array(result: np.ndarray[Any, Any] | torch.Tensor) -> np.ndarray[Any, Any]:
    return result if isinstance(result, np.ndarray) else result.cpu().numpy()


# Kinds...


@pytest.mark.asyncio
async def test_results_are_of_the_kind_that_went_in(device: str) -> None:
    x = frame(2)
    on_host, on_device = torch.from_numpy(x), torch.from_numpy(x).to(place(device))
    async with aiotrt.load(TwoOutputs(), device=device) as model:
        for a, b, kind, where in (
            (x, x, np.ndarray, None),
            (on_host, on_host, torch.Tensor, on_host.device),
            (on_device, on_device, torch.Tensor, on_device.device),
            (x, on_host, torch.Tensor, on_host.device),  # of two kinds, the one nearer to the device
            (on_host, on_device, torch.Tensor, on_device.device),
            (x, on_device, torch.Tensor, on_device.device),
        ):
            for result in await model(a, b):
                assert isinstance(result, kind)
                if isinstance(result, torch.Tensor):
                    assert result.device == where
                np.testing.assert_array_equal(as_array(result), x * 2)


class _Kept(torch.nn.Module):
    """Returns a parameter, which has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.add_(x)
        return self.weight


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.complex(x, x + 1).conj(), [1 - 2j, 2 - 3j, 3 - 4j]),
        (lambda x: torch.complex(x, x + 1).conj().imag, [-2.0, -3.0, -4.0]),
        (lambda x: x.to(torch.bfloat16), [1.0, 2.0, 3.0]),
        (lambda x: x.flip(0), [3.0, 2.0, 1.0]),
        (lambda x: x.repeat(3000)[-3:], [1.0, 2.0, 3.0]),
        (lambda x: x > 1, [False, True, True]),
        (lambda x: x, [1.0, 2.0, 3.0]),
    ],
    ids=["conj", "neg", "bfloat16", "strided", "part", "bool", "input"],
)
async def test_small_results_of_every_kind_are_right(device: str, function: Any, expected: list[Any]) -> None:
    x = np.asarray([1, 2, 3], np.float32)
    async with aiotrt.load(function, device=device, slots=1) as model:
        for _ in range(3):
            assert (await model(x)).tolist() == expected


@pytest.mark.asyncio
async def test_a_result_with_a_gradient_is_copied() -> None:
    async with aiotrt.load(_Kept(), device="host", slots=1) as model:
        first, second = [await model(np.ones(3, np.float32)) for _ in range(2)]
    assert (second - first).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.asyncio
@pytest.mark.parametrize("outputs", ["torch", "device"])
async def test_another_tasks_inference_mode_is_not_that_of_the_results(
    device: str, outputs: Literal["torch", "device"]
) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, outputs=outputs, warmup=frame(0)) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            with torch.inference_mode():  # of this task, which waits inside: the mode is the thread's
                also = asyncio.ensure_future(model(frame(2)))
                await turns()
                latch.open()
                await call
                results = [call.result(), await also, await model(frame(3))]
        for value, result in enumerate(results, start=1):
            result += 1
            np.testing.assert_array_equal(as_array(result), frame(3 * value + 2))


@pytest.mark.asyncio
@pytest.mark.parametrize("outputs", ["numpy", "torch", "device"])
async def test_outputs_overrides_the_kind(device: str, outputs: Literal["numpy", "torch", "device"]) -> None:
    x = frame(2)
    async with aiotrt.load(Affine(), device=device, outputs=outputs) as model:
        for value in (x, torch.from_numpy(x), torch.from_numpy(x).to(place(device))):
            result = await model(value)
            if outputs == "numpy":
                assert isinstance(result, np.ndarray)
            else:
                assert isinstance(result, torch.Tensor)
                assert result.device.type == (place(device).type if outputs == "device" else "cpu")
            np.testing.assert_array_equal(as_array(result), x * 3 + 1)


@pytest.mark.asyncio
async def test_results_have_the_structure_that_the_module_returns(device: str) -> None:
    x = frame(2)
    async with aiotrt.load(TwoOutputs(), device=device) as model:
        total, product = result = await model(x, x + 1)
        assert result._fields == ("total", "product")
        assert result.total is total
        assert result.product is product
    async with aiotrt.load(halves, device=device) as model:
        pair: Any = await model(x)
        assert type(pair) is tuple
        assert [type(part) for part in pair] == [np.ndarray, np.ndarray]


@pytest.mark.asyncio
async def test_bfloat16_comes_to_numpy_as_float32(device: str) -> None:
    x = np.array([[1.0, 1 / 3, -0.0], [np.inf, 1e30, 65536.0]], np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16)
    async with aiotrt.load(to_bfloat16, device=device) as model:
        result = await model(x)
        assert result.dtype == np.float32
        assert result.tobytes() == expected.float().numpy().tobytes()
        tensor = await model(torch.from_numpy(x))
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, expected)


def to_complex32(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, 2 * x).to(torch.complex32)


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
async def test_complex32_comes_to_numpy_as_complex64(device: str) -> None:
    x = frame(3)
    async with aiotrt.load(to_complex32, device=device) as model:
        result = await model(x)
        assert result.dtype == np.complex64
        np.testing.assert_array_equal(result, x + 2j * x)


@pytest.mark.asyncio
async def test_bfloat16_goes_in_from_tensors_only(device: str) -> None:
    x = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    async with aiotrt.load(Affine(), device=device, outputs="numpy", warmup=[x], signatures="fixed") as model:
        result = await model(x)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, (x * 3 + 1).float().numpy())
        with pytest.raises(aiotrt.InputError, match=r"input 'x': expected x: bfloat16 \(\*, \*\), got dtype float32"):
            await model(x.float().numpy())


# Whose they are...


def variants(device: str) -> list[Any]:
    x = frame(2)
    return [x, torch.from_numpy(x), torch.from_numpy(x).to(place(device)), frame(2, (1024, 512))]


@pytest.mark.asyncio
@pytest.mark.parametrize("variant", range(4), ids=["array", "tensor", "device tensor", "large array"])
async def test_writing_to_a_result_changes_nothing_else(device: str, variant: int) -> None:
    x = variants(device)[variant]
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        first = await model(x)
        second = await model(x)
        first[...] = -1
        assert (as_array(second) == 7).all()
        assert (as_array(await model(x)) == 7).all()
        assert (as_array(first) == -1).all()
        assert (as_array(x) == 2).all()
    assert (as_array(second) == 7).all()  # and they outlive the model


@pytest.mark.asyncio
@pytest.mark.parametrize("variant", range(4), ids=["array", "tensor", "device tensor", "large array"])
async def test_writing_to_an_input_after_the_call_changes_nothing(device: str, variant: int) -> None:
    x = variants(device)[variant]
    async with aiotrt.load(lambda x: x, device=device, slots=1) as model:  # an alias of the input, if anything is
        result = await model(x)
        x[...] = -1
        assert (as_array(result) == 2).all()
        other = await model(x)
        result[...] = 5
        assert (as_array(other) == -1).all()
        assert (as_array(x) == -1).all()


@pytest.mark.asyncio
async def test_results_kept_from_many_calls_are_all_different(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=3) as model:
        results = await asyncio.gather(*(model(frame(i)) for i in range(50)))
        results += [await model(frame(i)) for i in range(50, 60)]
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, frame(i) * 3 + 1)
        assert len({result.__array_interface__["data"][0] for result in results}) == 60


@pytest.mark.asyncio
async def test_two_outputs_that_are_one_tensor_are_two_results(device: str) -> None:
    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y

    for x in (frame(2), torch.from_numpy(frame(2)).to(place(device))):
        async with aiotrt.load(twice, device=device) as model:
            a, b = await model(x)
            a[...] = -1
            assert (as_array(b) == 3).all()


@pytest.mark.asyncio
async def test_a_result_needs_no_gradient(device: str) -> None:
    linear = torch.nn.Linear(3, 2).to(place(device))
    async with aiotrt.load(linear, device=device) as model:
        result = await model(torch.ones(2, 3, device=place(device)))
        assert not result.requires_grad
        result[...] = 0
        assert linear.weight.grad is None
