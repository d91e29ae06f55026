from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.executor import COPY_ON_LOOP_BYTES
from aiotrt.runtime.slots import State
from tests.tools import Affine, TwoOutputs, count, executor_of, frame, held, turns, until

pytestmark = pytest.mark.asyncio


def is_idle(model: aiotrt.Model) -> bool:
    statistics = model.statistics()
    return statistics.free == len(executor_of(model).slots) and statistics.waiting == 0


async def test_a_checksum_that_nothing_is_checked_against_is_refused(device: str) -> None:
    with pytest.raises(aiotrt.InputError, match="sha256 is for files, and the engine is of type Affine"):
        _ = aiotrt.load(Affine(), device=device, sha256="0" * 64)


async def test_each_caller_gets_the_result_of_its_own_input(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=3) as model:
        results = await asyncio.gather(*(model(frame(i)) for i in range(200)))
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, frame(3 * i + 1))
        assert is_idle(model)


async def test_shapes_may_change_from_call_to_call(device: str) -> None:
    shapes = [(random.Random(i).randint(1, 5), random.Random(-i).randint(1, 7)) for i in range(60)]
    async with aiotrt.load(Affine(), device=device, slots=2) as model:
        results = await asyncio.gather(*(model(frame(i, shape)) for i, shape in enumerate(shapes)))
        for i, (shape, result) in enumerate(zip(shapes, results, strict=True)):
            np.testing.assert_array_equal(result, frame(3 * i + 1, shape))


async def test_results_come_back_as_what_went_in(device: str) -> None:
    async with aiotrt.load(Affine(), device=device) as model:
        assert isinstance(await model(frame(1)), np.ndarray)
        result = await model(torch.ones(2, 3))
        assert isinstance(result, torch.Tensor)
        assert result.device.type == "cpu"


@pytest.mark.parametrize(("outputs", "kind"), [("numpy", np.ndarray), ("torch", torch.Tensor), ("device", torch.Tensor)])
async def test_load_can_fix_the_kind_of_results(device: str, outputs: Any, kind: type) -> None:
    async with aiotrt.load(Affine(), device=device, outputs=outputs) as model:
        assert isinstance(await model(torch.ones(2, 3)), kind)
        assert isinstance(await model(frame(1)), kind)


async def test_one_output_is_bare_and_several_are_a_named_tuple(device: str) -> None:
    async with aiotrt.load(TwoOutputs(), device=device) as model:
        result = await model(frame(2), y=frame(5))
        assert result._fields == ("total", "product")
        np.testing.assert_array_equal(result.total, frame(7))
        np.testing.assert_array_equal(result.product, frame(10))


async def test_results_belong_to_the_caller(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        results = [await model(frame(i)) for i in range(5)]
        results[0][...] = -1
        for i, result in enumerate(results[1:], 1):
            np.testing.assert_array_equal(result, frame(3 * i + 1))


async def test_awaiting_a_model_opens_it_and_aclose_closes_it(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device)
    assert model.is_ready
    np.testing.assert_array_equal(await model(frame(1)), frame(4))
    await model.aclose()
    assert not getattr(model, "is_ready")  # noqa: B009  # it changes, and mypy takes a property for a constant
    await model.aclose()


async def test_several_tasks_may_await_one_model(device: str) -> None:
    model = aiotrt.load(Affine(), device=device)

    async def use(i: int) -> None:
        opened = await model
        assert opened is model
        np.testing.assert_array_equal(await model(frame(i)), frame(3 * i + 1))

    await asyncio.gather(*(use(i) for i in range(8)))
    await model.aclose()


async def test_warmup_captures_each_shape_on_each_slot(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=3, warmup=[frame(0, (1, 2)), frame(0, (4, 2))]) as model:
        assert model.statistics().captures == model.statistics().graphs == 6
        await asyncio.gather(*(model(frame(i, (1, 2))) for i in range(20)))
        assert model.statistics().captures == 6
        assert model.statistics().replays == 20
        await model.warmup((5, 2))
        assert model.statistics().captures == 9


async def test_warmups_at_the_same_time_do_not_wait_for_each_other_for_ever(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0)) as model:
        await asyncio.gather(*(model.warmup((i, 3)) for i in range(3, 7)), *(model(frame(i)) for i in range(20)))
        assert model.statistics().graphs == 10


