"""Live pictures for whoever watches: MJPEG over HTTP, and frames and results over WebSockets.

Each viewer has one place for the newest frame that it has not seen. Putting one there never waits, so a viewer that is slow,
or stands still, costs itself frames, which are counted, and nobody else anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiotrt._install import install_hint
from aiotrt.errors import InputError, MissingDependencyError
from aiotrt.video.boxes import Box
from aiotrt.video.policies import OVERTAKEN, Policy
from aiotrt.video.sinks import Draw, Result, Sink, as_json, jsonable

if TYPE_CHECKING:
    from starlette.responses import StreamingResponse
    from starlette.websockets import WebSocket

__all__ = ["Mjpeg", "ViewerStatus", "WebSockets"]

BOUNDARY: Final = "frame"


@dataclass(frozen=True)
class ViewerStatus:
    """One viewer.

    Attributes:
        source: what it watches.
        shown: frames that were handed to its connection.
        dropped: frames that it never saw, since a newer one came before its connection had room.
    """

    source: str
    shown: int
    dropped: int


@dataclass(frozen=True)
class _Shown:
    """One result as it is sent; None where nobody wants it."""

    text: str | None
    jpeg: bytes | None


class _Viewer:
    def __init__(self, source: str, *, frames: bool, results: bool) -> None:
        self.source = source
        self.frames = frames
        self.results = results
        self.box: Box[_Shown] = Box(Policy("latest"))
        self._shown = 0

    async def next(self) -> _Shown | None:
        """The newest one that it has not seen; None when the pipeline has ended, and it has seen the last one."""
        if not await self.box.something():
            return None
        self._shown += 1
        return self.box.take(0.0)  # 0: nothing here depends on the time

    @property
    def status(self) -> ViewerStatus:
        return ViewerStatus(self.source, self._shown, self.box.mail.drops[OVERTAKEN])


class _Live(Sink):
    """Encodes each result once for all who watch its source, and not at all while nobody does."""

    def __init__(self, draw: Draw | None, convert: Callable[[Any], Any] | None, quality: int) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingDependencyError(f"JPEG needs Pillow; {install_hint('video')}") from error
        self._image = Image
        self._draw = draw
        self._convert = convert or jsonable
        self._quality = quality
        self._viewers: list[_Viewer] = []
        self._is_closed = False

    async def open(self) -> None:
        """Get ready."""
        self._is_closed = False

    async def write(self, result: Result) -> None:
        """See `Sink`."""
        # Only those who are here now: one that comes while this is encoded may want what was not.
        viewers = [viewer for viewer in self._viewers if viewer.source == result.frame.source]
        if not viewers:
            return
        frames, results = any(viewer.frames for viewer in viewers), any(viewer.results for viewer in viewers)
        shown = await asyncio.to_thread(lambda: self._encode(result, frames=frames, results=results))
        for viewer in viewers:
            viewer.box.put(shown, 0.0)

    async def aclose(self) -> None:
        """See `Sink`. Each viewer gets the last frame, and then the end; a slow one is not waited for."""
        self._is_closed = True
        for viewer in self._viewers:
            viewer.box.close()

    def viewers(self) -> tuple[ViewerStatus, ...]:
        """Who watches now, in the order in which they came."""
        return tuple(viewer.status for viewer in self._viewers)

    @contextlib.contextmanager
    def _watching(self, source: str, *, frames: bool, results: bool) -> Iterator[_Viewer]:
        """A viewer, for as long as the block lasts."""
        viewer = _Viewer(source, frames=frames, results=results)
        if self._is_closed:
            viewer.box.close()
        self._viewers.append(viewer)
        try:
            yield viewer
        finally:
            self._viewers.remove(viewer)

    def _encode(self, result: Result, *, frames: bool, results: bool) -> _Shown:
        return _Shown(as_json(result, self._convert) if results else None, self._jpeg(result) if frames else None)

    def _jpeg(self, result: Result) -> bytes:
        image = result.frame.image if self._draw is None else self._draw(result.frame.image, result.output)
        file = io.BytesIO()
        self._image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=self._quality)
        return file.getvalue()


class Mjpeg(_Live):
    """The newest frame of each source as JPEG, for browsers: `response` is for a route of FastAPI or Starlette.

    Frames are encoded only while somebody watches. A viewer that is slow skips frames, and holds up nobody.

    Args:
        draw: what to show; by default the frame as it is.
        quality: of the JPEGs, from 1 to 95.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, draw: Draw | None = None, *, quality: int = 80) -> None:
        super().__init__(draw, None, quality)

    async def parts(self, source: str) -> AsyncIterator[bytes]:
        """The body of a ``multipart/x-mixed-replace`` response, until the pipeline ends."""
        with self._watching(source, frames=True, results=False) as viewer:
            while (shown := await viewer.next()) is not None:
                assert shown.jpeg is not None
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(shown.jpeg)}\r\n\r\n"
                yield head.encode() + shown.jpeg + b"\r\n"

    def response(self, source: str) -> StreamingResponse:
        """A response that lasts as long as the pipeline: ``return mjpeg.response("door")`` in a route; ``<img>`` shows it.

        Raises:
            MissingDependencyError: Starlette is not installed.
        """
        try:
            from starlette.responses import StreamingResponse
        except ImportError as error:
            raise MissingDependencyError(f"a response needs Starlette; {install_hint('serving')}") from error
        kind = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
        return StreamingResponse(self.parts(source), media_type=kind, headers={"Cache-Control": "no-store"})


