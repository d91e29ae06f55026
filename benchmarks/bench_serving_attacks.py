"""Requests that are meant to stop a server, and what other clients notice of them.

    python -m benchmarks serving --part attacks [--quick]

Two servers in processes of their own: `aiotrt serve` with a model that doubles numbers, and a FastAPI application with
`image_body`. During each attack one client asks for ``/livez`` every 5 ms, and another runs the model every 20 ms. Reported
are how long ``/livez`` took, which statuses innocent requests got, how much more memory than before the server used at its
peak, and which statuses the attacker got.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from benchmarks.measure import Spread, write
from benchmarks.serving_processes import free_port, started

__all__ = ["measure"]

MIB: Final = 1 << 20
LIVEZ_BAR: Final = 0.05  # seconds, p99
MEMORY_BAR: Final = 1024 * MIB  # what decoders of images may take together
APPLICATION: Final = """
import sys
from typing import Annotated
import numpy as np, numpy.typing as npt, uvicorn
from fastapi import Depends, FastAPI
from aiotrt import serving

app = FastAPI(lifespan=serving.lifespan())
serving.install(app)

@app.post("/size")
async def size(page: Annotated[npt.NDArray[np.uint8], Depends(serving.image_body())]) -> tuple[int, ...]:
    return page.shape

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""
INFER: Final = "/v2/models/double/infer"
SMALL: Final = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}]}).encode()


@dataclass
class Seen:
    """What happened during one attack: seconds of each answer of ``/livez``, and statuses by who got them."""

    livez: list[float] = field(default_factory=list)
    innocent: Counter[str] = field(default_factory=Counter)
    attacker: Counter[str] = field(default_factory=Counter)


def measure(*, quick: bool, folder: Path | None) -> int:
    """Run all attacks; returns the exit status."""
    rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, place / "double.onnx")
        (place / "application.py").write_text(APPLICATION, encoding="utf-8")
        server, application = free_port(), free_port()
        command = ["-m", "aiotrt", "serve", place / "double.onnx", "--port", server, "--device", "host"]
        rows = {}
        for port, words, attacks in (
            (server, command, SERVER), (application, ["-c", APPLICATION, application], APPLICATION_ATTACKS),
        ):  # fmt: skip
            for what, attack in attacks.items():
                with started(words, place / "log") as process:
                    _until_ready(port)
                    rows[what] = _one(port, process.pid, functools.partial(attack, port), rounds, port == server)
                    _show(what, rows[what])
    misses = [what for what, row in rows.items() if not row["meets"]]
    results = {"quick": quick, "rounds": rounds, "attacks": rows, "misses": misses}
    if folder is not None:
        print(f"results: {write('serving-attacks', results, folder)}")
    return 1 if misses else 0


def _one(port: int, pid: int, attack: Callable[[Counter[str]], None], rounds: int, runs_model: bool) -> dict[str, Any]:
    seen, over = Seen(), threading.Event()
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _memory(pid, "VmRSS")
    threads = [threading.Thread(target=_ask_livez, args=(port, seen, over))]
    if runs_model:
        threads.append(threading.Thread(target=_run_model, args=(port, seen, over)))
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    for _ in range(rounds):
        attack(seen.attacker)
        time.sleep(0.2)
    over.set()
    for thread in threads:
        thread.join()
    livez, memory = Spread.of(seen.livez), _memory(pid, "VmHWM") - before
    refused = sum(count for status, count in seen.innocent.items() if status != "200")
    return {
        "livez": livez,
        "memory": memory,
        "innocent": dict(seen.innocent),
        "attacker": dict(seen.attacker),
        "meets": livez.p99 < LIVEZ_BAR and memory < MEMORY_BAR and not refused,
    }


def _show(what: str, row: dict[str, Any]) -> None:
    livez = row["livez"]
    print(
        f"{what:28} /livez p50 {1e3 * livez.p50:5.1f} p99 {1e3 * livez.p99:6.1f} worst {1e3 * livez.worst:6.0f} ms; memory "
        f"+{row['memory'] / MIB:.0f} MiB; innocent {row['innocent']}; attacker {row['attacker']}; "
        f"{'meets' if row['meets'] else 'MISSES'}",
        flush=True,
    )


# --- innocent clients ---------------------------------------------------------------------------------------------------


