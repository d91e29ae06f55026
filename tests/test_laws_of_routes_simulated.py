"""The short path: calls of a signature that was seen before are as right as all others.

On a simulated device, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.executor import COPY_ON_LOOP_BYTES, MOST_SPARES
from aiotrt.testing import SimulatedDevice, SimulatedGraph, SimulatedStream
from tests.simulated import held_streams
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import load, right, settle, under_schedules
from tests.tools import TwoOutputs, changed, executor_of, frame, turns


async def seen(model: aiotrt.Model, *inputs: Any) -> None:
    """Call it until it takes the short path."""
    for _ in range(3):
        await model(*inputs)
    route = executor_of(model)._route
    assert route is not None
    assert route.matches(inputs)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_inputs_and_results_are_ordered_on_the_stream_of_their_own_caller(group: int, slots: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=slots, warmup=frame(0), overlap=True) as model:
            await seen(model, device.tensor(frame(0)))
            executor = executor_of(model)
            streams = [device.stream(), device.stream()]
            requests = []
            for value in range(8):
                stream = choose.choice(streams)
                with device.use(stream):
                    x = device.tensor(frame(0))
                    stream.run(lambda x=x, value=value: x.fill_(value))  # type: ignore[misc]  # still to be done
                    request = executor.submit((x,), {})
                    assert request.route is not None
                    requests.append((value, stream, request))
            for value, stream, request in requests:
                result = await request
                with device.use(stream):
                    copies: list[torch.Tensor] = []
                    stream.run(lambda result=result, copies=copies: copies.append(result.clone()))  # type: ignore[misc]
                    del result
                await aiotrt.wait(stream.record())
                assert right(device.read(copies[0]), value)
            await settle(model, slots)

    under_schedules(group, program)


@pytest.mark.parametrize("kinds", ["device", "host", "mixed"])
@pytest.mark.parametrize("group", GROUPS)
def test_several_inputs_and_outputs(group: int, kinds: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        def inputs(value: float) -> tuple[Any, Any]:
            x, y = frame(value), frame(2)
            return (
                x if kinds == "host" else device.tensor(x),
                y if kinds != "device" else device.tensor(y),
            )

        async with aiotrt.load(TwoOutputs(), device=device, slots=2, overlap=True, warmup=(frame(0), frame(0))) as model:
            await seen(model, *inputs(0))
            before = model.statistics()
            results = await asyncio.gather(*[model(*inputs(value)) for value in range(6)])
            for value, result in enumerate(results):
                total, product = (np.asarray(device.read(part) if kinds != "host" else part) for part in result)
                assert (total == value + 2).all()
                assert (product == value * 2).all()
                assert result._fields == ("total", "product")
            after = model.statistics()
            assert after.hits - before.hits == after.replays - before.replays == 6
            assert after.misses == before.misses
            await settle(model, 2)

    under_schedules(group, program)


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize("group", GROUPS)
def test_an_input_that_is_resized_while_it_waits_is_refused(group: int, kind: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
            x: Any = frame(1) if kind == "host" else device.tensor(frame(1))
            await seen(model, x)
            with held_streams(device, *streams_of(model)):
                first = asyncio.ensure_future(model(x))
                await turns()
                late: Any = frame(2) if kind == "host" else device.tensor(frame(2))
                second = asyncio.ensure_future(model(late))
                await turns()
                assert model.statistics().waiting == 1
                if kind == "host":
                    late.resize((3, 2, 1), refcheck=False)
                else:
                    with device.raw():
                        late.unsqueeze_(0)
            assert right(await first if kind == "host" else device.read(await first), 1)
            with pytest.raises(aiotrt.InputError, match="rank 3"):
                await second
            await settle(model, 1)
            assert right(await model(frame(3)), 3)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_torch_tensors_in_host_memory_take_the_short_path(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
            x = torch.from_numpy(frame(1))
            await seen(model, x)
            route = executor_of(model)._route
            assert route is not None
            assert right(await model(torch.from_numpy(frame(2))), 2)
            for other in (
                x.t(),
                x.double(),
                x[None],
                frame(1),
                x.clone().requires_grad_(),
                device.tensor(frame(1)),
                x.to_sparse(),
            ):
                assert not route.matches((other,))
            assert right(await model(x.clone().requires_grad_()), 1)
            await settle(model, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("change", ["gradient", "rank", "order"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_torch_tensor_that_changes_while_it_waits_is_read_as_it_is_then(group: int, change: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
            await seen(model, torch.from_numpy(frame(1)))
            with held_streams(device, *streams_of(model)):
                first = asyncio.ensure_future(model(torch.from_numpy(frame(1))))
                await turns()
                late = torch.from_numpy(frame(2)).clone()
                if change == "order":
                    late[0, 1] = 7.0
                second = asyncio.ensure_future(model(late))
                await turns()
                assert model.statistics().waiting == 1
                if change == "gradient":
                    late.requires_grad_()
                elif change == "rank":
                    late.unsqueeze_(0)
                else:
                    late.set_(late.clone().t().contiguous().t())  # type: ignore[call-overload]  # a tensor is taken too
            assert right(await first, 1)
            if change == "rank":
                with pytest.raises(aiotrt.InputError, match="rank 3"):
                    await second
            else:
                assert np.array_equal(np.asarray(await second), 3 * late.detach().numpy() + 1)
            await settle(model, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_the_short_path_uses_is_not_evicted_for_what_it_does_not(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0), graph_cache_entries=2) as model:
            x = device.tensor(frame(1))
            assert right(await model(frame(1, (1, 3))), 1)
            await seen(model, x)
            before = model.statistics()
            for rows in (3, 4, 5):
                assert right(await model(frame(rows, (rows, 3))), rows)
                assert right(device.read(await model(x)), 1)
            after = model.statistics()
            assert after.misses - before.misses == 3, "the shape that is used most was evicted"

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_result_is_an_input_of_the_next_call(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            y = await model(await model(x))
            assert executor_of(model)._route is not None
            assert right(device.read(y), 4)

    under_schedules(group, program)


@pytest.mark.parametrize("verb", ["launch", "record", "allocate"])
def test_a_device_that_breaks_under_a_short_path_breaks_the_model(verb: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            fault = aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress")
            breaks = mock.Mock(side_effect=fault)
            if verb == "allocate":
                for program in executor_of(model).cache:
                    program.makers = [breaks]
            owner = SimulatedGraph if verb == "launch" else SimulatedStream
            with contextlib.nullcontext() if verb == "allocate" else mock.patch.object(owner, verb, breaks):
                request = executor_of(model).submit((x,), {})
            with pytest.raises(aiotrt.DeviceError, match="it broke"):
                await request
            assert device.fault is fault
            with pytest.raises(aiotrt.ModelBrokenError):
                await model(x)

    under_schedules(0, program)


def test_work_of_a_short_path_that_hangs_gives_no_result() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            await seen(model, device.tensor(frame(0)))
            request = executor_of(model).submit((device.tensor(frame(1)),), {})
            request.query = lambda: False
            with pytest.raises(aiotrt.DeviceHangError):
                await request

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_closing_waits_for_a_call_on_the_short_path(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            await seen(model, device.tensor(frame(0)))
            request = executor_of(model).submit((device.tensor(frame(3)),), {})
            assert request.route is not None
        assert request.done()
        assert right(device.read(await request), 3)

    under_schedules(group, program)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [1024, 4 << 20])
def test_large_results_are_copied_by_a_worker_and_small_ones_are_not(size: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        x = np.ones((1, size // 4), np.float32)
        async with aiotrt.load(lambda x: x + 1, device=device, slots=1, warmup=x, overlap=True) as model:
            executor = executor_of(model)
            for _ in range(2):
                await model(x)
            with mock.patch.object(executor, "_copied", wraps=executor._copied) as copied:
                assert (await model(x) == 2).all()
            assert copied.called == (size > COPY_ON_LOOP_BYTES)

    under_schedules(0, program)


@pytest.mark.parametrize("way", ["the short path", "the long way"])
def test_an_event_is_polled_by_its_probe_and_an_error_of_that_is_confirmed(way: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(3))
            await seen(model, x)
            executor = executor_of(model)
            (slot,) = executor.slots
            for fails in (False, True):
                if way == "the long way":
                    executor._route = executor._likely = None
                confirm = mock.Mock(wraps=slot.confirm)
                query = mock.Mock(side_effect=RuntimeError("an error that is nobody's")) if fails else slot.query
                with changed(slot, "confirm", confirm), changed(slot, "query", query):
                    assert right(device.read(await model(x)), 3)
                    assert confirm.called == fails

    under_schedules(0, program)


def test_a_call_that_cannot_take_its_route_ends_that_route() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), overlap=True, graph_cache_entries=1) as model:
            x = device.tensor(frame(3))
            await seen(model, x)
            executor = executor_of(model)
            for kept in executor.cache.evict((), None):  # as another shape's program would have it
                kept.close()
            assert right(device.read(await model(x)), 3)
            assert executor._route is None
            await seen(model, x)

    under_schedules(0, program)


def test_a_result_says_that_it_is_complete_and_an_observer_when_it_was_seen() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(3))
            await seen(model, x)
            noted: list[Any] = []
            model.observe(noted.append)
            result = await model(x)
            assert device.query(result._trt_produce_event)
            (request,) = noted
            assert request.route is not None
            assert 0.0 < request.times.entered <= request.times.granted <= request.times.seen
            assert request.times.ran > 0.0

    under_schedules(0, program)


@pytest.mark.parametrize("missing", ["inputs", "outputs"])
def test_a_slot_whose_program_has_no_staging_yet_gets_it(missing: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        options: dict[str, Any] = {} if missing == "inputs" else {"outputs": "numpy"}
        async with load(device, slots=2, overlap=True, warmup=frame(0), **options) as model:
            executor = executor_of(model)
            second = executor.cache.get(executor.machine._free[0], (((2, 3),), (), executor.specs.known()))
            assert second is not None
            views = second.input_views if missing == "inputs" else second.output_views
            # As after calls with inputs and results on the device only.
            staged = second.staged_inputs if missing == "inputs" else second.staged_outputs
            views[0] = staged[0] = None
            x = frame(3) if missing == "inputs" else device.tensor(frame(3))
            await seen(model, x)  # in the slot that became free last
            results = await asyncio.gather(model(x), model(x))
            assert all(right(result, 3) for result in results)
            assert staged[0] is not None

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_request_that_has_ended_refers_to_nothing_and_is_used_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            executor = executor_of(model)
            (request,) = executor._spares
            for _ in range(3):
                with held_streams(device, *streams_of(model)):
                    call = asyncio.ensure_future(model(x))
                    await turns()
                    assert executor._spares == []
                    assert executor.slots[0].request is request
                assert right(device.read(await call), 1)
                assert executor._spares == [request]
                assert (list(request.values), list(request.results), request._value) == ([], [], None)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_request_that_somebody_observes_is_not_used_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            executor = executor_of(model)
            executor._spares.clear()
            observed: list[Any] = []
            executor.observer = observed.append
            for _ in range(3):
                assert right(device.read(await model(x)), 1)
            assert len(set(map(id, observed))) == 3
            assert executor._spares == []

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_only_requests_of_the_present_signature_are_used_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0), overlap=True) as model:
            x, other = device.tensor(frame(1)), device.tensor(frame(2)[:1])
            await seen(model, x)
            executor = executor_of(model)
            with held_streams(device, *streams_of(model)):
                call = asyncio.ensure_future(model(x))
                await turns()
            await seen(model, other)
            assert right(device.read(await call), 1)
            assert executor._spares
            assert all(request.route is executor._route for request in executor._spares)
            assert right(device.read(await model(other)), 2)

    under_schedules(group, program)


def test_no_more_requests_are_kept_than_a_bound() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            await asyncio.gather(*[model(x) for _ in range(MOST_SPARES + 3)])
            assert len(executor_of(model)._spares) == MOST_SPARES

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_graph_is_prepared_for_the_next_results(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        prepared: list[int] = []

        def prepare(self: SimulatedGraph, results: Any) -> None:
            prepared.extend(result.data_ptr() for result in results)

        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            await seen(model, x)
            with mock.patch.object(SimulatedGraph, "prepare", prepare):
                results = [await model(x) for _ in range(3)]
            assert prepared[:-1] == [result.data_ptr() for result in results[1:]]

    under_schedules(group, program)


# By name, and with a structure...


def sum_of(parts: dict[str, list[torch.Tensor]], scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {"sum": (parts["a"][0] + parts["a"][1]) * scale}


def named(device: SimulatedDevice, value: float) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return TwoOutputs(), (), {"y": device.tensor(frame(2)), "x": device.tensor(frame(value))}


def nested(device: SimulatedDevice, value: float) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return sum_of, ({"a": [device.tensor(frame(value)), device.tensor(frame(2))]},), {"scale": 3.0}


@pytest.mark.parametrize("form", [named, nested])
@pytest.mark.parametrize("group", GROUPS)
def test_named_and_nested_inputs_take_a_short_path_too(group: int, form: Any) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(form(device, 0)[0], device=device, slots=2, overlap=True) as model:
            executor = executor_of(model)
            for _ in range(3):
                _, values, names = form(device, 0)
                await asyncio.gather(model(*values, **names), model(*values, **names))
            route = executor._nested_route
            assert route is not None
            stream = device.stream()
            requests = []
            for value in range(6):
                with device.use(choose.choice([stream, device.current_stream()])):
                    _, values, names = form(device, 0)
                    x = names["x"] if form is named else values[0]["a"][0]
                    device.current_stream().run(lambda x=x, value=value: x.fill_(value))  # type: ignore[misc]
                    request = executor.submit(values, names)
                    assert request.route is route
                    requests.append((value, device.current_stream(), request))
            for value, where, request in requests:
                result = await request
                total = result[0] if form is named else result["sum"]
                with device.use(where):
                    copies: list[torch.Tensor] = []
                    where.run(lambda total=total, copies=copies: copies.append(total.clone()))  # type: ignore[misc]
                await aiotrt.wait(where.record())
                expected = value + 2 if form is named else (value + 2) * 3
                assert (np.asarray(device.read(copies[0])) == expected).all()
            await settle(model, 2)

    under_schedules(group, program)


@pytest.mark.parametrize(("given", "outputs"), [("device", "numpy"), ("host", "device")])
@pytest.mark.parametrize("group", GROUPS)
def test_a_nested_input_and_a_result_in_different_memory_are_ordered(group: int, given: str, outputs: Any) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(sum_of, device=device, slots=1, overlap=True, outputs=outputs) as model:
            executor = executor_of(model)
            stream = device.stream()
            routes = []
            with device.use(stream):
                for value in range(6):
                    x: Any = frame(value)
                    y: Any = frame(2)
                    if given == "device":
                        x, y = device.tensor(frame(0)), device.tensor(y)
                        stream.run(lambda x=x, value=value: x.fill_(value))  # type: ignore[misc]  # still to be done
                    request = executor.submit(({"a": [x, y]},), {"scale": 3.0})
                    routes.append(request.route)
                    result = (await request)["sum"]
                    assert device.holds(torch.as_tensor(result)) == (outputs == "device")
                    expected = device.read(result) if outputs == "device" else result
                    assert (np.asarray(expected) == (value + 2) * 3).all()
            assert routes[-1] is executor._nested_route is not None
            stream.close()

    under_schedules(group, program)


@pytest.mark.parametrize("form", [named, nested])
def test_a_nested_input_that_is_resized_while_it_waits_is_refused(form: Any) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(form(device, 0)[0], device=device, slots=1, overlap=True) as model:
            _, values, names = form(device, 0)
            for _ in range(3):
                await model(*values, **names)
            assert executor_of(model)._nested_route is not None
            with held_streams(device, *streams_of(model)):
                first = asyncio.ensure_future(model(*values, **names))
                await turns()
                _, values, names = form(device, 1)
                second = asyncio.ensure_future(model(*values, **names))
                await turns()
                late = names["x"] if form is named else values[0]["a"][0]
                with device.raw():
                    late.unsqueeze_(0)
            await first
            with pytest.raises(aiotrt.InputError, match="rank 3"):
                await second
            await settle(model, 1)

    under_schedules(0, program)


@pytest.mark.interpreted
def test_if_a_result_cannot_be_copied_its_call_fails_and_its_slot_goes_on() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), overlap=True) as model:
            await seen(model, frame(0))
            with (
                mock.patch("aiotrt.runtime.executor.own", side_effect=MemoryError),
                pytest.raises(aiotrt.EngineError, match="while its results were copied"),
            ):
                await model(frame(1))
            assert right(await model(frame(2)), 2)
            await settle(model, 1)

    under_schedules(0, program)
