"""Real networks on a real GPU, through everything: built by `aiotrt.build`, loaded, awaited by many, against bare TensorRT.

Bare TensorRT is the same engine file, one context, enqueue and synchronise. Where it repeats itself at a shape, aiotrt must
give the same bits; where it does not, what is compared is within a tolerance, and the test says so on the terminal.

Most tests also run on the host device, with a double of TensorRT and a small network, so that they are known to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import open_device
from aiotrt.runtime.handshake import GraphState
from aiotrt.runtime.slots import State
from benchmarks.bare import Bare
from benchmarks.networks import NETWORKS, Array, MissingError, Network, Shape
from tests.tensorrt.double import TensorRTDouble
from tests.tensorrt.tools import PROFILES, double_on, loading, save
from tests.tools import Latch, count, executor_of, held, turns, until

# On asyncio alone: what differs between event loops is tested elsewhere, with work that costs less.
pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.timeout(300)]

CALLERS: Final = 64
#: Of the largest number in a result, where bare TensorRT does not repeat itself: FP16 has 11 bits.
TOLERANCE: Final = 2e-2
DOUBLE: Final = Network(
    "double",
    lambda _: Path(),
    np.float32,
    None,
    (((1, 3), (2, 3), (4, 3)), ((8, 3), (8, 3), (16, 3))),
    ((2, 3), (4, 3), (9, 3)),
    (4, 3),
)


def on_gpu(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.gpu)


@dataclass
class Case:
    """A built network, inputs, and what bare TensorRT makes of them.

    Attributes:
        network: which.
        path: the engine.
        device: where it is loaded.
        inputs: of its shapes, in turn.
        expected: for each input, the outputs.
        unsteady: shapes at which bare TensorRT does not repeat itself.
        bare: what computed that; None for the double.
        notes: for the terminal.
    """

    network: Network
    path: Path
    device: str
    inputs: list[Array] = field(repr=False)
    expected: list[list[Array]] = field(default_factory=list, repr=False)
    unsteady: set[Shape] = field(default_factory=set)
    bare: Bare | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def small(self) -> list[int]:
        """The numbers of the inputs of the first shape."""
        return [i for i, x in enumerate(self.inputs) if x.shape == self.network.shapes[0]]

    def tensor(self, i: int) -> torch.Tensor:
        """Input `i` on the device."""
        return torch.from_numpy(self.inputs[i]).to("cpu" if self.device == "host" else self.device)

    def check(self, i: int, result: object) -> None:
        """That these are the results of input `i`."""
        got = arrays(result)
        want = self.expected[i]
        assert [(a.shape, a.dtype) for a in got] == [(b.shape, b.dtype) for b in want]
        if self.inputs[i].shape in self.unsteady:
            assert all(distance(a, b) <= TOLERANCE for a, b in zip(got, want, strict=True)), self.difference(i, got)
        else:
            assert same(got, want), self.difference(i, got)

    def difference(self, i: int, got: list[Array]) -> str:
        """How results differ from what was expected, and from what: for whoever has to find out why."""
        want = self.expected[i]
        lines = [f"{self.network.name}, input {i} of shape {self.inputs[i].shape}:"]
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            lines.append(f"output {k}: {np.sum(a != b)} of {a.size} numbers differ, by {distance(a, b):.2e} of the largest")
        others = [j for j, other in enumerate(self.expected) if j != i and same(got, other)]
        lines += [f"these are the results of input {others[0]}"] if others else []
        if self.bare is None:
            return "\n".join(lines)
        with open_device(self.device).exclusive():  # the model still runs, and may capture
            fresh = Bare(self.path)
            lines.append(f"bare, again: {verdict(self.bare.run(self.inputs[i]), want)}")
            lines.append(f"bare, in a fresh context: {verdict(fresh.run(self.inputs[i]), want)}")
            replayed = fresh.replay(fresh.capture(), self.inputs[i])
            lines.append(f"bare, a graph's replay: {verdict(replayed, want)}; against aiotrt's: {verdict(replayed, got)}")
        return "\n".join(lines)


def arrays(result: object) -> list[Array]:
    """What a call gave, as arrays."""
    results = list(result) if isinstance(result, tuple) else [result]
    return [value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for value in results]


def same(a: list[Array], b: list[Array]) -> bool:
    """Whether all bits are the same."""
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def distance(a: Array, b: Array) -> float:
    """The largest difference, as a share of the largest number; infinite where one is not finite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    share = float(np.abs(a - b).max() / max(1e-30, np.abs(b).max()))
    return share if np.isfinite(share) else float("inf")


