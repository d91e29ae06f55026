"""The example of live viewers runs as it stands, as a process of its own, and shows what its model says."""

from __future__ import annotations

import io
import json
import signal
import socket

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("tritonclient")  # of tests.serving.test_processes
pytest.importorskip("websockets")
from websockets.sync.client import connect

from tests.serving.test_processes import ROOT, process


def test_two_browsers_see_a_spot_move() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(ROOT / "examples" / "live_view.py", port) as (server, url):
        assert "/live/spots" in httpx.get(url, trust_env=False).text
        address = f"{url.replace('http', 'ws')}/live/spots"
        with connect(address, proxy=None) as one, connect(address, proxy=None) as two:
            for watcher in (one, two, one, two):
                said = json.loads(watcher.recv(20))
                jpeg = watcher.recv(20)
                assert isinstance(jpeg, bytes)
                bright = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"))[120] > 128
                assert bright.sum() == 40
                assert bright[said["index"] % 320]  # the frame is the one that the text speaks of
                assert not bright[said["index"] % 320 - 1]
                assert bright[said["output"]]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) in (0, -signal.SIGTERM)
