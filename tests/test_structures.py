"""Nested structures, in and out: what a module takes and returns, it takes and returns through a model."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import aiotrt
from aiotrt.tensors.structure import Structure, take_apart
from tests.tools import executor_of, frame


def place(device: str) -> torch.device:
    return torch.device("cpu" if device == "host" else device)


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Boxes:
    """Registered nowhere."""

    corners: torch.Tensor
    image: str
    scores: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: torch.Tensor
    count: int


class Layer:
    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None


class Cache:
    """As a decoder's: layers that the module replaces the tensors of."""

    def __init__(self, layers: int) -> None:
        self.layers = [Layer() for _ in range(layers)]
        self.steps = 0

    def update(self, i: int, keys: torch.Tensor) -> torch.Tensor:
        layer = self.layers[i]
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys], 1)
        return layer.keys


class Output(collections.OrderedDict[str, Any]):
    """A mapping whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    Output, lambda one: (list(one.values()), list(one)), lambda values, names: Output(zip(names, values, strict=True))
)


class Kept(dict[str, Any]):
    """A dict that is registered nowhere."""


class Mode(enum.Enum):
    UP = 1
    DOWN = 2


class Decoder(torch.nn.Module):
    def forward(self, ids: torch.Tensor, past: Cache | None = None, **options: Any) -> Output:
        past = past or Cache(2)
        total = ids
        for i in range(2):
            total = total + past.update(i, ids + i).sum(1, keepdim=True)
        past.steps += 1
        return Output(logits=total, past=past) if options.get("use_cache", True) else Output(logits=total)


def leaves(value: object) -> list[Any]:
    return [leaf.cpu().numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in take_apart(value)[1]]


def like(result: object, expected: object) -> None:
    assert type(result) is type(expected)
    assert take_apart(result)[0] == take_apart(expected)[0]
    for got, wanted in zip(leaves(result), leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted)


RESULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a tuple in a tuple": lambda x: (x, (x + 1, x + 2)),
    "a list of dicts": lambda x: [{"boxes": x, "labels": x.long()}, {"boxes": x[:1], "labels": x[:1].long()}],
    "a named tuple in a dict": lambda x: {"point": Point(x, -x), "n": 3},
    "a registered mapping in another": lambda x: Output(text=Output(pooled=x, hidden=(x, x * 2)), loss=None),
    "a dataclass": lambda x: Boxes(x, "a.png", None),
    "dataclasses with slots in a list": lambda x: [Frozen(x, 1), Frozen(x + 1, 2)],
    "a dict that is registered nowhere": lambda x: Kept(a=x, b=[x + 1]),
    "constants of every kind": lambda x: (x, None, True, 1, 1.5, "a", b"b", Mode.UP, torch.float16, x.shape, np.float32(2)),
    "a default dict and a deque": lambda x: [collections.defaultdict(list, a=[x]), collections.deque([x, x + 1])],
    "its input, nested": lambda x: [x, [x, {"x": x}]],
    "one tensor in a list": lambda x: [x],
}


@pytest.mark.asyncio
async def test_results_come_back_in_the_structure_that_was_returned(device: str) -> None:
    for function in RESULTS.values():
        async with aiotrt.load(function, device=device, slots=1) as model:
            for value in (1, 2, 3, 4):
                x = torch.from_numpy(frame(value))
                like(await model(x), function(x))
                there = x.to(place(device))
                result = await model(there)
                like(result, function(there))
                assert all(leaf.device == there.device for leaf in take_apart(result)[1])
                assert all(isinstance(leaf, np.ndarray) for leaf in take_apart(await model(frame(value)))[1])
            assert model.statistics().fallbacks == ()


@pytest.mark.asyncio
async def test_nested_results_are_the_callers_own(device: str) -> None:
    async with aiotrt.load(RESULTS["its input, nested"], device=device, slots=1) as model:
        x = torch.from_numpy(frame(1)).to(place(device))
        first = await model(x)
        first[1][1]["x"][...] = -1
        second = await model(x)
        assert first is not second
        assert bool((x == 1).all())
        assert bool((first[0] == 1).all())
        assert bool((second[1][1]["x"] == 1).all())


def _moved(tensor: torch.Tensor, kind: str, device: str) -> Any:
    return tensor.numpy() if kind == "numpy" else tensor.to(place(device)) if kind == "device" else tensor


@pytest.mark.asyncio
async def test_inputs_are_passed_in_their_structure(device: str) -> None:
    def mixed(
        images: list[torch.Tensor], boxes: Boxes, *, scale: float = 1.0, mode: Mode = Mode.UP, extra: Any = None
    ) -> torch.Tensor:
        assert type(images) is list
        assert type(boxes) is Boxes
        assert boxes.scores is None
        sign = 1 if mode is Mode.UP else -1
        more = extra["point"].y if extra is not None else 0
        return sum(images[1:], images[0]) * scale * sign + boxes.corners * len(boxes.image) + more

    async with aiotrt.load(mixed, device=device, slots=2) as model:
        for _ in range(3):
            for value in (1, 2):
                x, y = torch.from_numpy(frame(value)), torch.from_numpy(frame(3))
                for kind in ("host", "device", "numpy"):
                    a, b = (_moved(tensor, kind, device) for tensor in (x, y))
                    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
                        (([a, b], Boxes(a, "ab")), {}),
                        (([a, b], Boxes(a, "ab")), {"scale": 2.0}),
                        (([a, b], Boxes(a, "abc")), {"scale": 2.0, "mode": Mode.DOWN}),
                        (([a], Boxes(a, "")), {"extra": {"point": Point(a, b)}, "scale": 0.5}),
                        ((), {"boxes": Boxes(b, "a"), "images": [a, a, b]}),
                    ]
                    for values, named in calls:
                        result = torch.as_tensor(await model(*values, **named)).cpu()
                        structure, tensors = take_apart((values, named))
                        on_host = structure.build([torch.as_tensor(tensor).cpu() for tensor in tensors])
                        assert torch.equal(result, mixed(*on_host[0], **on_host[1]))


@pytest.mark.asyncio
async def test_a_decoder_with_its_cache(device: str) -> None:
    decoder, ids = Decoder(), torch.zeros(2, 1)
    async with aiotrt.load(decoder, device=device, slots=1) as model:
        for _ in range(2):
            past: Cache | None = None
            expected: Cache | None = None
            for step in range(4):
                ids = torch.full((2, 1), float(step))
                result = await model(ids, past)
                wanted = decoder(ids, expected)
                like(result, wanted)
                assert result.past.steps == step + 1
                before, past, expected = past, result.past, wanted.past
                if before is not None:
                    keys = before.layers[0].keys
                    assert keys is not None
                    assert keys.shape == (2, step), "the caller's cache is not changed"
        like(await model(ids, use_cache=False), decoder(ids, use_cache=False))


@pytest.mark.asyncio
async def test_lstms_take_and_return_their_state(device: str) -> None:
    lstm: Any = torch.nn.LSTM(3, 4, 2).eval().to(place(device))
    x, state = torch.randn(5, 1, 3).to(place(device)), tuple(torch.randn(2, 2, 1, 4).to(place(device)))
    async with aiotrt.load(lstm, device=device) as model:
        for args in ((x,), (x, state)):
            with torch.no_grad():
                expected = lstm(*args)
            for _ in range(3):
                output, (hidden, cell) = await model(*args)
                for got, wanted in zip((output, hidden, cell), (expected[0], *expected[1]), strict=True):
                    torch.testing.assert_close(got, wanted)


@pytest.mark.asyncio
async def test_pre_and_postprocess_of_structures(device: str) -> None:
    def split(image: torch.Tensor, sizes: list[int]) -> tuple[list[torch.Tensor]]:
        return (list(image.split(sizes)),)

    def network(parts: list[torch.Tensor]) -> Output:
        return Output(sums=tuple(part.sum() for part in parts), whole=torch.cat(parts))

    def finish(output: Output) -> dict[str, Any]:
        return {"largest": torch.stack(output.sums).max(), "twice": [output.whole * 2]}

    async with aiotrt.load(network, device=device, preprocess=split, postprocess=finish) as model:
        for _ in range(3):
            result = await model(np.arange(6, dtype=np.float32), [1, 3, 2])
            assert result["largest"] == 9
            np.testing.assert_array_equal(result["twice"][0], np.arange(6) * 2)
        assert model.statistics().fallbacks == ()


@pytest.mark.asyncio
async def test_a_graph_that_cannot_be_captured_packs_what_each_call_returned(device: str) -> None:
    def counted(x: torch.Tensor) -> dict[str, Any]:
        return {"positive": x[x > 0], "count": int((x > 0).sum())}

    async with aiotrt.load(counted, device=device, slots=1) as model:
        for count in (1, 3, 0, 6, 2):
            x = np.repeat(np.array([1, -1], np.float32), [count, 6 - count])
            for value in (x, torch.from_numpy(x), torch.from_numpy(x).to(place(device))):
                result = await model(value)
                assert result["count"] == len(result["positive"]) == count


@pytest.mark.asyncio
async def test_leases_of_structures_go_by_name(device: str) -> None:
    def both(pair: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1]["b"], "parts": [pair[0], 1]}

    async with aiotrt.load(both, device=device, warmup=[((frame(0), {"b": frame(0)}),)]) as model:
        async with model.lease(outputs="numpy") as slot:
            assert [buffer.name for buffer in slot.inputs] == ["pair[0]", "pair[1].b"]
            assert [buffer.name for buffer in slot.outputs] == ["sum", "parts[0]"]
            slot.inputs["pair[0]"][...] = frame(1)
            with pytest.raises(aiotrt.UsageError, match=r"input 'pair\[1\]\.b' was never written"):
                slot.launch()
            slot.inputs["pair[1].b"][...] = frame(2)
            result = await slot.replay()
            np.testing.assert_array_equal(result["sum"], frame(3))
            assert result["parts"][1] == 1


@pytest.mark.asyncio
async def test_batches_of_structures(device: str) -> None:
    def network(pair: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, Any]:
        return {"out": [pair["a"] * scale + pair["b"]], "scale": scale}

    async with aiotrt.load(network, device=device, batching=aiotrt.Batching(max_size=4)) as model:
        calls = [model({"a": frame(i), "b": frame(1)}, float(i % 2 + 1)) for i in range(8)]
        for i, result in enumerate(await asyncio.gather(*calls)):
            assert result["scale"] == i % 2 + 1
            np.testing.assert_array_equal(result["out"][0], frame(i * (i % 2 + 1) + 1))
        assert model.inputs is not None
        assert [(spec.name, len(spec.shape or ())) for spec in model.inputs] == [("pair.a", 2), ("pair.b", 2)]


@pytest.mark.asyncio
async def test_repeated_calls_with_a_structure_take_a_short_path(device: str) -> None:
    def total(parts: list[torch.Tensor], scale: float) -> torch.Tensor:
        return (parts[0] + parts[1]) * scale

    async with aiotrt.load(total, device=device, slots=1) as model:
        for value in range(6):
            np.testing.assert_array_equal(await model([frame(value), frame(1)], 2.0), frame(2 * value + 2))
        executor = executor_of(model)
        assert executor._nested_route is not None
        request = executor.submit(([frame(5), frame(1)], 2.0), {})
        assert request.route is executor._nested_route
        np.testing.assert_array_equal(await request, frame(12))
        for parts, scale, expected in (([frame(5), frame(1)], 3.0, 18), ([frame(5), frame(2)], 2.0, 14)):
            np.testing.assert_array_equal(await model(parts, scale), frame(expected))
        np.testing.assert_array_equal(await model([frame(5, (1, 2)), frame(1, (1, 2))], 2.0), frame(12, (1, 2)))


# What no structure is...


class Uncomparable:
    """Registered, with a context that cannot be hashed."""

    def __init__(self, x: Any, note: Any) -> None:
        self.x, self.note = x, note


pytree.register_pytree_node(
    Uncomparable, lambda one: ([one.x], one.note), lambda values, note: Uncomparable(next(iter(values)), note)
)


class EqualsAll:
    """A constant, since it can be called, that claims to be equal to anything."""

    def __call__(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Hashless(EqualsAll):
    """Another one, that cannot be hashed."""

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


def cyclic() -> list[Any]:
    items: list[Any] = [frame(1)]
    items.append(items)
    return items


def cyclic_dict() -> dict[str, Any]:
    items: dict[str, Any] = {"a": (frame(1),)}
    items["b"] = [items]
    return items


def ragged() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        tensor: torch.Tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        return tensor


def cyclic_object() -> Layer:
    layer = Layer()
    layer.keys = layer  # type: ignore[assignment]
    return layer


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "cyclic list": (cyclic, r"input 'x': it contains itself, or is nested too deeply"),
    "cyclic object": (cyclic_object, r"input 'x': it contains itself, or is nested too deeply"),
    "set": (lambda: [frame(1), {1}], r"input 'x\[1\]': .* got set"),
    "bytearray": (lambda: {"a": frame(1), "b": bytearray(2)}, r"input 'x\.b': .* got bytearray"),
    "generator": (lambda: [frame(1), (i for i in range(2))], r"input 'x\[1\]': .* got generator"),
    "context without a hash": (lambda: Uncomparable(frame(1), {1}), r"input 'x': .* got set, which cannot be hashed"),
    "constant without a hash": (lambda: [frame(1), Hashless()], r"input 'x': .* got Hashless, which cannot be hashed"),
    "slice of a list": (lambda: [frame(1), slice([1])], r"input 'x': .* got slice, which cannot be hashed"),
    "cyclic dict": (cyclic_dict, r"input 'x': it contains itself, or is nested too deeply"),
    "nested tensor": (lambda: {"a": ragged()}, r"input 'x\.a': expected a strided tensor, got a nested one"),
    "sparse": (lambda: [torch.ones(2, 3).to_sparse()], r"input 'x\[0\]': expected a strided tensor, got a sparse_coo one"),
    "meta": (lambda: {"a": [torch.ones(2, device="meta")]}, r"input 'x\.a\[0\]': got a meta tensor"),
    "object array": (lambda: [frame(1), np.full(2, None)], r"input 'x\[1\]': torch has no dtype for numpy's object"),
    "no tensor": (lambda: [1, 2.0, "a"], r"input 'x': expected a numpy array.*got list"),
}


@pytest.mark.asyncio
async def test_bad_structures_are_refused_by_name(device: str) -> None:
    def first(x: Any) -> torch.Tensor:
        found: torch.Tensor = take_apart(x)[1][0] * 2
        return found

    async with aiotrt.load(first, device=device) as model:
        for _ in range(2):
            for make, message in BAD.values():
                with pytest.raises(aiotrt.InputError, match=message):
                    await model(make())
                assert (model.statistics().submitted, model.statistics().free) == (model.statistics().completed, 2)
            np.testing.assert_array_equal(await model([frame(1)]), frame(2))


@pytest.mark.asyncio
async def test_a_constant_that_is_equal_to_anything_is_no_tensor(device: str) -> None:
    def first(x: Any) -> Any:
        return x[0] * 2, x[1]

    constant = EqualsAll()
    async with aiotrt.load(first, device=device) as model:
        for _ in range(2):
            result, same = await model([frame(1), constant])
            np.testing.assert_array_equal(result, frame(2))
            assert same is constant


@pytest.mark.gpu
@pytest.mark.asyncio
async def test_a_nested_tensor_on_another_device_is_refused() -> None:
    async with aiotrt.load(lambda x: x[0] + x[1], device="host") as model:
        with pytest.raises(aiotrt.InputError, match=r"input 'x\[1\]': .* got a tensor on cuda:0"):
            await model([torch.ones(2), torch.ones(2, device="cuda")])


# As keys...


DIFFERENT: list[Any] = [
    1, 1.0, True, "1", b"1", None, 0.0, -0.0, math.nan, 1j, Mode.UP, Mode.DOWN, torch.float32, np.float32(1), np.float64(1),
    [1], (1,), {"a": 1}, {"b": 1}, [1, 1], [[1]], slice(1), slice(2), torch.Size([1]), range(1), Boxes, len,
]  # fmt: skip


def test_structures_are_equal_only_where_all_of_their_constants_are() -> None:
    keys = [take_apart(one)[0] for one in DIFFERENT]
    assert len(set(keys)) == len(keys)
    for one, key in zip(DIFFERENT, keys, strict=True):
        assert take_apart(one)[0] == key
        assert key != one
    assert take_apart([torch.ones(1), 1])[0] == take_apart([np.ones(3), 1])[0], "tensors are no part of it"


@pytest.mark.parametrize("make", list(RESULTS.values()), ids=list(RESULTS))
def test_what_was_taken_apart_is_put_together(make: Callable[[torch.Tensor], object]) -> None:
    value = make(torch.ones(2, 3))
    structure, tensors = take_apart(value)
    assert isinstance(structure, Structure)
    assert structure.count == len(tensors)
    again = structure.build([tensor + 1 for tensor in tensors])
    assert take_apart(again)[0] == structure
    for before, after in zip(tensors, take_apart(again)[1], strict=True):
        assert torch.equal(before + 1, after)


@pytest.mark.parametrize("make", list(RESULTS.values()), ids=list(RESULTS))
def test_the_quick_reader_agrees_with_taking_apart(make: Callable[[torch.Tensor], object]) -> None:
    value = make(torch.ones(2, 3))
    structure, tensors = take_apart(value)
    others = [tensors, tuple(tensors), {"a": tensors[0]}, None, tensors[0], Point(tensors[0], tensors[0]), [value], []]
    for other in [value, *others]:
        found = structure.reader(other)
        assert found is None or (structure == take_apart(other)[0] and all(map(torch.equal, found, take_apart(other)[1])))
    if structure.is_flat and not structure.is_bare:
        assert structure.reader(value) is not None
        assert type(structure.builder(tensors)) is type(value)


FLAT: dict[str, tuple[object, bool]] = {
    "tensor": (torch.ones(1), True),
    "list": ([torch.ones(1)], True),
    "tuple": ((torch.ones(1), torch.ones(2)), True),
    "named tuple": (Point(torch.ones(1), torch.ones(2)), True),
    "dict": ({"a": torch.ones(1)}, True),
    "registered mapping": (Output(a=torch.ones(1)), True),
    "nested": ([[torch.ones(1)]], False),
    "with None": ([torch.ones(1), None], False),
    "dataclass": (Boxes(torch.ones(1), "a"), False),
    "dataclass in a list": ([Boxes(torch.ones(1), "a")], False),
}


@pytest.mark.parametrize("kind", FLAT)
def test_what_is_flat(kind: str) -> None:
    value, is_flat = FLAT[kind]
    assert take_apart(value)[0].is_flat == is_flat
