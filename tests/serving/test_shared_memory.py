"""Shared memory: Triton's own client registers regions, and tensors lie in them; nothing is read past a region's end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http.aio as triton
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

from aiotrt.errors import InputError
from aiotrt.serving.kserve import ModelSettings, binary, regions
from benchmarks import bench_serving_shared_memory
from tests.serving.test_extensions import image, same
from tests.serving.test_kserve import X, given, request_of, serving

needs_shared_memory = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no POSIX shared memory here")
pytestmark = [
    pytest.mark.asyncio,
    # Answers without a body of interest are never read by the client.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
    needs_shared_memory,
]
ON: dict[str, Any] = {"shared_memory": True}
ANY = {"shared_memory_region": "a", "shared_memory_byte_size": 24}


@contextlib.contextmanager
def region(size: int, *arrays: np.ndarray[Any, Any]) -> Iterator[tuple[Any, str]]:
    """Shared memory of the client's, and its key."""
    key = f"/aiotrt-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region(key, key, size)
    try:
        if arrays:
            shm.set_shared_memory_region(handle, list(arrays))
        yield handle, key
    finally:
        shm.destroy_shared_memory_region(handle)


def placed(name: str, size: int, shape: list[int], datatype: str = "FP32", offset: int = 0, key: str = "in") -> Any:
    tensor = triton.InferInput(name, shape, datatype)
    tensor.set_shared_memory(key, size, offset)
    return tensor


def wanted(size: int, offset: int = 0, key: str = "out", **options: Any) -> Any:
    output = triton.InferRequestedOutput("y", **options)
    output.set_shared_memory(key, size, offset)
    return output


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # the client's own habit
async def test_inputs_and_outputs_lie_in_regions_of_the_clients(tmp_path: Path) -> None:
    large = np.random.default_rng(1).random((1 << 17, 3), np.float32)
    async with serving(tmp_path, **ON) as (http, client):
        assert "system_shared_memory" in (await client.get_server_metadata())["extensions"]
        for array in (X, large):
            size = array.nbytes
            with region(size + 8, np.zeros(2, np.float32), array) as (_, one), region(2 * size) as (other, two):
                await client.register_system_shared_memory("in", one, size, 8)
                await client.register_system_shared_memory("out", two, 2 * size)
                shape = list(array.shape)
                result = await client.infer("double", [placed("x", size, shape)], outputs=[wanted(size, size)])
                said = result.get_output("y")
                assert said == {"name": "y", "datatype": "FP32", "shape": shape}
                found = shm.get_contents_as_numpy(other, np.float32, shape, size)
                np.testing.assert_array_equal(found, array + array)
                result = await client.infer("double", [placed("x", size, shape)])
                np.testing.assert_array_equal(result.as_numpy("y"), array + array)
                await client.infer("double", [given(array)], outputs=[wanted(size)])
                np.testing.assert_array_equal(shm.get_contents_as_numpy(other, np.float32, shape), array + array)
                await client.unregister_system_shared_memory()
        assert http.server.config.app.state.service.budget.used == 0  # type: ignore[union-attr]


async def test_strings_and_images_in_regions(tmp_path: Path) -> None:
    models = (
        ModelSettings("words", same(tmp_path / "words.onnx", ("?", "?")), options={"device": "host"}),
        ModelSettings("view", same(tmp_path / "view.onnx", ("h", "w", 3)), options={"device": "host"}, takes_images=True),
    )
    file, pixels = image(20, 10)
    words, files = (serialize_byte_tensor(np.array(one, object)) for one in ([b"one", b"three"], [file]))
    async with serving(tmp_path, *models, **ON) as (_, client):
        with region(4096) as (handle, key):
            await client.register_system_shared_memory("in", key, 4096)
            for name, data, shape, expected in (
                ("words", words, [2], np.array([list(b"one\0\0"), list(b"three")], np.uint8)), ("view", files, [1], pixels),
            ):  # fmt: skip
                shm.set_shared_memory_region(handle, [np.frombuffer(data.item(), np.uint8)])
                result = await client.infer(name, [placed("x", len(data.item()), shape, "BYTES")])
                np.testing.assert_array_equal(result.as_numpy("y"), expected)