async def test_preprocess_and_postprocess_are_part_of_the_graph(device: str) -> None:
    def normalise(image: torch.Tensor) -> torch.Tensor:
        return image.permute(2, 0, 1).float() / 255

    def score(y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": y.mean(), "top": y.max()}

    async with aiotrt.load(Affine(), device=device, preprocess=normalise, postprocess=score) as model:
        result = await model(np.full((4, 5, 3), 255, np.uint8))
        assert result == {"mean": 4.0, "top": 4.0}
        assert result["mean"].shape == ()
        assert model.statistics().replays == 1
        assert model.statistics().fallbacks == ()


async def test_without_graphs_it_runs_all_the_same_and_says_so(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, graphs=False) as model:
        results = await asyncio.gather(*(model(frame(i)) for i in range(20)))
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, frame(3 * i + 1))
        statistics = model.statistics()
        assert (statistics.replays, statistics.fallback_runs) == (0, 20)
        assert statistics.fallbacks == ("graphs=False",)


async def test_map_gives_results_in_order(device: str) -> None:
    async with aiotrt.load(Affine(), device=device) as model:
        values = [result[0, 0] async for result in model.map(frame(i) for i in range(50))]
        assert values == [3 * i + 1 for i in range(50)]


async def test_map_takes_asynchronous_iterables_tuples_and_dicts(device: str) -> None:
    async def frames() -> AsyncIterator[object]:
        for i in range(20):
            await asyncio.sleep(0)
            yield (frame(i), frame(1)) if i % 2 else {"x": frame(i), "y": frame(1)}

    async with aiotrt.load(TwoOutputs(), device=device) as model:
        totals = [result.total[0, 0] async for result in model.map(frames())]
        assert totals == [i + 1 for i in range(20)]


async def test_a_map_takes_all_items_of_a_source_in_one_context(device: str) -> None:
    span: ContextVar[str] = ContextVar("span", default="none")
    seen = []

    async def frames() -> AsyncIterator[object]:
        token = span.set("span")
        try:
            for i in range(3):
                await asyncio.sleep(0)
                seen.append(span.get())
                yield frame(i)
        finally:
            span.reset(token)

    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:
        assert [result[0, 0] async for result in model.map(frames())] == [1, 4, 7]
    assert seen == ["span"] * 3
    assert span.get() == "none"


@pytest.mark.parametrize("in_flight", [0, 2.5, "3", True])
async def test_a_map_whose_bound_is_none(device: str, in_flight: Any) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:
        with pytest.raises(aiotrt.InputError, match=f"in_flight must be an integer of at least 1, got {in_flight!r}"):
            await anext(model.map([frame(1)], in_flight=in_flight))


async def test_map_is_bounded(device: str) -> None:
    taken = 0

    def frames() -> Iterator[object]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield frame(i)

    async with aiotrt.load(Affine(), device=device, max_queue=0) as model:
        fetched = 0
        async for _ in model.map(frames(), in_flight=5):
            fetched += 1
            assert taken - fetched <= 5
        assert fetched == 100


async def test_a_map_takes_no_place_in_line(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, max_queue=1, warmup=frame(0)) as model:
        results = model.map(map(frame, range(6)), in_flight=4)
        with held(model):
            first = asyncio.ensure_future(anext(results))
            await turns()
            call = asyncio.ensure_future(model(frame(9)))
            await turns()
            assert model.statistics().waiting == 4
            with pytest.raises(aiotrt.QueueFullError, match="1 of 1 slots are busy and 1 of max_queue=1 places"):
                await model(frame(8))
        assert [(await first)[0, 0], *[result[0, 0] async for result in results]] == [1, 4, 7, 10, 13, 16]
        assert (await call)[0, 0] == 28
        assert model.statistics().rejected == 1


