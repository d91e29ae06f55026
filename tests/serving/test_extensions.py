"""Extensions of the protocol over a real socket: compression, raw bodies, classes, strings and images."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio as triton
from onnx import TensorProto, helper
from PIL import Image
from tritonclient.utils import InferenceServerException

from aiotrt.errors import InputError
from aiotrt.serving.kserve import ModelSettings, ServerSettings, read_config
from aiotrt.serving.kserve.classes import classified
from aiotrt.serving.kserve.compression import compress, decompressed
from tests.building import models as onnx_models
from tests.serving.test_kserve import X, given, request_of, serving

URL = "/v2/models/double/infer"
RAW = {"inference-header-content-length": "0"}
torch = pytest.importorskip("torch")


def same(path: Path, shape: tuple[int | str, ...], dtype: int = TensorProto.UINT8) -> Path:
    """y = x."""
    return onnx_models.save(path, [helper.make_node("Identity", ["x"], ["y"])], {"x": shape}, elem_type=dtype)


# --- compression --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.asyncio
async def test_tritons_client_compresses_both_ways(tmp_path: Path, coding: str, binary: bool) -> None:
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", "?"))
    async with serving(tmp_path, ModelSettings("relu", path, options={"device": "host"})) as (_, client):
        for count in (1, 6_000):
            array = np.random.default_rng(1).random((2, count), np.float32)
            result = await client.infer(
                "relu", [given(array, binary=binary)], outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
                request_compression_algorithm=coding, response_compression_algorithm=coding,
            )  # fmt: skip
            np.testing.assert_array_equal(result.as_numpy("y"), array)


@pytest.mark.asyncio
async def test_an_answer_is_compressed_only_where_that_is_asked_for_by_itself(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, _):
        for accepted, coding in (
            ("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", None), ("br", None), ("", None), ("*", None)
        ):  # fmt: skip
            answer = await http.post(URL, json=request_of(), headers={"accept-encoding": accepted})
            assert answer.headers.get("content-encoding") == coding
            assert answer.json()["outputs"][0]["data"] == (2 * X).ravel().tolist()


@pytest.mark.asyncio
async def test_what_is_compressed_is_bounded_as_it_is_decompressed(tmp_path: Path) -> None:
    text = json.dumps(request_of()).encode()
    async with serving(tmp_path, max_body=4 << 20, max_bodies=8 << 20) as (http, _):
        budget = http.server.config.app.state.service.budget  # type: ignore[union-attr]
        long = gzip.compress(text + b" " * (1 << 30 >> 3))
        assert len(long) < 1 << 18
        for status, says, body, coding in (
            (413, "more than 4,194,304 bytes once it is decompressed", long, "gzip"),
            (400, "not gzip", text, "gzip"),
            (400, "not deflate", gzip.compress(text), "deflate"),
            (400, "has no end", gzip.compress(text)[:-1], "gzip"),
            (400, "has no end", b"", "gzip"),
            (400, "goes on after the end", gzip.compress(text) + b"x", "gzip"),
            (400, "goes on after the end", zlib.compress(text) + b"x" * 100_000, "deflate"),
            (200, "", gzip.compress(text), "GZIP"),
            (200, "", zlib.compress(text), "deflate"),
            (200, "", text, "identity"),
        ):
            answer = await http.post(URL, content=body, headers={"content-encoding": coding})
            assert (answer.status_code, says in answer.text) == (status, True), answer.text
        assert budget.used == 0


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_pieces(coding: str) -> None:
    for data in (b"", b"1", np.random.default_rng(1).bytes(3 << 20), bytes(9 << 20)):
        short = compress([data[:7], memoryview(data)[7:]], coding)
        pieces = list(decompressed(bytearray(short), coding))
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= 1 << 20


# --- raw bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_body_that_is_all_the_input(tmp_path: Path) -> None:
    relu = onnx_models.relu(tmp_path / "relu.onnx", ("?", 3))
    add = onnx_models.save(tmp_path / "add.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], {"a": (3,), "b": (3,)})
    any_shape = same(tmp_path / "any.onnx", ("?", "?"))
    models = (
        ModelSettings("items", relu, options={"device": "host", "batching": True}),
        ModelSettings("add", add, options={"device": "host"}),
        ModelSettings("any", any_shape, options={"device": "host"}),
    )
    async with serving(tmp_path, *models) as (http, _):
        answer = await http.post(URL, content=X.tobytes(), headers=RAW)
        length = int(answer.headers["inference-header-content-length"])
        assert json.loads(answer.content[:length])["outputs"][0]["shape"] == [2, 3]
        np.testing.assert_array_equal(np.frombuffer(answer.content[length:], np.float32).reshape(2, 3), X + X)
        answer = await http.post("/v2/models/items/infer", content=X[0].tobytes(), headers=RAW)
        assert b'"shape":[1,3]' in answer.content
        for name, says in (
            ("double", "input 'x' is FP32 of shape [-1, 3], where -1 is any size; 5 bytes do not fit"),
            ("items", "input 'x' is FP32 of shape [3], where -1 is any size; 5 bytes do not fit"),
            ("add", "a raw request is for a model of one input, and 'add' has 2"),
            ("any", "input 'x' has a shape that a raw request cannot say"),
        ):
            answer = await http.post(f"/v2/models/{name}/infer", content=b"12345", headers=RAW)
            assert (answer.status_code, says in answer.text) == (400, True), answer.text
        assert (await http.post(URL, content=b"", headers=RAW)).status_code == 400


# --- classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.asyncio
async def test_the_largest_elements_with_their_labels(tmp_path: Path, binary: bool) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding="utf-8")
    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 3))
    options = {"device": "host", "batching": True}
    pets = ModelSettings("pets", path, options=options, labels=tmp_path / "labels.txt")
    array = np.array([[0.25, 2, 1.5], [7, 7, 0]], np.float32)
    async with serving(tmp_path, pets) as (_, client):
        assert (await client.get_model_config("pets"))["output"][0]["label_filename"] == "labels.txt"
        outputs = [triton.InferRequestedOutput("y", binary_data=binary, class_count=2)]
        found = (await client.infer("pets", [given(array)], outputs=outputs)).as_numpy("y")
        of = bytes.decode if binary else str
        assert [[of(one) for one in row] for row in found] == [
            ["2.000000:1:dog", "1.500000:2"], ["7.000000:0:cat", "7.000000:1:dog"],
        ]  # fmt: skip
        outputs = [triton.InferRequestedOutput("y", binary_data=binary, class_count=9)]
        found = (await client.infer("pets", [given(array[0])], outputs=outputs)).as_numpy("y")
        assert [of(one) for one in found] == ["2.000000:1:dog", "1.500000:2", "0.250000:0:cat"]
        found = (await client.infer("double", [given(array)], outputs=outputs)).as_numpy("y")
        assert of(found[0]) == "14.000000:3", "without a batch axis all of it is one item"


@pytest.mark.asyncio
async def test_classes_that_are_not_a_number(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, _):
        for count in (-1, "2", True, 1.5):
            request = request_of() | {"outputs": [{"name": "y", "parameters": {"classification": count}}]}
            answer = await http.post(URL, json=request)
            assert (answer.status_code, "must be a number of classes" in answer.text) == (400, True)
        request = request_of() | {"outputs": [{"name": "y", "parameters": {"classification": 0}}]}
        assert (await http.post(URL, json=request)).json()["outputs"][0]["datatype"] == "FP32"


def test_classes_of_every_dtype() -> None:
    for dtype in (torch.uint8, torch.uint16, torch.uint64, torch.int8, torch.int64):
        assert classified("y", torch.tensor([1, 3, 2]).to(dtype), 2, [], has_axis=False).tolist() == ["3:1", "2:2"]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        values = torch.tensor([1, float("nan"), 2], dtype=dtype)
        assert classified("y", values, 2, ["a", "b"], has_axis=False).tolist() == ["nan:1:b", "2.000000:2"]
    assert classified("y", torch.zeros(2, 0), 2, [], has_axis=True).shape == (2, 0)
    with pytest.raises(InputError, match="y is BOOL"):
        classified("y", torch.tensor([True]), 1, [], has_axis=False)


# --- images -------------------------------------------------------------------------------------------------------------


def image(width: int, height: int, form: str = "PNG", mode: str = "RGB") -> tuple[bytes, np.ndarray[Any, Any]]:
    """A file and its pixels."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(file, form)
    return file.getvalue(), pixels


