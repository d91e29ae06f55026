"""A server in a process of its own, what it holds, and a client that keeps asking it while others do harm."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from prometheus_client.parser import text_string_to_metric_families

from tests.building import models as onnx_models
from tests.serving.test_processes import process, until_ready

__all__ = ["HEAD", "Bystander", "Server", "double", "exchange", "infer_body", "serving_process", "status_of", "unharmed"]

#: Of one answer to the bystander, in seconds. A stall is for as long as somebody else wants; a busy machine is not.
STALL = 5.0
#: What a server's memory may differ by after thousands of requests: allocators keep what they had once.
GROWTH = 48 << 20
HEAD = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@dataclass(frozen=True)
class Server:
    """``aiotrt serve`` in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Values by name and labels' values."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Connection": "close"})
            text = connection.getresponse().read().decode()
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def serving_process(folder: Path, **options: object) -> Iterator[Server]:
    """A server of ``double`` and, for those who load and unload, ``other``; both are y = x + x, of rows of three."""
    for name in ("double", "other"):
        double(folder / f"{name}.onnx")
    lines = ["[server]", "port = 0", *(f"{name} = {value}" for name, value in options.items())]
    for name in ("double", "other"):
        lines += [f"[models.{name}]", f'path = "{name}.onnx"', 'device = "host"', "slots = 2", "warmup = [[2, 3]]"]
    config = folder / "models.toml"
    config.write_text("\n".join(lines), encoding="utf-8")
    with process("-m", "aiotrt", "serve", "--config", config) as (server, url):
        until_ready(url)
        yield Server(server, url)


def double(path: Path) -> Path:
    """y = x + x."""
    return onnx_models.save(path, [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("?", 3)})


def infer_body(x: np.ndarray[Any, Any], name: str = "") -> tuple[bytes, int]:
    """A request of the binary extension, and how long its JSON is."""
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"id": name, "inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + x.tobytes(), len(head)


def exchange(address: tuple[str, int], data: bytes, *, ends: bool = False) -> bytes:
    """Send this and return all that comes until the server closes; `ends` says first that nothing more will come."""
    answer = b""
    with socket.create_connection(address, timeout=20) as connection:
        # A server that refuses closes while more is on its way to it, which resets the connection.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 16):
                answer += chunk
    return answer


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 for none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


class Bystander(threading.Thread):
    """Asks ``double`` again and again, of numbers that nobody else has, and looks at every answer.

    Attributes:
        count: of right answers.
        longest: seconds that one took.
        error: what was wrong, after which it asks no more.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(name="bystander", daemon=True)
        self.count = 0
        self.longest = 0.0
        self.error: Exception | None = None
        self._server = server
        self._over = threading.Event()

    def run(self) -> None:
        random = np.random.default_rng(1)
        connection = http.client.HTTPConnection(*self._server.address, timeout=30)
        with contextlib.closing(connection):
            try:
                while not self._over.is_set():
                    x = random.standard_normal((2, 3)).astype(np.float32)
                    began = time.monotonic()
                    self._ask(connection, x, str(self.count))
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.count += 1
            except Exception as error:
                self.error = error

    def _ask(self, connection: http.client.HTTPConnection, x: np.ndarray[Any, Any], name: str) -> None:
        body, length = infer_body(x, name)
        connection.request("POST", "/v2/models/double/infer", body, {"Inference-Header-Content-Length": str(length)})
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status == 200, (answer.status, data)
        start = int(answer.headers["inference-header-content-length"])
        assert json.loads(data[:start])["id"] == name
        np.testing.assert_array_equal(np.frombuffer(data[start:], np.float32).reshape(2, 3), x + x)

    def until(self, count: int) -> None:
        """Until it has had so many right answers."""
        until(lambda: self.count >= count or self.error is not None, "the bystander's answers", 40)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Let it finish."""
        self._over.set()
        self.join(40)


@contextlib.contextmanager
def unharmed(server: Server) -> Iterator[Bystander]:
    """Whatever is done inside: somebody else is served meanwhile, and nothing of it stays."""
    before, files, resident = server.metrics(), server.files(), server.resident()
    bystander = Bystander(server)
    bystander.start()
    try:
        bystander.until(10)
        yield bystander
        bystander.until(bystander.count + 10)
    finally:
        bystander.stop()
    assert bystander.longest < STALL
    until(lambda: server.files() <= files, "connections that nobody has any more")
    after = server.metrics()
    for key in (("aiotrt_slots", "double", "free"), ("aiotrt_queue_waiting", "double")):
        assert after[key] == before[key]
    failed = ("aiotrt_requests_total", "double", "failed")
    assert after[failed] == before[failed]
    assert server.resident() - resident < GROWTH
    assert server.process.poll() is None


def until(predicate: Any, what: str, seconds: float = 15.0) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, what
        time.sleep(0.01)
