"""Cameras or films through a model, watched live in any number of browsers: frames and results over WebSockets.

    python examples/live_view.py [PORT [NAME=SOURCE...]]       such as 8000 door=rtsp://door/live yard=film.mp4
http://127.0.0.1:8000/ shows the first; with none named, a spot that moves. A browser that is slow costs itself frames only.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import HTMLResponse

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import video

PAGE = """<!doctype html><img id="frame"><pre id="result"></pre><script>
  const socket = new WebSocket(`ws://${location.host}/live/%s`)
  socket.onmessage = ({data}) => {
    if (typeof data === "string") { result.textContent = data; return }
    URL.revokeObjectURL(frame.src); frame.src = URL.createObjectURL(data)
  }
</script>"""


def spots() -> Iterator[tuple[float, np.ndarray[Any, Any]]]:
    image = np.full((240, 320, 3), 20, np.uint8)
    image[100:140, :40] = 250
    for i in itertools.count():
        yield i / 30, np.roll(image, i, axis=1)


PORT = sys.argv[1] if len(sys.argv) > 1 else "8000"
if not PORT.isdecimal() or not all("=" in word for word in sys.argv[2:]):
    sys.exit(f"expected [PORT [NAME=SOURCE...]], such as 8000 door=rtsp://door/live, got {' '.join(sys.argv[1:])}")
SOURCES: Any = dict(word.split("=", 1) for word in sys.argv[2:]) or {"spots": video.open(spots, realtime=True)}
live = video.WebSockets()


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with aiotrt.load(lambda frame: frame.float().mean((0, 2)).argmax()) as model, video.Pipeline(model, SOURCES, live):
        yield


app = FastAPI(lifespan=lifespan)
app.get("/", response_class=HTMLResponse)(lambda: PAGE % next(iter(SOURCES)))


@app.websocket("/live/{source}")
async def watch(socket: WebSocket, source: str) -> None:
    await live.serve(socket, source)


if __name__ == "__main__":
    uvicorn.run(app, port=int(PORT), ws_per_message_deflate=False)
