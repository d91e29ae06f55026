"""What shared memory saves: one client, tensors of 6 MiB each way, in the body and in system shared memory.

    python -m benchmarks serving --part shared_memory [--quick] [--out DIR]

`aiotrt serve` runs in a process of its own, on the host, with a model that copies its input. Both ways alternate, request by
request, through the same client of Triton's. Reported are the time of a request, and processor time of the server and of the
client for one.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import tritonclient.http as triton
from onnx import TensorProto, helper
from tritonclient.utils import shared_memory as shm

from benchmarks.measure import Spread, write
from benchmarks.serving_processes import free_port, started, used

__all__ = ["measure"]

MIB: Final = 1 << 20


def measure(*, quick: bool, folder: Path | None) -> int:
    """Run it; returns the exit status."""
    rounds, size = (5, MIB) if quick else (100, 6 * MIB)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        place, port = Path(name), free_port()
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place / "same.onnx")
        words = ["-m", "aiotrt", "serve", place / "same.onnx", "--port", port, "--device", "host", "--shared-memory"]
        process = stack.enter_context(started(words, place / "log"))
        client = stack.enter_context(contextlib.closing(triton.InferenceServerClient(f"127.0.0.1:{port}")))
        _until_ready(client)
        array = np.random.default_rng(1).random(size // 4, np.float32)
        regions = {}
        for name in ("in", "out"):
            key = f"/aiotrt-benchmark-{uuid.uuid4().hex}"
            regions[name] = shm.create_shared_memory_region(name, key, size)
            stack.callback(shm.destroy_shared_memory_region, regions[name])
            client.register_system_shared_memory(name, key, size)

        def in_body() -> Any:
            tensor = triton.InferInput("x", [array.size], "FP32").set_data_from_numpy(array)
            return client.infer("same", [tensor]).as_numpy("y")

        def in_memory() -> Any:
            shm.set_shared_memory_region(regions["in"], [array])
            tensor = triton.InferInput("x", [array.size], "FP32")
            tensor.set_shared_memory("in", size)
            output = triton.InferRequestedOutput("y")
            output.set_shared_memory("out", size)
            client.infer("same", [tensor], outputs=[output])
            return shm.get_contents_as_numpy(regions["out"], np.float32, [array.size])

        ways: dict[str, Callable[[], Any]] = {"body": in_body, "shared memory": in_memory}
        rows = {way: _Row() for way in ways}
        for turn in range(rounds + 3):
            for way, call in ways.items():
                server, own, began = used(process.pid).cpu, time.process_time(), time.perf_counter()
                result = call()
                seconds = time.perf_counter() - began
                assert np.array_equal(result, array)
                if turn >= 3:
                    rows[way].seconds.append(seconds)
                    rows[way].client += time.process_time() - own
                    rows[way].server += used(process.pid).cpu - server
    results = {}
    for way, row in rows.items():
        spread, server, own = Spread.of(row.seconds), row.server / rounds, row.client / rounds
        results[way] = {"seconds": spread, "server_cpu": server, "client_cpu": own}
        print(
            f"{size // MIB} MiB each way in {way:14} p50 {1e3 * spread.p50:6.2f} p99 {1e3 * spread.p99:6.2f} ms; "
            f"processor time: server {1e3 * server:.1f}, client {1e3 * own:.1f} ms a request"
        )
    if folder is not None:
        found = {"quick": quick, "size": size, "rounds": rounds, "ways": results}
        print(f"results: {write('serving-shared-memory', found, folder)}")
    return 0


class _Row:
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.server = self.client = 0.0


def _until_ready(client: triton.InferenceServerClient) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if client.is_server_ready():
                return
        time.sleep(0.1)
    raise TimeoutError("the server is not ready after 60 s")
