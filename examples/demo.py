"""See it run: `make demo`. No GPU needed; where there is one, a second part uses it.

32 clients ask one program for the lines of text on pieces of a scanned page. The program answers in three ways, one after
the other: calling the engine in the handler, as one would at first; in a thread, as one would next; and with aiotrt. All
give the same results, bit for bit. What differs is how late the rest of the program runs meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from benchmarks.measure import Heartbeat, Spread, Usage, idle_lag
from examples import gpu, ocr

CLIENTS: Final = 32
CALLS: Final = 8  # by each client
SLOTS: Final = 2  # requests that aiotrt has under way at once; each takes one processor core
PICTURE: Final = Path("demo.png")

console: Final = Console()


@dataclass(frozen=True)
class Outcome:
    """How one way of answering did.

    Attributes:
        way: its name.
        rate: requests answered a second.
        latency: in seconds.
        lag: of the event loop, in seconds.
        cpu: cores that this program used.
        others: cores that other programs used meanwhile, if the system tells.
        results: in the order of the requests.
    """

    way: str
    rate: float
    latency: Spread
    lag: Spread
    cpu: float
    others: float | None
    results: list[Any]


async def main() -> None:
    """The whole demo."""
    try:
        await find_text()
    except FileNotFoundError as error:
        if not gpu.is_available():
            raise
        console.print(f"[yellow]Left out:[/] {error}")
    if gpu.is_available():
        console.print()
        await gpu_part()
    else:
        console.print(
            "\nNo GPU here, so this ran on the processor. On a machine with an NVIDIA GPU the demo has a second part."
        )


async def find_text() -> None:
    """On the processor: a pretrained text detector on a scanned page."""
    console.print("[bold]Finding lines of text on a scanned page[/] with the PP-OCRv4 detector")
    file = ocr.detector_file()
    session = ocr.direct_session(file)
    page = ocr.scanned_page(scale=3)
    requests = page_pieces()

    async def in_handler(x: ocr.Floats) -> ocr.Floats:
        result: ocr.Floats = session(x)
        return result

    async def in_thread(x: ocr.Floats) -> ocr.Floats:
        return await asyncio.to_thread(session, x)

    idle = await idle_lag()
    async with aiotrt.load(file, device="host", slots=SLOTS, threads=1, warmup=[requests[0], ocr.normalise(page)]) as model:
        lines = ocr.find_lines(await model(ocr.normalise(page)))
        ocr.draw(page, lines, PICTURE)
        console.print(f"Found {len(lines)} lines and drew them into [bold]{PICTURE}[/].")
        outcomes = await compare(
            {"session.run(x)": in_handler, "to_thread(...)": in_thread, "await model(x)": model},
            requests,
        )
    show(outcomes, idle)
    check_equal(outcomes)


async def gpu_part() -> None:
    """On the GPU: a network as a captured graph."""
    workload = gpu.workload()
    console.print(f"[bold]{workload.name}[/] on {workload.device}, as a captured graph")
    idle = await idle_lag()
    async with aiotrt.load(workload.network, device="cuda", slots=2, warmup=[workload.example]) as model:
        for reason in model.statistics().fallbacks:
            console.print(f"[yellow]not one graph:[/] {reason}")
        seconds = await gpu.graph_seconds(model, workload.example)
        awaited = await gpu.await_seconds(model, workload.example)
        console.print(
            f"The GPU takes {1e6 * seconds:,.0f} us for one image; awaiting it takes {1e6 * awaited.p50:,.0f} us, "
            f"{1e6 * (awaited.p50 - seconds):,.0f} us over that (p99 {1e6 * (awaited.p99 - seconds):,.0f} us).\n"
        )

        async def in_handler(x: Any) -> Any:
            return workload.run(x)

        async def in_thread(x: Any) -> Any:
            return await asyncio.to_thread(workload.run, x)

        outcomes = await compare(
            {"net(x).cpu()": in_handler, "to_thread(...)": in_thread, "await model(x)": model},
            [workload.image(i) for i in range(CLIENTS * CALLS)],
        )
    show(outcomes, idle)
    difference = max(gpu.difference(a, b) for a, b in zip(outcomes[0].results, outcomes[-1].results, strict=True))
    console.print(f"Largest difference between the handler's results and aiotrt's: {difference:g}.")


# Measuring...


async def compare(ways: dict[str, Callable[[Any], Awaitable[Any]]], requests: Sequence[Any]) -> list[Outcome]:
    """Send all requests through each way in turn."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    width = max(map(len, ways))
    outcomes = []
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as progress:
        for way, answer in ways.items():
            task = progress.add_task(way.ljust(width), total=len(requests))
            outcomes.append(await measure(way, answer, requests, lambda task=task: progress.advance(task)))  # type: ignore[misc]
    return outcomes


