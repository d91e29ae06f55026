"""Inputs that a model must refuse: the error names the thing, what was expected and what came; nothing else happens."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from tests.tools import Affine, TwoOutputs, count, executor_of, frame

GOOD = frame(2)


async def refused(model: aiotrt.Model, *inputs: object, says: tuple[str, ...], **named: Any) -> None:
    """The call raises an `InputError` that says all of this, and it is as if it had never been made."""
    before = model.statistics()
    with pytest.raises(aiotrt.InputError) as caught:
        await model(*inputs, **named)
    message = str(caught.value)
    for part in says:
        assert part in message, f"{part!r} is not in {message!r}"
    assert isinstance(caught.value, ValueError)
    after = model.statistics()
    assert (after.submitted, after.failed, after.replays, after.captures) == (
        before.submitted, before.failed, before.replays, before.captures,
    )  # fmt: skip
    assert (after.free, after.waiting) == (len(executor_of(model).slots), 0)


async def works(model: aiotrt.Model) -> None:
    """One-input models here are Affine: it answers, and everything is free after it."""
    np.testing.assert_array_equal(await model(GOOD), GOOD * 3 + 1)
    assert count(model, State.FREE) == len(executor_of(model).slots)
    assert model.statistics().waiting == 0


@contextlib.asynccontextmanager
async def affine(device: str) -> AsyncIterator[aiotrt.Model]:
    """Affine, whose input `x` is fixed to float32 of rank 2 by its warm-up, and which still works at the end."""
    async with aiotrt.load(Affine(), device=device, warmup=[GOOD], signatures="fixed") as model:
        yield model
        await works(model)


def cpu_or(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        tensor: torch.Tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        return tensor


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this layout is in beta
        return torch.ones(2, 3).to_sparse_csr()


def generator() -> Iterator[np.ndarray[Any, Any]]:
    yield GOOD


class Broken:
    """Claims DLPack, and fails at it."""

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("this exporter is broken")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class BrokenCuda:
    """Claims the CUDA array interface, with nonsense."""

    __cuda_array_interface__ = "nonsense"


EXPECTED = "input 'x': expected x: float32 (*, *), got "

# What is passed, and what the message must say.
REFUSED: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "float64 array": (lambda: np.ones((2, 3)), (EXPECTED, "dtype float64", ".astype(np.float32)")),
    "float64 tensor": (lambda: torch.ones(2, 3).double(), (EXPECTED, "dtype float64", ".to(torch.float32)")),
    "integers": (lambda: np.ones((2, 3), np.int64), (EXPECTED, "dtype int64", ".astype(np.float32)")),
    "booleans": (lambda: torch.ones(2, 3, dtype=torch.bool), (EXPECTED, "dtype bool", ".to(torch.float32)")),
    "bfloat16": (lambda: torch.ones(2, 3).bfloat16(), (EXPECTED, "dtype bfloat16", ".to(torch.float32)")),
    "complex": (lambda: np.ones((2, 3), np.complex64), (EXPECTED, "dtype complex64", ".astype(np.float32)")),
    "rank too low": (lambda: np.ones(3, np.float32), (EXPECTED, "rank 1", "(3,)", "x[None]")),
    "rank too high": (lambda: torch.ones(1, 2, 3), (EXPECTED, "rank 3", "(1, 2, 3)")),
    "0-d array": (lambda: np.array(1, np.float32), (EXPECTED, "rank 0", "()")),
    "0-d tensor": (lambda: torch.tensor(1.0), (EXPECTED, "rank 0", "()")),
    "meta": (lambda: torch.ones(2, 3, device="meta"), ("input 'x'", "meta", "no data")),
    "sparse coo": (lambda: torch.ones(2, 3).to_sparse(), ("input 'x'", "strided", "sparse_coo", "to_dense")),
    "sparse csr": (csr, ("input 'x'", "strided", "sparse_csr", "to_dense")),
    "nested": (lambda: nested(torch.strided), ("input 'x'", "strided", "nested")),
    "jagged": (lambda: nested(torch.jagged), ("input 'x'", "strided", "nested")),
    "object array": (lambda: np.full((2, 3), None), (EXPECTED, "dtype object")),
    "big-endian": (lambda: GOOD.astype(">f4"), (EXPECTED, "dtype >f4", ".astype(np.float32)")),
    "structured": (lambda: np.zeros((2, 3), [("a", "<f4")]), (EXPECTED, "'a'")),
    "text array": (lambda: np.full((2, 3), "a"), (EXPECTED, "dtype <U1")),
    "dates": (lambda: np.zeros((2, 3), "datetime64[s]"), (EXPECTED, "dtype datetime64[s]")),
    "long double": (lambda: np.zeros((2, 3), np.longdouble), (EXPECTED, "dtype float128", ".astype(np.float32)")),
    "string": (lambda: "image.png", ("input 'x'", "numpy array", "got str")),
    "path": (lambda: Path("image.png"), ("input 'x'", "numpy array", "Path")),
    "bytes": (lambda: b"\x00" * 24, ("input 'x'", "numpy array", "got bytes")),
    "number": (lambda: 1.0, ("input 'x'", "numpy array", "got float")),
    "numpy scalar": (lambda: np.float32(1), ("input 'x'", "numpy array", "got float32")),
    "list": (lambda: [[1.0, 2.0, 3.0]], ("input 'x'", "numpy array", "got list")),
    "tuple": (lambda: (GOOD,), ("input 'x'", "numpy array", "got tuple")),
    "dict": (lambda: {"x": GOOD}, ("input 'x'", "numpy array", "got dict")),
    "None": (lambda: None, ("input 'x'", "numpy array", "got NoneType")),
    "generator": (generator, ("input 'x'", "numpy array", "got generator")),
    "broken DLPack": (Broken, ("input 'x'", "Broken", "DLPack", "this exporter is broken")),
    "broken CUDA array": (BrokenCuda, ("input 'x'", "BrokenCuda", "__cuda_array_interface__")),
}


@pytest.mark.asyncio
async def test_bad_inputs_are_refused(device: str) -> None:
    async with affine(device) as model:
        for make, says in REFUSED.values():
            await refused(model, make(), says=says)
            await refused(model, x=make(), says=says)


# The first call has nothing to be compared with, but rubbish is rubbish, and must not be taken for the rule.
ALWAYS = [
    "meta", "sparse coo", "sparse csr", "nested", "jagged", "object array", "big-endian",
    "structured", "text array", "dates", "long double", "string", "path", "bytes", "number", "numpy scalar", "list", "None",
    "generator", "broken DLPack", "broken CUDA array",
]  # fmt: skip


@pytest.mark.asyncio
async def test_bad_first_inputs_are_refused_and_fix_nothing(device: str) -> None:
    async with aiotrt.load(Affine(), device=device) as model:
        for case in ALWAYS:
            await refused(model, REFUSED[case][0](), says=("input 'x'",))
            assert model.inputs is None, case
        await works(model)


@pytest.mark.asyncio
@pytest.mark.parametrize("first", [np.ones((2, 3), np.int64), np.ones((2, 4), np.float32)], ids=["dtype", "extent"])
async def test_a_first_call_that_the_engine_refuses_fixes_nothing(device: str, first: np.ndarray[Any, Any]) -> None:
    linear = torch.nn.Linear(3, 3).to(cpu_or(device))
    async with aiotrt.load(linear, device=device) as model:
        with pytest.raises(aiotrt.EngineError, match="Linear raised RuntimeError"):
            await model(first)
        assert (await model(GOOD)).shape == (2, 3)
        assert count(model, State.FREE) == 2


# How many, and by which names...


@pytest.mark.asyncio
async def test_inputs_are_counted_and_named(device: str) -> None:
    a, b = frame(2), frame(3)
    async with aiotrt.load(TwoOutputs(), device=device, warmup=[(a, b)], signatures="fixed") as model:
        both = "x: float32 (*, *), y: float32 (*, *)"
        await refused(model, says=("2 inputs", both, "got 0"))
        await refused(model, a, says=("2 inputs", both, "got 1"))
        await refused(model, a, b, a, says=("2 inputs", both, "got 3"))
        await refused(model, x=a, says=("missing input 'y'",))
        await refused(model, y=a, says=("missing input 'x'",))
        await refused(model, a, x=b, says=("input 'x'", "twice, by position and by name"))
        await refused(model, a, b, y=b, says=("input 'y'", "twice, by position and by name"))
        await refused(model, a, z=b, says=("no input 'z'", "x, y"))
        await refused(model, a, y=b, z=b, says=("no input 'z'", "x, y"))
        await refused(model, a, np.ones((2, 3)), says=("input 'y': expected y: float32 (*, *), got dtype float64",))
        for result in (await model(a, b), await model(a, y=b), await model(y=b, x=a)):
            assert result._fields == ("total", "product")
            np.testing.assert_array_equal(result.total, a + b)
            np.testing.assert_array_equal(result.product, a * b)


@pytest.mark.asyncio
async def test_the_first_inputs_are_counted_and_named(device: str) -> None:
    a, b = frame(2), frame(3)
    async with aiotrt.load(TwoOutputs(), device=device) as model:
        await refused(model, says=("at least one input", "got none"))
        await refused(model, a, b, a, says=("takes 2 inputs (x, y) by position, got 3",))
        await refused(model, a, x=b, says=("input 'x'", "twice, by position and by name"))
        await refused(model, a, z=b, says=("no input 'z'", "x, y"))
        assert model.inputs is None
        np.testing.assert_array_equal((await model(a, b)).total, a + b)


@pytest.mark.asyncio
async def test_a_missing_first_input_is_refused_and_fixes_nothing(device: str) -> None:
    a, b = frame(2), frame(3)
    async with aiotrt.load(TwoOutputs(), device=device) as model:
        await refused(model, a, says=("missing input 'y'",))
        await refused(model, y=a, says=("missing input 'x'",))
        np.testing.assert_array_equal((await model(a, b)).total, a + b)


@pytest.mark.asyncio
async def test_a_refusal_says_what_to_do_next(device: str) -> None:
    async with aiotrt.load(lambda: torch.zeros(1), device=device) as model:
        await refused(model, GOOD, GOOD, says=("the model takes 0 inputs by position, got 2",))
    async with aiotrt.load(Affine(), device=device) as model:
        for _ in ("the first call", "a later one"):
            for option in ("deadline", "priority"):
                says = f"there is no input '{option}'; the inputs are x; deadline= and priority= need load(..., batching="
                await refused(model, GOOD, **{option: 1}, says=(says,))
            await works(model)
        for odd in ([1.0], 1.0, np.float32(1), "x"):
            await refused(model, odd, says=(f"got {type(odd).__name__}; convert it with np.asarray(...)",))


@pytest.mark.asyncio
async def test_one_input_is_spoken_of_in_the_singular(device: str) -> None:
    async with affine(device) as model:
        await refused(model, {"x": GOOD}, says=("got dict; pass named inputs as model(**inputs)",))
        await refused(model, says=("expected 1 input (x: float32 (*, *)), got 0",))
        await refused(model, GOOD, GOOD, says=("expected 1 input (x: float32 (*, *)), got 2",))


# Extents, where the engine declares them...


def square_model(path: Path) -> Path:
    """y = x + x, with x: float32 (n, 4)."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "twice",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.mark.asyncio