class WebSockets(_Live):
    """Results and frames of each source over WebSockets: `serve` is for a WebSocket route of FastAPI or Starlette.

    For each result a viewer gets a text message, the JSON that `JsonLines` writes, and then a binary one, the frame as JPEG;
    or only one of the two. Each is encoded once for all viewers, and only while somebody wants it. A viewer that is slow
    skips results, and holds up nobody.

    Args:
        draw: what to show; by default the frame as it is. `Annotator` draws boxes, masks and labels.
        convert: from the output to what JSON has; by default arrays become lists, and named results objects.
        quality: of the JPEGs, from 1 to 95.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, draw: Draw | None = None, convert: Callable[[Any], Any] | None = None, *, quality: int = 80) -> None:
        super().__init__(draw, convert, quality)

    async def serve(self, socket: WebSocket, source: str, *, frames: bool = True, results: bool = True) -> ViewerStatus:
        """Show a source to one viewer, until that goes or the pipeline ends; then the socket is closed, with 1000.

        A socket that is not accepted yet is; who may watch is for the route to decide before. What the viewer says is read
        and ignored. Cancelled, it leaves the socket open, as a route that is cancelled does.

        Args:
            socket: of the viewer.
            source: the source's name. One that there is not shows nothing.
            frames: whether to send frames.
            results: whether to send results.

        Returns:
            How much the viewer saw.

        Raises:
            InputError: neither frames nor results are to be sent.
        """
        from starlette.websockets import WebSocketState

        if not (frames or results):
            raise InputError("a viewer gets frames, results or both")
        if socket.application_state is WebSocketState.CONNECTING:
            await socket.accept()
        with self._watching(source, frames=frames, results=results) as viewer:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_send(socket, viewer)), group.create_task(_until_gone(socket))]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
            return viewer.status


async def _send(socket: WebSocket, viewer: _Viewer) -> None:
    """Everything that comes, and then the end. A server waits here until the connection has room."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(WebSocketDisconnect):
        while (shown := await viewer.next()) is not None:
            if viewer.results and shown.text is not None:
                await socket.send_text(shown.text)
            if viewer.frames and shown.jpeg is not None:
                await socket.send_bytes(shown.jpeg)
        await socket.close(1000, "the pipeline has ended")


async def _until_gone(socket: WebSocket) -> None:
    """Else one that goes while nothing is sent would be kept until the next frame, which may never come."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
