"""Image files that become device tensors: in a FastAPI endpoint, and over the Open Inference Protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from fastapi import Depends, FastAPI

from aiotrt import serving
from aiotrt.decoding import ImageError, ImageTooLargeError, pillow
from aiotrt.errors import InputError
from aiotrt.serving.errors import problem
from aiotrt.serving.kserve import ModelSettings, read_config
from tests.decoding import double
from tests.decoding.corpus import encoded, on_cpu, photograph, turned
from tests.serving.test_extensions import files, same
from tests.serving.test_kserve import serving as protocol
from tests.serving.tools import served

pytestmark = pytest.mark.asyncio

PHOTOGRAPH = photograph("rocket", (64, 48))
Body = Annotated[torch.Tensor, Depends(serving.image_body(device="host", max_pixels=3750, max_bytes=100_000))]


def application() -> FastAPI:
    app = FastAPI(lifespan=serving.lifespan())
    serving.install(app)

    @app.post("/", openapi_extra=serving.image_request)
    async def answer(image: Body) -> list[int]:
        assert image.dtype is torch.uint8
        return [*image.shape, int(image.sum())]

    return app


async def test_an_endpoint_gets_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    module = double.install(monkeypatch)
    async with served(application()) as client:
        for number, data in enumerate((encoded(PHOTOGRAPH), turned(6), encoded(PHOTOGRAPH, "PNG"))):
            expected = pillow.decode(data, 10_000)
            for request in ({"content": data}, {"files": {"file": ("image", data)}}):
                answer = await client.post("/", **request)
                assert answer.json() == [*expected.shape, int(expected.sum())]
            assert len(module.batches) == min(2 * number + 2, 4)


@pytest.mark.parametrize("has_library", [False, True])
async def test_errors_are_the_same_with_and_without_the_library(has_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_library:
        double.install(monkeypatch, believes=True)
    good = encoded(PHOTOGRAPH)
    async with served(application()) as client:
        for status, data in (
            (422, good[:-100]),
            (422, b"GIF89"),
            (422, b""),
            (413, encoded(PHOTOGRAPH.resize((80, 48)))),
            (413, bytes(100_001)),
        ):
            answer = await client.post("/", content=data)
            assert answer.status_code == status, answer.text
            if status == 422:
                assert f"ImageError: {answer.json()['detail']}" == on_cpu(data)
        assert (await client.post("/", content=good)).status_code == 200


async def test_what_an_endpoint_answers_to_errors_of_a_decoder_of_its_own() -> None:
    assert problem(ImageError("damaged")).status == 422
    assert problem(ImageTooLargeError("too large")).status == 413


async def test_other_modes_are_for_host_memory() -> None:
    with pytest.raises(InputError, match="gives RGB; got mode='L'"):
        serving.image_body(device=True, mode="L")


async def test_over_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = double.install(monkeypatch)
    shapes: dict[str, tuple[str | int, ...]] = {"rgb": ("h", "w", 3), "planar": ("n", 3, "h", "w"), "grey": ("h", "w", 1)}
    options = {"device": "host"}
    models = [
        ModelSettings(
            name, same(tmp_path / f"{name}.onnx", shape), options=options, takes_images=True, decodes_on_device=True
        )
        for name, shape in shapes.items()
    ]
    data = encoded(PHOTOGRAPH)
    pixels = pillow.decode(data, 10_000)
    async with protocol(tmp_path, *models) as (_, client):
        result = await client.infer("rgb", [files(data, shape=[1])])
        np.testing.assert_array_equal(result.as_numpy("y"), pixels)
        result = await client.infer("planar", [files(data, data, shape=[2])])
        np.testing.assert_array_equal(result.as_numpy("y"), np.stack([pixels.transpose(2, 0, 1)] * 2))
        assert module.batches == [1, 1, 1]
        result = await client.infer("grey", [files(data, shape=[1])])
        np.testing.assert_array_equal(result.as_numpy("y"), pillow.decode(data, 10_000, "L"))
        assert module.batches == [1, 1, 1]
        with pytest.raises(Exception, match="not an image that can be read"):
            await client.infer("rgb", [files(data[:-99], shape=[1])])


async def test_settings(tmp_path: Path) -> None:
    config = tmp_path / "models.toml"
    text = '[models.a]\npath = "a.onnx"\ndecode_on_device = true\n'
    config.write_text(text + "images = true\n", encoding="utf-8")
    _, (model,) = read_config(config)
    assert model.takes_images
    assert model.decodes_on_device
    config.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="needs images = true"):
        read_config(config)
