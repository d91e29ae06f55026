"""Video over a WebSocket: the newest frame of each client is looked at, and no other, however many it sends.

python examples/websocket_frames.py
ws://127.0.0.1:8000/frames takes images, one a message, and says of some of them where the brightest spot is:
{"frame": 17, "skipped": 3, "spot": [160, 96]}

A client that sends faster than the model runs costs itself frames, and nobody else anything: each has one place to put its
newest frame, and one call under way.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import uvicorn
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be started as a script, with nothing installed

import aiotrt
from aiotrt import serving

CELL = 16  # pixels


def brightest(frame: torch.Tensor) -> torch.Tensor:
    """Row and column of the brightest cell of a frame (height, width, 3)."""
    grey = frame.float().mean(dim=2)[None, None]
    cells = torch.nn.functional.avg_pool2d(grey, CELL)[0, 0]
    best = cells.flatten().argmax()
    return torch.stack([best // cells.shape[1], best % cells.shape[1]])


def load() -> aiotrt.Model:
    return aiotrt.load(brightest, warmup=[np.zeros((480, 640, 3), np.uint8)])


app = FastAPI(lifespan=serving.lifespan(brightest=load))
serving.install(app)


@app.websocket("/frames")
async def frames(socket: WebSocket, model: Annotated[aiotrt.Model, Depends(serving.get("brightest"))]) -> None:
    await socket.accept()
    newest: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(1)

    async def answer() -> None:
        before = -1
        while True:
            number, data = await newest.get()
            frame = await asyncio.to_thread(serving.decode_image, data, 4_000_000)
            row, column = map(int, await model(frame))
            await socket.send_json({"frame": number, "skipped": number - before - 1, "spot": [column * CELL, row * CELL]})
            before = number

    try:
        async with asyncio.TaskGroup() as group:  # when a client goes, so does its call
            group.create_task(answer())
            for number in range(sys.maxsize):
                data = await socket.receive_bytes()
                if newest.full():
                    newest.get_nowait()  # nobody has looked at it yet, and now nobody will
                newest.put_nowait((number, data))
    except* WebSocketDisconnect:
        pass
    except* aiotrt.InputError:
        await socket.close(1003, "not an image")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, ws_max_size=4 << 20)
