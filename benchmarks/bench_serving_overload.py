"""Twice as much as a server can do, for ten minutes.

    python -m benchmarks serving --part overload|overload_grpc [--seconds 600]

`aiotrt serve`, with batches of up to 8, in a process of its own, and a client in another, which first asks as fast as it is
answered, for what the server can do a second, and then twice as often, with a deadline on each request and no regard for the
answers. Each request has a number, and each answer a checksum that only that request can have. Then the client stops, and
asks now and then, until the server is as it was.

The bars: no answer is lost, duplicated or another's; of the requests that were admitted 99 % are answered within the
deadline; each refusal says when to come back, in 1 to 60 seconds; the queue keeps to its bound, and the memory to 32 MiB of
what it was when everything had been used; the server counted what the client did; and after the end the server is as quick
as before within 5 seconds, with all slots free and nobody in line.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.measure import Spread, Usage, run_on, write
from benchmarks.rows import verdict
from benchmarks.serving_asker import Answer, Asker, GrpcAsker
from benchmarks.serving_model import WIDTH, reader
from benchmarks.serving_processes import free_port, resident, started, used

__all__ = ["measure"]

MIB: Final = 1 << 20
DEADLINE: Final = 0.5  # seconds
FACTOR: Final = 2.0  # of what the server can do
QUEUE: Final = 64
SLOTS: Final = 1
BATCH: Final = 8
CLIENTS: Final = 24  # to find out what it can do
GROWTH_BAR: Final = 32 * MIB
RECOVERY_BAR: Final = 5.0
OUTCOMES: Final = ("completed", "failed", "cancelled", "rejected", "expired")

CONFIG: Final = f"""
[server]
port = %d
grpc_port = %d

[models.reader]
path = "reader.onnx"
device = "host"
slots = {SLOTS}
max_queue = {QUEUE}
batching = {{ max_size = {BATCH} }}
warmup = [{{ pixels = [3, 48, {WIDTH}], number = [] }}]
"""


@dataclass(frozen=True)
class Sample:
    """The server at one moment: seconds since the overload began, bytes of memory, callers in line, free slots, requests."""

    at: float
    memory: int
    waiting: int
    free: int
    outcomes: dict[str, int]


class Watch:
    """Reads the server's metrics and memory."""

    def __init__(self, url: str, pid: int) -> None:
        self.samples: list[Sample] = []
        self._url = url
        self._pid = pid
        self._began = time.monotonic()

    async def look(self) -> Sample:
        """Now."""
        async with aiohttp.ClientSession() as session, session.get(f"{self._url}/metrics") as response:
            text = await response.text()
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return Sample(
            time.monotonic() - self._began,
            resident(self._pid),
            int(found["aiotrt_queue_waiting", "reader"]),
            int(found["aiotrt_slots", "reader", "free"]),
            {outcome: int(found["aiotrt_requests_total", "reader", outcome]) for outcome in OUTCOMES},
        )

    async def keep(self, pause: float) -> None:
        """Again and again."""
        self._began = time.monotonic()
        while True:
            self.samples.append(await self.look())
            await asyncio.sleep(pause)