async def test_declared_extents_are_checked(tmp_path: Path) -> None:
    async with aiotrt.load(square_model(tmp_path / "twice.onnx")) as model:
        expected = "input 'x': expected x: float32 (*, 4), got "
        await refused(model, frame(1, (2, 3)), says=(expected + "shape (2, 3)",))
        await refused(model, frame(1, (4,)), says=(expected + "rank 1, shape (4,)", "x[None]"))
        await refused(model, frame(1, (0, 3)), says=(expected + "shape (0, 3)",))
        await refused(model, np.ones((2, 4)), says=(expected + "dtype float64",))
        await refused(model, z=frame(1, (2, 4)), says=("there is no input 'z'", "x"))
        for n in (1, 0, 5, 0):
            np.testing.assert_array_equal(await model(x=frame(n, (n, 4))), frame(2 * n, (n, 4)))


@pytest.mark.asyncio
async def test_a_tensor_on_another_device_is_refused(device: str) -> None:
    elsewhere = "cuda" if device == "host" and torch.cuda.is_available() else "meta"
    async with affine(device) as model:
        await refused(model, torch.ones(2, 3, device=elsewhere), says=("input 'x'", elsewhere))


@pytest.mark.asyncio
async def test_one_bad_call_among_many_fails_alone(device: str) -> None:
    async with affine(device) as model:
        bad = np.ones((2, 3))

        async def call(i: int) -> object:
            try:
                return await model(bad if i % 3 == 0 else frame(i))
            except aiotrt.InputError as error:
                return error

        results = await asyncio.gather(*(call(i) for i in range(30)))
        for i, result in enumerate(results):
            if i % 3 == 0:
                assert isinstance(result, aiotrt.InputError)
            else:
                np.testing.assert_array_equal(result, frame(i) * 3 + 1)
        assert model.statistics().completed == 20


