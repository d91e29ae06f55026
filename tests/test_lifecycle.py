from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch

import aiotrt
from aiotrt.completion.hub import _hubs
from aiotrt.devices.host import HostDevice
from aiotrt.runtime.slots import State
from tests.tools import Affine, Latch, count, executor_of, frame, held, interruptible, turns, until

pytestmark = pytest.mark.every_loop
asyncio_test = pytest.mark.asyncio


@asyncio_test
async def test_before_open_and_after_close(device: str) -> None:
    model = aiotrt.load(Affine(), device=device)
    for use in (model.statistics, model.lease, model.stream, lambda: model.inputs):
        with pytest.raises(aiotrt.ModelClosedError, match="Affine is not open: use 'async with"):
            use()
    with pytest.raises(aiotrt.ModelClosedError, match="is not open"):
        await model(frame(1))
    async with model:
        await model(frame(1))
    with pytest.raises(aiotrt.ModelClosedError, match="Affine is closed: load it again"):
        await model(frame(1))
    with pytest.raises(aiotrt.ModelClosedError, match="is closed: load it again"):
        _ = await model
    await model.aclose()


@pytest.mark.parametrize("wrong", [0, None, "gpu"])
@asyncio_test
async def test_what_is_no_device_is_refused(wrong: Any) -> None:
    with pytest.raises(aiotrt.UsageError, match=rf"unknown device {wrong!r}.*; expected 'auto', 'host', 'cuda', "):
        _ = await aiotrt.load(Affine(), device=wrong)


@asyncio_test
async def test_a_device_whose_time_is_not_the_loops_is_refused() -> None:
    class Elsewhere(HostDevice):
        def check_loop(self) -> None:
            raise aiotrt.UsageError("not on this loop")

    with pytest.raises(aiotrt.UsageError, match="not on this loop"):
        _ = await aiotrt.load(Affine(), device=Elsewhere())


@asyncio_test
async def test_closing_a_model_that_was_never_opened(device: str) -> None:
    model = aiotrt.load(Affine(), device=device)
    await model.aclose()
    with pytest.raises(aiotrt.ModelClosedError):
        _ = await model