def verdict(a: list[Array], b: list[Array]) -> str:
    return "same bits" if same(a, b) else f"differs by {max(map(distance, a, b)):.2e} of the largest"


# Making cases...


def on_double(double: TensorRTDouble, folder: Path) -> Case:
    path = save(folder / "double.engine", double, PROFILES)
    inputs = [np.full(DOUBLE.shapes[i % 3], i, np.float32) for i in range(CALLERS)]
    return Case(DOUBLE, path, "host", inputs, [[x * 3 + 1] for x in inputs])


def on_tensorrt(network: Network, folder: Path) -> Case:
    path = network.build(folder)
    inputs = [network.example(i, network.shapes[i % len(network.shapes)]) for i in range(CALLERS)]
    bare = Bare(path)
    case = Case(network, path, "cuda", inputs, bare=bare)
    # All of one shape after the other, and then in turn: changing shapes must not change results either.
    order = sorted(range(CALLERS), key=lambda i: network.shapes.index(inputs[i].shape))
    first = dict(zip(order, [bare.run(inputs[i]) for i in order], strict=True))
    case.expected = [first[i] for i in range(CALLERS)]
    worst = 0.0
    for x, want in zip(inputs, case.expected, strict=True):
        again = bare.run(x)
        if not same(again, want):
            case.unsteady.add(x.shape)
            worst = max(worst, *map(distance, again, want))
    finite = all(np.isfinite(output).all() for outputs in case.expected for output in outputs)
    assert finite, f"{network.name} gives infinities on random inputs: equality would say little"
    assert not same(case.expected[0], case.expected[len(network.shapes)]), "all inputs give the same: likewise"
    spent = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in bare.seconds.items())
    case.notes.append(f"{network.name}: bare TensorRT: {spent}; it calls itself capturable: {bare.is_capturable()}")
    if case.unsteady:
        case.notes.append(
            f"{network.name}: bare TensorRT does NOT repeat itself at {sorted(case.unsteady)} (off by {worst:.2e}): "
            f"compared there within {TOLERANCE} of the largest number, not bit for bit"
        )
    return case


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, Case | str]]:
    """Cases by the network's name, made when first asked for; or why one cannot be."""
    cases: dict[str, Case | str] = {}
    yield cases
    cases.clear()
    gc.collect()


@pytest.fixture
def case(
    name: str,
    made: dict[str, Case | str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Case]:
    if name == "double":
        double = double_on("host")
        with loading(double):
            yield on_double(double, tmp_path_factory.mktemp(name))
        return
    untested = f"{name} is NOT tested with the real runtime in this run"
    pytest.importorskip("tensorrt_rtx", reason=f"tensorrt_rtx is not installed: {untested}")
    pytest.importorskip("onnx", reason=f"onnx is not installed, which building needs: {untested}")
    if name not in made:
        try:
            made[name] = on_tensorrt(NETWORKS[name], tmp_path_factory.mktemp(name))
        except MissingError as error:
            made[name] = f"{error}: {untested}"
    entry = made[name]
    if isinstance(entry, str):
        pytest.skip(entry)
    if entry.notes:
        with capsys.disabled():
            print("", *entry.notes, sep="\n  ")
        entry.notes.clear()
    yield entry


# Many callers...


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("double", 3),
        on_gpu("recogniser", 3),
        on_gpu("detector", 1),
        on_gpu("detector", 4),
        on_gpu("resnet50", 2),
        on_gpu("vit", 4),
        on_gpu("rfdetr", 2),
    ],
)
async def test_64_callers_get_what_bare_tensorrt_gives(case: Case, slots: int) -> None:
    """Each with inputs of its own, in changing shapes, from host and device in turn."""
    rounds = 3
    shapes = {x.shape for x in case.inputs}

    async def caller(number: int) -> None:
        for k in range(rounds):
            i = (number + 7 * k) % CALLERS
            case.check(i, await model(case.inputs[i] if (number + k) % 2 else case.tensor(i)))

    async with aiotrt.load(case.path, device=case.device, slots=slots) as model:
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        statistics = model.statistics()
        assert statistics.fallbacks == ()
        assert statistics.replays == statistics.completed == CALLERS * rounds
        assert statistics.captures <= slots * len(shapes)
        if case.network.profiles:
            with pytest.raises(aiotrt.InputError):
                await model(np.zeros((99, *case.inputs[0].shape[1:]), case.inputs[0].dtype))


