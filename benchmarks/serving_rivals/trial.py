"""One server, from its start to its end, asked in several ways, and what was seen of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, Usage, loops, run_on
from benchmarks.rows import Run
from benchmarks.serving_processes import free_port, started, used
from benchmarks.serving_rivals.asker import Asker, Known
from benchmarks.serving_rivals.contenders import Contender

__all__ = ["Load", "Seen", "Trials"]


@dataclass(frozen=True)
class Load:
    """What is asked: by so many connections for so long, or at these moments; in seconds."""

    name: str
    seconds: float = 0.0
    connections: int = 0
    moments: Sequence[float] = ()


@dataclass(frozen=True)
class Seen:
    """A server under one load.

    Attributes:
        run: its `cpu` is of all the server's processes, in cores; its `others` are neither the server nor the client.
        lag: of the server's loop, in seconds.
        memory: of all the server's processes, in bytes.
        client: the client's share of a core.
    """

    run: Run
    lag: Spread
    memory: int
    client: float


@dataclass
class Trials:
    """All trials with one model.

    Args:
        model: its name.
        device: where it runs.
        file: its own, if it has one.
        known: its right answers.
        server: what uvicorn is told, by option.
        pythons: interpreters by the program that they run, where it is not this one.
        folder: for the servers' output.
        warm: seconds of asking before anything counts.

    Attributes:
        wrong: answers that are not what they must be, by contender.
        failed: what could not be tried, and why.
    """

    model: str
    device: str
    file: Path | None
    known: Known
    server: Mapping[str, str]
    pythons: Mapping[str, str]
    folder: Path
    warm: float
    wrong: dict[str, Counter[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, who: Contender, settings: Mapping[str, Any], loads: Sequence[Load]) -> list[Seen]:
        """Start it, ask it, end it; nothing comes back if it failed."""
        port, log, said = free_port(), self.folder / "log", json.dumps(settings)
        log.write_bytes(b"")
        options = {"port": port, "model": self.model, "device": self.device, "settings": said, **self.server}
        if self.file is not None:
            options["file"] = self.file
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        python, cuda = self.pythons.get(who.program, sys.executable), self.device == "cuda"
        try:
            with started(["-m", "benchmarks.serving_rivals", who.program, *words], log, python=python, cuda=cuda) as process:
                asked = self._asked(who, f"http://127.0.0.1:{port}", process.pid, lambda: process.poll() is None, loads)
                return run_on("uvloop" if "uvloop" in loops() else "asyncio", asked)
        except (OSError, RuntimeError, TimeoutError) as error:
            last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            self.failed[f"{self.model}, {who.name}, {said}"] = f"{error!r}\n{last}"
            return []

    async def _asked(
        self, who: Contender, url: str, pid: int, is_running: Callable[[], bool], loads: Sequence[Load]
    ) -> list[Seen]:
        wrong = self.wrong.setdefault(who.name, Counter())
        async with Asker(url, self.known, wrong) as asker:
            await asker.until_ready(is_running)
            await asker.closed(8, self.warm)
            return [await _under(load, asker, pid) for load in loads]


async def _under(load: Load, asker: Asker, pid: int) -> Seen:
    await asker.lags()  # those before are no part of it
    before = used(pid)
    with Usage() as usage:
        took = await asker.open(load.moments) if load.moments else await asker.closed(load.connections, load.seconds)
    after = used(pid)
    cpu = (after.cpu - before.cpu) / usage.seconds
    # `Usage` takes everybody but this process for others: so the server too, which is none.
    others = None if usage.others is None else max(0.0, usage.others - cpu)
    run = Run(Spread.of(took), len(took) / usage.seconds, cpu, others)
    return Seen(run, Spread.of(await asker.lags()), after.memory, usage.cpu)