@asyncio_test
async def test_closing_drains_what_waits_and_what_runs(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    with held(model) as latch:
        calls = [asyncio.ensure_future(model(frame(i))) for i in range(4)]
        await turns()
        closing = asyncio.ensure_future(model.aclose())
        await turns()
        with pytest.raises(aiotrt.ModelClosedError):
            await model(frame(9))
        assert not closing.done()
        latch.open()
        assert [(await call)[0, 0] for call in calls] == [1, 4, 7, 10]
        await closing


@asyncio_test
async def test_closing_without_draining_fails_who_waits_and_lets_the_device_finish(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    with held(model) as latch:
        calls = [asyncio.ensure_future(model(frame(i))) for i in range(4)]
        await turns()
        closing = asyncio.ensure_future(model.aclose(drain=False))
        for call in calls:
            with pytest.raises(aiotrt.ModelClosedError, match="was closed while this call waited"):
                await call
        await turns(50)
        assert not closing.done()
        latch.open()
        await closing


@asyncio_test
async def test_closing_again_without_draining_hurries_the_first(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    with held(model) as latch:
        call, waiting = (asyncio.ensure_future(model(frame(i))) for i in range(2))
        await turns()
        first = asyncio.ensure_future(model.aclose())
        await turns()
        second = asyncio.ensure_future(model.aclose(drain=False))
        for future in (call, waiting):
            with pytest.raises(aiotrt.ModelClosedError):
                await future
        latch.open()
        await asyncio.gather(first, second)


@asyncio_test
async def test_closing_revokes_leases_when_it_does_not_drain(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    async with model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        with held(model) as latch:
            replay = asyncio.ensure_future(slot.replay())
            await turns()
            closing = asyncio.ensure_future(model.aclose(drain=False))
            with pytest.raises(aiotrt.ModelClosedError):
                await replay
            latch.open()
            await closing
        with pytest.raises(aiotrt.ModelClosedError, match="and this lease with it"):
            slot.launch()


@asyncio_test
async def test_a_cancelled_close_can_be_awaited_again(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    with held(model) as latch:
        call = asyncio.ensure_future(model(frame(1)))
        await turns()
        closing = asyncio.ensure_future(model.aclose())
        await turns()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        latch.open()
        await call
        await model.aclose()


@asyncio_test
async def test_leaving_a_block_in_a_scope_that_was_cancelled_closes(device: str) -> None:
    with anyio.CancelScope() as scope:
        async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await until(lambda: repr(model) == "<aiotrt.Model Affine: closed>")


def test_the_end_of_a_loop_ends_a_closing(device: str) -> None:
    async def main() -> tuple[aiotrt.Model, aiotrt.Lease]:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        lease = await model.lease().__aenter__()
        closing = asyncio.ensure_future(model.aclose())
        await turns()
        closing.cancel()
        return model, lease

    model, _ = asyncio.run(main())
    assert repr(model) == "<aiotrt.Model Affine: closed>"


def test_a_loop_that_is_closed_under_a_closing() -> None:
    latch = Latch("host")

    async def main() -> aiotrt.Model:
        model = await aiotrt.load(Affine(), device=HostDevice(), slots=1, warmup=frame(0))
        latch.hold(executor_of(model).slots[0].stream)
        for use in (model(frame(1)), model.aclose()):
            task = asyncio.ensure_future(use)
            await turns()
            task.cancel()
            await asyncio.wait([task])
        return model

    async def again() -> None:  # what waits at the old loop's hub is dropped when there is another loop
        async with aiotrt.load(Affine(), device="host") as other:
            assert (await other(frame(2)))[0, 0] == 7

    told: list[object] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    forgotten = weakref.ref(loop.run_until_complete(main()))
    loop.close()
    latch.open()
    assert "1 draining" in repr(forgotten())
    asyncio.run(again())
    gc.collect()  # which warns of nothing: it was being closed
    assert forgotten() is None
    assert told == []


@asyncio_test
async def test_an_exception_in_the_block_closes_without_waiting_for_the_line(device: str) -> None:
    calls: list[asyncio.Future[object]] = []
    with pytest.raises(ZeroDivisionError):
        async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
            with held(model):
                calls += [asyncio.ensure_future(model(frame(i))) for i in range(3)]
                await turns()
            raise ZeroDivisionError
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, aiotrt.ModelClosedError) for outcome in outcomes[1:])


class Slow(torch.nn.Module):
    """Runs until it is told to end, on a worker thread."""

    def __init__(self) -> None:
        super().__init__()
        self.latch = Latch("host")
        self.entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._loop.call_soon_threadsafe(self.entered.set)
        self.latch._opened.wait()
        return x


async def _opened(model: aiotrt.Model) -> bool:
    return await model is model


@asyncio_test
async def test_cancelling_a_load_returns_at_once_and_leaves_nothing(device: str) -> None:
    slow = Slow()
    model = aiotrt.load(slow, device=device, warmup=frame(0))
    task = asyncio.ensure_future(_opened(model))
    await slow.entered.wait()
    task.cancel()
    await turns()
    assert task.cancelled()
    assert not model.is_ready
    slow.latch.open()
    await model.aclose()
    with pytest.raises(aiotrt.ModelClosedError):
        await model(frame(1))
    assert not [hub for (owner, _), hub in _hubs.items() if owner is asyncio.get_running_loop()]


def test_the_end_of_a_loop_ends_a_load_that_was_cancelled(device: str) -> None:
    async def main() -> aiotrt.Model:
        slow = Slow()
        model = aiotrt.load(slow, device=device, warmup=frame(0))
        task = asyncio.ensure_future(_opened(model))
        await slow.entered.wait()
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, slow.latch.open)
        task.cancel()
        return model

    assert repr(asyncio.run(main())) == "<aiotrt.Model Slow: closed>"


@asyncio_test
async def test_a_load_that_fails_as_the_last_who_waits_is_cancelled_is_no_news(device: str) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("it does not work")

    async def give_up() -> None:
        model = aiotrt.load(broken, device=device, warmup=frame(0))
        waiting = asyncio.ensure_future(_opened(model))
        await turns(1)
        assert model._opening is not None
        model._opening.add_done_callback(lambda _: waiting.cancel())  # told, and its task has not run yet
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    await give_up()
    gc.collect()
    assert told == []


@asyncio_test
async def test_whoever_waits_for_a_load_is_told_that_the_model_was_closed(device: str) -> None:
    slow = Slow()
    model = aiotrt.load(slow, device=device, warmup=frame(0))
    waiting = [asyncio.ensure_future(_opened(model)) for _ in range(2)]
    await slow.entered.wait()
    closing = asyncio.ensure_future(model.aclose())
    await turns()
    slow.latch.open()
    await asyncio.wait([closing, *waiting])
    for task in waiting:
        with pytest.raises(aiotrt.ModelClosedError, match="Slow was closed while it was being opened"):
            task.result()


@asyncio_test
async def test_another_loop_leaves_an_opening_alone(device: str) -> None:
    slow = Slow()
    model = aiotrt.load(slow, device=device, warmup=frame(0))
    opening = asyncio.ensure_future(_opened(model))

    def elsewhere() -> None:
        for use in (model.aclose, lambda: _opened(model)):
            with pytest.raises(aiotrt.UsageError, match="Slow was used from another event loop"):
                asyncio.run(use())

    await slow.entered.wait()
    await asyncio.to_thread(elsewhere)
    slow.latch.open()
    assert await opening
    await asyncio.to_thread(elsewhere)
    await model.aclose()


@asyncio_test
async def test_one_of_two_who_await_a_load_may_be_cancelled(device: str) -> None:
    model = aiotrt.load(Affine(), device=device, warmup=frame(0))

    first, second = asyncio.ensure_future(_opened(model)), asyncio.ensure_future(_opened(model))
    await turns(1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second
    await model.aclose()


@asyncio_test
async def test_from_another_thread(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=frame(0)) as model:

        def elsewhere() -> None:
            with pytest.raises(aiotrt.UsageError, match="was used outside any event loop"):
                model.lease()
            with pytest.raises(aiotrt.UsageError, match="was used from another event loop"):
                asyncio.run(_call(model))

        await asyncio.to_thread(elsewhere)
        assert (await model(frame(1)))[0, 0] == 4


async def _call(model: aiotrt.Model) -> object:
    return await model(frame(1))


def test_several_loops_in_several_threads(device: str) -> None:
    failures: list[BaseException] = []

    async def main(seed: int) -> None:
        async with aiotrt.load(Affine(), device=device, slots=2) as model:
            results = await asyncio.gather(*(model(frame(seed + i)) for i in range(100)))
            assert [result[0, 0] for result in results] == [3 * (seed + i) + 1 for i in range(100)]

    def run(seed: int) -> None:
        try:
            asyncio.run(main(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@asyncio_test
async def test_a_model_that_was_never_closed_warns(device: str) -> None:
    model = await aiotrt.load(Affine(), device=device, warmup=frame(0))
    with pytest.warns(ResourceWarning, match="was never closed: use 'async with'"):
        del model
        gc.collect()
    await turns()


@asyncio_test
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_a_model_is_not_copied(device: str, duplicate: Callable[[object], object]) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with pytest.raises(TypeError, match=r"Model Affine .* cannot be copied or pickled: share it, or load"):
            duplicate(model)
        gc.collect()
        assert (await model(frame(1)))[0, 0] == 4


def test_a_loop_that_is_closed_under_pending_work(device: str) -> None:
    latch = Latch("cuda" if device == "cuda" else "host")

    async def main() -> aiotrt.Model:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
        for slot in model._executor.slots:  # type: ignore[union-attr]
            latch.hold(slot.stream)
        call = asyncio.ensure_future(model(frame(1)))
        await turns()
        assert count(model, State.IN_FLIGHT) == 1
        call.cancel()
        await asyncio.wait([call])
        return model

    loop = asyncio.new_event_loop()
    model = loop.run_until_complete(main())
    loop.close()
    with pytest.warns(ResourceWarning, match="was never closed"):
        del model
        gc.collect()
    latch.open()

    async def again() -> None:  # the next loop on this thread has a hub of its own
        async with aiotrt.load(Affine(), device=device) as other:
            assert (await other(frame(2)))[0, 0] == 7

    asyncio.run(again())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@asyncio_test
async def test_after_a_fork() -> None:
    program = """
        import asyncio, os, sys, warnings
        import numpy as np, torch, aiotrt
        warnings.simplefilter("ignore")  # Python warns of a fork with threads, rightly; this test is about just that

        async def main():
            async with aiotrt.load(torch.nn.Identity(), device="host") as model:
                x = np.ones((1, 2), np.float32)
                await model(x)
                child = os.fork()
                if child == 0:
                    try:
                        await model(x)
                    except aiotrt.UsageError as error:
                        print(error, flush=True)
                        os._exit(0)
                    os._exit(1)
                assert os.waitpid(child, 0)[1] == 0
                await model(x)

        asyncio.run(main())
    """
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Identity was loaded before a fork" in done.stdout
    assert "'spawn'" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_models_that_are_loaded_after_a_fork_work_whatever_the_parent_did() -> None:
    program = """
        import asyncio, os, signal, warnings
        import numpy as np, torch, aiotrt
        from aiotrt import devices
        from aiotrt.completion import hub as completion
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)  # torch's own threads do not survive a fork either

        async def main():
            x = np.ones((1, 2), np.float32)
            async with aiotrt.load(torch.nn.Identity(), device="host", slots=1, warmup=x) as model:
                async with model.lease() as slot:  # which orders on the calling thread's current stream
                    slot.inputs[0][...] = x
                    assert (await slot.replay()).sum() == 2

        asyncio.run(main())
        with completion._hubs_lock, devices._devices_lock:  # as if by threads that are not in the child
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                asyncio.run(main())
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("when", ["load", "call"])
def test_ctrl_c(when: str) -> None:
    program = f"""
        import asyncio, sys, threading, warnings
        import numpy as np, torch, aiotrt
        warnings.simplefilter("error")
        latch = threading.Event()

        class Slow(torch.nn.Module):
            def forward(self, x):
                if {when == "load"} or x.sum() > 0:
                    print("entered", flush=True)
                    latch.wait(20)
                return x

        async def main():
            asyncio.get_running_loop().call_later(0.5, latch.set)
            x = np.zeros((1, 2), np.float32)
            async with aiotrt.load(Slow(), device="host", slots=1, warmup=x) as model:
                await model(x + 1)

        try:
            aiotrt.run(main())
        except KeyboardInterrupt:
            latch.set()
            print("interrupted", flush=True)
            sys.exit(3)
    """
    with subprocess.Popen(
        interruptible(sys.executable, "-c", textwrap.dedent(program)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "entered\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 3, errors
    assert "interrupted" in output
    assert "Warning" not in errors


@asyncio_test
async def test_run_inside_a_running_loop_says_what_to_write_instead() -> None:
    async def main() -> None:
        pytest.fail("it ran")

    with pytest.raises(aiotrt.UsageError, match=r"inside a running event loop: write 'await main\(\)' there"):
        aiotrt.run(main())
    gc.collect()  # Python would warn of a coroutine that was never awaited


@asyncio_test
async def test_everything_is_free_after_the_block(device: str) -> None:
    before = {thread.name for thread in threading.enumerate()}
    async with aiotrt.load(Affine(), device=device, slots=3, warmup=frame(0)) as model:
        await asyncio.gather(*(model(frame(i)) for i in range(20)))
    del model
    gc.collect()
    left = {
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("aiotrt-") and thread.name not in before and "current" not in thread.name
    }
    for thread in left:  # they were told to end; that they do is what is tested
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    await until(lambda: True)