async def test_status_and_names(tmp_path: Path) -> None:
    async with serving(tmp_path, **ON) as (_, client):
        assert await client.get_system_shared_memory_status() == []
        await client.unregister_system_shared_memory("none")
        await client.unregister_cuda_shared_memory()
        with region(64) as (_, key):
            await client.register_system_shared_memory("a", key, 32, 32)
            await client.register_system_shared_memory("b", key.removeprefix("/"), 64)
            entry = {"name": "a", "key": key, "offset": 32, "byte_size": 32}
            assert await client.get_system_shared_memory_status("a") == [entry]
            assert [one["name"] for one in await client.get_system_shared_memory_status()] == ["a", "b"]
            assert await client.get_cuda_shared_memory_status() == []
            await client.unregister_cuda_shared_memory()
            for call, says in (
                (client.register_system_shared_memory("a", key, 64), "'a' already in manager"),
                (client.register_system_shared_memory("c", key, 65), "has 64 bytes, and not 65 from its byte 0 on"),
                (client.register_system_shared_memory("c", key, 64, 1), "has 64 bytes, and not 64 from its byte 1 on"),
                (client.register_system_shared_memory("c", key, -1), "byte_size of shared memory must be an integer"),
                (client.register_system_shared_memory("c", key, 1 << 62), "byte_size of shared memory must be an integer"),
                (client.register_system_shared_memory("c", "/none", 1), "Unable to open shared memory region: '/none'"),
                (client.register_system_shared_memory("c", "../../etc/passwd", 1), "must be a name of letters"),
                (client.register_system_shared_memory("c", "/", 1), "must be a name of letters"),
                (client.register_system_shared_memory("c", "..", 1), "must be a name of letters"),
                (client.register_system_shared_memory("c", "a\0b", 1), "must be a name of letters"),
                (client.register_system_shared_memory("c", 3, 1), "must be a string"),
                (client.get_system_shared_memory_status("c"), "Unable to find system shared memory region: 'c'"),
                (client.get_cuda_shared_memory_status("a"), "Unable to find cuda shared memory region: 'a'"),
            ):
                with pytest.raises(InferenceServerException) as caught:
                    await call
                assert says in str(caught.value)
            await client.unregister_system_shared_memory("a")
            assert [one["name"] for one in await client.get_system_shared_memory_status()] == ["b"]
            await client.unregister_system_shared_memory()
            assert await client.get_system_shared_memory_status() == []


async def test_links_and_folders_are_not_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    link, folder = Path("/dev/shm") / f"aiotrt-{uuid.uuid4().hex}", Path("/dev/shm") / f"aiotrt-{uuid.uuid4().hex}"
    link.symlink_to(tmp_path / "secret")
    folder.mkdir()
    try:
        for path in (link, folder):
            with pytest.raises(InputError, match="Unable to open"):
                regions.SystemRegion(path.name, 0, 1)
    finally:
        link.unlink()
        folder.rmdir()


async def test_no_tensor_passes_the_end_of_a_region(tmp_path: Path) -> None:
    async with serving(tmp_path, **ON) as (_, client):
        with region(48, X) as (handle, key):
            await client.register_system_shared_memory("in", key, 24)
            for tensor, outputs, says in (
                (placed("x", 24, [2, 3], offset=1), None, "region 'in' has 24 bytes, and not 24 from its byte 1 on"),
                (placed("x", 36, [3, 3]), None, "region 'in' has 24 bytes, and not 36"),
                (placed("x", 20, [2, 3]), None, "FP32 of shape [2, 3] has 24 bytes, shared_memory_byte_size is 20"),
                (placed("x", 24, [2, 3], key="none"), None, "Unable to find shared memory region: 'none'"),
                (given(X), [wanted(24, 1, "in")], "region 'in' has 24 bytes, and not 24 from its byte 1 on"),
                (given(X), [wanted(24, key="none")], "Unable to find shared memory region: 'none'"),
                (given(X), [wanted(20, key="in")], "(20 bytes) should be at least 24 bytes to hold the results"),
            ):
                with pytest.raises(InferenceServerException) as caught:
                    await client.infer("double", [tensor], outputs=outputs)
                assert (says in str(caught.value), caught.value.status()) == (True, "400"), str(caught.value)
            assert shm.get_contents_as_numpy(handle, np.float32, [12])[6:].tolist() == [0] * 6
            os.truncate(f"/dev/shm{key}", 10)
            with pytest.raises(InferenceServerException, match="was cut short after it was registered"):
                await client.infer("double", [placed("x", 24, [2, 3])])
            np.testing.assert_array_equal((await client.infer("double", [given(X)])).as_numpy("y"), X + X)


