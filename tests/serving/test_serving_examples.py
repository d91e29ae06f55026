"""The serving examples run as they stand, as processes of their own, and answer over a real socket."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import skimage.data
import websockets.exceptions
from PIL import Image
from websockets.sync.client import connect

from tests.serving.test_processes import ROOT, process, until_ready
from tests.test_documentation import BLOCK

EXAMPLES = ("fastapi_detect_gpu", "fastapi_ocr", "fastapi_read", "websocket_frames", "ray_serve")
CELL = 16


@contextlib.contextmanager
def example(name: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The example, and where it serves; ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(ROOT / "examples" / f"{name}.py", port) as (server, _):
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        yield server, url


def png(pixels: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_two_models_read_a_page() -> None:
    page = png(Image.fromarray(skimage.data.page()).resize((384 * 2, 192 * 2)))
    with example("fastapi_read") as (server, url), httpx.Client(base_url=url, trust_env=False, timeout=40) as client:
        lines = client.post("/text", content=page).json()
        assert len(lines) == 7
        said = re.sub(r"[^a-z]", "", "".join(lines).lower())
        for words in ("regionbasedsegmentation", "firstdeterminemarkersofthecoins", "thesemarkersarepixelsthatwecanlabel"):
            assert words in said
        assert client.post("/text", content=png(np.full((64, 64, 3), 255, np.uint8))).json() == []
        metrics = client.get("/metrics").text
        assert 'aiotrt_requests_total{model="recogniser",outcome="completed"} 7.0' in metrics
        assert 'aiotrt_queue_seconds_count{model="recogniser"} 7.0' in metrics
        names = [model["name"] for model in client.get("/status/status.json").json()["models"]]
        assert names == ["detector", "recogniser"]
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def test_photographs_of_any_size_share_a_graph() -> None:
    pixels = np.zeros((1080, 1920, 3), np.uint8)
    pixels[480:576, 960:1056] = 250  # as large as a cell of the letterbox, which has a third of the size
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    with example("fastapi_detect_gpu") as (_, url), httpx.Client(base_url=url, trust_env=False, timeout=40) as client:
        captured = captures(client)  # a canvas of 1080p, which these sizes have too
        answer = client.post("/detect", content=file.getvalue())
        assert answer.status_code == 200, answer.text
        boxes = answer.json()
        left, upper, right, lower = boxes[0]["edges"]
        assert (right - left, lower - upper) == (96, 96)
        assert abs(left - 960) < 96
        assert abs(upper - 480) < 96
        assert client.post("/detect", content=png(np.full((1100, 1800, 3), 9, np.uint8))).status_code == 200
        assert client.post("/detect", content=file.getvalue()[:-500]).status_code == 422
        assert captures(client) == captured


def captures(client: httpx.Client) -> str:
    found = re.search(r'aiotrt_graph_captures_total{model="detector"} (.*)', client.get("/metrics").text)
    assert found is not None
    return found[1]


def spot(i: int) -> tuple[list[int], bytes]:
    """Where the brightest cell is in frame `i`, and the frame."""
    column, row = i % 20, i % 15
    pixels = np.full((240, 320, 3), 20, np.uint8)
    pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 250
    return [column * CELL, row * CELL], png(pixels)


def test_a_video_over_a_websocket_the_latest_frame_wins() -> None:
    with example("websocket_frames") as (server, url):
        address = url.replace("http", "ws") + "/frames"
        with connect(address, proxy=None) as fast, connect(address, proxy=None) as slow:
            where, frame = spot(3)
            for number in range(2):  # one at a time: none is skipped
                slow.send(frame)
                assert json.loads(slow.recv(20)) == {"frame": number, "skipped": 0, "spot": where}
            count = 300
            for data in [spot(i)[1] for i in range(count)]:  # as fast as it goes
                fast.send(data)
            answers: list[dict[str, Any]] = []
            while not answers or answers[-1]["frame"] != count - 1:  # the last one is always looked at
                answers.append(json.loads(fast.recv(20)))
            numbers = [answer["frame"] for answer in answers]
            assert numbers == sorted(set(numbers))
            assert all(answer["spot"] == spot(answer["frame"])[0] for answer in answers)
            assert len(answers) + sum(answer["skipped"] for answer in answers) == count
            assert len(answers) < count
            slow.send(frame)  # and this one is still served
            assert json.loads(slow.recv(20))["frame"] == 2
            slow.send(b"no image")
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                slow.recv(20)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1003
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert f'outcome="completed"}} {len(answers) + 3:.1f}' in metrics, "what was skipped was never run"
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def test_the_programs_for_tritons_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "triton.md").read_text(encoding="utf-8"))
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as grpc:
        ports = {"8000": http.getsockname()[1], "8001": grpc.getsockname()[1]}

    def run(program: str) -> str:
        for there, here in ports.items():
            program = program.replace(f"127.0.0.1:{there}", f"127.0.0.1:{here}")
        Path("program.py").write_text(program, encoding="utf-8")
        runpy.run_path("program.py", run_name="__main__")
        return capsys.readouterr().out

    assert run(blocks[0][0]) == ""
    options = ["--device", "host", "--port", ports["8000"], "--grpc-port", ports["8001"]]
    with process("-m", "aiotrt", "serve", "relu.onnx", *options) as (server, url):
        until_ready(url)
        for program, printed in blocks[1:]:
            assert run(program) == printed != ""
        server.send_signal(signal.SIGTERM)
        server.wait(20)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert not re.search(r"sleep\((?!0\))", text), "an example must not sleep until something has probably happened"
