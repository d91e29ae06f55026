"""One model on several GPUs: how much faster than on one, and than a process for each GPU?

    python -m benchmarks.bench_several_gpus [--device cuda] [--count 2] [--json FILE] [--quick]

- ``rate``: calls a second on one device and on all of them, in turns, for work of 200 us, of 1 ms and ResNet-50. Inputs are
  on the host, on the first device only, or on each device in turn.
- ``unequal``: the last device has a neighbour, another process that keeps it busy. All devices against that one alone.
- ``processes``: a service with all devices in one process, and one process for each device behind a client that sends each
  request to the process with the fewest under way. Requests a second, percentiles, memory.
- ``fault``: one device breaks under load. How many calls fail, and how long until the others are as fast as without it.

With ``--device host`` the work is a pause, and what is measured is the layer above the executors. ``--twins`` takes the
first GPU as several devices, for a machine that has only one: its rate cannot rise, and what is measured is the layer too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import aiotrt
from aiotrt.devices import Device
from aiotrt.errors import AiotrtError, DeviceError
from benchmarks.measure import drive

__all__ = ["Pause", "Spin", "main"]

#: Seconds of work on the device, and the targets of the rate of two devices over that of one.
WORK: Final = {"200us": (200e-6, 1.8), "1ms": (1e-3, 1.95), "resnet50": (0.0, 1.95)}
UNEQUAL: Final = 1.4  # times twice the rate of the slower device alone
SLOTS: Final = 2
AWAITERS: Final = 4  # for each slot
SHAPE: Final = (64,)


class Pause(torch.nn.Module):
    """Work for the host that takes so many seconds, and no processor."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, later."""
        time.sleep(self.seconds)
        return x + 1


