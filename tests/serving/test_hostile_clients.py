"""``aiotrt serve`` in a process of its own, and clients that lie to it: 4xx each time, while another client is served."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.bystander import HEAD, Server, exchange, infer_body, serving_process, status_of, unharmed, until

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PATIENCE = 1.5  # seconds
HUGE = [1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_process(
        tmp_path_factory.mktemp("hostile"), body_timeout=PATIENCE, keep_alive_timeout=5, max_connections=500
    ) as server:
        yield server


# --- lies ---------------------------------------------------------------------------------------------------------------


class Said:
    """A request as its parts, all of them true; a lie changes one."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.x = x
        self.parameters: dict[str, Any] = {"binary_data_size": x.nbytes}
        self.tensor: dict[str, Any] = {
            "name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": self.parameters,
        }  # fmt: skip
        self.request: dict[str, Any] = {"inputs": [self.tensor], "parameters": {"binary_data_output": True}}
        self.payload = x.tobytes()
        self.more_json = self.more_body = 0
        self.headers: list[bytes] = []
        self.json_length: object = None

    def bytes(self) -> bytes:
        text = json.dumps(self.request).encode()
        body = text + self.payload
        length = len(text) + self.more_json if self.json_length is None else self.json_length
        headers = [
            f"Content-Length: {len(body) + self.more_body}".encode(),
            f"Inference-Header-Content-Length: {length}".encode(),
            *self.headers,
        ]
        return HEAD + b"\r\n".join(headers) + b"\r\n\r\n" + body


Lie = Callable[[Said], None]


def of(strategy: st.SearchStrategy[Any], tell: Callable[[Said, Any], object]) -> st.SearchStrategy[Lie]:
    def lie(value: Any) -> Lie:
        def change(said: Said) -> None:
            tell(said, value)

        return change

    return strategy.map(lie)


NOT_NUMBERS: st.SearchStrategy[Any] = st.sampled_from([None, True, "24", [24], {}, 2.5])
WRONG_SIZES = st.integers(0, 200).filter(lambda n: n % 12) | st.integers(-100, -1) | st.sampled_from(HUGE) | NOT_NUMBERS
WRONG_SHAPES: st.SearchStrategy[Any] = (
    # Of a rank, or with extents, that the model does not have, or that are not those of the bytes.
    st.lists(st.integers(0, 8), max_size=5).filter(lambda shape: len(shape) != 2 or shape[1] != 3)
    | st.lists(st.sampled_from([*HUGE, 0, 1, 3, -1, -2, True, 2.0, "3", None]), min_size=3, max_size=40)
    | st.sampled_from([[1 << 32, 1 << 32], [1 << 62, 4], [(1 << 63) - 1, 3], [0, 3], [-2, -3], [100, 3], 6, None, "23", {}])
)
WRONG_DATATYPES = st.sampled_from(
    ["FP64", "FP16", "BF16", "INT32", "UINT32", "BOOL", "UINT8", "BYTES", "fp32", "", None, 7, ["FP32"]]
)
WRONG_LENGTHS = st.sampled_from(["", "-1", "+9", "1e2", "0x20", "9" * 40, "9" * 400, "\xb2", "None", "1, 2", 0, *HUGE])
WRONG_HEADERS = st.sampled_from(
    [
        b"Content-Length: 7",
        b"Transfer-Encoding: gzip",
        b"Content-Encoding: gzip",
        b"no colon",
        b"a\x00b: c",
        b": c",
        b"a b: c",
    ]
)
LIES = st.one_of(
    of(WRONG_SIZES, lambda said, size: said.parameters.update(binary_data_size=size)),
    of(WRONG_SHAPES, lambda said, shape: said.tensor.update(shape=shape)),
    of(WRONG_DATATYPES, lambda said, name: said.tensor.update(datatype=name)),
    of(st.sampled_from(["", "y", "x" * 5000, None, 3, ["x"]]), lambda said, name: said.tensor.update(name=name)),
    of(st.integers(1, 24), lambda said, n: setattr(said, "payload", said.payload[:-n])),
    of(st.binary(min_size=1, max_size=64), lambda said, more: setattr(said, "payload", said.payload + more)),
    of(st.integers(-40, 30).filter(bool), lambda said, n: setattr(said, "more_json", n)),
    of(WRONG_LENGTHS, lambda said, length: setattr(said, "json_length", length)),
    of(st.integers(-60, -1), lambda said, n: setattr(said, "more_body", n)),
    of(st.integers(1, 1000) | st.sampled_from([1 << 20, 1 << 62]), lambda said, n: setattr(said, "more_body", n)),
    of(WRONG_HEADERS, lambda said, header: said.headers.append(header)),
    of(st.sampled_from(["sequence_id", "sequence_start"]), lambda said, name: said.request["parameters"].update({name: 1})),
    of(st.sampled_from([1, "a"]), lambda said, region: said.parameters.update(shared_memory_region=region)),
    of(
        st.sampled_from([-1, "1", True]),
        lambda said, count: said.request.update(outputs=[{"name": "y", "parameters": {"classification": count}}]),
    ),
    of(st.sampled_from([None, [], {}, 7, "x"]), lambda said, inputs: said.request.update(inputs=inputs)),
    of(st.just("x"), lambda said, _: said.request["inputs"].append(said.tensor)),
    of(st.sampled_from([7, {}, ["y"], [{}], [{"name": "z"}]]), lambda said, o: said.request.update(outputs=o)),
)


