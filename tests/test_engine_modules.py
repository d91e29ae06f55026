"""Modules that do odd things: the right answer, or a clear error for the call that did them."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import aiotrt
from tests.tools import frame, until

Array = np.ndarray[Any, np.dtype[Any]]


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


async def answers(model: aiotrt.Model, x: Array, expected: Array) -> None:
    np.testing.assert_array_equal(await model(x), expected)
    result = await model(torch.from_numpy(x))
    np.testing.assert_array_equal(result.numpy(), expected)


# What they return...


def empty_sparse(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(2, 3, device=x.device).to_sparse()


def ragged(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        tensor: torch.Tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        return tensor


def cyclic(x: torch.Tensor) -> list[Any]:
    items: list[Any] = [x]
    items.append(items)
    return items


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda x: None, r"returned nothing \(None\); it must return a tensor"),
    "a number": (lambda x: 1.5, "returned float; it must return a tensor"),
    "text": (lambda x: "cat", "returned str; it must return a tensor"),
    "an array": (lambda x: np.ones(3), "returned ndarray; it must return a tensor"),
    "an array in a list": (
        lambda x: [x, [np.ones(3)]],
        r"returned ndarray as 'output_1\[0\]'; it must return a tensor",
    ),
    "a set": (lambda x: {x}, "returned set; it must return a tensor"),
    "a set in a dict": (lambda x: {"a": x, "b": [{1}]}, r"returned set as 'b\[0\]'; it must return a tensor"),
    "a generator": (lambda x: (y for y in (x, x)), "returned generator; it must return a tensor"),
    "a generator in a tuple": (lambda x: (x, iter([x])), "returned list_iterator as 'output_1'; it must return a tensor"),
    "a list that contains itself": (cyclic, "returned a list that contains itself, or is nested too deeply"),
    "an empty tuple": (lambda x: (), "returned an empty tuple; it must return at least one tensor"),
    "an empty dict": (lambda x: {}, "returned an empty dict; it must return at least one tensor"),
    "a dict of nothing": (lambda x: {"loss": None}, "returned a dict without a tensor; it must return at least one tensor"),
    "a sparse tensor": (empty_sparse, "returned 'output' as a torch.sparse_coo tensor; return a strided one"),
    "a meta tensor": (lambda x: x.to("meta"), "returned 'output' as a meta tensor, which has no data; return one on c"),
    "a meta tensor in a dict": (lambda x: {"a": x, "b": [x.to("meta")]}, r"returned 'b\[0\]' as a meta tensor"),
    "a nested tensor": (lambda x: ragged(torch.strided), "returned 'output' as a nested tensor; return a strided one"),
    "a jagged tensor": (lambda x: (x, ragged(torch.jagged)), "returned 'output_1' as a nested tensor; return a strided one"),
    "a sparse tensor in a tuple": (lambda x: (x + 1, empty_sparse(x)), "returned 'output_1' as a torch.sparse_coo tensor"),
}


@pytest.mark.asyncio
async def test_wrong_results_are_named(device: str) -> None:
    for function, message in WRONG.values():
        async with aiotrt.load(function, device=device, slots=1) as model:
            for _ in range(2):
                with pytest.raises(aiotrt.EngineError, match=message) as caught:
                    await model(frame(1))
                assert function.__name__ in str(caught.value)
            statistics = model.statistics()
            assert (statistics.free, statistics.waiting) == (1, 0)
            assert (statistics.failed, statistics.completed) == (2, 0)


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


class KeepsParameter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight


VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Array], Array]]] = {
    "its input": (lambda x: x, lambda x: x),
    "a view of its input": (lambda x: x.mT, lambda x: x.T),
    "part of its input": (lambda x: x[:, 1:2], lambda x: x[:, 1:2]),
    "a reshaped input": (lambda x: x.view(-1), lambda x: x.reshape(-1)),
    "an expanded input": (lambda x: x[:1].expand(4, 3), lambda x: np.broadcast_to(x[:1], (4, 3))),
    "a non-contiguous view": (lambda x: (x + 1).mT, lambda x: (x + 1).T),
    "every second column": (lambda x: (x + 1)[:, ::2], lambda x: (x + 1)[:, ::2]),
    "a 0-d tensor": (lambda x: x.sum(), lambda x: x.sum()),
    "an empty tensor": (lambda x: x[:0], lambda x: x[:0]),
    "a 0-d view": (lambda x: x[1, 2], lambda x: x[1, 2]),
    "a negated view": (lambda x: torch.complex(x, x).conj().imag, lambda x: -x),
}


@pytest.mark.asyncio
async def test_views_and_aliases_are_right(device: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for function, expected in VIEWS.values():
        async with aiotrt.load(function, device=device) as model:
            for y in (x, x + 10):
                await answers(model, y, expected(y))
            on_device = await model(torch.from_numpy(x).to(place(device)))
            np.testing.assert_array_equal(on_device.cpu().numpy(), expected(x))


@pytest.mark.asyncio
async def test_changing_its_input_is_the_modules_own_affair(device: str) -> None:
    """It changes the graph's copy of the input, never the caller's."""
    x = frame(2)
    async with aiotrt.load(lambda x: x.add_(1), device=device, slots=1) as model:
        for _ in range(3):
            np.testing.assert_array_equal(await model(x), frame(3))
            assert torch.equal(await model(torch.from_numpy(x)), torch.from_numpy(frame(3)))
        np.testing.assert_array_equal(x, frame(2))


@pytest.mark.asyncio
async def test_its_own_parameter_is_returned_as_a_copy(device: str) -> None:
    module = KeepsParameter().to(place(device))
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    async with aiotrt.load(module, device=device) as model:
        for x in (frame(1), torch.from_numpy(frame(1)), torch.from_numpy(frame(1)).to(place(device))):
            result = await model(x)
            result[...] = -1
            np.testing.assert_array_equal(module.weight.detach().cpu().numpy(), expected)
            np.testing.assert_array_equal(await model(frame(1)), expected)


@pytest.mark.asyncio
async def test_results_come_in_the_container_that_it_returns(device: str) -> None:
    x = frame(2)
    cases: list[tuple[Callable[..., Any], Any, tuple[Any, ...]]] = [
        (lambda x: {"low": x - 1, "high": x + 1}, dict, ("low", "high")),
        (lambda x: Pair(x - 1, x + 1), Pair, (0, 1)),
        (lambda x: [x - 1, x + 1], list, (0, 1)),
        (lambda x: {3: x - 1, "class": x + 1}, dict, (3, "class")),
        (lambda x: {"only": x - 1}, dict, ("only",)),
        (lambda x: (x - 1,), tuple, (0,)),
    ]
    for function, kind, keys in cases:
        async with aiotrt.load(function, device=device) as model:
            for _ in range(4):  # by the long way, and by the short path
                result: Any = await model(x)
                assert type(result) is kind
                assert len(result) == len(keys)
                for key, value in zip(keys, (x - 1, x + 1), strict=False):
                    np.testing.assert_array_equal(result[key], value)


# From call to call...


def picky(x: torch.Tensor) -> torch.Tensor:
    if x.sum() < 0:
        raise ValueError("negative")
    return x + 1


@pytest.mark.asyncio
async def test_an_input_that_it_raises_for_fails_that_call_alone(device: str) -> None:
    async with aiotrt.load(picky, device=device, slots=2) as model:
        calls = [model(frame(-i if i % 3 == 1 else i)) for i in range(20)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for i, result in enumerate(results):
            if i % 3 == 1:
                assert isinstance(result, aiotrt.EngineError)
                assert "picky raised ValueError" in str(result)
                assert "negative" in str(result)
                assert isinstance(result.__cause__, ValueError)
            else:
                np.testing.assert_array_equal(result, frame(i + 1))
        await until(lambda: model.statistics().free == 2)  # a call that failed is told at once; its slot drains first
        statistics = model.statistics()
        assert (statistics.failed, statistics.completed) == (7, 13)


@pytest.mark.asyncio
async def test_shapes_that_depend_on_the_data(device: str) -> None:
    async with aiotrt.load(lambda x: x[x > 0], device=device, slots=2) as model:
        inputs = [np.arange(-i, 10 - i, dtype=np.float32) for i in (0, 5, 9, 3, 12, 0)]  # of 9, 4, 0, 6, 0 and 9 results
        for x in inputs:
            await answers(model, x, x[x > 0])
        for x, result in zip(inputs, await asyncio.gather(*map(model, inputs)), strict=True):
            np.testing.assert_array_equal(result, x[x > 0])


@pytest.mark.asyncio
async def test_dtypes_that_depend_on_the_data(device: str) -> None:
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int64) if x.sum() > 0 else x

    async with aiotrt.load(odd, device=device, slots=1) as model:
        for value, dtype in ((1, np.int64), (-1, np.float32), (1, np.int64)):
            result = await model(frame(value))
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, frame(value))


def more(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x, x + 1) if x.sum() > 0 else (x,)


def fewer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x,) if x.sum() > 0 else (x, x + 1)


def bare(x: torch.Tensor) -> Any:
    return x + 1 if x.sum() > 0 else (x, x)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("function", "got", "expected"), [(more, 2, 1), (fewer, 1, 2), (bare, 1, 2)], ids=["more", "fewer", "bare"]
)
async def test_another_number_of_outputs_is_an_error(
    device: str, function: Callable[..., Any], got: int, expected: int
) -> None:
    async with aiotrt.load(function, device=device, slots=1, warmup=[frame(0)]) as model:
        before = await model(frame(-1))
        with pytest.raises(aiotrt.EngineError, match=function.__name__) as caught:
            await model(frame(1))
        assert f"{got} output" in str(caught.value)
        assert str(expected) in str(caught.value)
        np.testing.assert_array_equal(await model(frame(-1)), before)
        assert model.statistics().free == 1


@pytest.mark.asyncio
async def test_another_order_of_named_outputs_is_an_error_or_right(device: str) -> None:
    def shuffled(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"b": x + 2, "a": x + 1} if x.sum() > 0 else {"a": x + 1, "b": x + 2}

    async with aiotrt.load(shuffled, device=device, slots=1, warmup=[frame(0)]) as model:
        try:
            result = await model(frame(5))
        except aiotrt.EngineError as error:
            assert "shuffled" in str(error)  # noqa: PT017  # either is right; the wrong way round is not
        else:
            np.testing.assert_array_equal(result["a"], frame(6))
            np.testing.assert_array_equal(result["b"], frame(7))


@pytest.mark.asyncio
async def test_dropout_in_train_mode_stays_random(device: str) -> None:
    module = torch.nn.Dropout(0.5).train().to(place(device))
    x = np.ones((64, 64), np.float32)
    with pytest.warns(UserWarning, match=r"Dropout is in training mode, where Dropout gives .*: call eval\(\) on it"):
        loading = aiotrt.load(module, device=device, slots=2)
    async with loading as model:
        results = await asyncio.gather(*(model(x) for _ in range(6)))
        assert len({result.tobytes() for result in results}) == 6  # each draws its own
        for result in results:
            assert set(np.unique(result)) == {0.0, 2.0}
            assert 0.4 < (result > 0).mean() < 0.6
        assert module.training
        assert model.statistics().free == 2


@pytest.mark.asyncio
async def test_batch_norm_in_eval_mode_is_left_alone(device: str) -> None:
    module = torch.nn.BatchNorm1d(3).eval().to(place(device))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    async with aiotrt.load(module, device=device) as model:
        x = torch.arange(6.0).view(2, 3)
        with torch.no_grad():
            expected = module(x.to(place(device))).cpu()
        assert torch.equal(await model(x), expected)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


# In training mode, and with other weights...


def scripted(module: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that scripting is deprecated
        result: torch.nn.Module = torch.jit.script(module)
        return result


IN_TRAINING: dict[str, tuple[Callable[[], torch.nn.Module], str | None]] = {
    "dropout": (lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.1)), r"'1' \(Dropout\)"),
    "dropout of nothing": (lambda: torch.nn.Sequential(torch.nn.Dropout(0.0)), None),
    "batch norm": (lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(3)), r"'0' \(BatchNorm2d\)"),
    "instance norm": (lambda: torch.nn.InstanceNorm2d(3), None),
    "instance norm with statistics": (lambda: torch.nn.InstanceNorm2d(3, track_running_stats=True), "InstanceNorm2d"),
    "lstm": (lambda: torch.nn.LSTM(3, 3, 2), None),
    "lstm with dropout": (lambda: torch.nn.LSTM(3, 3, 2, dropout=0.5), "LSTM"),
    "attention": (lambda: torch.nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
    "linear": (lambda: torch.nn.Linear(3, 3), None),
    "scripted": (lambda: scripted(torch.nn.Sequential(torch.nn.BatchNorm1d(3))), r"'0' \(BatchNorm1d\)"),
}


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_a_module_in_training_mode_is_warned_of_once(kind: str) -> None:
    make, part = IN_TRAINING[kind]
    if part is not None:
        with pytest.warns(UserWarning, match=rf"is in training mode, where {part} gives .*call eval\(\)") as caught:
            _ = aiotrt.load(make(), device="host")
        assert len(caught) == 1
        assert caught[0].filename == __file__
    else:
        _ = aiotrt.load(make(), device="host")
    _ = aiotrt.load(make().eval(), device="host")


@pytest.mark.asyncio
async def test_weights_that_are_replaced_are_warned_of(device: str, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        return [record.message for record in caplog.records if "replaced" in record.message]

    linear = torch.nn.Linear(3, 3, bias=False).to(place(device))
    torch.nn.init.ones_(linear.weight)
    async with aiotrt.load(linear, device=device, slots=1) as model:
        np.testing.assert_array_equal(await model(frame(1)), frame(3))
        with torch.no_grad():
            linear.weight.mul_(2)  # in place
        linear.load_state_dict({"weight": linear.weight * 2})
        if device != "host":
            torch.cuda.synchronize()  # a call with host inputs is not ordered after the current stream
        np.testing.assert_array_equal(await model(frame(1)), frame(12))
        np.testing.assert_array_equal(await model(frame(1, (1, 3))), frame(12, (1, 3)))
        assert not said()
        linear.weight = torch.nn.Parameter(torch.full_like(linear.weight, 5.0))
        junk = [torch.full_like(linear.weight, -1) for _ in range(100)]  # would take the old one's memory, if that were free
        np.testing.assert_array_equal(await model(frame(1)), frame(15 if device == "host" else 12))  # the host has no graphs
        np.testing.assert_array_equal(await model(frame(1, (3, 3))), frame(15, (3, 3)))
        (message,) = said()
        assert "Linear: weight (1 of 1 weights) was replaced after a graph was captured" in message
        np.testing.assert_array_equal(await model(frame(1, (4, 3))), frame(15, (4, 3)))
        assert len(said()) == 1
        del junk


class Masked(torch.nn.Module):
    """Raises for a mask of nothing, as some networks do."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        longest = int(lengths.max())
        if longest == 0:
            raise ValueError("no lengths")
        return x[:, :longest] * 2


@pytest.mark.asyncio
async def test_what_raises_for_zeros_is_warmed_up_with_an_example(device: str) -> None:
    x, lengths = frame(3, (2, 4)), np.array([2, 3])
    for kind in ("numpy", "device"):
        inputs: Any = (x, lengths)
        if kind == "device":
            inputs = tuple(torch.from_numpy(one).to(place(device)) for one in (x, lengths))
        for warmup in ((), [inputs]):
            async with aiotrt.load(Masked(), device=device, slots=2, warmup=warmup) as model:
                for _ in range(3):
                    result = torch.as_tensor(await model(*inputs)).cpu()
                    np.testing.assert_array_equal(result, frame(6, (2, 3)))
                with pytest.raises(aiotrt.EngineError, match="no lengths"):
                    await model(x, np.array([0, 0]))
                assert model.statistics().free + model.statistics().draining == 2
    batching = aiotrt.Batching(max_size=4)
    async with aiotrt.load(Masked(), device=device, batching=batching, warmup=[(x[0], lengths[0])]) as model:
        np.testing.assert_array_equal(await model(x[0], lengths[1]), frame(6, (3,)))