def files(*contents: bytes, shape: list[int], name: str = "x") -> Any:
    return triton.InferInput(name, shape, "BYTES").set_data_from_numpy(np.array(contents, object).reshape(shape))


@pytest.mark.parametrize(
    ("shape", "mode"),
    [(("h", "w", 3), "RGB"), ((3, "h", "w"), "RGB"), ((1, "h", "w", 4), "RGBA"), (("n", 1, "h", "w"), "L")],
)
@pytest.mark.asyncio
async def test_an_image_file_goes_to_an_input_of_pixels(tmp_path: Path, shape: tuple[int | str, ...], mode: str) -> None:
    model = ModelSettings("view", same(tmp_path / "view.onnx", shape), options={"device": "host"}, takes_images=True)
    file, pixels = image(20, 10, mode=mode)
    if shape[-1] == "w":
        pixels = pixels.transpose(2, 0, 1)
    if len(shape) == 4:
        pixels = pixels[None]
    async with serving(tmp_path, model) as (http, client):
        for one in (files(file, shape=[1]), files(file, shape=[1, 1]), given(pixels, datatype="UINT8")):
            np.testing.assert_array_equal((await client.infer("view", [one])).as_numpy("y"), pixels)
        answer = await http.post("/v2/models/view/infer", content=file, headers=RAW)
        assert answer.content.endswith(pixels.tobytes())
        request = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(file).decode()]}]}
        assert np.array_equal(
            (await http.post("/v2/models/view/infer", json=request)).json()["outputs"][0]["data"], pixels.ravel()
        )