async def measure(
    way: str, answer: Callable[[Any], Awaitable[Any]], requests: Sequence[Any], done: Callable[[], None]
) -> Outcome:
    """Send all requests through one way, from `CLIENTS` clients at once, while the heartbeat runs beside them."""
    latencies: list[float] = []
    results: list[Any] = [None] * len(requests)

    async def client(first: int) -> None:
        for i in range(first, len(requests), CLIENTS):
            sent = time.perf_counter()
            await asyncio.sleep(0)  # as a request from a network does, it waits until the loop gets round to it
            results[i] = await answer(requests[i])
            latencies.append(time.perf_counter() - sent)
            done()

    async with Heartbeat() as heartbeat:
        with Usage() as usage:
            await asyncio.gather(*map(client, range(CLIENTS)))
    rate = len(requests) / usage.seconds
    return Outcome(way, rate, Spread.of(latencies), heartbeat.spread, usage.cpu, usage.others, results)


def show(outcomes: Sequence[Outcome], idle: Spread) -> None:
    """The outcomes side by side."""
    table = Table(title=f"{CLIENTS} clients, {CALLS} requests each", title_justify="left")
    table.add_column("answered by")
    for outcome in outcomes:
        table.add_column(outcome.way, justify="right", style="bold" if outcome is outcomes[-1] else None)

    def row(name: str, cell: Callable[[Outcome], str]) -> None:
        table.add_row(name, *map(cell, outcomes))

    row("requests a second", lambda outcome: f"{outcome.rate:,.0f}")
    row("processor cores used", lambda outcome: f"{outcome.cpu:.1f}")
    row("latency: half are within", lambda outcome: milliseconds(outcome.latency.p50))
    row("latency: 99 of 100 within", lambda outcome: milliseconds(outcome.latency.p99))
    row("loop late: half the time", lambda outcome: milliseconds(outcome.lag.p50))
    row("loop late: 1 in 100 times", lambda outcome: milliseconds(outcome.lag.p99))
    console.print(table)
    console.print(
        "[dim]Latency: from sending a request to having its result, waiting in line included. Loop late: how much later "
        "than asked the rest of the program runs, such as timers, other clients and health checks; with nothing to do, "
        f"this loop is late by {milliseconds(idle.p50)} half the time and by {milliseconds(idle.p99)} 1 in 100 times.[/]"
    )
    others = max((outcome.others or 0.0 for outcome in outcomes), default=0.0)
    if others > 0.2:
        console.print(f"[yellow]Other programs used up to {others:.1f} of this machine's cores meanwhile.[/]")


def milliseconds(seconds: float) -> str:
    """As the table shows it."""
    return f"{1e3 * seconds:,.1f} ms"


def check_equal(outcomes: Sequence[Outcome]) -> None:
    """Every way must have given every client the same bits as calling the engine directly."""
    expected, *others = outcomes
    for outcome in others:
        wrong = sum(not np.array_equal(a, b) for a, b in zip(outcome.results, expected.results, strict=True))
        if wrong:
            raise SystemExit(f"{outcome.way}: {wrong} of {len(expected.results)} results differ from the engine's own")
    console.print(f"All {len(expected.results)} results of each are equal, bit for bit, and went to the client who asked.")


# The work...


def page_pieces() -> list[ocr.Floats]:
    """One input for each request: a different piece of the page for each client, a different brightness for each call."""
    page = ocr.scanned_page(scale=2)
    pieces = []
    for call in range(CALLS):
        for client in range(CLIENTS):
            y, x = 6 * client, 12 * client
            piece = page[y : y + 192, x : x + 384] * (1 - 0.05 * call)
            pieces.append(ocr.normalise(piece.astype(np.uint8)))
    return pieces


if __name__ == "__main__":
    try:
        aiotrt.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (aiotrt.AiotrtError, OSError) as error:
        sys.exit(f"demo: {error}")
