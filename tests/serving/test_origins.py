"""What pages of other sites can make a browser send, and what of it the server takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiotrt.errors import InputError
from aiotrt.serving.kserve import ModelSettings, ServerSettings, create_app
from tests.building import models as onnx_models
from tests.serving.tools import Served, served

pytestmark = pytest.mark.asyncio

TOKEN = "a token of more than 16 characters"
SITE = "https://shop.example"
UNLOAD = "/v2/repository/models/relu/unload"


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[Served]:
    model = ModelSettings("relu", onnx_models.relu(tmp_path / "relu.onnx"), options={"device": "host"})
    async with served(create_app(ServerSettings((model,), **options))) as client:
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        yield client


FOREIGN = [
    {"Origin": SITE}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://[bad"},
    {"Referer": f"{SITE}/page"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("content", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
async def test_a_page_of_another_site_cannot_unload_a_model(
    tmp_path: Path, headers: dict[str, str], content: str | None
) -> None:
    async with serving(tmp_path) as client:
        answer = await client.post(UNLOAD, headers=headers | ({"Content-Type": content} if content else {}))
        assert (answer.status_code, list(answer.json())) == (403, ["error"])
        assert "access-control-allow-origin" not in answer.headers
        assert (await client.get("/readyz")).status_code == 200, "the model is there"


async def test_a_name_that_is_rebound_reads_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        for path in ("/", "/status.json", "/v2", "/metrics", "/v2/models/relu", "/livez"):
            for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1.evil.example", "[::1", "localhost@evil"):
                answer = await client.get(path, headers={"Host": host})
                assert (answer.status_code, "--allowed-host" in answer.json()["error"]) == (421, True), host
            for host in (f"localhost:{client.port}", "LOCALHOST", "localhost.", "127.0.0.1", "[::1]:80"):
                assert (await client.get(path, headers={"Host": host})).status_code == 200, host


async def test_its_own_page_and_other_clients_are_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        own = f"http://127.0.0.1:{client.port}"
        link = {"Referer": f"{SITE}/", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        for headers in ({}, link, {"Sec-Fetch-Site": "same-origin"}):
            assert (await client.get("/", headers=headers)).status_code == 200
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's and urllib's, unless they are told otherwise
        for headers in (form, {"Origin": own}, {"Referer": f"{own}/"}, {"Sec-Fetch-Site": "same-origin"}):
            assert (await client.post("/v2/repository/index", headers=headers)).status_code == 200


@pytest.mark.parametrize("options", [{"allowed_hosts": ["Models.example"]}, {"host": "0.0.0.0"}, {"token": TOKEN}])
async def test_names_that_are_allowed(tmp_path: Path, options: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    model = ModelSettings("relu", onnx_models.relu(tmp_path / "relu.onnx"), options={"device": "host"})
    async with served(create_app(ServerSettings((model,), **options))) as client:
        answer = await client.get("/v2", headers=headers | {"Host": "models.example:8000"})
        assert answer.status_code == 200
        answer = await client.get("/v2", headers=headers | {"Host": "other.example"})
        assert answer.status_code == (421 if "allowed_hosts" in options else 200)


@pytest.mark.parametrize("origins", [[SITE], ["*"]])
@pytest.mark.parametrize("token", [None, TOKEN])
async def test_cors(tmp_path: Path, origins: list[str], token: str | None) -> None:
    async with serving(tmp_path, cors_origins=origins, token=token) as client:
        asked = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "content-type,authorization,inference-header-content-length"
        answer = await client.options("/v2/models/relu/infer", headers=asked)
        assert answer.status_code == 200, "a preflight has no token"
        assert answer.headers["access-control-allow-origin"] in (SITE, "*")
        assert "inference-header-content-length" in answer.headers["access-control-allow-headers"]
        headers = {"Origin": SITE} | ({"Authorization": f"Bearer {token}"} if token else {})
        for path, status in (("/v2", 200), ("/v2/models/other", 404)):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] in (SITE, "*"), "the page may read errors too"
        assert "inference-header-content-length" in answer.headers["access-control-expose-headers"].lower()
        if origins != ["*"]:
            answer = await client.options("/v2", headers=asked | {"Origin": "https://evil.example"})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers


async def test_without_cors_a_preflight_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        answer = await client.options("/v2", headers={"Origin": SITE, "Access-Control-Request-Method": "POST"})
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "https://shop.example/page", "", 7])
async def test_what_is_no_origin(origin: Any) -> None:
    with pytest.raises(InputError, match="cors_origins"):
        ServerSettings((ModelSettings("a", Path("a.onnx")),), cors_origins=[origin])