class Spin(torch.nn.Module):
    """Work that fills a GPU for about so many seconds: matrix products, whose number is found by measuring.

    Args:
        seconds: of one call.
        place: the GPU.
    """

    weight: torch.Tensor

    def __init__(self, seconds: float, place: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(4096, dtype=torch.float16, device=place))
        self.times = 1
        x = torch.zeros(SHAPE, device=place)
        took = seconds
        for self.times in (1, 20):
            self(x)
            torch.cuda.synchronize(place)
            begun = time.perf_counter()
            for _ in range(20):
                self(x)
            torch.cuda.synchronize(place)
            took = (time.perf_counter() - begun) / 20
        self.times = max(1, round(20 * seconds / took))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input plus one, later."""
        y = self.weight[:1024]
        for _ in range(self.times):
            y = y @ self.weight
        return x + 1 + y[0, 1]


def network(name: str, place: torch.device) -> tuple[torch.nn.Module, np.ndarray[Any, Any]]:
    """The work of this name, and an input for it."""
    if name == "resnet50":
        import torchvision

        torch.manual_seed(0)
        return torchvision.models.resnet50(weights=None).eval().to(place), np.zeros((1, 3, 224, 224), np.float32)
    seconds, _ = WORK[name]
    return (Spin(seconds, place) if place.type == "cuda" else Pause(seconds)), np.zeros(SHAPE, np.float32)


def devices_of(given: argparse.Namespace) -> list[str | Device]:
    """All devices."""
    if given.device == "host":
        return ["host"] * given.count
    if given.twins:
        from aiotrt.devices.cuda import CudaDevice

        twins: list[Device] = []
        for i in range(given.count):
            twins.append(CudaDevice(0))
            twins[-1].name = f"cuda:0 ({i})"
        return list(twins)
    return [f"cuda:{i}" for i in range(given.count)]


def load(source: torch.nn.Module, devices: Sequence[Any], example: np.ndarray[Any, Any], **options: Any) -> aiotrt.Model:
    """The model on these devices."""
    given: Any = devices[0] if len(devices) == 1 else list(devices)
    model: aiotrt.Model = aiotrt.load(source, device=given, slots=SLOTS, warmup=[example], max_queue=None, **options)
    return model


async def rate(model: aiotrt.Model, inputs: Sequence[Any], seconds: float, count: int) -> float:
    """Calls a second, from enough callers for so many devices."""
    calls: list[Callable[[], Awaitable[object]]] = [lambda x=x: model(x) for x in inputs]  # type: ignore[misc]
    awaiters = AWAITERS * SLOTS * count
    await drive(calls, awaiters, 4 * awaiters)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        await drive(calls, awaiters, 8 * awaiters)
        done += 8 * awaiters
    return done / (time.perf_counter() - begun)


async def rates(given: argparse.Namespace, devices: Sequence[Any]) -> list[dict[str, Any]]:
    """One device and all of them, in turns."""
    place = torch.device("cpu") if given.device == "host" else torch.device("cuda", 0)
    rows = []
    for name in given.work:
        module, example = network(name, place)
        ways: dict[str, list[Any]] = {"host": [example]}
        if given.device != "host":
            ways["first"] = [torch.from_numpy(example).to(place)]
            ways["each"] = [torch.from_numpy(example).to(d.torch_device if given.twins else d) for d in devices]
        one, several = load(module, devices[:1], example), load(module, devices, example)
        async with one, several:
            for way, inputs in ways.items():
                found: dict[str, list[float]] = {"one": [], "several": []}
                for _ in range(given.rounds):
                    found["one"].append(await rate(one, inputs[:1], given.seconds, 1))
                    found["several"].append(await rate(several, inputs, given.seconds, len(devices)))
                shares = [one.completed for one in several.statistics().devices]
                ratio = statistics.median(b / a for a, b in zip(found["one"], found["several"], strict=True))
                rows.append({"work": name, "input": way, "ratio": ratio, "target": WORK[name][1], "shares": shares, **found})
                one_rate, all_rate = statistics.median(found["one"]), statistics.median(found["several"])
                print(f"rate       {name:9s} {way:6s} one {one_rate:9.1f}/s  all {all_rate:9.1f}/s", end="  ")
                print(f"ratio {ratio:.3f}  by device {shares}", flush=True)
    return rows


async def unequal(given: argparse.Namespace, devices: Sequence[Any]) -> dict[str, Any]:
    """All devices, of which the last has a neighbour, against that one alone."""
    place = torch.device("cpu") if given.device == "host" else torch.device("cuda", 0)
    module, example = network("1ms", place)
    visible = {} if given.device == "host" or given.twins else {"CUDA_VISIBLE_DEVICES": str(given.count - 1)}
    neighbour = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs yet
        [sys.executable, "-m", "benchmarks.neighbour", given.device],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **visible},
    )  # fmt: skip
    try:
        assert neighbour.stdout is not None
        await asyncio.get_running_loop().run_in_executor(None, neighbour.stdout.readline)
        found: dict[str, list[float]] = {"slower": [], "several": []}
        async with load(module, devices[-1:], example) as slower, load(module, devices, example) as several:
            for _ in range(given.rounds):
                found["slower"].append(await rate(slower, [example], given.seconds, 1))
                found["several"].append(await rate(several, [example], given.seconds, len(devices)))
            shares = [one.completed for one in several.statistics().devices]
    finally:
        assert neighbour.stdin is not None
        neighbour.stdin.close()
        neighbour.wait(10)
        assert neighbour.stdout is not None
        neighbour.stdout.close()
    ratio = statistics.median(b / (len(devices) * a) for a, b in zip(found["slower"], found["several"], strict=True))
    print(f"unequal    all {statistics.median(found['several']):9.1f}/s, {ratio:.3f} times {len(devices)} of the slower one"
          f"  by device {shares}")  # fmt: skip
    return {"ratio": ratio, "target": UNEQUAL, "shares": shares, **found}


# A service, in one process or in several...


async def serve(given: argparse.Namespace) -> None:
    """Answer each array that comes with the model's result, until standard input is closed. Prints the port."""
    devices = [devices_of(given)[given.serve]] if given.serve >= 0 else devices_of(given)
    place = torch.device("cpu") if given.device == "host" else torch.device("cuda", max(given.serve, 0) * (not given.twins))
    module, example = network(given.work[0], place)

    async with load(module, devices, example) as model:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    (size,) = struct.unpack("!I", await reader.readexactly(4))
                    x = np.frombuffer(await reader.readexactly(size), np.float32).reshape(example.shape)
                    body = (await model(x)).tobytes()
                    writer.write(struct.pack("!I", len(body)) + body)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        server.close()