@pytest.mark.parametrize("name", ["double", on_gpu("recogniser")])
async def test_without_graphs_the_bits_are_the_same(case: Case) -> None:
    async with aiotrt.load(case.path, device=case.device, slots=1, graphs=False) as model:
        for i in case.small[:4]:
            case.check(i, await model(case.inputs[i]))
            case.check(i, await model(case.tensor(i)))
        assert model.statistics().replays == 0


# The handshake, with streams held by a latch so that the window in which a defect shows stays open...


@pytest.mark.parametrize("name", ["double", on_gpu("recogniser"), on_gpu("resnet50")])
async def test_results_are_not_early(case: Case) -> None:
    i, j = case.small[:2]
    async with aiotrt.load(case.path, device=case.device, slots=1, warmup=[case.inputs[i]]) as model:
        await model(case.inputs[j])  # the first use of a kernel can synchronise the device, which a latch would hold up
        with held(model) as latch:
            call = asyncio.ensure_future(model(case.inputs[i]))
            await turns(100)
            assert not call.done()
            latch.open()
            case.check(i, await call)
        async with model.lease() as slot:
            with held(model) as latch:
                slot.inputs[0][...] = case.inputs[j]
                event = slot.launch()
                for _ in range(100):
                    assert not event.query()
                    await asyncio.sleep(0)
                latch.open()
                await aiotrt.wait(event)
            case.check(j, slot.outputs[0].tensor)
        assert model.statistics().fallbacks == ()


@pytest.mark.parametrize("says", ["consumed", "roboflow"])
@pytest.mark.parametrize("name", ["double", on_gpu("recogniser"), on_gpu("resnet50")])
async def test_what_a_consumer_has_not_read_yet_is_not_overwritten(case: Case, says: str) -> None:
    i, j = case.small[:2]
    async with (
        aiotrt.load(case.path, device=case.device, slots=1, warmup=[case.inputs[i]]) as model,
        Latch(executor_of(model).device.name) as latch,
    ):
        await model(case.inputs[j])  # as above
        side = model.stream()
        async with model.lease() as slot:
            slot.inputs[0][...] = case.inputs[i]
            output = await slot.replay()
            seen = torch.full_like(output, -1)
            # On the device, `full_like` is on the caller's stream.
            side.wait(executor_of(model).device.current_stream().record())
            side.wait(output._trt_produce_event)
            latch.hold(side)
            side.run(lambda: seen.copy_(output))
            if says == "consumed":
                slot.consumed(side)
            else:
                state: GraphState = output._trt_graph_state
                state.consumer_done_event = side.record()
        call = asyncio.ensure_future(model(case.inputs[j]))
        await turns(200)
        assert not call.done()
        latch.open()
        case.check(j, await call)
        await asyncio.to_thread(side.synchronize)
        case.check(i, seen)
        side.close()


@pytest.mark.parametrize("name", [on_gpu("recogniser"), on_gpu("resnet50")])
async def test_an_input_that_is_still_being_made_is_waited_for(case: Case) -> None:
    """As Roboflow's code says it; and its event on the result can be awaited."""
    i, j = case.small[:2]
    async with (
        aiotrt.load(case.path, device=case.device, slots=1, warmup=[case.inputs[i]]) as model,
        Latch(executor_of(model).device.name) as latch,
    ):
        x, good = case.tensor(j), case.tensor(i)
        case.check(j, await model(x))  # the same before there is a latch: see above
        producer = model.stream()
        producer.wait(executor_of(model).device.current_stream().record())
        latch.hold(producer)
        producer.run(lambda: x.copy_(good))
        x._trt_ready_event = producer.record()  # type: ignore[attr-defined]
        call = asyncio.ensure_future(model(x))
        await turns(200)
        assert not call.done()
        latch.open()
        result = await call
        await aiotrt.wait(result)
        case.check(i, result)
        producer.close()