# Without elements...


def joined(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([past, new], 1)


@pytest.mark.asyncio
async def test_inputs_without_elements_are_inputs(device: str) -> None:
    """A decoder's first step has a cache of length 0."""
    where = torch.device("cpu" if device == "host" else device)
    async with aiotrt.load(joined, device=device, slots=2) as model:
        for length in (0, 0, 0, 2, 0):
            past, new = frame(1, (2, length, 3)), frame(5, (2, 1, 3))
            expected = np.concatenate([past, new], 1)
            np.testing.assert_array_equal(await model(past, new), expected)
            on_host = await model(torch.from_numpy(past), torch.from_numpy(new))
            there = await model(torch.from_numpy(past).to(where), torch.from_numpy(new).to(where))
            for result in (on_host, there):
                np.testing.assert_array_equal(result.cpu().numpy(), expected)


@pytest.mark.asyncio
async def test_whole_calls_leases_and_batches_without_elements(device: str) -> None:
    empty = np.zeros((0, 3), np.float32)
    where = torch.device("cpu" if device == "host" else device)
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        for _ in range(4):
            for value in (empty, torch.from_numpy(empty), torch.from_numpy(empty).to(where)):
                assert tuple((await model(value)).shape) == (0, 3)
        async with model.lease((0, 3), outputs="numpy") as slot:
            for value in (empty, torch.from_numpy(empty).to(where)):
                slot.inputs[0][...] = value
                assert (await slot.replay()).shape == (0, 3)
        async with model.lease((2, 3), outputs="numpy") as slot:
            slot.inputs[0][...] = 1.0
            slot.inputs[0][0:0] = empty
            assert (await slot.replay()).shape == (2, 3)
        with pytest.raises(aiotrt.InputError, match=r"got shape \(-1, 3\); no dimension can be negative"):
            model.lease((-1, 3))
    async with aiotrt.load(Affine(), device=device, batching=aiotrt.Batching(max_size=4)) as model:
        for result in await asyncio.gather(*(model(empty) for _ in range(5))):
            assert result.shape == (0, 3)
