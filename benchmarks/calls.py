"""Which Python functions does one await call, and how many calls are that?

    python -m benchmarks calls [--device auto|host|cuda] [--loop LOOP] [--us LENGTH] [--count N]

Calls of Python functions are counted that `sys.setprofile` reports on the loop's thread, between the call and the resumed
coroutine. Resuming a coroutine counts as a call. The benchmark's own functions are left out, and so are the event loop's,
which differ from loop to loop. The await with the median number is listed. Functions of a compiled build are not seen.

`call`, `lease` and `batched item` run on the device, as the prototype's `call` and `lease` do; `call, host device` runs
without a GPU. The loop is held up until the device is done, so that an await takes one poll.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

import aiotrt
from benchmarks import waits
from benchmarks.measure import Request, loops, run_on
from benchmarks.prototype import ways
from benchmarks.tables import Table, as_text
from benchmarks.waits import CALL, LEASE, PROTOTYPE_CALL, PROTOTYPE_LEASE, Work, unavailable

__all__ = ["BATCHED", "HOST_CALL", "TARGETS", "Counted", "count", "main", "profiled"]

BATCHED: Final = "aiotrt, batched item"
HOST_CALL: Final = "aiotrt call, host device"
#: The most calls of an await on CUDA, in the plain build.
TARGETS: Final = {CALL: 28, LEASE: 22}
#: Microseconds of work, by device.
LENGTH: Final = {"cuda": 200, "host": 1000}
WARM: Final = 100
BETWEEN: Final = 2
#: Loop iterations that are held up: a batch is launched in a later one than its items are submitted in.
ITERATIONS: Final = 3
HELD: Final = 300e-6  # seconds more than the work takes
ROOT: Final = Path(__file__).parent.parent

#: The benchmark's own files, and the one function of the prototype's file that is the caller's.
_OWN: Final = {__file__, waits.__file__}
_LOOP: Final = (str(Path(asyncio.__file__).parent), selectors.__file__)


@dataclass(frozen=True)
class Counted:
    """The calls of many awaits.

    Attributes:
        totals: of each await, in ascending order.
        functions: of the await with the median total: the number of calls by function.
    """

    totals: Sequence[int]
    functions: Mapping[str, int]

    @property
    def median(self) -> int:
        return self.totals[(len(self.totals) - 1) // 2]


async def profiled(request: Request, number: int, warm: int = WARM, *, length: float = 0.0) -> Counted:
    """Count the calls of so many awaits, one after the other, after some that do not count.

    Args:
        request: what to await.
        number: how many awaits are counted.
        warm: how many come before.
        length: seconds that the device takes. The loop is held up for longer, so that the first poll finds the work
            complete: otherwise the number of polls would be chance. Before each counted await some are not held up, so that
            predictions stay right.
    """
    loop = asyncio.get_running_loop()

    def hold(iterations: int) -> None:
        time.sleep(1.5 * length + HELD)
        if iterations > 1:
            loop.call_soon(hold, iterations - 1)

    for _ in range(warm):
        await request()
    taken: list[Counter[Any]] = []
    for _ in range(number):
        codes: Counter[Any] = Counter()
        if length:
            for _ in range(BETWEEN):
                await request()
            loop.call_soon(hold, ITERATIONS)

        def seen(frame: FrameType, event: str, _: object, codes: Counter[Any] = codes) -> None:
            if event == "call":
                codes[frame.f_code] += 1

        sys.setprofile(seen)
        try:
            await request()
        finally:
            sys.setprofile(None)
        taken.append(Counter({code: n for code, n in codes.items() if _counts(code)}))
    taken.sort(key=lambda codes: codes.total())
    middle = taken[(len(taken) - 1) // 2]
    functions: Counter[str] = Counter()
    for code, n in middle.items():
        functions[_name(code)] += n
    return Counted([codes.total() for codes in taken], dict(functions.most_common()))


def count(device: str, loop: str, length: float, number: int) -> tuple[dict[str, Counted], dict[str, str]]:
    """Count all ways; returns what was counted, and why others were not."""
    work = Work(device, length)
    counted: dict[str, Counted] = {}
    failed: dict[str, str] = {}

    async def counting(opening: AbstractAsyncContextManager[Request]) -> Counted:
        async with opening as request:
            return await profiled(request, number, length=work.seconds)

    openings: dict[str, Callable[[], AbstractAsyncContextManager[Request]]] = {
        CALL: lambda: waits.opened(CALL, work, 1),
        LEASE: lambda: waits.opened(LEASE, work, 1),
        BATCHED: lambda: _batched(work),
        HOST_CALL: _on_host,
    }
    for way in (PROTOTYPE_CALL, PROTOTYPE_LEASE):
        if why := unavailable(way, device):
            failed[way] = why
        else:
            openings[way] = lambda way=way: waits.opened(way, work, 1)  # type: ignore[misc]
    for way, opening in openings.items():
        try:
            counted[way] = run_on(loop, counting(opening()))
        except Exception as error:  # the other ways go on
            failed[way] = f"{type(error).__name__}: {error}"
    return counted, failed


@asynccontextmanager
async def _batched(work: Work) -> AsyncIterator[Request]:
    batching = aiotrt.Batching(max_size=4)
    async with aiotrt.load(
        work.function, device=work.device.name, slots=1, batching=batching, warmup=[work.example]
    ) as model:  # fmt: skip
        yield lambda: model(work.example)


@asynccontextmanager
async def _on_host() -> AsyncIterator[Request]:
    x = torch.zeros(64)
    async with aiotrt.load(_nothing, device="host", slots=1, warmup=[x]) as model:
        yield lambda: model(x)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x


def _counts(code: Any) -> bool:
    file = code.co_filename
    is_request = file == ways.__file__ and code.co_name == "request"
    return file not in _OWN and not is_request and not file.startswith(_LOOP)


def _name(code: Any) -> str:
    """The function's file, line and name; the file relative to the project or to where packages are installed."""
    path = Path(code.co_filename)
    for folder in (ROOT, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))):
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
            break
    return f"{path.as_posix()}:{code.co_firstlineno} {code.co_qualname}"


