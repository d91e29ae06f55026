"""Servers, from their start to their end, asked in several ways, and what was seen of them."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

from benchmarks.measure import Spread, Usage
from benchmarks.rows import Run
from benchmarks.serving_processes import free_port, started, used
from benchmarks.serving_rivals.clients import Clients, Load
from benchmarks.serving_rivals.contenders import Contender
from benchmarks.serving_rivals.work import BEAT, LAG, READY

__all__ = ["Seen", "Trials"]

START: Final = 120.0  # seconds that a server has until it is ready


@dataclass(frozen=True)
class Seen:
    """A server under one load.

    Attributes:
        run: its `cpu` is of all the server's processes, in cores; its `others` are neither the server nor the clients.
        lag: of the server's loop, in seconds.
        memory: of all the server's processes, in bytes.
        client: the busiest client's share of a core. Near 1 the client limits the rate.
    """

    run: Run
    lag: Spread
    memory: int
    client: float


@dataclass(frozen=True)
class _Server:
    name: str
    said: str
    url: str
    process: Popen[bytes]
    log: Path

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            data: bytes = response.read()
        return data

    def lags(self) -> list[float]:
        """Since this was last called, at least one; in seconds."""
        while not (lags := json.loads(self.get(LAG))["lags"]):
            time.sleep(BEAT)
        found: list[float] = lags
        return found

    def until_ready(self) -> None:
        end = time.perf_counter() + START
        while time.perf_counter() < end:
            if self.process.poll() is not None:
                raise RuntimeError("the server ended before it was ready")
            try:
                self.get(READY)
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError(f"the server was not ready within {START:.0f} s")


@dataclass
class Trials:
    """All trials with one model.

    Args:
        model: its name.
        device: where it runs.
        file: its own, if it has one.
        clients: who asks.
        server: what uvicorn is told, by option.
        pythons: interpreters by the program that they run, where it is not this one.
        folder: for the servers' output.
        warm: seconds of asking before each load.

    Attributes:
        wrong: answers that are not what they must be, by contender.
        failed: what could not be tried, and why.
    """

    model: str
    device: str
    file: Path | None
    clients: Clients
    server: Mapping[str, str]
    pythons: Mapping[str, str]
    folder: Path
    warm: float
    wrong: dict[str, Counter[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, field: Sequence[tuple[Contender, Mapping[str, Any]]], loads: Sequence[Load]) -> list[list[Seen]]:
        """Start servers with these settings, ask them one after the other, end them; one that failed gives nothing.

        On CUDA all are started first, because that takes longer than the asking, and an idle server uses no device. On the
        host each has the processors to itself.
        """
        groups = [field] if self.device == "cuda" else [[one] for one in field]
        return [seen for group in groups for seen in self._together(group, loads)]

    def _together(self, group: Sequence[tuple[Contender, Mapping[str, Any]]], loads: Sequence[Load]) -> list[list[Seen]]:
        with ExitStack() as stack:
            servers = [stack.enter_context(self._started(who, settings)) for who, settings in group]
            ready = [self._is_ready(server) for server in servers]  # all of them before any is asked
            seen = [self._asked(server, loads) if is_ready else [] for server, is_ready in zip(servers, ready, strict=True)]
            for server in servers:
                server.process.terminate()  # all end at the same time
        return seen

    @contextmanager
    def _started(self, who: Contender, settings: Mapping[str, Any]) -> Iterator[_Server]:
        port, said = free_port(), json.dumps(settings)
        log = self.folder / f"log-{port}"
        log.write_bytes(b"")
        options = {"port": port, "model": self.model, "device": self.device, "settings": said, **self.server}
        if self.file is not None:
            options["file"] = self.file
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        python, cuda = self.pythons.get(who.program, sys.executable), self.device == "cuda"
        with started(["-m", "benchmarks.serving_rivals", who.program, *words], log, python=python, cuda=cuda) as process:
            yield _Server(who.name, said, f"http://127.0.0.1:{port}", process, log)

    def _is_ready(self, server: _Server) -> bool:
        try:
            server.until_ready()
        except (RuntimeError, TimeoutError) as error:
            self._fail(server, error)
            return False
        return True

    def _asked(self, server: _Server, loads: Sequence[Load]) -> list[Seen]:
        try:
            return [self._under(load, server) for load in loads]
        except (OSError, RuntimeError) as error:
            self._fail(server, error)
            return []

    def _fail(self, server: _Server, error: Exception) -> None:
        last = server.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        self.failed[f"{self.model}, {server.name}, {server.said}"] = f"{error!r}\n{last}"

    def _under(self, load: Load, server: _Server) -> Seen:
        start = time.perf_counter() + self.warm
        answers = self.clients.ask(server.url, load, start)
        time.sleep(max(0.0, start - time.perf_counter()))
        with Usage() as usage:
            before = used(server.process.pid)
            server.get(LAG)  # the lags before the load do not count
            asked = answers()
        after = used(server.process.pid)
        self.wrong.setdefault(server.name, Counter()).update(asked.wrong)
        cpu = (after.cpu - before.cpu) / usage.seconds
        clients = [seconds / (asked.end - start) for seconds in asked.cpu]
        # `Usage` counts all but this process as others: the server and the clients are none.
        others = None if usage.others is None else max(0.0, usage.others - cpu - sum(clients))
        run = Run(Spread.of(asked.took), len(asked.took) / (asked.end - start), cpu, others)
        return Seen(run, Spread.of(server.lags()), after.memory, max(clients))
