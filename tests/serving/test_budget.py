"""How many bytes of requests and answers are in memory: counted as they arrive, and as long as something holds them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.types import Message

from aiotrt.serving import BusyError
from aiotrt.serving.kserve import ModelSettings, binary
from aiotrt.serving.kserve.guards import Budget
from tests.building import models as onnx_models
from tests.serving.bystander import HEAD, infer_body
from tests.serving.test_fastapi import until_slow, until_waiting
from tests.serving.test_kserve import X, given, model_behind, request_of, serving
from tests.serving.tools import Served
from tests.tools import held

pytestmark = pytest.mark.asyncio


def request_with(*parts: bytes) -> Request:
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    iterator = iter(messages)

    async def receive() -> Message:
        return next(iterator)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


async def test_what_arrived_counts_until_nothing_refers_to_it() -> None:
    budget = Budget(1000, 1000, 1.0)
    data, length = infer_body(np.ones((10, 3), np.float32))
    body: Any = await budget.read(request_with(data[:50], data[50:]))
    assert (body, budget.used) == (data, len(data))
    tensor: Any = binary.parse(body, length).inputs[0].tensor
    view = tensor[1:]
    del body, tensor
    assert budget.used == len(data), "the tensor is a view of it"
    with pytest.raises(BusyError, match="bytes are in memory, at most 1,000 are taken"):
        await budget.read(request_with(bytes(700), bytes(300)))
    gc.collect()  # the error's traceback
    assert budget.used == len(data), "what did not fit is gone"
    owner = [view]
    del view
    thread = threading.Thread(target=owner.clear)  # as the device's threads do
    thread.start()
    thread.join()
    assert budget.used == 0
    with budget.sending(600):
        assert budget.used == 600
        with pytest.raises(BusyError):
            await budget.read(request_with(bytes(500)))
    await budget.read(request_with(bytes(1000)))


async def test_what_is_only_announced_refuses_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path, max_bodies=1 << 20, max_body=1 << 19) as (http, client):
        async with contextlib.AsyncExitStack() as stack:
            for rest in (b"Content-Length: 500000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n") * 8:
                writer = await stack.enter_async_context(opened(http))
                writer.write(HEAD + rest)
                await writer.drain()
            await until_slow(lambda: len(http.server.server_state.tasks) == 16)
            np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)


async def test_small_requests_of_unknown_length_are_all_answered(tmp_path: Path) -> None:
    text = json.dumps(request_of()).encode()
    gate = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield text[:30]
        await gate.wait()
        yield text[30:]

    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 3))
    model = ModelSettings("relu", path, options={"device": "host"})
    async with serving(tmp_path, model, max_bodies=1 << 20, max_body=1 << 19) as (http, _):
        calls = [asyncio.create_task(http.post("/v2/models/relu/infer", content=body())) for _ in range(64)]
        await until_slow(lambda: len(http.server.server_state.tasks) == 64)
        gate.set()
        assert {(await call).status_code for call in calls} == {200}


async def test_refused_requests_leave_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, max_bodies=1000) as (http, client):
        budget = budget_behind(http)
        for content in (
            bytes(900),
            json.dumps(request_of(shape=[3, 3])).encode(),
            json.dumps(request_of()).encode(),
            bytes(1001),
        ):
            await http.post("/v2/models/double/infer", content=content)
        await until_slow(lambda: budget.used == 0)
        await client.infer("double", [given(X)])


async def test_an_answer_that_its_client_does_not_take_counts(tmp_path: Path) -> None:
    x = np.ones((400_000, 3), np.float32)  # more than sockets hold
    body, length = infer_body(x)
    async with serving(tmp_path, max_bodies=8 << 20, body_timeout=20.0) as (http, client):
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, (http.host, http.port))
            head = b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n" % (len(body), length)
            await loop.sock_sendall(deaf, HEAD + head + body)
            budget = budget_behind(http)
            await until_slow(lambda: x.nbytes <= budget.used < 2 * x.nbytes)  # the body is gone, and the answer there
            answer = await http.post("/v2/models/double/infer", content=bytes((4 << 20) - 100))
            assert answer.status_code == 503
            np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)
        await until_slow(lambda: budget.used == 0)


async def test_a_request_whose_client_has_gone_counts_while_the_device_reads_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        model, budget = model_behind(http), budget_behind(http)
        with held(model):
            call = asyncio.create_task(client.infer("double", [given(X)]))
            await until_waiting(model, 0)
            assert budget.used > X.nbytes
            call.cancel()
            await until_slow(lambda: model.statistics().cancelled == 1)
        await until_slow(lambda: budget.used == 0)


def budget_behind(http: Served) -> Budget:
    app: Any = http.server.config.app
    budget: Budget = app.state.service.budget
    return budget


@contextlib.asynccontextmanager
async def opened(http: Served) -> AsyncIterator[asyncio.StreamWriter]:
    _, writer = await asyncio.open_connection(http.host, http.port)
    try:
        yield writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
