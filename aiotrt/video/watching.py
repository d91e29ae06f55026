"""Live views: MJPEG over HTTP, and frames and results over WebSockets.

Each viewer has a mailbox for one frame, the newest that it has not seen. Adding a frame never waits, so a slow or stalled
viewer loses frames, which are counted, and does not delay the pipeline or other viewers.
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
    """The status of one viewer.

    Attributes:
        source: the name of the source that it watches.
        shown: frames that were passed to its connection.
        dropped: frames that a newer one replaced before the connection had room.
    """

    source: str
    shown: int
    dropped: int


@dataclass(frozen=True)
class _Shown:
    """A result encoded for sending; a field that no viewer wants is None."""

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
        """Return the newest result not yet seen; None after the last one, when the pipeline has ended."""
        if not await self.box.wait_for_item():
            return None
        self._shown += 1
        return self.box.take(0.0)  # the policy does not depend on the time

    @property
    def status(self) -> ViewerStatus:
        return ViewerStatus(self.source, self._shown, self.box.mail.drops[OVERTAKEN])


class _Live(Sink):
    """Base class that encodes each result once for all viewers of its source, and only if there are any."""

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
        """Accept viewers until `aclose`."""
        self._is_closed = False

    async def write(self, result: Result) -> None:
        """Encode a result, and put it into the mailbox of each viewer of its source."""
        # The viewers at this moment, because one that comes during encoding may want a form that is not encoded.
        viewers = [viewer for viewer in self._viewers if viewer.source == result.frame.source]
        if not viewers:
            return
        frames, results = any(viewer.frames for viewer in viewers), any(viewer.results for viewer in viewers)
        shown = await asyncio.to_thread(lambda: self._encode(result, frames=frames, results=results))
        for viewer in viewers:
            viewer.box.put(shown, 0.0)

    async def aclose(self) -> None:
        """End all views after the last frame, without waiting for slow viewers."""
        self._is_closed = True
        for viewer in self._viewers:
            viewer.box.close()

    def viewers(self) -> tuple[ViewerStatus, ...]:
        """Return the status of the present viewers, in the order in which they came."""
        return tuple(viewer.status for viewer in self._viewers)

    @contextlib.contextmanager
    def _watching(self, source: str, *, frames: bool, results: bool) -> Iterator[_Viewer]:
        """Register a viewer until the block ends."""
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
    """A sink that shows the newest frame of each source in browsers, as JPEG; see `response`.

    Frames are encoded only while there are viewers. A slow viewer skips frames, and delays nothing.

    Args:
        draw: a function that draws on the frame, such as `Annotator`; None shows the frame unchanged.
        quality: of the JPEGs, from 1 to 95.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, draw: Draw | None = None, *, quality: int = 80) -> None:
        super().__init__(draw, None, quality)

    async def parts(self, source: str) -> AsyncIterator[bytes]:
        """Yield the body of a ``multipart/x-mixed-replace`` response, until the pipeline ends."""
        with self._watching(source, frames=True, results=False) as viewer:
            while (shown := await viewer.next()) is not None:
                assert shown.jpeg is not None
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(shown.jpeg)}\r\n\r\n"
                yield head.encode() + shown.jpeg + b"\r\n"

    def response(self, source: str) -> StreamingResponse:
        """Return a response for a route of FastAPI or Starlette: ``return mjpeg.response("door")``. ``<img>`` shows it.

        It lasts until the pipeline ends. For a source that does not exist it has no frames.

        Raises:
            MissingDependencyError: Starlette is not installed.
        """
        try:
            from starlette.responses import StreamingResponse
        except ImportError as error:
            raise MissingDependencyError(f"an MJPEG response needs Starlette; {install_hint('serving')}") from error
        kind = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
        return StreamingResponse(self.parts(source), media_type=kind, headers={"Cache-Control": "no-store"})


class WebSockets(_Live):
    """A sink that sends the results and frames of each source over WebSockets; see `serve`.

    For each result a viewer gets a text message, the JSON that `JsonLines` writes, and then a binary one, the frame as JPEG;
    or only one of the two. Each is encoded once for all viewers, and only if a viewer wants it. A slow viewer skips results,
    and delays nothing.

    Args:
        draw: a function that draws on the frame, such as `Annotator`; None shows the frame unchanged.
        convert: a function from the output to JSON types; by default arrays become lists, and named results objects.
        quality: of the JPEGs, from 1 to 95.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, draw: Draw | None = None, convert: Callable[[Any], Any] | None = None, *, quality: int = 80) -> None:
        super().__init__(draw, convert, quality)

    async def serve(self, socket: WebSocket, source: str, *, frames: bool = True, results: bool = True) -> ViewerStatus:
        """Send a source to one viewer until it disconnects or the pipeline ends; for a route of FastAPI or Starlette.

        At the end of the pipeline the socket is closed, with code 1000. A socket that is not accepted yet is accepted, so
        authorise the viewer in the route before. Messages from the viewer are ignored. If cancelled, the socket stays open.

        Args:
            socket: of the viewer.
            source: the source's name. A source that does not exist gives no results.
            frames: whether to send frames.
            results: whether to send results.

        Returns:
            The counts of this viewer.

        Raises:
            InputError: both `frames` and `results` are False.
        """
        from starlette.websockets import WebSocketState

        if not (frames or results):
            raise InputError("frames and results are both False: a viewer needs at least one of them")
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
    """Send each new result, then close. Sending waits until the connection has room."""
    from starlette.websockets import WebSocketDisconnect

    with contextlib.suppress(WebSocketDisconnect):
        while (shown := await viewer.next()) is not None:
            if viewer.results and shown.text is not None:
                await socket.send_text(shown.text)
            if viewer.frames and shown.jpeg is not None:
                await socket.send_bytes(shown.jpeg)
        await socket.close(1000, "the pipeline has ended")


async def _until_gone(socket: WebSocket) -> None:
    """Wait until the viewer disconnects, because without a frame to send this would not be noticed."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
