"""Count the schedules explored and the speed: small programs and the long laws, on the simulated GPU.

    python -m tests.testing.schedules        # six minutes on all processors; writes reports/schedules.json
    python -m tests.testing.schedules --seconds 60 --processes 2 --out FILE

What is counted, each by itself and never summed up:

- ``small``: runs of programs with two slots, three requests, a cancellation and a consumer on another stream, through the
  whole runtime, in a model that stays open. Everything that a device and threads leave open is drawn: when the request is
  cancelled, in which order the requests come, how long work takes, which of what is due happens next. Two runs are the same
  schedule if the same things happened in the same order, on the device and as the host saw it; what is counted is different
  ones, by a hash of that. Runs in which the host saw the same are of one class: what else differs between them is the order
  of things on the device that no one looked at in between, which the detector's clocks judge whatever it was.
- ``several``: schedules of programs with three calls of one model on two devices with a slot each, from the host and from
  either device, in any order; one may be cancelled.
- ``exhaustive``: all runs that there are of smaller programs, loading included, where work takes equal times.
- ``laws``: the long laws of the portfolio, each under many seeds.
- ``line``: all orders of events at the slot machine alone, two slots and three or four requests, with states reached by
  several ways gone on from once: the number of ways is counted, not run one by one.

Any hazard, wrong result, deadlock or broken invariant ends it with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch

import aiotrt
from aiotrt.devices.base import Event
from aiotrt.runtime.slots import State
from aiotrt.testing import Schedule, Seeded, SimulatedDevice, SimulatedStream, explore, run
from tests.simulated import Audit, run_simulated
from tests.testing.orders import line
from tests.testing.portfolio import Law, laws, outcome
from tests.testing.reports import REPORTS, write_report
from tests.tools import Affine, executor_of, frame

__all__ = ["Found", "exhaust", "main", "search", "several_block", "small_block"]

OUT: Final = REPORTS / "schedules.json"
#: Runs in one model before another is opened.
RUNS: Final = 5000
#: Runs after which progress is told.
TOLD: Final = 100
#: Seconds between reports.
REPORT: Final = 2.0
#: What a piece of work may take, in seconds: less than a turn of the loop, or up to six; a request is three pieces.
DURATIONS: Final = (1e-6, 3e-6, 5e-6, 7e-6, 11e-6)
#: Laws that say little for their time in a search: those with one schedule only, and those in real time.
SEEDED_LAWS: Final = (
    "test_laws_simulated",
    "test_laws_of_owners_simulated",
    "test_laws_of_memory_simulated",
    "test_batches_simulated",
    "test_laws_of_several_devices_simulated",
)


class Watched(Seeded):
    """A schedule that remembers what happened, so that two runs can be told apart.

    Attributes:
        happened: everything in order: what was done on the device and in threads, and what the host saw.
        seen: only what the host saw.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.happened: list[str] = []
        self.seen: list[str] = []

    def restart(self, seed: int) -> None:
        """Another run begins."""
        self._random.seed(seed)
        self.happened.clear()
        self.seen.clear()

    def choose(self, options: Sequence[str]) -> int:
        """Any."""
        choice = 0 if len(options) == 1 else self._random.randrange(len(options))
        self.happened.append(options[choice])
        return choice

    def duration(self, what: str) -> float:
        """One of a few."""
        return DURATIONS[int(self._random.random() * len(DURATIONS))]

    def look(self, what: str) -> None:
        """The host saw this; looking again and seeing the same is nothing new."""
        if not self.seen or self.seen[-1] != what:
            self.seen.append(what)
        if not self.happened or self.happened[-1] != what:
            self.happened.append(what)

    def schedule(self) -> int:
        """Tells this run from others."""
        return _hash(self.happened)

    def kind(self) -> int:
        """Tells apart only what the host could tell apart."""
        return _hash(self.seen)