@pytest.mark.timeout(120)
def test_one_lie_is_refused(server: Server) -> None:
    refused = 0

    @settings(max_examples=500, deadline=None)
    @given(st.integers(1, 4), LIES)
    def one(rows: int, lie: Lie) -> None:
        nonlocal refused
        said = Said(np.full((rows, 3), rows, np.float32))
        lie(said)
        is_cut = said.more_body > 0
        answer = exchange(server.address, said.bytes(), ends=is_cut)
        # Who ends before the body does is gone, and may be told nothing.
        assert status_of(answer) in ({0, 400, 413} if is_cut else {400, 413, 415}), answer[:500]
        refused += status_of(answer) > 0

    with unharmed(server):
        one()
    assert refused > 100


def test_the_truth_is_answered(server: Server) -> None:
    """Without this, a server that refuses everything would do as well. In pieces of any size, chunked or not."""

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 5), st.lists(st.integers(1, 200), max_size=6), st.booleans())
    def one(rows: int, cuts: list[int], chunked: bool) -> None:
        x = np.full((rows, 3), rows, np.float32)
        body, length = infer_body(x)
        head = HEAD + b"Inference-Header-Content-Length: %d\r\n" % length
        pieces = []
        for cut in cuts:
            pieces.append(body[:cut])
            body = body[cut:]
        pieces = [piece for piece in (*pieces, body) if piece]
        if chunked:
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
        else:
            head += b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces))
        answer = exchange(server.address, head + b"".join(pieces))
        assert status_of(answer) == 200, answer
        assert answer.endswith((x + x).tobytes())

    with unharmed(server):
        one()


METHODS = st.binary(max_size=8) | st.sampled_from(
    [b"GET ", b"POST ", b"PRI * HTTP/2.0\r\n\r\n", b"\x16\x03\x01", b"OPTIONS * "]
)
LINES = st.binary(max_size=40) | st.sampled_from(
    [b"/v2/models/double/infer HTTP/1.1\r\n", b"/v2 HTTP/1.0\r\n", b"/ HTTP/9.9\r\n"]
)
RESTS = st.binary(max_size=60) | st.sampled_from(
    [b"Host: localhost\r\n\r\n", b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"]
)


def test_any_bytes(server: Server) -> None:
    @settings(max_examples=250, deadline=None)
    @given(METHODS, LINES, RESTS)
    def one(method: bytes, line: bytes, rest: bytes) -> None:
        assert status_of(exchange(server.address, method + line + rest, ends=True)) < 500

    with unharmed(server):
        one()


# --- too much -----------------------------------------------------------------------------------------------------------


def test_headers_by_the_ten_thousand(server: Server) -> None:
    body, length = infer_body(X)
    most = b"".join(b"x-%d: %d\r\n" % (i, i) for i in range(10_000))
    with unharmed(server):
        for headers in 5 * (most, most * 10, b"x: " + b"y" * 1_000_000 + b"\r\n", b"x" * 1_000_000):
            rest = b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n" % (len(body), length)
            assert status_of(exchange(server.address, HEAD + headers + rest + body)) == 431
        long = b"GET /v2/" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert status_of(exchange(server.address, long)) == 431


def test_what_is_announced_takes_no_memory(server: Server) -> None:
    """A hundred clients at once announce as much as one may, and tensors of exabytes, and send next to nothing."""
    before = server.resident()
    with unharmed(server), contextlib.ExitStack() as stack:
        for i in range(100):
            client = stack.enter_context(socket.create_connection(server.address, timeout=20))
            shape = [1 << (20 + i % 40), 3]
            text = json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": [1.0]}]})
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % ([len(text), 64 << 20][i % 2], text.encode()))
        assert server.resident() - before < 64 << 20
        # Those that sent all they had announced are told what is wrong; for the others' bodies it waits, and not for long.
        until(lambda: server.metrics()["aiotrt_queue_waiting", "double"] == 0, "requests wait for bodies")


# --- too slow -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(90)
def test_slow_clients_are_not_waited_for(server: Server) -> None:
    """Hundreds of connections that never get anywhere, of five kinds. The server closes them; nobody here does."""
    x = np.zeros((200_000, 3), np.float32)
    body, length = infer_body(x)
    ask = HEAD.replace(b"close", b"keep-alive") + b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n"
    refused = HEAD.replace(b"close", b"keep-alive") + b"Content-Length: 99999999999\r\n\r\n"
    openings = {"silent": b"", "head": b"POST /v2/mod", "body": HEAD + b"Content-Length: 10000\r\n\r\n{", "refused": refused}
    files = server.files()
    with unharmed(server), contextlib.ExitStack() as stack:
        slow: list[socket.socket] = []
        for opening in openings.values():
            for _ in range(60):
                client = stack.enter_context(socket.create_connection(server.address, timeout=20))
                client.sendall(opening)
                slow.append(client)
        deaf = []
        for _ in range(6):  # they ask for 2.4 MB and read none of it
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect(server.address)
            client.sendall(ask % (len(body), length) + body)
            deaf.append(client)
        until(lambda: server.files() - files > 200, "they are not even connected")
        sent = 0

        def dribble() -> bool:
            """One byte from each; whether the server has let all of them go."""
            nonlocal sent
            sent += 1
            for client in slow:
                with contextlib.suppress(OSError):
                    client.send(b"a")
            return server.files() <= files + 1  # the bystander's

        until(dribble, "the server still waits for slow clients", 30)
        assert sent > 5
        answers = [_rest_of(client) for client in slow[60:120]]
        assert {status_of(answer) for answer in answers} <= {0, 408}
        assert any(answers), "who had begun is told what was wrong, unless the reset was quicker"


def _rest_of(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 16)
    except ConnectionError:
        return b""
