"""Frames and results over WebSockets: real sockets, viewers that are quick, slow, gone or too late, and nothing left."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket as sockets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aiotrt import video
from aiotrt.errors import InputError
from aiotrt.video import Frame, Pipeline, ViewerStatus
from tests.tools import until
from tests.video.tools import number_of, picture, write_video

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from tests.serving.tools import Served, served

pytestmark = pytest.mark.asyncio

#: A picture that no codec makes small, so that few of them fill a connection.
NOISE = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)


class Watched:
    """A sink behind WebSocket routes, and what each viewer had seen when it went."""

    def __init__(self, live: video.WebSockets) -> None:
        self.live = live
        self.app = FastAPI()
        self.app.websocket("/{source}")(self.watch)
        self.tasks: list[asyncio.Task[ViewerStatus]] = []

    async def watch(self, socket: WebSocket, source: str, frames: bool = True, results: bool = True) -> None:
        self.tasks.append(asyncio.ensure_future(self.live.serve(socket, source, frames=frames, results=results)))
        await asyncio.wait(self.tasks[-1:])

    async def gone(self, number: int) -> ViewerStatus:
        """What a viewer had seen, once it has gone."""
        return await self.tasks[number]


class Film:
    """A source that gives a frame when it is told to."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[np.ndarray[Any, Any] | None] = asyncio.Queue()

    def give(self, *frames: np.ndarray[Any, Any] | None) -> None:
        """These, or None for the end."""
        for frame in frames:
            self._frames.put_nowait(frame)

    async def __call__(self) -> AsyncIterator[np.ndarray[Any, Any]]:
        while (frame := await self._frames.get()) is not None:
            yield frame


async def index(frame: Frame) -> dict[str, int]:
    return {"answer": 2 * frame.index}


def viewer(client: Served, path: str = "/door", **options: Any) -> connect:
    return connect(f"ws://{client.host}:{client.port}{path}", proxy=None, **options)


def image_of(jpeg: str | bytes) -> np.ndarray[Any, Any]:
    assert isinstance(jpeg, bytes)
    return np.asarray(Image.open(io.BytesIO(jpeg)))


async def pair(connection: ClientConnection) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """The next result and its frame."""
    text, jpeg = await connection.recv(), await connection.recv()
    assert isinstance(text, str)
    return json.loads(text), image_of(jpeg)


async def test_every_viewer_gets_each_result_and_its_frame_and_then_the_end() -> None:
    live, film = video.WebSockets(), Film()
    watched = Watched(live)
    async with served(watched.app) as client, viewer(client) as one, viewer(client) as two, viewer(client, "/yard") as other:
        async with Pipeline(index, {"door": film, "yard": [picture(20)]}, live) as pipeline:
            await until(lambda: len(live.viewers()) == 3)
            for i in range(5):
                film.give(picture(10 + i))
                for connection in (one, two):
                    said, image = await pair(connection)
                    assert said == {"source": "door", "index": i, "time": None, "output": {"answer": 2 * i}}
                    assert number_of(image) == 10 + i
            film.give(None)
            await pipeline.wait()
        for connection in (one, two, other):
            with pytest.raises(ConnectionClosedOK, match="the pipeline has ended"):
                while True:  # `other` may have come before its source's only frame, or after it
                    await connection.recv()
    assert [await watched.gone(i) for i in range(2)] == [ViewerStatus("door", 5, 0)] * 2
    assert not live.viewers()