async def test_parameters_that_are_wrong(tmp_path: Path) -> None:
    async with serving(tmp_path, **ON) as (http, _):
        request = request_of() | {"outputs": [{"name": "y", "parameters": {"classification": 1, **ANY}}]}
        assert "can't be set on classification output" in (await http.post("/v2/models/double/infer", json=request)).text
        for parameters, more, says in (
            ({"shared_memory_region": 3}, {"data": None}, "shared_memory_region must be a name, got 3"),
            ({"shared_memory_region": "a"}, {"data": None}, "must be numbers of bytes"),
            ({"shared_memory_region": "a", "shared_memory_byte_size": 24}, {}, "has both data and the parameter"),
            ({"shared_memory_region": "a", "shared_memory_byte_size": 24, "shared_memory_offset": -1}, {}, "be numbers of"),
        ):  # fmt: skip
            answer = await http.post("/v2/models/double/infer", json=request_of(parameters=parameters, **more))
            assert (answer.status_code, says in answer.text) == (400, True), answer.text


async def test_it_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        for call in (
            client.get_system_shared_memory_status(),
            client.register_system_shared_memory("a", "/a", 1),
            client.unregister_cuda_shared_memory(),
            client.infer("double", [placed("x", 24, [2, 3])]),
            client.infer("double", [given(X)], outputs=[wanted(24)]),
        ):
            with pytest.raises(InferenceServerException, match="without --shared-memory"):
                await call


async def test_a_region_stays_open_for_requests_that_use_it(tmp_path: Path) -> None:
    with region(24, X) as (_, key):
        all_regions = regions.Regions()
        await all_regions.register("system", "a", {"key": key, "byte_size": 24})
        found = all_regions.find(binary.Placed("a", 0, 24))
        all_regions.unregister("system", None)
        np.testing.assert_array_equal(found.read(0, 24).numpy().view(np.float32).reshape(2, 3), X)


# --- CUDA ---------------------------------------------------------------------------------------------------------------


async def test_cuda_memory_on_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    memory[8:32] = torch.from_numpy(X.ravel().view(np.uint8))
    made: list[tuple[bytes, int, int]] = []

    def opened(handle: bytes, index: int, size: int) -> None:
        if index:
            raise InputError(f"there is no GPU {index} here")
        made.append((handle, index, size))

    monkeypatch.setattr(regions.CudaRegion, "_view", memory)
    monkeypatch.setattr(regions, "_open_cuda", opened)
    handle = base64.b64encode(bytes(range(64)))
    async with serving(tmp_path, **ON) as (_, client):
        await client.register_cuda_shared_memory("in", handle.decode(), 0, 64)
        assert made == [(bytes(range(64)), 0, 64)]
        assert await client.get_cuda_shared_memory_status() == [{"name": "in", "device_id": 0, "byte_size": 64}]
        result = await client.infer("double", [placed("x", 24, [2, 3], offset=8)], outputs=[wanted(24, 40, "in")])
        assert "data" not in result.get_output("y")
        np.testing.assert_array_equal(memory[40:].numpy().view(np.float32).reshape(2, 3), X + X)
        for handle_, index, says in (
            ("?", 0, "is not base64"), ("AAAA", 0, "has 64 bytes, got 3"), (handle.decode(), 3, "no GPU 3 here"),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match=says):
                await client.register_cuda_shared_memory("other", handle_, index, 64)


@pytest.mark.proof
async def test_the_benchmark_runs(tmp_path: Path) -> None:
    assert await asyncio.to_thread(bench_serving_shared_memory.measure, quick=True, folder=tmp_path) == 0
    assert (tmp_path / "serving-shared-memory.json").is_file()