def _hash(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little")


class _Device(SimulatedDevice):
    """Tells the schedule what the host sees."""

    def __init__(self, schedule: Watched, peer: _Device | None = None) -> None:
        super().__init__(schedule, peer=peer)
        self.watched = schedule
        self.names: dict[int, str] = {} if peer is None else peer.names

    def query(self, event: Event) -> bool:
        answer = event.query()
        name = self.names.get(id(event)) or self.names.setdefault(id(event), f"event {len(self.names)}")
        self.watched.look(f"{name} {answer}")
        return answer


@dataclass
class Found:
    """Hashes of what was run."""

    schedules: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, schedule: Watched) -> None:
        """One run."""
        self.schedules.append(schedule.schedule())
        self.kinds.append(schedule.kind())

    def extend(self, other: Found) -> None:
        """Those of another."""
        self.schedules += other.schedules
        self.kinds += other.kinds

    def figures(self, runs: int, seconds: float) -> dict[str, Any]:
        """What it comes to."""
        distinct = len(set(self.schedules))
        figures = {"runs": runs, "seconds": round(seconds, 1), "distinct": distinct, "per_second": round(distinct / seconds)}
        return figures | ({"classes": len(set(self.kinds))} if self.kinds else {})


# Small programs...


async def small(
    model: aiotrt.Model, device: _Device, side: SimulatedStream, kept: torch.Tensor, choose: random.Random
) -> None:
    """Two calls, and a lease whose outputs another stream copies to `kept`, in any order; one may be cancelled."""
    schedule = device.watched

    async def call(value: int) -> None:
        result = await model(frame(value))
        schedule.look(f"result {value}")
        assert np.all(result == 3 * value + 1), f"call {value} got {result}"

    async def lease(value: int) -> None:
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(value)
            event = slot.launch()
            side.wait(event)
            side.copy(kept, slot.outputs[0].tensor)
            slot.consumed(side)
        schedule.look(f"left {value}")

    jobs: list[tuple[Callable[[int], Coroutine[Any, Any, Any]], int]] = [(call, 1), (call, 2), (lease, 3)]
    choose.shuffle(jobs)
    tasks: list[asyncio.Task[Any]] = []
    for job, value in jobs:
        schedule.look(f"begin {value}")
        tasks.append(asyncio.ensure_future(job(value)))
        for _ in range(choose.choice((0, 0, 1, 2, 3, 5))):
            await asyncio.sleep(0)
    for _ in range(choose.randrange(12)):
        await asyncio.sleep(0)
    victim = choose.randrange(4)
    if victim < 3:
        schedule.look(f"cancel {jobs[victim][1]}")
        tasks[victim].cancel()
    await asyncio.wait(tasks)
    for task, (job, value) in zip(tasks, jobs, strict=True):
        if task.cancelled():
            assert tasks.index(task) == victim, "somebody else was cancelled"
        elif job is lease:
            done = side.record()
            await aiotrt.wait(done)
            with device.raw():
                assert bool((device.read(kept) == 3 * value + 1).all()), "a consumer read something else"
        else:
            task.result()
    machine = executor_of(model).machine
    while machine.count(State.FREE) < 2:
        await asyncio.sleep(1e-6)


def small_block(seed: int, goes_on: Callable[[int], bool] = bool, *, tells_where: bool = False) -> Found:
    """At most `RUNS` runs in one model; `goes_on` is told how many there were, now and then, and says whether to go on."""
    schedule = Watched(seed)
    device = _Device(schedule)
    device.detector.tells_where = tells_where
    audit = Audit(device)
    found = Found()

    async def main() -> None:
        async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0), hang_timeout=1.0) as model:
            executor, side = executor_of(model), device.stream()
            kept = device.empty((2, 3), torch.float32)
            audit.executors.add(executor)
            for i in range(seed * RUNS, (seed + 1) * RUNS):
                executor.machine._free.sort(reverse=True)  # as in the beginning: what was before is no part of a schedule
                device.names.clear()
                schedule.restart(i)
                try:
                    await small(model, device, side, kept, random.Random(i))
                    device.check()
                    audit.step()
                except BaseException as error:
                    error.add_note(f"in run {i}")
                    raise
                found.add(schedule)
                if i % TOLD == 0 and not goes_on(len(found.schedules) or 1):
                    break

    try:
        run(audit.audited(main()), device)
    except BaseException:
        if not tells_where:
            small_block(seed, goes_on, tells_where=True)  # the same again, with a better report
        raise
    return found