async def test_map_delivers_what_came_before_a_failure_and_then_the_failure(device: str) -> None:
    def frames() -> Iterator[object]:
        yield frame(0)
        yield frame(1)
        raise OSError("camera gone")

    async with aiotrt.load(Affine(), device=device) as model:
        seen = []
        with pytest.raises(OSError, match="camera gone"):
            async for result in model.map(frames()):
                seen.append(result[0, 0])
        assert seen == [1, 4]
        with pytest.raises(aiotrt.InputError):
            async for result in model.map([frame(2), "no", frame(3)]):
                seen.append(result[0, 0])
        assert seen == [1, 4, 7]
        await until(lambda: is_idle(model))


async def test_leaving_a_map_early_leaves_nothing_behind(device: str) -> None:
    async def endless() -> AsyncIterator[object]:
        while True:
            await asyncio.sleep(0)
            yield frame(1)

    async with aiotrt.load(Affine(), device=device) as model:
        results = model.map(endless(), in_flight=8)
        async for _ in results:
            break
        await results.aclose()
        await until(lambda: is_idle(model))


async def test_a_slow_source_does_not_hold_back_results(device: str) -> None:
    release = asyncio.Event()

    async def frames() -> AsyncIterator[object]:
        yield frame(1)
        await release.wait()
        yield frame(2)

    async with aiotrt.load(Affine(), device=device) as model:
        results = model.map(frames(), in_flight=4)
        assert (await anext(results))[0, 0] == 4
        release.set()
        assert (await anext(results))[0, 0] == 7
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_a_full_queue_refuses_and_says_so(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, max_queue=1, warmup=frame(0)) as model:
        with held(model) as latch:
            first, second = asyncio.ensure_future(model(frame(1))), asyncio.ensure_future(model(frame(2)))
            await turns()
            with pytest.raises(aiotrt.QueueFullError, match="1 of 1 slots are busy and 1 of max_queue=1 places"):
                await model(frame(3))
            latch.open()
            assert (await first)[0, 0] == 4
            assert (await second)[0, 0] == 7
        assert model.statistics().rejected == 1


async def test_a_queue_bound_of_zero_means_a_free_slot_or_nothing(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, max_queue=0, warmup=frame(0)) as model:
        with held(model) as latch:
            first = asyncio.ensure_future(model(frame(1)))
            await turns()
            with pytest.raises(aiotrt.QueueFullError):
                await model(frame(2))
            latch.open()
            await first
        assert (await model(frame(2)))[0, 0] == 7


async def test_a_call_does_not_complete_before_the_device_is_done(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(frame(1)))
            await turns(200)
            assert not call.done()
            assert count(model, State.IN_FLIGHT) == 1
            latch.open()
            assert (await call)[0, 0] == 4


async def test_statistics_are_frozen_and_repr_counts(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0)) as model:
        statistics = model.statistics()
        with pytest.raises(AttributeError):
            statistics.free = 3  # type: ignore[misc]
        assert "2 free; 0 waiting" in repr(model)
        with held(model) as latch:
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            assert "1 free, 1 in_flight; 0 waiting" in repr(model)
            latch.open()
            await call
    assert "closed" in repr(model)


async def test_graph_cache_is_bounded_and_results_stay_right(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=2, graph_cache_entries=4) as model:
        for _ in range(3):
            results = await asyncio.gather(*(model(frame(i, (1, i + 1))) for i in range(12)))
            for i, result in enumerate(results):
                np.testing.assert_array_equal(result, frame(3 * i + 1, (1, i + 1)))
            assert model.statistics().graphs <= 4
        assert model.statistics().evictions > 0


async def test_graph_cache_is_bounded_in_bytes(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, graph_cache_bytes=3000) as model:
        for extent in range(1, 20):
            await model(frame(1, (extent, 10)))
        assert model.statistics().graph_bytes <= 3000


