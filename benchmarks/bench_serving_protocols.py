"""The same requests over HTTP and over gRPC, in one run and by turns.

    python -m benchmarks serving --part protocols [--seconds 3] [--quick]

`aiotrt serve` with a model that adds a number to itself, in a process of its own, and a client on uvloop in another. Each
way sends bytes that were made before, so that the client costs little: HTTP with the binary extension, gRPC with
`raw_input_contents`, one call for each request or one stream for each client. Reported are requests a second, their latency,
and the server's processor time for a request, which is all that the protocol and the model take.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper

from aiotrt.serving.kserve.messages import messages
from benchmarks.measure import Spread, median_of, run_on, write
from benchmarks.serving_processes import free_port, started, used

__all__ = ["measure"]

SIZES: Final = {"256 B": 64, "1 MiB": 1 << 18}  # numbers of four bytes
CLIENTS: Final = (1, 8)
ROUNDS: Final = 3
SERVICE: Final = "/inference.GRPCInferenceService/"

#: Sends one request, and returns when its answer is there.
Send = Callable[[], Awaitable[None]]


def measure(*, seconds: float, quick: bool, folder: Path | None) -> int:
    """Run it; returns the exit status."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, place / "double.onnx")
        http, rpc = free_port(), free_port()
        command = ["-m", "aiotrt", "serve", place / "double.onnx", "--port", http, "--grpc-port", rpc, "--device", "host"]
        with started(command, place / "log") as process:
            rows = run_on("uvloop", _all(http, rpc, process.pid, seconds, 1 if quick else ROUNDS))
    results = {"quick": quick, "seconds": seconds, "rounds": 1 if quick else ROUNDS, "settings": rows}
    if folder is not None:
        print(f"results: {write('serving-protocols', results, folder)}")
    return 0


async def _all(http: int, rpc: int, pid: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
    await _until_ready(http)
    rows = []
    for size, count in SIZES.items():
        ways = {"HTTP": _http(http, count), "gRPC": _unary(rpc, count), "gRPC, streams": _streams(rpc, count)}
        async with AsyncExitStack() as stack:
            senders = {
                way: [await stack.enter_async_context(one()) for _ in range(max(CLIENTS))] for way, one in ways.items()
            }
            for clients in CLIENTS:
                runs: dict[str, list[tuple[Spread, float, float]]] = {way: [] for way in ways}
                for _ in range(rounds):
                    for way in ways:
                        runs[way].append(await _one(senders[way][:clients], pid, seconds))
                for way, found in runs.items():
                    row: dict[str, Any] = {
                        "size": size,
                        "clients": clients,
                        "way": way,
                        "latency": median_of(latency for latency, _, _ in found),
                        "rate": statistics.median(rate for _, rate, _ in found),
                        "cpu": statistics.median(cpu for _, _, cpu in found),
                    }
                    rows.append(row)
                    print(
                        f"{size:6} {clients} clients, {way:14} {row['rate']:6.0f} requests/s, p50 "
                        f"{1e3 * row['latency'].p50:6.2f} p99 {1e3 * row['latency'].p99:6.2f} ms, "
                        f"{1e6 * row['cpu']:5.0f} us of the server's processor time for a request",
                        flush=True,
                    )
    return rows


async def _one(senders: list[Send], pid: int, seconds: float) -> tuple[Spread, float, float]:
    """Latency, requests a second, and processor seconds of the server for a request."""
    await asyncio.gather(*(send() for send in senders))  # connects
    taken: list[float] = []
    before, began = used(pid), time.monotonic()

    async def client(send: Send) -> None:
        while time.monotonic() < began + seconds:
            at = time.monotonic()
            await send()
            taken.append(time.monotonic() - at)

    await asyncio.gather(*map(client, senders))
    wall = time.monotonic() - began
    return Spread.of(taken), len(taken) / wall, (used(pid).cpu - before.cpu) / len(taken)


def _http(port: int, count: int) -> Callable[[], Any]:
    x = np.ones(count, np.float32)
    tensor = {"name": "x", "shape": [count], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body, headers = head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}

    @asynccontextmanager
    async def way() -> AsyncIterator[Send]:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

            async def send() -> None:
                async with session.post("/v2/models/double/infer", data=body, headers=headers) as response:
                    assert len(await response.read()) > x.nbytes

            yield send

    return way


def _request(count: int) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [count]}
    raw = np.ones(count, np.float32).tobytes()
    message = messages["ModelInferRequest"](model_name="double", inputs=[tensor], raw_input_contents=[raw])
    return bytes(message.SerializeToString())


def _unary(port: int, count: int) -> Callable[[], Any]:
    body = _request(count)

    @asynccontextmanager
    async def way() -> AsyncIterator[Send]:
        async with _channel(port) as channel:
            infer = channel.unary_unary(f"{SERVICE}ModelInfer")

            async def send() -> None:
                assert len(await infer(body)) > 4 * count

            yield send

    return way


def _streams(port: int, count: int) -> Callable[[], Any]:
    body = _request(count)

    @asynccontextmanager
    async def way() -> AsyncIterator[Send]:
        async with _channel(port) as channel:
            call = channel.stream_stream(f"{SERVICE}ModelStreamInfer")()

            async def send() -> None:
                await call.write(body)
                assert len(await call.read()) > 4 * count

            yield send
            call.cancel()

    return way


def _channel(port: int) -> Any:
    # A connection for each client, as with HTTP.
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])


async def _until_ready(port: int) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