def _ask_livez(port: int, seen: Seen, over: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        while not over.wait(0.005):
            began = time.perf_counter()
            connection.request("GET", "/livez")
            connection.getresponse().read()
            seen.livez.append(time.perf_counter() - began)


def _run_model(port: int, seen: Seen, over: threading.Event) -> None:
    while not over.wait(0.02):
        seen.innocent[_post(port, INFER, SMALL)] += 1


def _until_ready(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    sys.exit("the server is not ready after 60 s")


def _memory(pid: int, which: str) -> int:
    return 1024 * int(Path(f"/proc/{pid}/status").read_text(encoding="ascii").partition(f"{which}:")[2].split()[0])


# --- attacks ------------------------------------------------------------------------------------------------------------


def _post(port: int, path: str, body: bytes, **headers: str) -> str:
    """The status of the answer, or the error's name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        try:
            connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            return str(connection.getresponse().status)
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__


def _at_once(count: int, one: Callable[[], str], statuses: Counter[str]) -> None:
    def run() -> None:
        statuses[one()] += 1

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _many(item: bytes, size: float) -> bytes:
    return b"[" + item * (int(size) // len(item)) + item.rstrip(b",") + b"]"


def _json(body: bytes, count: int, port: int, statuses: Counter[str]) -> None:
    _at_once(count, lambda: _post(port, INFER, body, Content_Type="application/json"), statuses)


def _image(body: bytes, kind: str, count: int, port: int, statuses: Counter[str]) -> None:
    _at_once(count, lambda: _post(port, "/size", body, Content_Type=kind), statuses)


def _true_request(item: bytes, count: int) -> bytes:
    """JSON that is what it should be, and as much as there may be."""
    data = _many(item, len(item) * (count - 1))
    return b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [%d], "data": %s}]}' % (count, data)


def _announced(port: int, statuses: Counter[str]) -> None:
    """Sixteen connections that send headers, and nothing of the 64 MiB that these announce."""
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)))
            connection.putrequest("POST", INFER)
            connection.putheader("Content-Length", str(64 * MIB))
            connection.endheaders()
        time.sleep(1.0)
    statuses["sent headers"] += 16


def _chunked(port: int, statuses: Counter[str]) -> None:
    """Sixty-four small requests whose length is not announced."""
    gate = threading.Barrier(64)

    def one() -> str:
        def parts() -> Iterator[bytes]:
            gate.wait()
            yield SMALL[:20]
            time.sleep(0.05)
            yield SMALL[20:]

        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", INFER, parts(), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
            return str(connection.getresponse().status)

    _at_once(64, one, statuses)


def _long_head(port: int, statuses: Counter[str]) -> None:
    """Heads of 200 KiB that arrive in one piece."""
    headers = {f"x_{i}": "y" * 30 for i in range(4000)}
    _at_once(8, lambda: _post(port, INFER, SMALL, **headers), statuses)


def _from_another_site(port: int, statuses: Counter[str]) -> None:
    """What a page of another site may send, and does not need to be allowed to; the model must stay."""
    status = _post(
        port, "/v2/repository/models/double/unload", b"", Origin="http://evil.example", Content_Type="text/plain"
    )  # fmt: skip
    statuses[f"unload {status}"] += 1
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/status.json", headers={"Host": f"evil.example:{port}"})
        statuses[f"status.json {connection.getresponse().status}"] += 1


def tall(height: int, width: int = 1) -> bytes:
    """A PNG whose head says so, and which holds next to nothing."""
    parts = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def full(size: int) -> bytes:
    """A black PNG of so many pixels squared, which is small."""
    rows = zlib.compress(bytes((1 + 3 * size) * size), 9)
    parts = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0), b"IDAT" + rows, b"IEND"
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SERVER: Final[dict[str, Callable[[int, Counter[str]], None]]] = {
    "nothing": lambda port, statuses: time.sleep(1),
    "5 x 3.9 MiB of []": functools.partial(_json, _many(b"[],", 3.9 * MIB), 5),
    "5 x 3.9 MiB of keys": functools.partial(
        _json, b"{" + b",".join(b'"%x":0' % i for i in range(int(0.35 * MIB))) + b"}", 5
    ),
    "5 x 1,000,000 numbers": functools.partial(_json, _true_request(b"0.5,", 1_000_000), 5),
    "5 x 4 MiB of 2 M numbers": functools.partial(_json, _true_request(b"0,", 2_000_000), 5),
    "16 headers of 64 MiB": _announced,
    "64 small chunked requests": _chunked,
    "8 heads of 200 KiB": _long_head,
    "another site": _from_another_site,
}
APPLICATION_ATTACKS: Final[dict[str, Callable[[int, Counter[str]], None]]] = {
    "5 x 19.7 MiB of []": functools.partial(_image, _many(b"[],", 19.7 * MIB), "application/json", 5),
    "5 x 19.7 MiB of base64": functools.partial(
        _image, b'{"image": "' + b"A" * int(19.7 * MIB) + b'"}', "application/json", 5
    ),
    "5 x PNG of 1 x 50,000,000": functools.partial(_image, tall(50_000_000), "image/png", 5),
    "8 x PNG of 7,000 x 7,000": functools.partial(_image, full(7000), "image/png", 8),
}