def summary(counted: Mapping[str, Counted], device: str) -> Table:
    """One line for each way."""
    lines = []
    for way, found in counted.items():
        target = TARGETS.get(way) if device == "cuda" else None
        said = "" if target is None else "meets" if found.median <= target else f"misses by {found.median - target}"
        wanted = "" if target is None else f"<= {target}"
        lines.append([way, str(found.median), f"{found.totals[0]} to {found.totals[-1]}", wanted, said])
    return Table("Python calls of one await, median", ["way", "calls", "range", "target", "verdict"], lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calls", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument("--loop", choices=list(loops()), help="by default uvloop where it is installed")
    parser.add_argument("--us", type=float, help="length of the work; by default 200 on CUDA, 1,000 on the host device")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="awaits that are counted")
    parser.add_argument("--way", action="append", default=[], help="list the functions of this way only; may be repeated")
    arguments = parser.parse_args(words)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "host"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU here; --device host runs without one")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: expected at least 1")
    loop = arguments.loop or list(loops())[-1]
    length = (arguments.us or LENGTH[device]) / 1e6
    counted, failed = count(device, loop, length, arguments.count)
    for way, found in counted.items():
        if not arguments.way or way in arguments.way:
            print(f"{way}: {found.median} calls")
            print("\n".join(f"{n:6}  {function}" for function, n in found.functions.items()), end="\n\n")
    for way, why in failed.items():
        print(f"not counted: {way}: {why}")
    print(as_text(summary(counted, device)))
    print(f"on {device}, {loop}, {1e6 * length:,.0f} us of work, {arguments.count} awaits each")
    return 0 if CALL in counted else 1


if __name__ == "__main__":
    sys.exit(main())
