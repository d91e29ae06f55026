"""What tests enter states with: latches that hold a device, and networks whose results tell who they belong to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple
from unittest import mock

import numpy as np
import torch

import aiotrt
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.slots import State
from aiotrt.selftest.instruments import Latch

__all__ = [
    "Affine", "Latch", "TwoOutputs", "count", "executor_of", "frame", "free_port", "held", "interruptible", "no_threads",
    "turns", "until", "woken_by_the_loop",
]  # fmt: skip

_RESTORE: Final = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@contextlib.contextmanager
def woken_by_the_loop() -> Iterator[None]:
    """Inside, no poll resumes a task itself: the loop does, in the next iteration."""
    answers = itertools.cycle([object(), None])  # first to the poll, as inside a task, and then to the loop's callback
    with mock.patch("asyncio.current_task", side_effect=answers):
        yield


@contextlib.contextmanager
def held(model: aiotrt.Model) -> Iterator[Latch]:
    """Every slot's stream is held; opened at the end at the latest."""
    executor = executor_of(model)
    latch = Latch(executor.device.name)
    for slot in executor.slots:
        latch.hold(slot.stream)
    try:
        yield latch
    finally:
        latch.open()


@contextlib.contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute is another one. `mock.patch` deletes attributes, which compiled classes turn into None."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Inside, the system starts no thread."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with mock.patch.object(threading.Thread, "start", refuse):
        yield


def executor_of(model: aiotrt.Model) -> Executor:
    """The model's executor."""
    assert model._executor is not None
    return model._executor


def count(model: aiotrt.Model, state: State) -> int:
    """How many slots are in this state."""
    return executor_of(model).machine.count(state)


class Affine(torch.nn.Module):
    """3 x + 1 in float32: exact for small integers, so that equality means equality."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3 + 1


class Two(NamedTuple):
    """Two outputs."""

    total: torch.Tensor
    product: torch.Tensor


class TwoOutputs(torch.nn.Module):
    """Two inputs, two named outputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Two:
        return Two(x + y, x * y)


def frame(value: float, shape: tuple[int, ...] = (2, 3)) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A float32 array full of one number, which tells whose it is."""
    return np.full(shape, value, np.float32)


async def until(predicate: Callable[[], bool]) -> None:
    """Give the loop its turns until `predicate` holds; the test's timeout is the bound."""
    while not predicate():
        await asyncio.sleep(0)


async def turns(n: int = 5) -> None:
    """Give everybody else on the loop a few turns."""
    for _ in range(n):
        await asyncio.sleep(0)


def interruptible(*command: object) -> list[str]:
    """A command line that runs `command` with the default action for SIGINT.

    A child inherits an ignored SIGINT, and Python then installs no handler of its own. Background shells and some CI systems
    ignore it.
    """
    return [sys.executable, "-IS", "-c", _RESTORE, *map(str, command)]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on, for servers that must be told one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
