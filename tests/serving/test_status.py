"""The status page: the JSON behind it, the page as text, and the page in a real browser where there is one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

import aiotrt
from aiotrt import serving
from aiotrt.errors import DeviceError
from aiotrt.serving.kserve import ModelSettings, ServerSettings, create_app
from tests.building import models as onnx_models
from tests.serving.test_fastapi import models_behind, until_slow
from tests.serving.tools import Served, served
from tests.tools import Affine, executor_of, frame

TOKEN = "a token of more than 16 characters"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="the page is not looked at: no chromium on PATH")
#: Without a closing tag, in HTML.
VOID = {"meta", "link", "input", "br"}


@contextlib.asynccontextmanager
async def application(*, waits: bool = False) -> AsyncIterator[tuple[Served, serving.Models]]:
    """Two models, the second of which is never loaded; served until the end, then let go."""
    gate = asyncio.Event()

    def later() -> aiotrt.Model:
        if not waits:
            raise aiotrt.EngineError("no such engine")
        model = aiotrt.load(Affine(), device="host")

        async def opened() -> aiotrt.Model:
            await gate.wait()
            return await model

        return opened()  # type: ignore[return-value]

    first = lambda: aiotrt.load(Affine(), device="host", warmup=[frame(0)], batching=aiotrt.Batching(max_size=4))  # noqa: E731
    app = FastAPI(lifespan=serving.lifespan(wait=False, first=first, later=later))
    app.mount("/status", serving.status_page())
    async with served(app) as client:
        models = await models_behind(client)
        await until_slow(lambda: models.standing("first")[0] is serving.Standing.READY)
        wanted = serving.Standing.LOADING if waits else serving.Standing.UNAVAILABLE
        await until_slow(
            lambda: models.standing("later")[0] is wanted and "not loaded yet" not in models.standing("later")[1]
        )
        yield client, models
        gate.set()


async def sampled(models: serving.Models, more: int = 1) -> None:
    """Until there are so many more samples."""
    number = models.monitor.history.number
    await until_slow(lambda: models.monitor.history.number >= number + more)


# --- JSON ---------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_the_page_is_told() -> None:
    async with application() as (client, models):
        await sampled(models)
        await asyncio.gather(*[models["first"](frame(value)) for value in range(10)])
        await sampled(models)
        answer = await client.get("/status/status.json")
        assert answer.headers["cache-control"] == "no-store"
        said = answer.json()
        assert (said["version"], said["ready"], said["draining"]) == (aiotrt.__version__, False, False)
        assert said["implementation"] == aiotrt.__impl__
        first, later = said["models"]
        assert (first["name"], first["standing"], first["slots"], first["device"]) == ("first", "ready", 2, "host")
        assert first["totals"]["completed"] == 10
        assert (later["name"], later["standing"]) == ("later", "unavailable")
        assert later["reason"] == "loading failed; the log says why"
        assert said["newest"] == said["samples"][-1]["number"]
        assert sum(sample["models"]["first"]["completed"] for sample in said["samples"]) == pytest.approx(10, rel=0.2)
        busy = max(said["samples"], key=lambda sample: sample["models"]["first"]["completed"])["models"]["first"]
        assert 0 < busy["latency"]["p50"] <= busy["latency"]["p99"] < 60
        assert sum(int(size) * number for size, number in busy["batches"].items()) == 10
        assert sum(busy["slots"].values()) == pytest.approx(2, abs=0.01)
        assert all(sample["lag"] >= 0 for sample in said["samples"])

        newest = said["newest"]
        await sampled(models)
        more = (await client.get("/status/status.json", params={"after": newest})).json()["samples"]
        assert newest < more[0]["number"] == more[-1]["number"] - len(more) + 1
        for nonsense in ("-1", "x", "1" * 5000, "\u0661", "1.5", ""):
            answer = await client.get("/status/status.json", params={"after": nonsense})
            assert answer.json()["samples"][0]["number"] == 1, nonsense
        models.drain()
        assert (await client.get("/status/status.json")).json()["draining"] is True


@pytest.mark.asyncio
async def test_a_broken_model_is_said_to_be() -> None:
    async with application() as (client, models):
        executor_of(models["first"]).break_down(DeviceError("the device", code=700, name="illegal"))
        await sampled(models)
        said = (await client.get("/status/status.json")).json()
        assert (said["models"][0]["standing"], said["models"][0]["reason"]) == ("unavailable", "it is broken or closed")
        assert said["samples"][-1]["models"]["first"]["slots"]["broken"] > 0


@pytest.mark.asyncio
async def test_aiotrt_serve_has_it_at_the_root_and_its_token_guards_all_that_it_shows(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    settings = ServerSettings((ModelSettings("secret-name", path, options={"device": "host"}),), token=TOKEN)
    async with served(create_app(settings)) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "secret-name" not in page.text
        assert (await client.get("/status.json")).status_code == 401
        answer = await client.get("/status.json", headers={"authorization": f"Bearer {TOKEN}"})
        assert [model["name"] for model in answer.json()["models"]] == ["secret-name"]
        assert "/status.json" not in (await client.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"})).text


# --- the page as text ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page; fails where its tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.mark.asyncio
async def test_the_page_is_sound_and_brings_nothing_from_elsewhere() -> None:
    async with application() as (client, _):
        assert (await client.get("/status")).status_code == 307
        answer = await client.get("/status/")
    page = Page(answer.text)
    script, style = page.texts["script"], page.texts["style"]
    assert answer.text.startswith("<!doctype html>")
    assert ("html", "lang", "en") in page.attributes
    assert all(page.tags[tag] == 1 for tag in ("title", "h1", "main", "style", "script", "noscript"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'byId\("([^"]+)"\)', script)) | set(page.values("for")) | set(page.values("aria-labelledby"))
    assert used <= set(ids)
    assert set(ids) - used <= {"token", "loop-name"}, "nobody uses these"
    assert page.values("href") == ["data:,"]
    assert not page.values("src")
    assert re.findall(r"https?://[^\"]*", answer.text) == ["http://www.w3.org/2000/svg"], "a name, which nobody fetches"
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"], (
        "the policy forbids them"
    )
    assert "innerHTML" not in script
    assert "prefers-color-scheme: dark" in style
    colours = re.findall(r"--(\w+):", style)
    assert set(Counter(colours).values()) == {2}, "each colour has one for the light and one for the dark"
    assert set(re.findall(r"var\(--(\w+)\)", answer.text)) - {"colour"} == set(colours)
    policy = answer.headers["content-security-policy"]
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


# --- the page in a browser ----------------------------------------------------------------------------------------------


async def browse(url: str, *arguments: str, folder: Path) -> tuple[str, str]:
    """What chromium prints and complains about, after it has looked at the page for some seconds of its own time."""
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=1200,1500", *arguments, url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, complaints = await browser.communicate()
    assert browser.returncode == 0, complaints.decode()
    return out.decode(), "\n".join(line for line in complaints.decode().splitlines() if "CONSOLE" in line)


@in_a_browser
@pytest.mark.asyncio
async def test_the_page_in_a_browser_under_load(tmp_path: Path) -> None:
    async with application(waits=True) as (client, models):
        model = models["first"]

        async def load() -> None:
            while True:
                await asyncio.gather(*[model(frame(value)) for value in range(7)])
                await asyncio.sleep(0.01)

        loading = asyncio.create_task(load())
        await sampled(models, 3)
        url = f"http://{client.host}:{client.port}/status/"
        page, complaints = await browse(url, "--dump-dom", folder=tmp_path)
        picture = tmp_path / "page.png"
        await browse(url, f"--screenshot={picture}", folder=tmp_path)
        loading.cancel()
        await asyncio.wait([loading])
    assert not complaints
    assert 'role="status">Not ready</span>' in page, "one of them is not"
    assert re.search(r"<h2[^>]*>first</h2><span class=\"pill good\">Ready</span><span [^>]*>host · 2 slots</span>", page)
    assert re.search(r"<h2[^>]*>later</h2><span class=\"pill busy\">Loading</span>", page)
    assert "it is being loaded and warmed up" in page
    _, _, of_first = page.partition(">first</h2>")
    labels = dict(reversed(re.findall(r'aria-label="([^",:]+)[^"]*?: ([^"]+)"', of_first)))
    completed = re.search(r"completed ([\d,.k]+)", labels["Throughput"])
    assert completed is not None
    assert completed[1] != "0"
    assert re.fullmatch(r"p50 [\d.]+ (µs|ms), p95 [\d.]+ (µs|ms), p99 [\d.]+ (µs|ms)", labels["Latency"])
    assert re.search(r"on the device [\d.]+", labels["Slots"])
    assert re.search(r"\d+ of 3, \d+ of 4", labels["Batch sizes"])
    assert re.fullmatch(r"lag [\d.]+ (µs|ms)", labels["Lateness of a timer"])
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (1500, 1200, 3)
    blue = (np.abs(pixels - [0x25, 0x63, 0xEB]).sum(axis=2) < 20).sum()
    assert blue > 2000, "the bars are drawn"


@in_a_browser
@pytest.mark.asyncio
async def test_the_page_in_a_browser_asks_for_the_token_and_shows_names_as_text(tmp_path: Path) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx")
    settings = ServerSettings((ModelSettings("relu", path, options={"device": "host"}),), token=TOKEN)
    async with served(create_app(settings)) as client:
        page, complaints = await browse(f"http://{client.host}:{client.port}/", "--dump-dom", folder=tmp_path)
    assert "Token needed" in page
    assert '<form id="ask">' in page, "it is not hidden"
    assert "relu" not in page
    assert all("401" in line for line in complaints.splitlines())
    async with application() as (client, models):  # whose second model's reason has tags in it
        await sampled(models)
        page, complaints = await browse(f"http://{client.host}:{client.port}/status/", "--dump-dom", folder=tmp_path)
    assert "&lt;b&gt;no&lt;/b&gt; such engine" in page
    assert '<span class="pill bad">Unavailable</span>' in page
    assert not complaints