def measure(*, seconds: float, quick: bool, folder: Path | None, is_grpc: bool = False) -> int:
    """Run it; returns the exit status."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        file, ports, log = reader(place / "reader.onnx"), (free_port(), free_port()), place / "log"
        (place / "models.toml").write_text(CONFIG % ports, encoding="utf-8")
        url = f"http://127.0.0.1:{ports[0]}"
        asker = GrpcAsker(f"127.0.0.1:{ports[1]}", file) if is_grpc else Asker(url, file)
        with started(["-m", "aiotrt", "serve", "--config", place / "models.toml"], log) as process:
            try:
                results = run_on("uvloop", overload(url, asker, process.pid, seconds, quick=quick))
            except BaseException:
                print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
                raise
    show(results)
    if folder is not None:
        print(f"results: {write('serving-overload-grpc' if is_grpc else 'serving-overload', results, folder)}")
    return 0 if results["verdict"] == "meets" else 1


async def overload(url: str, asker: Asker, pid: int, seconds: float, *, quick: bool) -> dict[str, Any]:
    """All of it."""
    watch = Watch(url, pid)
    async with asker:
        await _until_ready(url)
        await _as_fast_as_answered(asker, 1.0)  # warms up what warms up
        alone = [await asker.ask() for _ in range(20)]
        capacity = await _as_fast_as_answered(asker, 2.0 if quick else 10.0)
        before, sent, rate = await watch.look(), asker.sent, FACTOR * capacity
        watching = asyncio.create_task(watch.keep(0.2 if quick else 1.0))
        used_before = used(pid)
        with Usage() as usage:
            answers, late = await _no_regard(asker, rate, seconds)
        used_after = used(pid)
        watching.cancel()
        usual = statistics.median(answer.seconds for answer in alone)
        recovery = await _recovery(asker, usual)
        await asyncio.sleep(0.5)
        after = await watch.look()
    found = _judged(asker, watch, answers, before, after, recovery, asker.sent - sent)
    return {
        "quick": quick,
        "seconds": usage.seconds,
        "deadline": DEADLINE,
        "model": f"PP-OCRv4 recogniser, 48 x {WIDTH} pixels",
        "slots": SLOTS,
        "max_batch": BATCH,
        "max_queue": QUEUE,
        "capacity": capacity,
        "asked": rate,
        "client_late": Spread.of(late),
        "usual": usual,
        "server_cpu": (used_after.cpu - used_before.cpu) / usage.seconds,
        "client_cpu": usage.cpu,
        # `Usage` takes everybody but this process for others: so the server too, which is none.
        "others": None if usage.others is None else usage.others - (used_after.cpu - used_before.cpu) / usage.seconds,
        **found,
    }


async def _until_ready(url: str) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def _as_fast_as_answered(asker: Asker, seconds: float) -> float:
    """Requests a second that are answered if each client waits for its answer before it asks again."""
    end, count = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal count
        while time.monotonic() < end:
            answer = await asker.ask()
            assert answer.status == 200, f"{answer}, with no more clients than the queue has places"
            count += 1

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return count / (time.monotonic() - began)


async def _no_regard(asker: Asker, rate: float, seconds: float) -> tuple[list[Answer], list[float]]:
    """So many a second, whatever comes of them; and how late each was sent."""
    began = time.monotonic()
    answers: list[Answer] = []
    late: list[float] = []

    async def one(due: float) -> None:
        late.append(time.monotonic() - due)
        answers.append(await asker.ask(DEADLINE))

    async with asyncio.TaskGroup() as group:
        for number in range(round(rate * seconds)):
            due = began + number / rate
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            group.create_task(one(due))
    return answers, late


async def _recovery(asker: Asker, usual: float) -> float:
    """Seconds until five answers in a row take no more than twice as long as usual; more than the bar if they never do."""
    began, in_a_row = time.monotonic(), 0
    while in_a_row < 5 and time.monotonic() - began < 4 * RECOVERY_BAR:
        answer = await asker.ask()
        in_a_row = in_a_row + 1 if answer.status == 200 and answer.seconds < 2 * usual else 0
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def _judged(
    asker: Asker, watch: Watch, answers: list[Answer], before: Sample, after: Sample, recovery: float, sent: int
) -> dict[str, Any]:
    by_status = Counter(answer.status for answer in answers)
    admitted = [answer.seconds for answer in answers if answer.status in (200, 504)]
    refused = [answer for answer in answers if answer.status == 503]
    waits = Counter(answer.retry_after for answer in refused)
    insane = [wait for wait in waits if wait is None or not wait.isdecimal() or not 1 <= int(wait) <= 60]
    quarter = len(watch.samples) // 4
    memory = [sample.memory for sample in watch.samples]
    growth = max(memory[3 * quarter :]) - max(memory[: quarter + 1])
    longest = max(sample.waiting for sample in watch.samples)
    counted = sum(after.outcomes[name] - before.outcomes[name] for name in OUTCOMES)
    latency = Spread.of(admitted)
    misses = {
        f"wrong: {dict(asker.wrong)}": bool(asker.wrong),
        f"answers other than 200, 503 and 504: {dict(by_status)}": bool(set(by_status) - {200, 503, 504}),
        f"p99 {latency.p99:.3f} s": latency.p99 > DEADLINE,
        "nobody was refused, so this was no overload": not refused,
        f"Retry-After {insane}": bool(insane),
        f"{longest} in line": longest > QUEUE,
        f"memory grew by {growth / MIB:.0f} MiB": growth > GROWTH_BAR,
        f"the server counted {counted}, and {sent} were sent": counted != sent,
        f"not as before within {recovery:.1f} s": recovery > RECOVERY_BAR,
        f"{after.free} slots free, {after.waiting} in line": (after.free, after.waiting) != (SLOTS, 0),
    }
    return {
        "sent": len(answers),
        "statuses": {str(status): count for status, count in sorted(by_status.items())},
        "wrong": dict(asker.wrong),
        "admitted": latency,
        "refused": Spread.of([answer.seconds for answer in refused]) if refused else None,
        "good_rate": by_status[200] / (max(answer.began for answer in answers) - min(answer.began for answer in answers)),
        "retry_after": {str(wait): count for wait, count in sorted(waits.items(), key=str)},
        "most_waiting": longest,
        "memory": {"first": memory[0], "most": max(memory), "growth": growth},
        "recovery": recovery,
        "verdict": verdict([what for what, is_missed in misses.items() if is_missed]),
    }


def show(results: dict[str, Any]) -> None:
    """What there is to say."""
    admitted, refused = results["admitted"], results["refused"]
    print(
        f"{results['seconds']:.0f} s of {results['asked']:.0f} requests/s at a capacity of {results['capacity']:.0f}: "
        f"{results['sent']:,} sent, by status {results['statuses']}, {results['good_rate']:.0f} good ones a second, "
        f"wrong {results['wrong'] or 'none'}\n"
        f"admitted: p50 {1e3 * admitted.p50:.0f} ms, p99 {1e3 * admitted.p99:.0f}, worst {1e3 * admitted.worst:.0f}, "
        f"deadline {1e3 * DEADLINE:.0f}; alone {1e3 * results['usual']:.0f}\n"
        + (f"refused: p50 {1e3 * refused.p50:.0f} ms, p99 {1e3 * refused.p99:.0f}\n" if refused else "")
        + f"Retry-After {results['retry_after']}; most in line {results['most_waiting']} of {QUEUE}; memory "
        f"{results['memory']['most'] / MIB:.0f} MiB at most, growth {results['memory']['growth'] / MIB:.1f}\n"
        f"as before after {results['recovery']:.2f} s; cores: server {results['server_cpu']:.2f}, client "
        f"{results['client_cpu']:.2f}, others {results['others'] or 0:.2f}\n"
        f"{results['verdict']}"
    )
