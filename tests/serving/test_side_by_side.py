"""The comparison of servers: what it says of made-up rows, and that it runs; LitServe is not installed here."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI, Request, Response

pytest.importorskip("aiohttp", reason="the benchmark's client")
pytest.importorskip("onnx", reason="the benchmark's model")
pytest.importorskip("skimage", reason="the benchmark's pictures")

from benchmarks import bench_serving, bench_serving_side_by_side, tables
from benchmarks.bench_serving_side_by_side import Clock, judge, overall
from benchmarks.measure import Spread
from benchmarks.rows import MEETS, Row, Run
from benchmarks.serving_rivals import contenders
from benchmarks.serving_rivals.asker import Asker
from benchmarks.serving_rivals.clients import Clients, Load
from benchmarks.serving_rivals.known import Known
from benchmarks.serving_rivals.trial import Trials
from benchmarks.serving_rivals.work import LAG, MODELS, Heart, Job, decode, encode
from examples import ocr
from tests.serving.tools import served

TINY = Job("tiny", None, "host", {"threads": 1, "at_once": 2})


def row(way: str, *, rate: float, p99: float, batched: bool = False, load: str = "8 connections") -> Row:
    facts = {"is_batched": batched, "is_open": "random" in load, "memory": 1 << 20, "client_cpu": 0.1}
    runs = [Run(Spread(p99 / 2, p99, p99, 100), rate, 1.0, 0.0)]
    return Row.measured(
        "side_by_side", "uvloop", way, {"model": "reader", "load": load}, None, runs, lags=[runs[0].latency], facts=facts
    )


def test_ahead_is_ahead_of_every_other_in_both() -> None:
    rows = [row("FastAPI", rate=100, p99=0.1), row("aiotrt", rate=101, p99=0.09), row("LitServe", rate=90, p99=0.2)]
    judge(rows)
    assert [one.verdict for one in rows] == ["", MEETS, ""]
    assert overall(rows) == "aiotrt is ahead in throughput and p99"


def test_what_is_behind_says_of_whom_and_by_how_much() -> None:
    rows = [row("FastAPI", rate=100, p99=0.1), row("LitServe", rate=50, p99=0.05), row("aiotrt", rate=80, p99=0.08)]
    judge(rows)
    assert rows[2].verdict == "misses: 0.800 of the requests a second of FastAPI; 1.600 of the p99 of LitServe"
    assert overall(rows) == "aiotrt is ahead in throughput and p99 in 0 of 1 comparisons"


def test_batches_are_compared_with_all_and_single_runs_with_single_runs() -> None:
    rows = [row("LitServe, batches", rate=200, p99=0.1, batched=True), row("FastAPI", rate=100, p99=0.2)]
    ours = [row("aiotrt", rate=150, p99=0.15), row("aiotrt, batches", rate=150, p99=0.05, batched=True)]
    judge([*rows, *ours])
    assert [one.verdict for one in ours] == [MEETS, "misses: 0.750 of the requests a second of LitServe, batches"]


def test_at_random_moments_only_the_time_counts() -> None:
    rows = [row(way, rate=rate, p99=0.1, load="70 at random moments") for way, rate in (("aiotrt", 69.9), ("FastAPI", 70.1))]
    judge(rows)
    assert rows[0].verdict == MEETS


def test_nothing_is_claimed_where_nobody_else_was_measured() -> None:
    rows = [row("aiotrt", rate=1, p99=1)]
    judge(rows)
    assert overall(rows) == "nothing to compare"


def test_an_item_and_its_number_go_there_and_back() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    found, number = decode(pixels.tobytes() + (77).to_bytes(8, "little"), pixels.shape)
    np.testing.assert_array_equal(found, pixels)
    assert (number.shape, int(number)) == ((), 77)
    with pytest.raises(ValueError, match="reshape"):
        decode(pixels.tobytes() + bytes(16), pixels.shape)


@pytest.mark.asyncio
async def test_a_wrong_answer_is_counted_whatever_is_wrong_with_it() -> None:
    run, known = TINY.run(), Known("tiny", None, "host")
    faults = iter(["none", "checksum", "output", "short", "status"])
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        fault = next(faults)
        pixels, number = decode(await request.body(), TINY.shape)
        (output,), (checksum,) = run(pixels[None], number[None])
        if fault == "checksum":
            checksum += 1
        if fault == "output":
            output[3] += np.abs(output).max()
        body = encode(output[:-1] if fault == "short" else output, checksum)
        return Response(body, status_code=503 if fault == "status" else 200)

    wrong: Counter[str] = Counter()
    async with served(Heart(app)) as client, Asker(str(client.base_url).rstrip("/"), known, wrong) as asker:
        for _ in range(5):
            await asker.ask()
        while not (await client.get(LAG)).json()["lags"]:  # the heart beats from the first request on
            await asyncio.sleep(0)
    assert wrong == {"mismatched: another request's checksum": 1, "mismatched: another output": 2, "status 503": 1}


def test_boxes_are_compared_by_their_scores() -> None:
    known = Known("tiny", None, "host")
    known.outputs[0] = np.array([[0.9, 1, 2, 3, 4, 5], [0.9, 6, 7, 8, 9, 10]], np.float32)
    assert known.is_output(known.outputs[0][::-1].tobytes(), 0)
    assert not known.is_output((0.9 * known.outputs[0]).tobytes(), 0)


def test_processes_share_a_load_without_loss() -> None:
    load = Load("all", 2.0, 7, [0.1, 0.2, 0.3])
    shares = [load.share(i, 4) for i in range(4)]
    assert [one.connections for one in shares] == [2, 2, 2, 1]
    assert [list(one.moments) for one in shares] == [[0.1], [0.2], [0.3], []]


def test_another_round_begins_only_if_it_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(bench_serving_side_by_side, "time", SimpleNamespace(monotonic=lambda: now))
    clock = Clock(began=0.0)
    now = 30.0
    clock.step()
    assert clock.has_time(50)
    assert not clock.has_time(49)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny", "resnet50", "detector"])
def test_graphs_by_hand_answer_as_the_model_does(model: str) -> None:
    if model != "tiny":
        pytest.importorskip("torchvision")
    run = Job(model, None, "cuda", {"at_once": 2, "max_batch": 4}).run()
    known = Known(model, None, "cuda")
    items = [np.frombuffer(body, np.uint8).reshape(MODELS[model]) for body in known.bodies]
    for count in (1, 2, 3, 4, 1):
        outputs, checksums = run(items[:count], np.arange(count))
        assert len(outputs) == len(checksums) == count
        for i in range(count):
            assert known.is_output(outputs[i].tobytes(), i)
            assert checksums[i] == known.sums[i] + i


def test_the_parser_and_the_loop_are_those_that_every_server_has() -> None:
    here, there = contenders.versions(), {"httptools": "1", "uvloop": "1"}
    assert here["litserve"] is None or here["litserve"] == importlib.metadata.version("litserve")
    assert contenders.same_server(there, there) == {"http": "httptools", "loop": "uvloop"}
    assert contenders.same_server(there, {"httptools": None, "uvloop": None}) == {"http": "h11", "loop": "asyncio"}


def test_every_setting_can_be_sent_to_a_server() -> None:
    for device in ("host", "cuda"):
        field = contenders.contenders(device)
        assert [who.is_batched for who in field] == [False, False, True, False, True]
        for who in field:
            for settings in who.candidates:
                assert json.loads(json.dumps(settings)) == settings


@pytest.mark.proof
@pytest.mark.timeout(180)
@pytest.mark.parametrize("model", ["reader", "tiny"])
def test_it_runs_without_litserve(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ocr.detector_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(bench_serving_side_by_side, "interpreter", lambda asked: None)
    assert bench_serving.main(["--part", "side_by_side", "--model", model, "--quick", "--out", str(tmp_path)]) == 0
    record = tables.load(tmp_path / "serving-side-by-side-host.json")
    assert record["quick"]
    assert not record["failed"]
    assert not record["wrong"]
    assert "not installed" in record["skipped"]["LitServe"]
    ways = ["FastAPI, thread pool", "aiotrt", "aiotrt, batches"]
    assert [(one["setting"]["model"], one["way"]) for one in record["rows"]] == [
        (model, way) for _ in range(3) for way in ways
    ]
    assert list(record["tuning"]) == [f"{model}, {way}" for way in ways]
    for one in record["rows"]:
        assert one["rate"] > 0
        assert one["cpu"] > 0
        assert one["latency"]["count"] > 0
        assert one["lag"]["count"] > 0
        assert one["facts"]["memory"] > 1 << 20
        assert bool(one["verdict"]) == one["way"].startswith("aiotrt")
    printed = capsys.readouterr().out
    assert "NOT MEASURED: LitServe" in printed
    for table in tables.tables_of(record):
        assert tables.as_text(table) in printed


def test_a_server_that_does_not_start_is_a_failure(tmp_path: Path) -> None:
    clients = Clients(Known("tiny", None, "host"), "asyncio")  # its processes are started when it is entered
    trials = Trials("tiny", "host", None, clients, {}, {}, tmp_path, 0.1)
    who = contenders.Contender("FastAPI", "plain", is_batched=False, candidates=[])
    assert trials.of([(who, {"threads": 1})], [Load("1 connection", 0.1, 1)]) == [[]]
    (said,) = trials.failed.values()
    assert "ended before it was ready" in said
    assert "KeyError: 'at_once'" in said