async def test_a_viewer_that_stands_still_costs_nobody_but_itself_and_what_it_misses_is_counted() -> None:
    """Until its connection is full, and then some: the other one gets every frame meanwhile."""
    live, film = video.WebSockets(quality=95), Film()
    watched = Watched(live)
    narrow = sockets.socket()
    narrow.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 1 << 16)
    async with served(watched.app, ws_per_message_deflate=False) as client:
        narrow.connect((client.host, client.port))
        narrow.setblocking(False)
        async with viewer(client) as quick, viewer(client, sock=narrow, max_queue=1) as still:
            async with Pipeline(index, {"door": film}, live, policy="every_frame") as pipeline:
                await until(lambda: len(live.viewers()) == 2)
                count = 0
                while live.viewers()[1].dropped < 5:
                    film.give(np.roll(NOISE, count, 0))
                    said, _ = await pair(quick)
                    assert said["index"] == count
                    count += 1
                assert live.viewers()[0] == ViewerStatus("door", count, 0)
                before = live.viewers()[1]
                assert count - 1 <= before.shown + before.dropped <= count  # the newest one waits
                film.give(None)
                await pipeline.wait()
            seen = []
            with pytest.raises(ConnectionClosedOK):
                while True:  # now it reads again: what was on its way, and then the newest one
                    said, _ = await pair(still)
                    seen.append(said["index"])
    assert seen == sorted(set(seen))
    assert seen[-1] == count - 1
    assert await watched.gone(1) == ViewerStatus("door", len(seen), count - len(seen))


async def test_what_nobody_wants_is_not_made() -> None:
    drawn: list[int] = []
    converted: list[int] = []

    def draw(image: np.ndarray[Any, Any], output: Any) -> np.ndarray[Any, Any]:
        drawn.append(output["answer"])
        return image

    def convert(output: Any) -> int:
        converted.append(output["answer"])
        return int(output["answer"])

    live, film = video.WebSockets(draw, convert), Film()
    watched = Watched(live)
    async with served(watched.app) as client, Pipeline(index, {"door": film}, live) as pipeline:
        film.give(picture(1))
        await until(lambda: pipeline.status().sources["door"].sinks[0].delivered == 1)
        assert not drawn
        assert not converted
        async with viewer(client, "/door?frames=false") as reader:
            await until(lambda: bool(live.viewers()))
            film.give(picture(2), None)
            assert json.loads(await reader.recv())["output"] == 2
        await until(lambda: not live.viewers())
        assert (drawn, converted) == ([], [2])


async def test_frames_alone_take_no_results() -> None:
    converted: list[object] = []
    live, film = video.WebSockets(convert=converted.append), Film()
    async with served(Watched(live).app) as client, viewer(client, "/door?results=false") as watcher:
        async with Pipeline(index, {"door": film}, live):
            await until(lambda: bool(live.viewers()))
            for i in (3, 4):
                film.give(picture(i))
                assert number_of(image_of(await watcher.recv())) == i
            film.give(None)
    assert not converted


async def test_viewers_of_one_source_get_what_each_of_them_wants() -> None:
    live, film = video.WebSockets(), Film()
    async with served(Watched(live).app) as client:
        async with viewer(client, "/door?results=false") as watcher, viewer(client, "/door?frames=false") as reader:
            async with Pipeline(index, {"door": film}, live):
                await until(lambda: len(live.viewers()) == 2)
                for i in range(3):
                    film.give(picture(i))
                    assert number_of(image_of(await watcher.recv())) == i
                    assert json.loads(await reader.recv())["index"] == i
                film.give(None)


@pytest.mark.parametrize("way", ["politely", "rudely"])
async def test_a_viewer_that_goes_is_forgotten_though_no_frame_comes(way: str) -> None:
    live, film = video.WebSockets(), Film()
    watched = Watched(live)
    async with served(watched.app) as client, Pipeline(index, {"door": film}, live) as pipeline:
        connection = await viewer(client)
        await until(lambda: bool(live.viewers()))
        await connection.send("hello?")  # is read, and ignored
        if way == "politely":
            await connection.close()
        else:
            connection.transport.abort()
        assert await watched.gone(0) == ViewerStatus("door", 0, 0)
        assert not live.viewers()
        film.give(picture(1), None)
        await pipeline.wait()
        assert pipeline.status().sources["door"].sinks[0].delivered == 1


