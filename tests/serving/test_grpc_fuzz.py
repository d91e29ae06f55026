"""Nonsense on the port of gRPC: mutated messages and frames.

The server is a process, so that its memory and log are its own.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import struct
from pathlib import Path

import grpc
import numpy as np
import pytest

from aiotrt.cli import main
from aiotrt.serving.kserve.messages import messages
from benchmarks.serving_processes import resident
from tests.building import models as onnx_models
from tests.serving.test_contents import mutated
from tests.serving.test_processes import process

pytestmark = pytest.mark.asyncio

SERVICE = "/inference.GRPCInferenceService/"
MIB = 1 << 20
X = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
#: Bytes of memory that a server may have more at the end than after the first third.
GROWTH = 16 * MIB
CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
}
UNARY = (
    "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex", "ServerMetadata", "TraceSetting",
)  # fmt: skip


def message() -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": X.shape}
    request = messages["ModelInferRequest"](model_name="relu", id="1", inputs=[tensor], raw_input_contents=[X.tobytes()])
    request.parameters["deadline_ms"].int64_param = 10_000
    data: bytes = request.SerializeToString()
    return data


async def many_messages(address: str, count: int, randomly: random.Random) -> None:
    """In calls, in streams, and to other methods."""
    seeds = [message(), b"\x0a\x04relu\x12\x011"]
    async with grpc.aio.insecure_channel(address) as channel:

        async def unary(name: str) -> None:
            call = channel.unary_unary(SERVICE + name)(mutated(randomly, seeds))
            assert await call.code() in CODES, await call.details()

        async def stream(length: int) -> None:
            call = channel.stream_stream(f"{SERVICE}ModelStreamInfer")()
            for _ in range(length):
                await call.write(mutated(randomly, seeds))
            await call.done_writing()
            for _ in range(length):
                messages["ModelStreamInferResponse"].FromString(await call.read())
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK

        for _ in range(count // 100):
            await asyncio.gather(
                *(unary("ModelInfer") for _ in range(40)), *(unary(randomly.choice(UNARY)) for _ in range(20)), stream(40)
            )


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def connection(data: bytes) -> bytes:
    """What a client of HTTP/2 sends for a call: settings, headers, a message."""
    headers = b"".join(
        header(*pair)
        for pair in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", f"{SERVICE}ModelInfer".encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"grpc-timeout", b"5S"),
        )
    )
    body = b"\0" + struct.pack(">I", len(data)) + data
    return frame(4, 0, 0, b"") + frame(1, 4, 1, headers) + frame(0, 1, 1, body) + frame(6, 0, 0, bytes(8))


async def many_connections(address: str, count: int, randomly: random.Random) -> None:
    host, _, port = address.rpartition(":")
    seeds = [connection(message()), connection(message())[9:], frame(3, 0, 1, bytes(4)) * 4, frame(8, 0, 1, b"\x7f" * 4)]

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if randomly.random() < 0.95 else b""
        try:
            writer.write(preface + mutated(randomly, seeds) + (mutated(randomly, seeds) if randomly.random() < 0.3 else b""))
            if randomly.random() < 0.5:
                await asyncio.wait_for(reader.read(1 << 16), 0.05)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    for _ in range(count // 20):
        await asyncio.gather(*(one() for _ in range(20)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("in_messages", "in_frames"), [(2_100, 240), pytest.param(100_000, 10_000, marks=pytest.mark.proof)]
)
async def test_nonsense_harms_nobody_and_costs_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_messages: int, in_frames: int
) -> None:
    relu = onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))
    arguments = ["-m", "aiotrt", "serve", relu, "--device", "host", "--port", "0", "--grpc-port", "0"]
    randomly = random.Random(0)
    with process(*arguments, reads=False) as (server, _):
        assert server.stdout is not None
        said = [server.stdout.readline(), server.stdout.readline()]
        (address,) = re.findall(r"gRPC at (\S+)", "".join(said))
        assert "serving relu" in said[1]
        reading = asyncio.create_task(asyncio.to_thread(server.stdout.read))
        sizes = []
        for _ in range(3):
            await many_messages(address, in_messages // 3, randomly)
            await many_connections(address, in_frames // 3, randomly)
            sizes.append(resident(server.pid))
        port = address.rpartition(":")[2]
        assert await asyncio.to_thread(main, ["serve", str(relu), "--port", "0", "--grpc-port", port]) == 1
        assert f"cannot bind to {address} for gRPC" in capsys.readouterr().err
        async with grpc.aio.insecure_channel(address) as channel:
            answer = await channel.unary_unary(f"{SERVICE}ModelInfer")(message())
            assert messages["ModelInferResponse"].FromString(answer).raw_output_contents[0] == X.tobytes()
            statistics = await channel.unary_unary(f"{SERVICE}ModelStatistics")(b"")
            (model,) = messages["ModelStatisticsResponse"].FromString(statistics).model_stats
            assert model.inference_stats.success.count > in_messages / 100
        server.send_signal(signal.SIGTERM)
        text = await reading
        assert server.wait(30) == 0
    # gRPC prints a traceback of its own where a client leaves before it was told that its path is no UTF-8.
    assert not re.search(r'^  File ".*aiotrt', text, re.MULTILINE), text[-4000:]
    assert text.count("Traceback") == text.count("in grpc._cython.cygrpc._handle_exceptions"), text[-4000:]
    assert sizes[-1] - sizes[0] < GROWTH, [f"{size / MIB:.0f} MiB" for size in sizes]
