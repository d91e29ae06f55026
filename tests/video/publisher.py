"""Publishes a film in real time over RTSP, as a gateway of cameras does; a process, since muxing keeps the interpreter lock.

    python -m tests.video.publisher rtsp://127.0.0.1:PORT/live FRAMES

It tries until somebody listens there.
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from typing import Any

import av

from tests.video.tools import picture

RATE = 30
PATIENCE = 60.0  # seconds


def main(url: str, count: int) -> None:
    """Publish `count` frames that say their numbers, modulo 32."""
    began = time.monotonic()
    while True:
        output = av.open(url, "w", format="rtsp", options={"rtsp_transport": "tcp"})
        stream: Any = output.add_stream("libx264", rate=RATE, options={"g": "5", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        try:
            output.start_encoding()
            break
        except ConnectionRefusedError:
            if time.monotonic() > began + PATIENCE:
                raise
            time.sleep(0.05)
    began = time.monotonic()
    with output:
        for i in range(count):
            frame: Any = av.VideoFrame.from_ndarray(picture(i % 32), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            time.sleep(max(0.0, began + i / RATE - time.monotonic()))
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