async def test_a_viewer_that_goes_while_its_connection_is_full_is_forgotten() -> None:
    live, film = video.WebSockets(quality=95), Film()
    watched = Watched(live)
    async with served(watched.app, ws_per_message_deflate=False) as client:
        async with Pipeline(index, {"door": film}, live, policy="every_frame") as pipeline:
            connection = await viewer(client, max_queue=1)
            await until(lambda: bool(live.viewers()))
            given = 0
            while not live.viewers()[0].dropped:
                film.give(NOISE)
                given += 1
                await until(lambda: pipeline.status().sources["door"].sinks[0].delivered == given)  # noqa: B023
            connection.transport.abort()
            status = await watched.gone(0)
            assert status.shown + status.dropped in (given - 1, given)
            film.give(None)


async def test_a_viewer_that_comes_too_late_is_told_so() -> None:
    live = video.WebSockets()
    async with Pipeline(index, {"door": [picture(1)]}, live) as pipeline:
        await pipeline.wait()
    async with served(Watched(live).app) as client, viewer(client) as connection:
        with pytest.raises(ConnectionClosedOK, match="the pipeline has ended"):
            await connection.recv()


async def test_cancelling_one_viewer_or_the_pipeline() -> None:
    live, film = video.WebSockets(), Film()
    watched = Watched(live)
    entered = asyncio.Event()

    async def main() -> None:
        async with Pipeline(index, {"door": film}, live) as pipeline:
            entered.set()
            await pipeline.wait()

    async with served(watched.app) as client, viewer(client) as one, viewer(client) as two:
        await until(lambda: len(live.viewers()) == 2)
        running = asyncio.ensure_future(main())
        await entered.wait()
        watched.tasks[0].cancel()
        with pytest.raises(ConnectionClosed):
            await one.recv()
        assert len(live.viewers()) == 1
        film.give(picture(7))
        assert number_of((await pair(two))[1]) == 7
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(ConnectionClosedOK):
            await two.recv()
        await watched.gone(1)
    assert not live.viewers()


async def test_a_frame_that_cannot_be_drawn_is_counted_and_the_viewer_stays() -> None:
    def draw(image: np.ndarray[Any, Any], output: Any) -> np.ndarray[Any, Any]:
        if output["answer"] == 0:
            raise ValueError("no paint")
        return image

    live, film = video.WebSockets(draw), Film()
    reports: list[video.Report] = []
    async with served(Watched(live).app) as client, viewer(client) as connection:
        async with Pipeline(index, {"door": film}, live, listener=reports.append) as pipeline:
            await until(lambda: bool(live.viewers()))
            film.give(picture(1), picture(2), None)
            assert (await pair(connection))[0]["index"] == 1
            await pipeline.wait()
            assert pipeline.status().sources["door"].sinks[0].failed == 1
    assert ["no paint" in report.detail for report in reports] == [True]


async def test_a_viewer_wants_something() -> None:
    live, socket = video.WebSockets(), object()
    with pytest.raises(InputError, match="frames and results are both False"):
        await live.serve(socket, "door", frames=False, results=False)  # type: ignore[arg-type]


async def test_the_documentation_s_application_runs_as_it_stands(tmp_path: Path) -> None:
    """But for its model and its camera, which are not here."""
    text = (Path(__file__).parents[2] / "docs" / "video.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import contextlib\n.*?)```", text, re.DOTALL)
    film = write_video(tmp_path / "film.mp4", range(10))
    for there, here in (
        ('aiotrt.load("detector.onnx")', "aiotrt.load(lambda frame: frame.float().mean(), device='host')"),
        ('"rtsp://door/live"', f"video.open({str(film)!r}, loop=True, realtime=True)"),
    ):
        assert there in program
        program = program.replace(there, here)
    names: dict[str, Any] = {}
    exec(program, names)
    async with served(names["app"]) as client, viewer(client, "/live/door") as connection:
        for _ in range(3):
            said, image = await pair(connection)
            assert round(said["output"] / 8) == number_of(image) == said["index"] % 10