@pytest.mark.parametrize("name", [on_gpu("recogniser"), on_gpu("resnet50")])
async def test_a_graph_on_the_callers_own_buffer(case: Case) -> None:
    i, j = case.small[:2]
    async with aiotrt.load(case.path, device=case.device, slots=1) as model:
        x = case.tensor(i)
        x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
        case.check(i, await model(x))
        x.copy_(case.tensor(j))
        case.check(j, await model(x))
        case.check(i, await model(case.inputs[i]))
        assert model.statistics().captures == 2
        assert model.statistics().fallbacks == ()


@pytest.mark.parametrize("name", ["double", on_gpu("recogniser")])
async def test_cancelled_calls_harm_nobody(case: Case) -> None:
    async with aiotrt.load(case.path, device=case.device, slots=2, warmup=case.inputs[:3]) as model:

        async def caller(number: int) -> None:
            call = asyncio.ensure_future(model(case.inputs[number] if number % 4 < 2 else case.tensor(number)))
            if number % 2:
                await turns(number % 11)
                call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                case.check(number, await call)

        for _ in range(3):
            await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        await until(lambda: count(model, State.FREE) == 2)
        for i in range(3):
            case.check(i, await model(case.inputs[i]))


# Memory...


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory: what torch has handed out, and what everybody but torch's allocator holds."""

    torch: int
    others: int

    @classmethod
    def now(cls, device: str) -> Memory:
        gc.collect()
        if device == "host":
            return cls(0, 0)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return cls(torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved())


@pytest.mark.parametrize("name", ["double", on_gpu("recogniser")])
async def test_memory_is_flat_over_2000_awaits_of_changing_shapes(case: Case) -> None:
    chance = np.random.default_rng(0)
    async with aiotrt.load(case.path, device=case.device, slots=2, warmup=case.inputs[:3]) as model:

        async def caller(awaits: int) -> None:
            for _ in range(awaits):
                i = int(chance.integers(CALLERS))
                case.check(i, await model(case.inputs[i] if chance.integers(2) else case.tensor(i)))

        async def awaits(number: int) -> Memory:
            await asyncio.gather(*(caller(number // 20) for _ in range(20)))
            return Memory.now(case.device)

        await awaits(400)
        before = await awaits(100)
        after = await awaits(2000)
        while after.torch > before.torch:  # a worker thread may hold a call a moment longer; the test's timeout is the bound
            await asyncio.sleep(0)
            after = Memory.now(case.device)
        assert after.others - before.others < 2 << 20  # less than the smallest piece that the driver hands out
        assert model.statistics().captures <= 6
        assert model.statistics().fallbacks == ()


@pytest.mark.parametrize("name", ["double", on_gpu("recogniser")])
async def test_contexts_that_are_given_up_give_their_memory_back(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Room for one graph and three shapes in turn: every call makes a context, and ends one."""
    async with aiotrt.load(case.path, device=case.device, slots=1, graph_cache_entries=1) as model:

        async def rounds(number: int) -> Memory:
            for _ in range(number):
                for i in range(3):
                    case.check(i, await model(case.inputs[i]))
            await until(lambda: model.statistics().graphs == 1)
            return Memory.now(case.device)

        before = await rounds(2)
        after = await rounds(3)
        statistics = model.statistics()
        assert (statistics.captures, statistics.fallbacks) == (15, ())
        assert statistics.evictions >= 13
        if case.device != "host":
            with capsys.disabled():
                print(f"\n  9 contexts made and ended: {after.others - before.others:+,} bytes outside of torch")
        assert after.torch == before.torch
        assert after.others - before.others < 9 << 20  # a context has more than that