async def several(model: aiotrt.Model, devices: Sequence[_Device], choose: random.Random) -> None:
    """Three calls of a model on two devices, from the host and from either device, in any order; one may be cancelled."""
    schedule = devices[0].watched

    async def call(value: int, home: _Device | None) -> None:
        if home is None:
            assert np.all(await model(frame(value)) == 3 * value + 1), f"call {value} got something else"
        else:
            result = await model(home.tensor(frame(value)))
            assert home.holds(result)
            assert bool((home.read(result) == 3 * value + 1).all()), f"call {value} got something else"
        schedule.look(f"result {value}")

    tasks: list[asyncio.Task[Any]] = []
    for value in choose.sample(range(1, 4), 3):
        schedule.look(f"begin {value}")
        tasks.append(asyncio.ensure_future(call(value, choose.choice((None, *devices)))))
        for _ in range(choose.choice((0, 0, 1, 2, 3, 5))):
            await asyncio.sleep(0)
    for _ in range(choose.randrange(12)):
        await asyncio.sleep(0)
    victim = choose.randrange(4)
    if victim < 3:
        schedule.look(f"cancel the {victim}th")
        tasks[victim].cancel()
    await asyncio.wait(tasks)
    for i, task in enumerate(tasks):
        if task.cancelled():
            assert i == victim, "somebody else was cancelled"
        else:
            task.result()
    while any(executor.machine.count(State.FREE) < 1 for executor in model._executors):
        await asyncio.sleep(1e-6)
    assert not model.statistics().waiting


def several_block(seed: int, goes_on: Callable[[int], bool] = bool, *, runs: int = RUNS) -> Found:
    """At most so many runs in one model on two devices."""
    schedule = Watched(seed)
    devices = [_Device(schedule)]
    devices.append(_Device(schedule, devices[0]))
    audit = Audit(devices[0])
    found = Found()

    async def main() -> None:
        async with aiotrt.load(Affine(), device=devices, slots=1, warmup=frame(0), hang_timeout=1.0) as model:
            for executor in model._executors:
                audit.executors.add(executor)
            for i in range(seed * RUNS, seed * RUNS + runs):
                devices[0].names.clear()
                schedule.restart(i)
                try:
                    await several(model, devices, random.Random(i))
                    devices[0].check()
                    audit.step()
                except BaseException as error:
                    error.add_note(f"in run {i} of several devices")
                    raise
                found.add(schedule)
                if i % TOLD == 0 and not goes_on(len(found.schedules) or 1):
                    break

    run(audit.audited(main()), devices[0])
    return found


# All runs of smaller programs...


def exhaust(limit: int) -> dict[str, Any]:
    """Every run of two calls, one of which is cancelled at any turn, with a consumer on another stream."""
    found = Found()

    class Every(Watched):
        """Takes the script's choices, and remembers."""

        def __init__(self, script: Schedule) -> None:
            Watched.__init__(self, 0)
            self.script = script

        def choose(self, options: Sequence[str]) -> int:
            choice = self.script.choose(options)
            self.happened.append(options[choice])
            return choice

        def duration(self, what: str) -> float:
            return self.script.duration(what)

        def preempts(self, what: str) -> bool:
            return False

    def scenario(script: Schedule) -> None:
        schedule = Every(script)
        device = _Device(schedule)

        async def main() -> None:
            async with aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0)) as model:
                side = device.stream()

                async def call() -> None:
                    assert np.all(await model(frame(1)) == 4)

                task = asyncio.ensure_future(call())
                async with model.lease() as slot:
                    slot.inputs[0][...] = frame(2)
                    side.wait(slot.launch())
                    with device.use(side):
                        copy = slot.outputs[0].tensor.clone()
                    slot.consumed(side)
                turn = script.choose([f"cancelled at turn {n}" for n in range(4)] + ["left alone"])
                if turn < 4:
                    for _ in range(turn):
                        await asyncio.sleep(0)
                    task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
                assert np.all(await model(frame(3)) == 10)
                done = side.record()
                await aiotrt.wait(done)
                assert bool((device.read(copy) == 7).all())

        run_simulated(main(), device)
        found.add(schedule)

    started = time.monotonic()
    try:
        runs, is_complete = explore(scenario, limit=limit), True
    except RuntimeError:
        runs, is_complete = limit, False
    return found.figures(runs, time.monotonic() - started) | {"all there are": is_complete}


# The long laws...


def law_block(seed: int, goes_on: Callable[[int], bool] = bool) -> Found:
    """Each law once, under this seed."""
    found = Found()
    for law in _seeded_laws():
        record = Watched(0)
        record.happened.append(law.name)
        with mock.patch.object(Seeded, "choose", _noting(record)):
            failure = outcome(law, seed)
        if failure is not None:
            raise AssertionError(f"law {law.name} fails under seed {seed}") from failure
        found.schedules.append(record.schedule())
        if not goes_on(len(found.schedules)):
            break
    return found


