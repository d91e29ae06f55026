"""A soak: one process under load for as long as one likes, in which every result is compared with what it must be.

    python -m tests.testing.soak --device cuda --seconds 600 --out soak.json

Several loops in threads, on asyncio and on uvloop where it is installed, each with models of its own and more callers than
slots: calls from host and device memory, leases whose results are read on other streams, maps, chains of two models, shapes
that come and go, a fifth of everything cancelled at some time. The time is cut into rounds. After each everybody rests, all
slots must be free again, another model is opened and closed, and memory is read: what is needed at rest must not grow.

It ends within its seconds, whatever happens, and says who waits if somebody waits for too long. The exit status is 1 after
a wrong result, an error, a leak or a hang, and 2 where there is no such device. Needs torch, numpy and aiotrt; counts on
nobody else using the GPU.
"""

# ruff: noqa: E402  # the clock starts before torch is imported: that takes seconds, and they count

from __future__ import annotations

import time

START = time.monotonic()

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import itertools
import json
import os
import random
import statistics
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

import aiotrt
from aiotrt.devices import open_device
from tests.testing.soak_callers import Caller, Images, Rows, Work

__all__ = ["ENOUGH", "LIMITS", "growth", "leaks", "main"]

MIB: Final = 1 << 20
#: Bytes by which memory may grow, at rest. Programs of other shapes are kept at each rest, and allocators keep a little of
#: what was in use at once. "reserved" has no limit of its own, since "used" is what counts.
LIMITS: Final = {"resident": 24 * MIB, "allocated": 4 * MIB, "used": 48 * MIB}
#: Callers per model: four for each slot, so that there is always a line.
CALLERS: Final = 12
SLOTS: Final = 3
#: Graphs that a model keeps: fewer than it has shapes.
GRAPHS: Final = 16
#: Rests that it takes to judge growth.
ENOUGH: Final = 8
#: Seconds between reports, between looks at who waits, and between beats of each loop.
REPORT, LOOK, BEAT = 5.0, 0.25, 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.testing.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="host", help="host, cuda or cuda:1 (host)")
    parser.add_argument("--seconds", type=float, default=60.0, help="from start to end (60)")
    parser.add_argument("--loops", type=int, default=2, help="event loops, each in a thread (2)")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that one step may take (30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the summary as JSON")
    options = parser.parse_args(arguments)
    try:
        options.device = open_device(options.device).name
    except aiotrt.AiotrtError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    start = START if arguments is None else time.monotonic()
    return Soak(options, start).run()


class Soak:
    """One soak, over all loops.

    Args:
        options: of the command line.
        start: when it began, on the monotonic clock.
    """

    def __init__(self, options: argparse.Namespace, start: float) -> None:
        self.options = options
        self.start = start
        self.end = start + options.seconds
        self.working_until = self.end - min(5.0, 0.2 * options.seconds)  # what follows is for closing
        self.numbers = itertools.count()
        self.failures: list[str] = []
        self.readings: list[dict[str, int]] = []
        self.peak = 0
        self.is_over = threading.Event()
        self.loops = [_Loop(self, i) for i in range(options.loops)]
        self.rest = threading.Barrier(options.loops, self._at_rest)
        self.round_ends = start
        self._last: tuple[float, int] = (start, 0)
        self._writing = threading.Lock()

    def run(self) -> int:
        """All of it; the exit status."""
        torch.set_num_threads(1)  # as many threads are at work as there are streams
        torch.backends.cudnn.allow_tf32 = False
        watch = threading.Thread(target=self._watch, name="soak-watch", daemon=True)
        watch.start()
        for loop in self.loops:
            loop.thread.start()
        for loop in self.loops:
            loop.thread.join()
        self.is_over.set()
        watch.join()
        return self._finish()

    def fail(self, what: str) -> None:
        """Something is wrong: everybody stops."""
        print(f"FAILED: {what}", file=sys.stderr, flush=True)
        self.failures.append(what)
        self.working_until = self.round_ends = 0.0
        self.rest.abort()

    # At rest...

    def _at_rest(self) -> None:
        """Nobody does anything: run by one of the loops' helpers while all others wait for it."""
        gc.collect()
        self.readings.append(memory(self.options.device))
        self.round_ends = time.monotonic() + max(0.05, self.options.seconds / 60)

    # Watching...

    def _watch(self) -> None:
        reported = self.start
        while not self.is_over.wait(LOOK):
            now = time.monotonic()
            self.peak = max(self.peak, memory("host")["resident"])
            waiting = [loop for loop in self.loops if loop.stands_still(now)]
            if waiting or now > self.end - 2 * LOOK:
                self._give_up(now)
            if now - reported >= REPORT:
                reported = now
                self._report(now)

    def _report(self, now: float) -> None:
        counts = self.counts()
        done = counts["results checked"]
        then, before = self._last
        self._last = now, done
        figures = ", ".join(f"{name} {size / MIB:.0f}" for name, size in memory(self.options.device).items())
        print(
            f"{now - self.start:6.1f} s  {done:,} results right, {(done - before) / (now - then):,.0f} a second; "
            f"{counts['cancelled']:,} cancelled; {figures} MiB",
            flush=True,
        )

    def _give_up(self, now: float) -> None:
        """Somebody hangs, or all of it is not over in time: say who waits, and end the process."""
        late = now > self.end - 2 * LOOK
        why = "it is not over in time" if late else f"somebody waits for more than {self.options.patience:g} s"
        lines = [f"hang: {why}"]
        for loop in self.loops:
            lines += loop.describe(now)
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self.failures.append("\n".join(lines))
        self._finish()
        os._exit(1)

    # In the end...

    def counts(self) -> Counter[str]:
        """What was done, over all loops."""
        total: Counter[str] = Counter()
        for loop in self.loops:
            total.update(dict(loop.counts))
        return total

    def _finish(self) -> int:
        with self._writing:
            grown = growth(self.readings)
            counts = self.counts()
            if not self.failures:
                self.failures += leaks(grown)
                if len(self.readings) < ENOUGH:
                    self.failures.append(f"only {len(self.readings)} rests: give it more seconds")
            summary = {
                "passed": not self.failures,
                "failures": self.failures,
                "device": self.options.device,
                "gpu": torch.cuda.get_device_name() if self.options.device != "host" else None,
                "torch": str(torch.__version__),
                "loops": [loop.kind for loop in self.loops],
                "seconds": round(time.monotonic() - self.start, 2),
                "counts": dict(sorted(counts.items())),
                "models": {name: facts for loop in self.loops for name, facts in loop.statistics.items()},
                "longest_beat_seconds": [round(loop.longest, 4) for loop in self.loops],
                "growth": grown,
                "limits": LIMITS,
                "peak_resident": self.peak,
                "at_rest": self.readings,
            }
            if self.options.out is not None:
                self.options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        verdict = "passed" if not self.failures else f"FAILED: {self.failures[0]}"
        figures = ", ".join(f"{name} {size / MIB:+.1f} MiB" for name, size in grown.items()) or "unknown"
        print(
            f"{verdict}\n{counts['results checked']:,} results compared, {counts['cancelled']:,} cancelled, "
            f"{counts['opened']:,} models opened and closed beside them, in {summary['seconds']} s; growth {figures}",
            flush=True,
        )
        return 0 if not self.failures else 1


class _Loop:
    """One event loop in a thread, its models and their callers."""

    def __init__(self, soak: Soak, index: int) -> None:
        self.counts: Counter[str] = Counter()
        self.statistics: dict[str, dict[str, Any]] = {}
        self.longest = 0.0  # between two beats that should be `BEAT` seconds apart
        self.kind, self._factory = loop_factory(index)
        self.thread = threading.Thread(target=self._run, name=f"soak-{index}-{self.kind}", daemon=True)
        self._soak = soak
        self._index = index
        self._options = soak.options
        self._models: dict[str, aiotrt.Model] = {}
        self._callers: list[Caller] = []
        self._stage = "starting"
        self._since = time.monotonic()
        self._beaten: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def stands_still(self, now: float) -> bool:
        """Whether something takes longer than it may."""
        limit = self._options.patience
        if self._beaten is not None and now - self._beaten > limit:
            return True
        if self._stage != "working":
            return self._stage != "over" and now - self._since > limit
        return any(caller.doing is not None and now - caller.since > limit for caller in self._callers)

    def describe(self, now: float) -> list[str]:
        """Who waits here, and for how long."""
        lines = [f"{self.thread.name}: {self._stage} for {now - self._since:.1f} s"]
        if self._beaten is not None:
            lines[0] += f", last turn {now - self._beaten:.1f} s ago"
        lines += [f"  {name}: {model!r}" for name, model in list(self._models.items())]
        waiting = [caller for caller in self._callers if caller.doing is not None]
        waiting.sort(key=lambda caller: caller.since)
        lines += [f"  {caller.name}: {caller.doing} for {now - caller.since:.1f} s" for caller in waiting]
        with contextlib.suppress(Exception):  # the loop's thread may be changing this meanwhile
            tasks = asyncio.all_tasks(self._loop) if self._loop is not None else ()
            for task in list(tasks)[:40]:
                stack = task.get_stack(limit=1)
                where = f"{Path(stack[0].f_code.co_filename).name}:{stack[0].f_lineno}" if stack else "nowhere"
                lines.append(f"  task {task.get_name()} at {where}, {task.get_coro()!r}")
        return lines

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._main())
        except threading.BrokenBarrierError:
            pass  # another loop has failed, and said so
        except BaseException as error:
            traceback.print_exception(error)
            self._soak.fail(f"{self.thread.name}, {self._stage}: {type(error).__name__}: {error}")
        finally:
            self._beaten = None
            self._enter("over")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(
            lambda _, context: self._soak.fail(f"the loop was told: {context.get('message')}: {context.get('exception')!r}")
        )
        beat = asyncio.ensure_future(self._beat())
        try:
            async with contextlib.AsyncExitStack() as stack:
                self._enter("loading models")
                await self._load(stack)
                while True:
                    self._enter("waiting for the other loops")
                    await asyncio.to_thread(self._soak.rest.wait, self._options.patience)
                    if self._soak.round_ends > self._soak.working_until:
                        break
                    self._enter("working")
                    await together([caller.run(lambda: self._soak.round_ends) for caller in self._callers])
                    self._enter("waiting for slots")
                    await self._all_free()
                    self._enter("opening another model")
                    await self._open_another()
                self._note_statistics()
                self._enter("closing models")
        finally:
            beat.cancel()

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self._since = time.monotonic()

    async def _beat(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT)
            self._beaten = time.monotonic()
            self.longest = max(self.longest, self._beaten - before - BEAT)

    async def _load(self, stack: contextlib.AsyncExitStack) -> None:
        rows, eager, images, items = Rows("rows"), Rows("rows without graphs"), Images("images"), Images("single images")
        models = {
            rows: self._opened(rows),
            eager: self._opened(eager, graphs=False),
            images: self._opened(images, max_queue=CALLERS - SLOTS - 3),
            items: self._opened(items, batching=aiotrt.Batching(max_size=4)),
        }
        for number, (work, model) in enumerate(models.items()):
            name = f"{work.name} on loop {self._index}"
            self._models[name] = await stack.enter_async_context(model)
            sides = [model.stream() for _ in range(2)]
            for side in sides:
                stack.callback(side.close)
                stack.push_async_callback(asyncio.to_thread, side.synchronize)
            for i in range(CALLERS):
                caller = Caller(
                    f"caller {i} of {name}", model, work, self._soak.numbers, sides, self.counts,
                    seed=self._options.seed * 1_000_003 + self._index * 10_007 + number * 101 + i,
                    partner=models[eager] if work is rows else None,
                    device=self._options.device,
                    is_batching=work is items,
                )  # fmt: skip
                self._callers.append(caller)

    def _opened(self, work: Work, **options: Any) -> aiotrt.Model:
        chance = random.Random(0)
        examples = [work.sample(size, 0, chance).inputs for size in work.common]
        if "batching" in options:
            examples = [tuple(array[0] for array in examples[0])]
        module = work.module()
        if self._options.device != "host":
            module.to(self._options.device)
        return aiotrt.load(
            module.eval(),
            device=self._options.device,
            warmup=examples,
            hang_timeout=self._options.patience,
            **({"slots": SLOTS, "graph_cache_entries": GRAPHS} | options),
        )

    async def _all_free(self) -> None:
        """Slots whose callers went are free when the device is done with them."""
        for model in self._models.values():
            while (figures := model.statistics()).free < SLOTS or figures.waiting:
                await asyncio.sleep(1e-3)  # the watch sees when this takes too long

    async def _open_another(self) -> None:
        work = Rows("another")
        async with self._opened(work, slots=1) as model:
            await Caller("a guest", model, work, self._soak.numbers, [], self.counts, 0, device="host").call()
        self.counts["opened"] += 1

    def _note_statistics(self) -> None:
        for name, model in self._models.items():
            figures = vars(model.statistics())
            self.statistics[name] = {
                key: value for key, value in figures.items() if isinstance(value, (int, tuple)) and value
            }