@pytest.mark.asyncio
async def test_images_of_a_batch_and_images_that_are_not_taken(tmp_path: Path) -> None:
    path = same(tmp_path / "view.onnx", ("n", 10, "w", 3))
    options = {"device": "host", "batching": {"max_size": 2}}
    models = (
        ModelSettings("items", path, options=options, takes_images=True),
        ModelSettings("one", same(tmp_path / "one.onnx", ("h", "w", 3)), options={"device": "host"}, takes_images=True),
        ModelSettings("off", same(tmp_path / "off.onnx", ("h", "w", 3)), options={"device": "host"}),
    )
    (first, a), (second, b) = image(20, 10), image(20, 10, "BMP")
    async with serving(tmp_path, *models) as (http, client):
        result = await client.infer("items", [files(first, second, shape=[2, 1])])
        np.testing.assert_array_equal(result.as_numpy("y"), np.stack([a, b]))
        for name, contents, says in (
            ("items", [first, image(21, 10)[0]], "images of one request must have the same size"),
            ("items", [first] * 3, "from 1 to 2, got 3"),
            ("items", [image(20, 11)[0]], "must have the shape [10, -1, 3] with or without a batch axis"),
            ("one", [first, second], "takes one image, got 2"),
            ("one", [b"GIF89a"], "not an image that can be read"),
            ("off", [first], "must have the shape"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                await client.infer(name, [files(*contents, shape=[len(contents)])])
            assert says in str(caught.value)
        for data, says in ((["?"], "expected files in base64"), ([1], "expected lists of strings")):
            request = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": data}]}
            answer = await http.post("/v2/models/one/infer", json=request)
            assert (answer.status_code, says in answer.text) == (400, True)


@pytest.mark.asyncio
async def test_pixels_count_towards_what_may_be_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ModelSettings("one", same(tmp_path / "one.onnx", ("h", "w", 3)), options={"device": "host"}, takes_images=True)
    many = ModelSettings(
        "many", same(tmp_path / "many.onnx", ("n", "h", "w", 3)), options={"device": "host"}, takes_images=True
    )
    black = io.BytesIO()
    Image.new("RGB", (500, 500)).save(black, "PNG")
    async with serving(tmp_path, one, many, max_bodies=100_000) as (http, client):
        with pytest.raises(InferenceServerException, match="at most 100,000 are taken at once"):
            await client.infer("one", [files(black.getvalue(), shape=[1])])
        monkeypatch.setattr("aiotrt.serving.kserve.image_input._MAX_PIXELS", 400_000)
        with pytest.raises(InferenceServerException, match="at most 150,000 are taken") as caught:
            await client.infer("many", [files(black.getvalue(), black.getvalue(), shape=[2])])
        assert caught.value.status() == "413"
        assert http.server.config.app.state.service.budget.used == 0  # type: ignore[union-attr]


# --- settings -----------------------------------------------------------------------------------------------------------


def test_settings_of_a_model_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "models.toml"
    config.write_text('[models.a]\npath = "a.onnx"\nlabels = "names.txt"\nimages = true\n', encoding="utf-8")
    _, (model,) = read_config(config)
    assert (model.labels, model.takes_images, model.is_loaded) == (tmp_path / "names.txt", True, True)
    for line, says in (("labels = 3", "labels must be the name of a file, got 3"), ("images = 1", "images must be true or")):
        config.write_text(f'[models.a]\npath = "a.onnx"\n{line}\n', encoding="utf-8")
        with pytest.raises(InputError, match=says):
            read_config(config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"takes_images": True}, "images = true is for models with an input of UINT8"),
        ({"labels": Path("/none")}, "no such file"),
    ],
)
@pytest.mark.asyncio
async def test_what_a_model_cannot_have_is_an_error_as_it_is_loaded(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    from aiotrt.serving.kserve.servable import Servable

    path = onnx_models.relu(tmp_path / "relu.onnx", ("?", 3))
    settings = ModelSettings("relu", path, options={"device": "host"}, **options)
    ServerSettings((settings,))
    async with settings.maker()() as model:
        with pytest.raises(InputError, match=says):
            await Servable(settings).opened(model)


# --- what is not there ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as (http, client):
        for call, says in (
            (client.get_trace_settings(), "this server does not have trace settings"),
            (client.update_trace_settings("double", {"trace_level": ["OFF"]}), "this server does not have trace settings"),
            (client.get_log_settings(), "this server does not have log settings"),
            (client.update_log_settings({"log_info": False}), "this server does not have log settings"),
            (client.infer("double", [given(X)], sequence_id=3, sequence_start=True), "does not have sequences of requests"),
            (client.get_model_metadata("wrong"), "Request for unknown model: 'wrong' is not found"),
            (client.get_model_config("double", "7"), "Request for unknown model: 'double' version 7 is not found"),
            (client.infer("wrong", [given(X)]), "Request for unknown model: 'wrong' is not found"),
            (client.load_model("wrong"), "failed to load 'wrong': Request for unknown model: 'wrong' is not found"),
            (client.unload_model("wrong"), "Request for unknown model: 'wrong' is not found"),
            (
                client.load_model("double", config='{"max_batch_size": "16"}'),
                "failed to load 'double': it is loaded with the",
            ),
        ):
            with pytest.raises(InferenceServerException) as caught:
                await call
            assert says in str(caught.value)
        answer = await http.post("/v2/models/double/generate", json={"text_input": "hello"})
        assert (answer.status_code, answer.json()) == (501, {"error": "this server does not have the generate extension"})
