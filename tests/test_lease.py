from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from tests.tools import Affine, Latch, TwoOutputs, count, executor_of, frame, held, turns, until, woken_by_the_loop

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]


async def host(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Device results as an array; the tests may block, the library may not."""
    return await asyncio.to_thread(lambda: tensor.detach().cpu().numpy())


async def test_write_replay_read(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:
        async with model.lease() as slot:
            slot.inputs.x[...] = frame(2)
            result = await slot.replay()
            np.testing.assert_array_equal(await host(result), frame(7))
            assert slot.outputs[0].tensor.data_ptr() == result.data_ptr()
        await until(lambda: count(model, State.FREE) == 2)


async def test_inputs_and_outputs_go_by_position_name_and_attribute(device: str) -> None:
    async with aiotrt.load(TwoOutputs(), device=device, warmup=[(frame(0), frame(0))]) as model, model.lease() as slot:
        assert slot.inputs[0] is slot.inputs["x"] is slot.inputs.x
        assert [buffer.name for buffer in slot.outputs] == ["total", "product"]
        assert (slot.inputs.y.shape, slot.inputs.y.dtype) == ((2, 3), torch.float32)
        slot.inputs.x[...] = 3.0
        slot.inputs["y"][0] = frame(4, (3,))
        slot.inputs[1][1, :] = torch.full((3,), 5.0)
        result = await slot.replay()
        np.testing.assert_array_equal(await host(result.total), [[7, 7, 7], [8, 8, 8]])
        with pytest.raises(KeyError, match="there is no input 'z'; the inputs are x, y"):
            slot.inputs["z"]
        with pytest.raises(IndexError, match="there is no input 2; the inputs are x, y"):
            slot.inputs[2]
        with pytest.raises(AttributeError, match="there is no output 'z'; the outputs are total, product"):
            _ = slot.outputs.z
        with pytest.raises(AttributeError, match=r"write to a buffer with inputs\.x\[\.\.\.\] = value"):
            slot.inputs.x = frame(1)


def swapped(count: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"count": index + 1, "index": count + 2}


async def test_buffers_are_a_sequence_and_their_names_are_all_their_attributes(device: str) -> None:
    """An input whose name is that of a sequence's method could not be written as an attribute."""
    async with aiotrt.load(swapped, device=device, warmup=[(frame(0), frame(0))]) as model, model.lease() as slot:
        slot.inputs.count[...] = 1
        slot.inputs.index[...] = 2
        result = await slot.replay()
        np.testing.assert_array_equal(await host(result["index"]), frame(3))
        assert slot.outputs.count is slot.outputs[0]
        first, second = slot.inputs
        assert (len(slot.inputs), slot.inputs[-1], slot.inputs[:1]) == (2, second, (first,))
        assert second in slot.inputs
        assert slot.outputs[0] not in slot.inputs
        assert [*reversed(slot.inputs)] == [second, first]


async def test_an_input_that_was_not_written_again_keeps_its_value(device: str) -> None:
    async with aiotrt.load(TwoOutputs(), device=device, warmup=[(frame(0), frame(0))]) as model, model.lease() as slot:
        slot.inputs.x[...] = frame(1)
        slot.inputs.y[...] = frame(10)
        for i in range(4):
            slot.inputs.x[...] = frame(i)
            result = await slot.replay()
            np.testing.assert_array_equal(await host(result.total), frame(10 + i))


async def test_staging_memory_can_be_written_without_a_copy(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model, model.lease() as slot:
        array = slot.inputs.x.host.numpy()
        array[...] = 5
        np.testing.assert_array_equal(await host(await slot.replay()), frame(16))


@pytest.mark.parametrize("outputs", ["numpy", "torch"])
async def test_results_on_the_host_if_asked_for(device: str, outputs: str) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:
        async with model.lease(outputs=outputs) as slot:  # type: ignore[arg-type]
            slot.inputs.x[...] = frame(1)
            result = await slot.replay()
            assert isinstance(result, np.ndarray if outputs == "numpy" else torch.Tensor)
            np.testing.assert_array_equal(np.asarray(result), frame(4))
            np.testing.assert_array_equal(slot.outputs[0].host.numpy(), frame(4))


async def test_launch_returns_at_once_and_leaving_lets_it_drain(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            async with model.lease() as slot:
                slot.inputs.x[...] = frame(1)
                event = slot.launch()
                assert not event.query()
                assert count(model, State.IN_FLIGHT) == 1
            assert count(model, State.DRAINING) == 1
            call = asyncio.ensure_future(model(frame(2)))
            await turns(50)
            assert not call.done()
            latch.open()
            assert (await call)[0, 0] == 7


async def test_a_consumer_on_another_stream_gates_the_next_replay(device: str) -> None:
    """Law 4: the slot is granted again while the consumer still reads; the device must wait, and nothing be overwritten."""
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        side = model.stream()
        latch = Latch(executor_of(model).device.name)
        seen = torch.zeros(2, 3, device=executor_of(model).device.torch_device)
        async with model.lease() as slot:
            slot.inputs.x[...] = frame(1)
            output = slot.outputs[0]
            side.wait(slot.launch())
            latch.hold(side)
            side.run(lambda: seen.copy_(output.tensor))
            slot.consumed(side)
        # The lease is over, its consumer has not read yet.
        call = asyncio.ensure_future(model(frame(100)))
        await turns(100)
        latch.open()
        assert (await call)[0, 0] == 301
        await asyncio.to_thread(side.synchronize)
        np.testing.assert_array_equal(await host(seen), frame(4))
        side.close()


async def test_two_consumers_both_gate(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        where = executor_of(model).device
        sides = [model.stream(), model.stream()]
        latches = [Latch(where.name), Latch(where.name)]
        seen = [torch.zeros(2, 3, device=where.torch_device) for _ in sides]
        async with model.lease() as slot:
            slot.inputs.x[...] = frame(1)
            output = slot.outputs[0]
            event = slot.launch()
            for side, latch, copy in zip(sides, latches, seen, strict=True):
                side.wait(event)
                latch.hold(side)
                side.run(lambda copy=copy: copy.copy_(output.tensor))  # type: ignore[misc]
                slot.consumed(side)
        call = asyncio.ensure_future(model(frame(100)))
        latches[0].open()  # one consumer is done; the other must still be waited for
        await asyncio.to_thread(sides[0].synchronize)
        await turns(100)
        latches[1].open()
        await call
        for side, copy in zip(sides, seen, strict=True):
            await asyncio.to_thread(side.synchronize)
            np.testing.assert_array_equal(await host(copy), frame(4))
            side.close()


async def test_models_chain_on_the_device_without_a_host_wait(device: str) -> None:
    async with (
        aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as first,
        aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as second,
    ):
        with held(first) as latch:
            async with second.lease() as b:
                async with first.lease() as a:
                    a.inputs[0][...] = frame(2)
                    a.launch()
                    b.inputs[0][...] = a.outputs[0]
                # The first lease ends while its launch has not even begun.
                replay = asyncio.ensure_future(b.replay())
                await turns(50)
                assert not replay.done()
                again = asyncio.ensure_future(first(frame(50)))
                latch.open()
                np.testing.assert_array_equal(await host(await replay), frame(22))
                assert (await again)[0, 0] == 151


async def test_host_and_device_writes_keep_their_order(device: str) -> None:
    async with (
        aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as first,
        aiotrt.load(TwoOutputs(), device=device, slots=1, warmup=[(frame(0), frame(0))]) as second,
    ):
        async with first.lease() as a, second.lease() as b:
            with held(first) as latch:
                a.inputs[0][...] = frame(2)
                a.launch()
                b.inputs.x[...] = a.outputs[0]
                b.inputs.y[...] = frame(1)
                latch.open()
                np.testing.assert_array_equal(await host((await b.replay()).total), frame(8))


@pytest.mark.parametrize("how", ["assigned", "tensor", "host"])
async def test_what_is_written_last_is_what_is_replayed_on_the_host_device(how: str) -> None:
    async with (
        aiotrt.load(Affine(), device="host", slots=1, warmup=frame(0)) as first,
        aiotrt.load(TwoOutputs(), device="host", slots=1, warmup=[(frame(0), frame(0))]) as second,
        first.lease() as a,
        second.lease() as b,
    ):
        with held(first) as latch:
            a.inputs[0][...] = 1.0
            a.launch()
            b.inputs.x[...] = a.outputs[0]  # waits for that launch
            b.inputs.y.host.fill_(2)  # and this for nothing
            if how == "assigned":
                b.inputs.x[...] = 5.0
            else:
                with pytest.raises(aiotrt.UsageError, match=r"input 'x': what was assigned .* assign this too"):
                    getattr(b.inputs.x, how)
            latch.open()
        await a.replay()
        if how != "assigned":
            await until(lambda: b._hold is not None and b._hold.is_current_idle())
            getattr(b.inputs.x, how).fill_(5)
        np.testing.assert_array_equal((await b.replay()).total, frame(7))


async def test_shapes_can_be_named_or_are_the_usual_ones(device: str) -> None:
    async with aiotrt.load(Affine(), device=device) as model:
        with pytest.raises(aiotrt.InputError, match="shapes are not known yet"):
            model.lease()
        await model(frame(1, (4, 4)))
        async with model.lease() as slot:
            assert slot.inputs.x.shape == (4, 4)
        for shapes in ((2, 2), [(2, 2)], {"x": (2, 2)}, (np.int64(2), np.int32(2))):
            async with model.lease(shapes) as slot:
                assert slot.inputs.x.shape == (2, 2)
        for wrong in ((True, 2), (np.bool_(True), 2), (2.0, 2), (np.float32(2), 2)):
            with pytest.raises(aiotrt.InputError, match="shapes must be tuples of integers"):
                model.lease(wrong)
        with pytest.raises(aiotrt.InputError, match="expected x"):
            model.lease((1, 2, 3))


async def test_misuse_is_told_and_harms_nothing(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        lease = model.lease()
        with pytest.raises(aiotrt.UsageError, match="has not been entered"):
            lease.launch()
        async with lease as slot:
            with pytest.raises(aiotrt.UsageError, match="input 'x' was never written"):
                slot.launch()
            with pytest.raises(aiotrt.UsageError, match="nothing was launched"):
                _ = slot.outputs[0].tensor
            with pytest.raises(aiotrt.UsageError, match="only inputs can be assigned"):
                slot.outputs[0][...] = 1.0
            with pytest.raises(aiotrt.InputError, match="float64"):
                slot.inputs[0][...] = np.zeros((2, 3))
            with pytest.raises(aiotrt.InputError, match=r"shape \(2, 3\), got \(9, 9\)"):
                slot.inputs[0][...] = frame(0, (9, 9))
            with pytest.raises(aiotrt.UsageError, match="expected a "):
                slot.consumed(object())
            with held(model) as latch:
                slot.inputs[0][...] = frame(1)
                slot.launch()
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    slot.inputs[0][...] = frame(2)
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    _ = slot.inputs[0].host
                latch.open()
            np.testing.assert_array_equal(await host(await slot.replay()), frame(4))
            buffer = slot.inputs[0]
        for use in (slot.launch, lambda: buffer.tensor, slot.consumed):
            with pytest.raises(aiotrt.UsageError, match=r"this lease has ended: .*; take another with model.lease"):
                use()
        with pytest.raises(aiotrt.UsageError, match="entered once"):
            await lease.__aenter__()
        assert (await model(frame(1)))[0, 0] == 4


async def test_the_host_device_does_not_hand_out_what_is_not_complete() -> None:
    async with aiotrt.load(Affine(), device="host", slots=1, warmup=frame(0)) as model, model.lease() as slot:
        with held(model) as latch:
            slot.inputs[0][...] = frame(1)
            slot.launch()
            with pytest.raises(aiotrt.UsageError, match=r"output 'output': the last launch is not complete"):
                _ = slot.outputs[0].tensor
            latch.open()
        await until(lambda: count(model, State.READABLE) == 1)
        np.testing.assert_array_equal(slot.outputs[0].tensor.numpy(), frame(4))


async def test_a_consumer_that_raises_still_releases(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with pytest.raises(ZeroDivisionError):
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                raise ZeroDivisionError
        assert (await model(frame(1)))[0, 0] == 4


async def test_a_forgotten_lease_warns_and_its_slot_comes_back(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        for launched in (False, True):
            slot = await model.lease().__aenter__()
            if launched:
                slot.inputs[0][...] = frame(1)
                slot.launch()
            with pytest.warns(ResourceWarning, match="was never left"):
                del slot
                gc.collect()
            assert (await model(frame(2)))[0, 0] == 7


async def test_a_lease_keeps_its_model_alive(device: str) -> None:
    async def use() -> object:
        async with (await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))).lease(outputs="numpy") as slot:
            gc.collect()
            slot.inputs[0][...] = frame(1)
            return (await slot.replay())[0, 0]

    with pytest.warns(ResourceWarning, match="was never closed: use 'async with'"):
        assert await use() == 4
        gc.collect()


async def test_cancelling_a_replay_keeps_the_lease_and_leaving_drains(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                replay = asyncio.ensure_future(slot.replay())
                await turns()
                replay.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await replay
                assert count(model, State.IN_FLIGHT) == 1
            assert count(model, State.DRAINING) == 1
            latch.open()
        assert (await model(frame(2)))[0, 0] == 7


async def test_cancelling_the_wait_for_a_lease_gives_the_place_up(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        async with model.lease():
            waiting = asyncio.ensure_future(model.lease().__aenter__())
            await turns()
            assert model.statistics().waiting == 1
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert model.statistics().waiting == 0
        assert (await model(frame(2)))[0, 0] == 7


async def test_a_lease_that_two_wait_to_enter_is_one_lease(device: str) -> None:
    """Both were granted a slot, and the first one's stayed claimed for ever."""
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:
        lease = model.lease()
        async with model.lease(), model.lease():
            first, second = (asyncio.ensure_future(lease.__aenter__()) for _ in range(2))
            await turns()
            with pytest.raises(aiotrt.UsageError, match="entered once; ask the model for another one"):
                second.result()
        await first
        assert count(model, State.CLAIMED) == 1
        await lease.__aexit__(None, None, None)
        await until(lambda: count(model, State.FREE) == 2)


async def test_granted_and_cancelled_in_the_same_turn_loses_no_slot(device: str) -> None:
    """The grant of a lease resolves its future. The cancellation comes before the task that waits for it has run."""
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        async with model.lease():
            waiting = asyncio.ensure_future(model.lease().__aenter__())
            await turns()
            assert model.statistics().waiting == 1
            stack = contextlib.ExitStack()
            stack.enter_context(woken_by_the_loop())
        # Leaving released the slot. Where its last readers delay the grant, a poll sees it before the task runs.
        with stack:
            await until(lambda: count(model, State.CLAIMED) == 1)
        assert model.statistics().waiting == 0
        assert not waiting.done(), "the task has run: this is not the state to be tested"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert count(model, State.FREE) == 1, "the slot stayed with a lease that nobody entered"
        assert (await model(frame(2)))[0, 0] == 7


async def test_several_launches_in_flight_end_with_the_last(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        with held(model) as latch:
            events = [slot.launch() for _ in range(3)]
            assert len({id(event) for event in events}) == 3
            assert not any(event.query() for event in events)
            latch.open()
        np.testing.assert_array_equal(await host(await slot.replay()), frame(4))
        assert all(event.query() for event in events)
        assert count(model, State.READABLE) == 1


async def test_without_a_graph_leases_work_too(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, graphs=False, warmup=frame(0)) as model:
        async with model.lease(outputs="numpy") as slot:
            for i in range(3):
                slot.inputs[0][...] = frame(i)
                np.testing.assert_array_equal(await slot.replay(), frame(3 * i + 1))
            slot.inputs[0][...] = frame(9)
            slot.launch()
        assert (await model(frame(2)))[0, 0] == 7


async def test_lease_and_calls_share_the_line_fairly(device: str) -> None:
    order: list[str] = []

    async def call(i: int) -> None:
        await model(frame(i))
        order.append(f"call {i}")

    async def lease(i: int) -> None:
        async with model.lease():
            order.append(f"lease {i}")

    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            tasks = [asyncio.ensure_future(call(0))]
            await turns()
            for i in range(1, 4):
                tasks += [asyncio.ensure_future(lease(i)), asyncio.ensure_future(call(i))]
                await turns()
            latch.open()
            await asyncio.gather(*tasks)
    # The slot goes to the next in line just before the one who is done with it hears of it, so that it is never idle.
    assert order == ["lease 1", "call 0", "lease 2", "call 1", "lease 3", "call 2", "call 3"]


async def test_warnings_are_for_forgotten_leases_only(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
            del slot
            gc.collect()


# As arrays...


@pytest.mark.parametrize("outputs", ["numpy", "torch"])
async def test_buffers_are_arrays_where_the_host_may_read_them(device: str, outputs: Any) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        async with model.lease(outputs=outputs) as slot:
            x, y = slot.inputs[0], slot.outputs[0]
            with pytest.raises(aiotrt.UsageError, match="nothing was launched"):
                np.asarray(y)
            np.asarray(x)[...] = 2
            with held(model):
                slot.launch()
                with pytest.raises(aiotrt.UsageError, match=r"output 'output': the last launch is not complete.*await it"):
                    np.asarray(y)
            await slot.replay()
            array = np.asarray(y)
            np.testing.assert_array_equal(array, frame(7))
            assert array.dtype == np.float32
            assert np.shares_memory(array, y.host.numpy())
            assert not np.shares_memory(np.array(y), array)
            assert np.asarray(y, np.float64).dtype == np.float64
            assert np.allclose(y, 7)
        with pytest.raises(aiotrt.UsageError, match="this lease has ended"):
            np.asarray(y)


@pytest.mark.gpu
async def test_an_output_on_the_device_only_is_no_array_and_says_what_to_use() -> None:
    async with aiotrt.load(Affine(), device="cuda", warmup=frame(0)) as model, model.lease() as slot:
        slot.inputs.x[...] = frame(1)
        await slot.replay()
        with pytest.raises(
            aiotrt.UsageError, match=r"on the device only: use its tensor there, or lease with outputs='torch'"
        ):
            np.asarray(slot.outputs[0])


async def test_bfloat16_buffers_are_copies_for_numpy(device: str) -> None:
    async with aiotrt.load(lambda x: x.to(torch.bfloat16), device=device, warmup=frame(0)) as model:
        async with model.lease(outputs="numpy") as slot:
            slot.inputs.x[...] = frame(1.5)
            await slot.replay()
            assert np.asarray(slot.outputs[0]).dtype == np.float32
            np.testing.assert_array_equal(np.asarray(slot.outputs[0]), frame(1.5))
            if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
                with pytest.raises(ValueError, match="bfloat16, which numpy lacks"):
                    np.asarray(slot.outputs[0], copy=False)


async def test_buffers_speak_dlpack(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        async with model.lease() as slot:
            slot.inputs.x[...] = frame(1)
            with pytest.raises(aiotrt.UsageError, match="nothing was launched"):
                torch.utils.dlpack.from_dlpack(slot.outputs[0])
            await slot.replay()
            tensor = torch.utils.dlpack.from_dlpack(slot.outputs[0])
            assert tensor.data_ptr() == slot.outputs[0].tensor.data_ptr()
            assert tensor.device == executor_of(model).device.torch_device
            np.testing.assert_array_equal(await host(tensor), frame(4))
            if device == "host":
                np.testing.assert_array_equal(np.from_dlpack(slot.outputs[0]), frame(4))
        with pytest.raises(aiotrt.UsageError, match="this lease has ended"):
            torch.utils.dlpack.from_dlpack(slot.outputs[0])


async def test_a_buffer_is_an_input_of_another_model(device: str) -> None:
    async with (
        aiotrt.load(Affine(), device=device, warmup=frame(0)) as first,
        aiotrt.load(lambda parts: parts[0] + 1, device=device) as second,
        first.lease() as slot,
    ):
        slot.inputs.x[...] = frame(1)
        with pytest.raises((aiotrt.InputError, aiotrt.UsageError), match="nothing was launched"):
            await second([slot.outputs[0]])
        await slot.replay()
        for _ in range(3):
            result = await second([slot.outputs[0]])
            np.testing.assert_array_equal(torch.as_tensor(result).cpu(), frame(5))


async def test_the_cuda_array_interface_is_there_on_cuda_only(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
        slot.inputs.x[...] = frame(1)
        await slot.replay()
        output = slot.outputs[0]
        if device == "host":
            assert not hasattr(output, "__cuda_array_interface__")
            with pytest.raises(AttributeError, match=r"<Buffer output: float32 \(2, 3\)> is in host memory: use np.asarray"):
                _ = output.__cuda_array_interface__
        else:
            description = output.__cuda_array_interface__
            assert description["data"][0] == output.tensor.data_ptr()
            assert description["stream"] not in (None, 0)
            np.testing.assert_array_equal(await host(torch.as_tensor(output, device=device)), frame(4))