def _noting(record: Watched) -> Callable[[Seeded, Sequence[str]], int]:
    original = Seeded.choose

    def choose(schedule: Seeded, options: Sequence[str]) -> int:
        choice = original(schedule, options)
        record.happened.append(options[choice])
        return choice

    return choose


@functools.cache
def _seeded_laws() -> list[Law]:
    return [law for law in laws() if law.schedules is None and law.module in SEEDED_LAWS]


# All of it, in processes...

BLOCKS: Final[dict[str, Callable[[int, Callable[[int], bool]], Found]]] = {
    "small": small_block,
    "several": several_block,
    "laws": law_block,
}


def _work(part: str, index: int, processes: int, seconds: float, pipe: Connection) -> None:
    """One process: block after block until the time is over, and the hashes in the end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)
    found = Found()
    _seeded_laws()
    until, used = time.monotonic() + seconds, time.process_time()  # now that everything is imported
    pipe.send(0)

    def goes_on(count: int) -> bool:
        pipe.send(len(found.schedules) + count)
        return time.monotonic() < until

    for seed in itertools.count(index, processes):
        try:
            found.extend(BLOCKS[part](seed, goes_on))
        except BaseException as error:
            pipe.send("".join(traceback.format_exception(error)))
            return
        if time.monotonic() > until:
            break
    pipe.send((np.array(found.schedules, np.uint64), np.array(found.kinds, np.uint64), time.process_time() - used))


def search(part: str, seconds: float, processes: int, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Search with all processes, and count.

    Raises:
        AssertionError: something is wrong; the message has the traceback.
    """
    context = multiprocessing.get_context("spawn")  # the parent has threads
    pipes = {}
    members = []
    for index in range(processes):
        mine, theirs = context.Pipe(duplex=False)
        member = context.Process(target=_work, args=(part, index, processes, seconds, theirs), daemon=True)
        member.start()
        theirs.close()
        members.append(member)
        pipes[mine] = 0
    arrays: list[tuple[Any, Any, float]] = []
    started = reported = time.monotonic()
    try:
        while len(arrays) < processes:
            for pipe in wait(list(pipes), timeout=REPORT):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    raise AssertionError(f"{part}: a process ended without a word") from None
                if isinstance(message, str):
                    raise AssertionError(f"{part}:\n{message}")
                if isinstance(message, int):
                    if not any(pipes.values()):
                        started = time.monotonic()  # the first ones are ready
                    pipes[pipe] = message
                else:
                    arrays.append(message)
                    del pipes[pipe]
            now = time.monotonic()
            if now - reported > REPORT:
                reported = now
                done = sum(pipes.values()) + sum(len(a) for a, _, _ in arrays)
                report(f"{part}: {done:,} runs in {now - started:.0f} s, {done / (now - started):,.0f} a second")
    finally:
        for member in members:
            member.terminate()
            member.join()
    taken = time.monotonic() - started
    found = Found([int(n) for a, _, _ in arrays for n in a], [int(n) for _, a, _ in arrays for n in a])
    used = sum(seconds for _, _, seconds in arrays)  # what one gets, where nobody else uses the processors
    figures = found.figures(len(found.schedules), taken)
    figures |= {"processor_seconds": round(used, 1), "per_processor_second": round(figures["distinct"] / used)}
    report(f"{part}: {figures}")
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.testing.schedules", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        help="for the small programs; a fifth of it for several devices and for the laws (300)",
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=int, default=1500, help="runs of the exhaustive search (1500)")
    parser.add_argument("--out", type=Path, default=OUT, help="file for the figures (reports/schedules.json)")
    options = parser.parse_args(arguments)

    def report(text: str) -> None:
        print(text, flush=True)

    try:
        figures: dict[str, Any] = {"processes": options.processes}
        figures["line"] = {f"{n} requests": line(n) for n in (3, 4)}
        report(f"line: {figures['line']}")
        figures["exhaustive"] = exhaust(options.limit)
        report(f"exhaustive: {figures['exhaustive']}")
        figures["small"] = search("small", options.seconds, options.processes, report=report)
        figures["several"] = search("several", options.seconds / 5, options.processes, report=report)
        figures["laws"] = search("laws", options.seconds / 5, options.processes, report=report)
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    write_report(options.out, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