async def together(coroutines: Sequence[Any]) -> None:
    """Run them all; the first error ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def loop_factory(index: int) -> tuple[str, Callable[[], asyncio.AbstractEventLoop]]:
    """asyncio's and uvloop's in turn, where the latter is installed."""
    if index % 2:
        with contextlib.suppress(ImportError):
            import uvloop

            return "uvloop", uvloop.new_event_loop
    return "asyncio", asyncio.new_event_loop


def memory(device: str) -> dict[str, int]:
    """Bytes in use now: by this process on the host; by torch on the device, and by everybody there."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    found = {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
    if device != "host":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "used": total - free,
            "reserved": torch.cuda.memory_reserved(),
            "allocated": torch.cuda.memory_allocated(),
        }
    return found


def leaks(grown: Mapping[str, int]) -> list[str]:
    """What grew more than it may, in words."""
    return [
        f"{name} memory grew by {grown[name] / MIB:.1f} MiB, at most {limit / MIB:.0f} expected"
        for name, limit in LIMITS.items()
        if grown.get(name, 0) > limit
    ]


def growth(readings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """How much more was in use in the last quarter of the rests than in the second one, when everything was used once."""
    if len(readings) < ENOUGH:
        return {}
    quarter = len(readings) // 4
    return {
        name: round(
            statistics.median(reading[name] for reading in readings[-quarter:])
            - statistics.median(reading[name] for reading in readings[quarter : 2 * quarter])
        )
        for name in readings[0]
    }


if __name__ == "__main__":
    sys.exit(main())
