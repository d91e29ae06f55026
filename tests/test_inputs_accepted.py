"""Inputs that a model must take as they are, however they lie in memory, and answer bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.tensors import numpy_view
from tests.tools import Affine, count

Array = np.ndarray[Any, np.dtype[Any]]

MEBIBYTE = 1 << 20


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


def as_kind(kind: str, array: Array, device: str) -> Array | torch.Tensor:
    if kind == "array":
        return array
    if kind == "strided array":
        return array[::-1, ::2]
    tensor: torch.Tensor = torch.from_numpy(array)
    return tensor.to(place(device)) if kind == "device tensor" else tensor


def identity(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def raw(value: Array | torch.Tensor) -> bytes:
    if isinstance(value, torch.Tensor):
        value = numpy_view(value.cpu().contiguous())
    return value.tobytes()


def assert_bit_equal(got: Array | torch.Tensor, expected: Array | torch.Tensor, case: str = "") -> None:
    assert type(got) is type(expected), case
    assert got.shape == expected.shape, case
    assert got.dtype == expected.dtype, case
    assert raw(got) == raw(expected), case


BASE = np.arange(96, dtype=np.float32).reshape(4, 6, 4)

ARRAYS: dict[str, Callable[[], Array]] = {
    "contiguous": lambda: BASE,
    "transposed": lambda: BASE.transpose(2, 0, 1),
    "Fortran order": lambda: np.asfortranarray(BASE),
    "every second": lambda: BASE[::2, 1::2],
    "negative strides": lambda: BASE[::-1, :, ::-1],
    "broadcast": lambda: np.broadcast_to(BASE[0, 0], (3, 5, 4)),
    "unaligned": lambda: np.frombuffer(b"\x00" + BASE.tobytes(), np.float32, offset=1).reshape(BASE.shape),
    "one element": lambda: BASE[:1, :1, :1],
    "subclass": lambda: np.rec.array(BASE),
}

TENSORS: dict[str, Callable[[torch.device], torch.Tensor]] = {
    "contiguous": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4),
    "transposed": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4).mT,
    "permuted": lambda at: torch.arange(96.0, device=at).view(2, 4, 4, 3).permute(0, 3, 1, 2),
    "channels last": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "every second": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4)[:, :, ::2, 1::2],
    "expanded": lambda at: torch.arange(4.0, device=at).expand(2, 3, 4, 4),
    "requires grad": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4).requires_grad_(),
    "not a leaf": lambda at: torch.arange(96.0, device=at).view(2, 3, 4, 4).requires_grad_() * 2,
    "parameter": lambda at: torch.nn.Parameter(torch.arange(96.0, device=at).view(2, 3, 4, 4)),
    "negative bit": lambda at: torch.complex(*2 * [torch.arange(96.0, device=at).view(2, 3, 4, 4)]).conj().imag,
    "offset": lambda at: torch.arange(97.0, device=at)[1:].view(2, 3, 4, 4),
}


@pytest.mark.asyncio
async def test_arrays_of_any_layout(device: str) -> None:
    for case, make in ARRAYS.items():
        x = make()
        async with aiotrt.load(Affine(), device=device) as model:
            for _ in range(2):
                result = await model(x)
                assert_bit_equal(result, np.ascontiguousarray(x).view(np.ndarray) * 3 + 1, case)
                assert result.flags.c_contiguous, case
            assert count(model, State.FREE) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["same", "host"])
async def test_tensors_of_any_layout(device: str, where: str) -> None:
    for case, make in TENSORS.items():
        x = make(place(device) if where == "same" else torch.device("cpu"))
        async with aiotrt.load(Affine(), device=device) as model:
            for _ in range(2):
                result = await model(x)
                assert result.device == x.device, case
                assert_bit_equal(result, (x.detach() * 3 + 1).contiguous(), case)
                assert result.is_contiguous(), case
                assert not result.requires_grad, case
            assert count(model, State.FREE) == 2


@pytest.mark.asyncio
async def test_a_lazy_conjugate_is_conjugated(device: str) -> None:
    x = torch.complex(torch.ones(2, 3), torch.arange(6.0).view(2, 3)).to(place(device)).conj()
    assert x.is_conj()
    async with aiotrt.load(identity, device=device) as model:
        assert_bit_equal(await model(x), x.resolve_conj())


@pytest.mark.asyncio
async def test_layouts_may_alternate(device: str) -> None:
    """A graph is bound to its own memory, not to the strides of whoever called first."""
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        for view in (x, x.T, x[::-1], np.asfortranarray(x), x):
            np.testing.assert_array_equal(await model(view), view * 3 + 1)
            result = await model(torch.from_numpy(x).to(place(device)).mT)
            np.testing.assert_array_equal(result.cpu().numpy(), x.T * 3 + 1)
        assert model.statistics().captures == 1


@pytest.mark.asyncio
async def test_read_only_arrays(device: str) -> None:
    small, large = np.ones((2, 3), np.float32), np.ones((1024, 512), np.float32)
    mapped = np.frombuffer(small.tobytes(), np.float32).reshape(2, 3)  # of bytes: can never be made writable
    async with aiotrt.load(Affine(), device=device) as model:
        for x in (small, large, mapped):
            x.flags.writeable = False
            result = await model(x)  # a warning is an error here
            np.testing.assert_array_equal(result, x * 3 + 1)
            assert result.flags.writeable


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["array", "tensor"])
async def test_zero_dimensions(device: str, kind: str) -> None:
    x = np.array(2, np.float32)
    async with aiotrt.load(Affine(), device=device) as model:
        result = await model(x if kind == "array" else torch.from_numpy(x).to(place(device)))
        assert isinstance(result, np.ndarray if kind == "array" else torch.Tensor)
        assert result.shape == ()
        assert float(result) == 7


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.asyncio
async def test_every_dtype_passes_bit_equal(device: str) -> None:
    for dtype in DTYPES:
        start = torch.zeros(2, 4) if dtype is torch.bool else torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
        x = start.to(dtype)
        async with aiotrt.load(identity, device=device) as model:
            assert_bit_equal(await model(x), x, str(dtype))
            assert_bit_equal(await model(x.to(place(device))), x.to(place(device)), str(dtype))
            if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
                assert_bit_equal(await model(x.numpy()), x.numpy(), str(dtype))


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["array", "tensor", "device tensor"])
async def test_nan_inf_and_signed_zero_pass_bit_equal(device: str, kind: str) -> None:
    bits = [0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x00000000, 0x7F7FFFFF]
    array = np.array(bits, np.uint32).view(np.float32).reshape(2, 4)
    x = as_kind(kind, array, device)
    async with aiotrt.load(identity, device=device) as model:
        assert_bit_equal(await model(x), x)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["array", "strided array", "tensor", "device tensor"])
async def test_inputs_too_large_for_the_loop_pass_bit_equal(device: str, kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 1 << 32, (1024, 1024), np.uint32).view(np.float32)  # NaNs among them
    assert array.nbytes > 2 * MEBIBYTE
    x = as_kind(kind, array, device)
    async with aiotrt.load(identity, device=device, slots=1) as model:
        for _ in range(2):
            assert_bit_equal(await model(x), np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x)
        assert count(model, State.FREE) == 1


class Foreign:
    """A tensor of some other library: nothing but DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **arguments: Any) -> object:
        return self._tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()


@pytest.mark.asyncio
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_anything_with_dlpack(device: str, dtype: torch.dtype) -> None:
    x = torch.arange(6.0).view(2, 3).to(dtype)
    async with aiotrt.load(Affine(), device=device, signatures="fixed") as model:
        for tensor in (x, x.to(place(device)), x.to(place(device)).mT):
            for result in (await model(Foreign(tensor)), await model(x=Foreign(tensor))):
                assert_bit_equal(result, (tensor * 3 + 1).contiguous())
        with pytest.raises(aiotrt.InputError, match=r"input 'x': expected x: .*, got dtype float64"):
            await model(Foreign(torch.ones(2, 3).double()))
        assert count(model, State.FREE) == 2
