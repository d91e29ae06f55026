"""``aiotrt serve`` and the FastAPI example as processes of their own: real sockets, real signals, Triton's client."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import skimage.data
import tritonclient.http as triton
from PIL import Image

from aiotrt.cli import main
from aiotrt.errors import InputError
from aiotrt.serving.kserve import ModelSettings, ServerSettings, read_config, token_from
from tests.building import models as onnx_models
from tests.tools import interruptible

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a token of more than 16 characters"


@contextlib.contextmanager
def process(*arguments: object, reads: bool = True, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and its address once it has said it."""
    with subprocess.Popen(
        interruptible(sys.executable, *arguments),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"} | environment,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            said = ""
            while not (found := re.search(r"http://[^\s]+", said)):
                line = server.stdout.readline()
                assert line, said
                said += line
            if reads:  # since nobody else does, and a full pipe would stop it
                threading.Thread(target=server.stdout.read, daemon=True).start()
            yield server, found[0]
        finally:
            server.kill()


def until_ready(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("not ready within 30 s")


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))


def ask(client: Any, value: float = 1.0, rows: int = 2) -> None:
    array = np.full((rows, 3), value, np.float32)
    tensor = triton.InferInput("x", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    np.testing.assert_array_equal(client.infer("relu", [tensor]).as_numpy("y"), array)


def test_serve_with_tritons_client_and_sigterm(relu: Path) -> None:
    with process("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host", "--shape", "2x3") as (server, url):
        assert url.startswith("http://127.0.0.1:")
        until_ready(url)
        with triton.InferenceServerClient(url.removeprefix("http://"), concurrency=4) as client:
            assert client.is_server_ready()
            assert client.get_model_metadata("relu")["inputs"][0]["name"] == "x"
            for i in range(20):
                ask(client, float(i))
            tensor = triton.InferInput("x", [2, 3], "FP32")
            tensor.set_data_from_numpy(np.ones((2, 3), np.float32), binary_data=False)
            pending = [client.async_infer("relu", [tensor]) for _ in range(8)]
            assert all(one.get_result().as_numpy("y").sum() == 6 for one in pending)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_what_is_under_way_is_answered_after_sigterm(relu: Path) -> None:
    """The body of a request is only half there when the signal comes."""
    with process("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host") as (server, url):
        until_ready(url)

        def halves() -> Iterator[bytes]:
            yield b'{"inputs": [{"name": "x", "shape": [1, 2], '
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            yield b'"datatype": "FP32", "data": [3, -3]}]}'

        answer = httpx.post(f"{url}/v2/models/relu/infer", content=halves(), trust_env=False)
        assert answer.json()["outputs"][0]["data"] == [3.0, 0.0]
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
        assert server.wait(20) == 0


def test_a_request_that_never_ends_does_not_hold_up_the_end(relu: Path) -> None:
    command = ("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host", "--drain-timeout", 1)
    with process(*command, reads=False) as (server, url), contextlib.ExitStack() as stack:
        until_ready(url)
        host, port = url.removeprefix("http://").split(":")
        connection = stack.enter_context(socket.create_connection((host, int(port))))
        connection.sendall(b"POST /v2/models/relu/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.3)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert_503(connection)
        assert server.wait(20) == 0
        assert time.monotonic() - began < 10
        assert server.stdout is not None
        assert "Traceback" not in server.stdout.read()


def assert_503(connection: socket.socket) -> None:
    connection.settimeout(20)
    answer = b""
    while chunk := connection.recv(1 << 16):
        answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body) == {"error": "the server ended before this request did"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_does_not_wait_and_is_quiet(relu: Path, number: signal.Signals, status: int) -> None:
    command = ("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host", "--drain-timeout", 60)
    with process(*command, reads=False) as (server, url), contextlib.ExitStack() as stack:
        until_ready(url)
        host, port = url.removeprefix("http://").split(":")
        connection = stack.enter_context(socket.create_connection((host, int(port))))
        connection.sendall(b"POST /v2/models/relu/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        until_accepted_by_nobody(server, number, host, int(port))
        server.send_signal(number)
        assert_503(connection)
        assert server.wait(20) == status
        assert server.stdout is not None
        assert "serving relu" in (said := server.stdout.read())
        assert "Traceback" not in said
        assert "error" not in said.lower()


def until_accepted_by_nobody(server: subprocess.Popen[str], number: signal.Signals, host: str, port: int) -> None:
    server.send_signal(number)
    with contextlib.suppress(ConnectionError):
        while True:
            socket.create_connection((host, port)).close()
            time.sleep(0.02)


def test_the_delay_before_draining(relu: Path) -> None:
    command = ("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host", "--drain-delay", 1.5)
    with process(*command) as (server, url):
        until_ready(url)
        server.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert httpx.get(f"{url}/readyz", trust_env=False).json()["draining"]
        assert httpx.get(f"{url}/v2/models/relu", trust_env=False).status_code == 200
        assert server.wait(20) == 130


def test_a_config_and_a_token(relu: Path) -> None:
    config = relu.with_name("models.toml")
    config.write_text(
        '[server]\nport = 0\ntoken_file = "token"\n'
        '[models.first]\npath = "relu.onnx"\nslots = 3\ndevice = "host"\nwarmup = [[2, 3]]\n'
        '[models.later]\npath = "relu.onnx"\nload = false\nbatching = { max_size = 4 }\n'
    )
    relu.with_name("token").write_text(TOKEN + "\n")
    with process("-m", "aiotrt", "serve", "--config", config) as (_, url):
        until_ready(url)
        assert httpx.get(f"{url}/v2/models/first", trust_env=False).status_code == 401
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        index = client.get_model_repository_index(headers={"Authorization": f"Bearer {TOKEN}"})
        assert [(entry["name"], entry["state"]) for entry in index] == [("first", "READY"), ("later", "UNAVAILABLE")]
        client.close()


def test_what_cannot_be_served_is_said(tmp_path: Path, relu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\xffnonsense")
    for status, says, arguments in (
        (2, "no model to serve", []),
        (1, "there is no file", ["missing.onnx"]),
        (2, "is named twice", [str(relu), str(relu)]),
        (2, "model name '..'", [f"..={relu}"]),
        (2, "slots must be an integer", [str(relu), "--slots", "0"]),
        (2, "expected a shape such as", [str(relu), "--shape", "axb"]),
        (2, "port must be less than 65536, got 99999", [str(relu), "--port", "99999"]),
        (2, "drain_timeout must be a finite number, got inf", [str(relu), "--drain-timeout", "inf"]),
        (2, "drain_delay must be a finite number, got nan", [str(relu), "--drain-delay", "nan"]),
        (2, f"token file {tmp_path / 'none'}: there is no such file", [str(relu), "--token-file", str(tmp_path / "none")]),
        (2, f"token file {bad}: is not text in UTF-8", [str(relu), "--token-file", str(bad)]),
        (2, f"{tmp_path / 'none'}: there is no such file", ["--config", str(tmp_path / "none")]),
        (2, f"{tmp_path}: cannot be read: Is a directory", ["--config", str(tmp_path)]),
        (2, "--shape 3: input 'x': ", [str(relu), "--port", "0", "--device", "host", "--shape", "3"]),
        (2, "grpc_port must be less than 65536, got 99999", [str(relu), "--grpc-port", "99999"]),
        (1, "cannot load this file", [str(bad), "--port", "0", "--device", "host"]),
    ):
        assert main(["serve", *arguments]) == status, says
        assert says in capsys.readouterr().err


def test_what_fails_while_it_serves_is_shown(relu: Path) -> None:
    config = relu.with_name("models.toml")
    relu.with_name("bad.onnx").write_bytes(b"nonsense")
    config.write_text(
        '[server]\nport = 0\n[models.relu]\npath = "relu.onnx"\ndevice = "host"\n'
        '[models.bad]\npath = "bad.onnx"\ndevice = "host"\nload = false\n'
    )
    with process("-m", "aiotrt", "serve", "--config", config, reads=False) as (server, url):
        until_ready(url)
        assert httpx.post(f"{url}/v2/repository/models/bad/load", trust_env=False).status_code == 500
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None
        assert "error: model bad could not be loaded" in server.stdout.read()


def test_the_access_log(relu: Path) -> None:
    command = ("-m", "aiotrt", "serve", relu, "--port", 0, "--device", "host", "--access-log")
    with process(*command, reads=False) as (server, url):
        until_ready(url)
        httpx.get(f"{url}/v2/models/none?x=1", trust_env=False)
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None
        assert re.search(r"127\.0\.0\.1:\d+ - \"GET /v2/models/none\?x=1 HTTP/1\.1\" 404\n", server.stdout.read())


def model(option: str) -> str:
    return f'[models.a]\npath = "a.onnx"\n{option}'


@pytest.mark.parametrize(
    ("says", "text"),
    [
        ("Expected", "["),
        ("expected the tables", "[other]"),
        ("expected the tables", "models = 3"),
        ("does not belong into a file", '[server]\ntoken = "x"'),
        ("unknown option 'hots'", '[server]\nhots = "x"'),
        ("needs a path", "[models.a]"),
        ("unknown option 'slot'", '[models.a]\npath = "a.onnx"\nslot = 3'),
        ("warmup must be a list of shapes", '[models.a]\npath = "a.onnx"\nwarmup = [3]'),
        ("batching", '[models.a]\npath = "a.onnx"\nbatching = { size = 3 }'),
        ("model 'a': batching: max_size must be", model("batching = { max_size = 0 }")),
        ("model 'a': batching has no option 'max'; there are max_size, max_delay", model("batching = { max = 3 }")),
        ("model 'a': batching: 'int' object is not iterable", model("batching = { sizes = 3 }")),
        ("model 'a': batching must be true, false or a table, got 0", model("batching = 0")),
        ("model 'a': batching must be true, false or a table, got 'false'", model('batching = "false"')),
        ("model 'a': load must be true or false, got 'no'", model('load = "no"')),
        ("model 'a': heed_timeout must be true or false, got 30", model("heed_timeout = 30")),
        ("model 'a': slots must be an integer of at least 1, got '3'", model('slots = "3"')),
        ("model 'a': device must be a string, or a list of strings, got 3", model("device = 3")),
        ("model 'a': profiles must be a list of tables, got 3", model("profiles = 3")),
        ("model 'a': allow_host_code must be true or false, got 'false'", model('allow_host_code = "false"')),
        ("model 'a': warmup must be a list of shapes", model('warmup = [["3"]]')),
        ("token_file must be a string, got 3", "[server]\ntoken_file = 3"),
    ],
)
def test_a_bad_config(tmp_path: Path, says: str, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_config(path)


def test_settings_out_of_range() -> None:
    model = ModelSettings("a", Path("a.onnx"))
    for name, value in (
        ("max_body", 0), ("drain_delay", -1), ("port", "8000"), ("max_connections", True), ("host", 1), ("repository", "no"),
        ("body_timeout", math.nan), ("max_deadline", math.inf), ("drain_timeout", math.inf),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            ServerSettings((model,), **{name: value})  # type: ignore[arg-type]


def test_a_token_is_stripped_wherever_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f" {TOKEN}\n")
    monkeypatch.setenv("AIOTRT_TOKEN", f" {TOKEN}\n")
    assert token_from(file) == token_from(None) == TOKEN
    monkeypatch.delenv("AIOTRT_TOKEN")
    assert token_from(None) is None


def test_the_example(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = Image.fromarray(skimage.data.page()).convert("RGB").resize((384 * 2, 191 * 2))
    file = io.BytesIO()
    page.save(file, "PNG")
    with process(ROOT / "examples" / "fastapi_ocr.py", port) as (server, _):
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        with httpx.Client(base_url=url, trust_env=False, timeout=40) as client:
            for request in ({"content": file.getvalue()}, {"files": {"file": ("page.png", file.getvalue())}}):
                lines = client.post("/lines", **request).json()
                assert len(lines) >= 5
                assert all(line["score"] > 0.6 and len(line["corners"]) == 4 for line in lines)
            assert client.post("/lines", content=b"?").status_code == 422
            assert 'outcome="completed"} 2.0' in client.get("/metrics").text
            described = client.get("/openapi.json").json()["paths"]["/lines"]["post"]
            assert "image/png" in described["requestBody"]["content"]
        server.send_signal(signal.SIGTERM)
        server.wait(20)