async def service(given: argparse.Namespace, parts: Sequence[int]) -> dict[str, Any]:
    """The rate, percentiles and memory of these processes together."""
    words = [sys.executable, "-m", "benchmarks.bench_several_gpus", "--device", given.device, "--count", str(given.count),
             "--work", given.work[0], *(["--twins"] if given.twins else [])]  # fmt: skip
    free = None if given.device == "host" else [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    processes = [
        subprocess.Popen([*words, "--serve", str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: ASYNC220
        for part in parts
    ]
    try:
        loop = asyncio.get_running_loop()
        ports = []
        for process in processes:
            assert process.stdout is not None
            ports.append(int(await loop.run_in_executor(None, process.stdout.readline)))
        under_way = [0] * len(ports)
        _, example = (
            network(given.work[0], torch.device("cpu")) if given.device == "host" else (None, _example(given.work[0]))
        )
        message = struct.pack("!I", example.nbytes) + example.tobytes()
        took: list[float] = []
        connections = AWAITERS * SLOTS * given.count
        ends = time.perf_counter() + 2 * given.seconds

        async def ask() -> None:
            streams = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
            while time.perf_counter() < ends:
                i = min(range(len(ports)), key=under_way.__getitem__)
                reader, writer = streams[i]
                under_way[i] += 1
                begun = time.perf_counter()
                writer.write(message)
                (size,) = struct.unpack("!I", await reader.readexactly(4))
                await reader.readexactly(size)
                under_way[i] -= 1
                took.append(time.perf_counter() - begun)
            for _, writer in streams:
                writer.close()

        await asyncio.gather(*(ask() for _ in range(connections)))
        took.sort()
        return {
            "processes": len(parts),
            "rate": len(took) / (2 * given.seconds),
            "p50": took[len(took) // 2],
            "p99": took[int(len(took) * 0.99)],
            "host_bytes": sum(_proportional_bytes(process.pid) for process in processes),
            "gpu_bytes": free and sum(before - torch.cuda.mem_get_info(i)[0] for i, before in enumerate(free)),
        }
    finally:
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait(30)
            process.stdout.close()


def _example(name: str) -> np.ndarray[Any, Any]:
    return np.zeros((1, 3, 224, 224) if name == "resnet50" else SHAPE, np.float32)


def _proportional_bytes(pid: int) -> int:
    """Of a process's memory, what is its own and its share of the rest."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# A fault...


async def fault(given: argparse.Namespace, devices: Sequence[Any]) -> dict[str, Any]:
    """The last device breaks under load, while all others go on. The last thing to do in a process: it stays broken."""
    place = torch.device("cpu") if given.device == "host" else torch.device("cuda", 0)
    module, example = network("1ms", place)
    ends: list[float] = []
    failed: list[BaseException] = []
    async with load(module, devices, example) as model, load(module, devices[:1], example) as one:
        alone = await rate(one, [example], given.seconds, 1) * (len(devices) - 1)
        is_over = False

        async def caller() -> None:
            while not is_over:
                try:
                    await model(example)
                except AiotrtError as error:
                    failed.append(error)
                ends.append(time.perf_counter())

        callers = [asyncio.ensure_future(caller()) for _ in range(AWAITERS * SLOTS * len(devices))]
        await asyncio.sleep(given.seconds)
        submitted = model.statistics().submitted
        broken = time.perf_counter()
        model._executors[-1].device.fail(DeviceError("broken by the benchmark", code=700, name="cudaErrorIllegalAddress"))
        await asyncio.sleep(given.seconds)
        is_over = True
        await asyncio.gather(*callers)
        now = model.statistics()
    assert now.submitted == now.completed + now.failed, "calls were lost or doubled"
    assert now.failed == len(failed)
    window = 0.05
    recovered = next(
        (t - broken for t in ends if t >= broken and sum(t <= e < t + window for e in ends) / window >= 0.9 * alone), None
    )
    after = "not in this run" if recovered is None else f"after {1e3 * recovered:.1f} ms"
    print(f"fault      {len(failed)} calls failed, of {submitted} before it; the others were as fast as alone {after}")
    return {"failed": len(failed), "recovered": recovered, "slots": SLOTS}


async def measured(given: argparse.Namespace) -> dict[str, Any]:
    """All of it, by part."""
    devices = devices_of(given)
    found: dict[str, Any] = {"device": given.device, "count": given.count, "twins": given.twins}
    found["rate"] = await rates(given, devices)
    found["unequal"] = await unequal(given, devices)
    found["processes"] = []
    for parts in ([-1], list(range(given.count))):
        row = await service(given, parts)
        found["processes"].append(row)
        times = f"p50 {1e3 * row['p50']:.2f} ms  p99 {1e3 * row['p99']:.2f} ms"
        memory = f"host {row['host_bytes'] / 2**20:.0f} MiB  GPU {(row['gpu_bytes'] or 0) / 2**20:.0f} MiB"
        print(f"processes  {row['processes']}: {row['rate']:9.1f}/s  {times}  {memory}", flush=True)
    found["fault"] = await fault(given, devices)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="One model on several GPUs, beside one GPU and a process for each.")
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda" if torch.cuda.is_available() else "host")
    parser.add_argument("--count", type=int, default=2, help="how many devices")
    parser.add_argument("--twins", action="store_true", help="the first GPU so many times")
    parser.add_argument("--work", type=lambda text: text.split(","), help=f"of {', '.join(WORK)}, with commas between them")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--quick", action="store_true", help="measure only a little")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.work = given.work or (list(WORK) if given.device == "cuda" else ["200us", "1ms"])
    given.seconds, given.rounds = (0.2, 1) if given.quick else (1.0, 5)
    if given.device == "cuda" and not given.twins and torch.cuda.device_count() < given.count:
        print(f"torch sees {torch.cuda.device_count()} GPUs, and --count is {given.count}: try --twins, or --device host")
        return 2
    torch.set_num_threads(1)
    if given.serve is not None:
        asyncio.run(serve(given))
        return 0
    found = asyncio.run(measured(given))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
