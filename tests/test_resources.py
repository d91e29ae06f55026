"""A process with no file descriptor or no thread left: what is raised is in the error tree, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import aiotrt
from aiotrt.completion.hub import Hub
from aiotrt.devices.host import HostDevice
from tests.tools import Affine, executor_of, frame, no_threads, until

pytestmark = pytest.mark.asyncio


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Inside, the process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def opened() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_load_without_file_descriptors() -> None:
    device = HostDevice()
    files = opened()
    with no_descriptors(), pytest.raises(aiotrt.ResourceError, match=r"timer could not be opened: .*Errno 24"):
        _ = await aiotrt.load(Affine(), device=device)
    assert opened() == files
    assert not device._callbacks
    async with aiotrt.load(Affine(), device=device) as model:
        assert (await model(frame(1)))[0, 0] == 4


async def test_a_file_that_cannot_be_opened_for_want_of_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"no model")
    sha256 = hashlib.sha256(b"no model").hexdigest()
    hub = Hub.acquire()
    try:
        with no_descriptors(), pytest.raises(aiotrt.ResourceError, match=r"a\.onnx: cannot be read: Too many open files"):
            _ = await aiotrt.load(path, device="host", sha256=sha256)
    finally:
        hub.release()


async def test_waiting_for_an_event_without_file_descriptors() -> None:
    stream = HostDevice().stream()
    gate = threading.Event()
    stream.run(gate.wait)
    event = stream.record()
    with no_descriptors(), pytest.raises(aiotrt.ResourceError, match="timer"):
        await aiotrt.wait(event)
    gate.set()
    await aiotrt.wait(event)
    stream.close()


@pytest.mark.parametrize("number", range(6))
async def test_a_load_that_gets_some_of_its_threads(number: int) -> None:
    """Each thread that a load, a call and a close start is refused once."""
    device = HostDevice()
    threads, start, left = threading.active_count(), threading.Thread.start, [number]

    def refuse_one(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", refuse_one):
        try:
            async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
                assert (await model(frame(1)))[0, 0] == 4
        except aiotrt.ResourceError as error:
            assert "can't start new thread" in str(error)  # noqa: PT017  # which of them fails it is left open
    assert not device._callbacks
    gc.collect()
    await until(lambda: threading.active_count() <= threads)


async def test_a_model_is_closed_without_a_thread() -> None:
    device = HostDevice()
    threads = threading.active_count()
    model = await aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0))
    cache = executor_of(model).cache
    with no_threads():
        await model.aclose()
    assert len(cache) == 0
    assert repr(model) == "<aiotrt.Model Affine: closed>"
    assert not device._callbacks
    await until(lambda: threading.active_count() <= threads)


async def test_a_load_without_threads() -> None:
    threads = threading.active_count()
    with no_threads(), pytest.raises(aiotrt.ResourceError, match="can't start new thread"):
        _ = await aiotrt.load(Affine(), device=HostDevice())
    assert threading.active_count() == threads
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