async def test_two_models_share_a_loop(device: str) -> None:
    async with aiotrt.load(Affine(), device=device) as first, aiotrt.load(TwoOutputs(), device=device) as second:
        ones, twos = await asyncio.gather(
            asyncio.gather(*(first(frame(i)) for i in range(30))),
            asyncio.gather(*(second(frame(i), frame(1)) for i in range(30))),
        )
        assert [result[0, 0] for result in ones] == [3 * i + 1 for i in range(30)]
        assert [result.total[0, 0] for result in twos] == [i + 1 for i in range(30)]


async def test_the_loop_runs_on_while_a_model_captures(device: str) -> None:
    """A capture that ends only after the loop has had a hundred turns: it would wait for ever, if it held the loop."""
    turned = threading.Event()

    class Patient(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert turned.wait(30)
            return x * 3 + 1

    async def turn() -> None:
        while True:
            turned.clear()
            await turns(100)
            turned.set()
            await turns(100)

    task = asyncio.ensure_future(turn())
    async with aiotrt.load(Patient(), device=device, slots=1, warmup=frame(0)) as model:
        assert (await model(frame(1, (9, 9))))[0, 0] == 4
    task.cancel()


async def test_large_inputs_and_outputs_are_copied_off_the_loop_and_are_right(device: str) -> None:
    big = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    async with aiotrt.load(Affine(), device=device, slots=2) as model:
        results = await asyncio.gather(*(model(big + i) for i in range(6)))
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, (big + i) * np.float32(3) + np.float32(1))


@pytest.mark.parametrize(
    ("nbytes", "copied_in"),
    [(COPY_ON_LOOP_BYTES, State.IN_FLIGHT), (COPY_ON_LOOP_BYTES + 4, State.PREPARING)],
    ids=["on the loop", "by a worker"],
)
async def test_who_copies_an_input_depends_on_its_size(device: str, nbytes: int, copied_in: State) -> None:
    big = frame(2, (nbytes // 4,))
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=big) as model:
        await model(big)  # so that there is page-locked memory for it
        with held(model) as latch:
            call = asyncio.ensure_future(model(big))
            await asyncio.sleep(0)
            assert executor_of(model).machine.states == [copied_in]
            latch.open()
            assert (await call == 7).all()


async def test_wait_for_the_event_of_a_launch(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        async with model.lease() as slot:
            slot.inputs.x[...] = frame(2)
            with held(model) as latch:
                event = slot.launch()
                waiting = asyncio.ensure_future(aiotrt.wait(event))
                await turns(50)
                assert not waiting.done()
                latch.open()
                await waiting


async def test_a_model_says_how_many_slots_it_has_and_what_it_gives(device: str) -> None:
    model: aiotrt.Model = aiotrt.load(lambda x: x + 1, device=device, slots=3, warmup=frame(0))
    for ask in (lambda: model.slots, lambda: model.outputs, lambda: model.observe(None)):
        with pytest.raises(aiotrt.ModelClosedError, match="is not open"):
            ask()
    async with model:
        assert model.slots == 3
        assert model.outputs is None, "a function does not declare it"


async def test_a_map_has_a_progress_bar_of_tqdm(device: str) -> None:
    asyncio_bar = pytest.importorskip("tqdm.asyncio").tqdm

    async def frames() -> AsyncIterator[object]:
        for i in range(7):
            yield frame(i)

    async with aiotrt.load(Affine(), device=device) as model:
        for source in ([frame(i) for i in range(7)], frames()):
            shown = io.StringIO()
            bar = asyncio_bar(model.map(source), total=7, file=shown, mininterval=0)
            values = [float(result[0, 0]) async for result in bar]
            assert values == [3.0 * i + 1 for i in range(7)]
            assert bar.n == 7
            assert "7/7" in shown.getvalue()
        bar = asyncio_bar(model.map(frame(i) for i in range(7)), file=io.StringIO(), disable=True)
        async for result in bar:
            assert result[0, 0] == 1
            break
        await model.aclose()  # what the map had under way is abandoned, or ends
