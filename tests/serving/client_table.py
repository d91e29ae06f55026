"""Run the clients that people have against ``aiotrt serve``, and print what each was used for and how that went.

    python -m tests.serving.client_table [--sites FOLDER] [--examples FOLDER] [--write]

Each client is installed by pip into a folder of its own in FOLDER (by default one that is deleted). perf_analyzer also needs
Debian 12's libb64-0d. Triton's own examples are in no package: ``--examples`` names a folder with ``src/python/examples`` of
its client's repository. ``--write`` puts the table into docs/serving.md. The exit status is 1 if a client fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.building import models as onnx_models
from tests.serving.test_processes import process, until_ready

__all__ = ["main"]

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/serving.md"
MARKS: Final = ("<!-- clients -->", "<!-- end of clients -->")
#: What Ultralytics needs for this, beside torch, of which it would bring one for CUDA.
ULTRALYTICS: Final = (
    "tritonclient[http]==2.69.0", "gevent", "zope.event", "zope.interface", "greenlet", "geventhttpclient", "brotli",
    "python-rapidjson", "ultralytics-thop", "opencv-python-headless", "psutil", "polars", "py-cpuinfo",
    "torchvision==0.28.0",
)  # fmt: skip
HEADER: Final = """
import sys
import numpy as np
url = sys.argv[1]
x = np.arange(6, dtype=np.float32).reshape(2, 3)
"""


@dataclass(frozen=True)
class Client:
    """One client.

    Attributes:
        name: of its distribution.
        version: of it.
        purpose: what it is used for here.
        program: in Python, whose first argument is the server's host and port; or the words of a command.
        extra: of the distribution.
        packages: what is installed with it, instead of what it asks for; None for that.
    """

    name: str
    version: str
    purpose: str
    program: str | tuple[str, ...]
    extra: str = ""
    packages: tuple[str, ...] | None = None


CLIENTS: Final = (
    Client(
        "tritonclient", "2.69.0",
        "health, metadata, configuration, statistics, inference as JSON and bytes, gzip, classes, repository",
        """
import tritonclient.http as t
c = t.InferenceServerClient(url)
assert c.is_server_live() and c.is_server_ready() and c.is_model_ready("double", "1")
assert c.get_model_metadata("double")["inputs"][0]["shape"] == [-1, 3]
assert c.get_model_config("items")["max_batch_size"] == 8
for binary in (True, False):
    given = t.InferInput("x", [2, 3], "FP32").set_data_from_numpy(x, binary_data=binary)
    output = t.InferRequestedOutput("y", binary_data=binary)
    for coding in (None, "gzip", "deflate"):
        found = c.infer("double", [given], outputs=[output], request_compression_algorithm=coding,
                        response_compression_algorithm=coding)
        assert (found.as_numpy("y") == x + x).all()
found = c.infer("items", [given], outputs=[t.InferRequestedOutput("y", class_count=2)]).as_numpy("y")
assert found.tolist()[0] == [b"4.000000:2", b"2.000000:1"], found
assert c.async_infer("double", [given]).get_result().as_numpy("y").shape == (2, 3)
assert c.get_inference_statistics("double")["model_stats"][0]["inference_stats"]["success"]["count"] == 7
c.unload_model("double"); assert not c.is_model_ready("double"); c.load_model("double")
assert len(c.get_model_repository_index()) == 4
""", "http",
    ),
    Client(
        "tritonclient", "2.69.0", "system shared memory, for inputs and outputs",
        """
import tritonclient.http as t, tritonclient.utils.shared_memory as shm
c = t.InferenceServerClient(url)
c.unregister_system_shared_memory(); c.unregister_cuda_shared_memory()
regions = [shm.create_shared_memory_region(name, "/aiotrt-" + name, x.nbytes) for name in ("in", "out")]
try:
    for name in ("in", "out"):
        c.register_system_shared_memory(name, "/aiotrt-" + name, x.nbytes)
    shm.set_shared_memory_region(regions[0], [x])
    given, output = t.InferInput("x", [2, 3], "FP32"), t.InferRequestedOutput("y")
    given.set_shared_memory("in", x.nbytes); output.set_shared_memory("out", x.nbytes)
    c.infer("double", [given], outputs=[output])
    assert (shm.get_contents_as_numpy(regions[1], np.float32, [2, 3]) == x + x).all()
    assert len(c.get_system_shared_memory_status()) == 2
    c.unregister_system_shared_memory()
finally:
    for region in regions:
        shm.destroy_shared_memory_region(region)
""", "http",
    ),
    Client(
        "nvidia-pytriton", "0.7.0", "`ModelClient`: samples and batches",
        """
from pytriton.client import ModelClient
with ModelClient(url, "items") as c:
    assert (c.infer_sample(x[0])["y"] == 2 * x[0]).all()
    assert (c.infer_batch(x)["y"] == 2 * x).all()
""",
    ),
    Client(
        "tritony", "0.0.23", "`InferenceClient`: batches over HTTP",
        """
from tritony import InferenceClient
c = InferenceClient.create_with(model="items", url=url, protocol="http")
assert (c(x) == 2 * x).all()
""",
    ),
    Client(
        "ultralytics", "8.4.190", '`YOLO("http://...")`: detection by a remote model',
        """
from ultralytics import YOLO
found = YOLO(f"http://{url}/detector", task="detect").predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)[0]
assert found.names[5] == "bus" and found.boxes.cls.tolist() == [5.0], found.boxes
assert abs(found.boxes.xyxy.numpy() - [24, 24, 40, 40]).max() < 1, found.boxes
""", packages=ULTRALYTICS,
    ),
    Client(
        "kserve", "0.21.0", "`InferenceRESTClient`: health and inference",
        """
import asyncio
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
async def main():
    c = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await c.is_server_ready(f"http://{url}") and await c.is_model_ready(f"http://{url}", "double")
    for binary in (True, False):
        given = InferInput("x", [2, 3], "FP32"); given.set_data_from_numpy(x, binary_data=binary)
        found = await c.infer(f"http://{url}", InferRequest("double", [given]), model_name="double")
        assert (found.outputs[0].as_numpy() == x + x).all()
asyncio.run(main())
""",
    ),
    Client(
        "mlserver", "1.7.1", "`NumpyCodec` and the protocol's types, sent by httpx",
        """
import httpx
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
request = InferenceRequest(inputs=[NumpyCodec.encode_input("x", x)])
answer = httpx.post(f"http://{url}/v2/models/double/infer", json=request.model_dump())
found = InferenceResponse.model_validate(answer.json())
assert (NumpyCodec.decode_output(found.outputs[0]) == x + x).all()
""",
    ),
    *(
        Client(
            "perf_analyzer of tritonclient", "2.41.0", purpose,
            ("perf_analyzer", "-m", model, "-i", "http", "--shape", shape, "-p", "1000", "-s", "999", "-r", "4", *more),
            packages=("nvidia-cuda-runtime-cu12",),
        )
        for purpose, model, shape, more in (
            ("concurrency 1", "double", "x:4,3", ("--concurrency-range", "1")),
            ("concurrency 8", "double", "x:4,3", ("--concurrency-range", "8")),
            ("batches, `-b 4`", "items", "x:3", ("-b", "4", "--concurrency-range", "2")),
            ("system shared memory", "double", "x:4,3", ("--shared-memory", "system", "--output-shared-memory-size", "64")),
        )
    ),
)  # fmt: skip
#: Triton's own, and what each does that this server does not do, if anything.
EXAMPLES: Final = {
    "simple_http_infer_client.py": "",
    "simple_http_aio_infer_client.py": "",
    "simple_http_async_infer_client.py": "",
    "simple_http_shm_client.py": "",
    "simple_http_aio_shm_client.py": "",
    "simple_http_health_metadata.py": "wants the server to be named `triton`",
    "simple_http_model_control.py": "overrides a model's configuration as it is loaded",
}


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.client_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sites", type=Path, help="folder for what is installed; kept")
    parser.add_argument("--examples", type=Path, help="src/python/examples of Triton's client")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _models(folder)
        with process("-m", "aiotrt", "serve", "--config", config) as (_, url):
            until_ready(url)
            rows = list(_rows(url.removeprefix("http://"), arguments.sites or folder, arguments.examples, folder))
    table = ["| client | version | used for | result |", "| --- | --- | --- | --- |", *rows]
    print("\n".join(table))
    if arguments.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text("\n".join([before + MARKS[0], "", *table, "", MARKS[1] + after]), encoding="utf-8")
    return 1 if any("| fails" in row for row in rows) else 0


def _rows(url: str, sites: Path, examples: Path | None, folder: Path) -> Iterator[str]:
    for client in CLIENTS:
        site = _site(client, sites)
        if isinstance(client.program, str):
            words = [sys.executable, "-W", "ignore", "-c", HEADER + client.program, url]
        else:
            words = [str(site / "bin" / client.program[0]), *client.program[1:], "-u", url]
        yield f"| {client.name} | {client.version} | {client.purpose} | {_result(words, site, folder)} |"
    if examples is not None:
        site = _site(CLIENTS[0], sites)
        for name, lacks in EXAMPLES.items():
            result = _result([sys.executable, "-W", "ignore", str(examples / name), "-u", url], site, folder)
            expected = f"does not pass: it {lacks}" if lacks and result != "passes" else result
            yield f"| Triton's example `{name}` | with {CLIENTS[0].version} | all that it does | {expected} |"


def _site(client: Client, sites: Path) -> Path:
    name = client.name.rpartition(" ")[2]
    site = sites / f"{name}-{client.version}"
    if not site.exists():
        wanted = f"{name}[{client.extra}]=={client.version}" if client.extra else f"{name}=={client.version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(site)]
        more = [] if client.packages is None else ["--no-deps", *client.packages]
        subprocess.run([*pip, wanted, *more], check=True)
    for script in (site / "bin").glob("perf_*"):
        script.chmod(0o755)
    return site


def _result(words: Sequence[str], site: Path, folder: Path) -> str:
    libraries = os.pathsep.join([str(site / "nvidia/cuda_runtime/lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": libraries, "YOLO_CONFIG_DIR": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False)
    print(words[-3:] if "-c" not in words else site.name, done.returncode, file=sys.stderr)
    if done.returncode:
        print(done.stdout[-1000:], done.stderr[-2000:], file=sys.stderr)
        return f"fails: {(done.stderr.strip() or done.stdout.strip() or 'no output').splitlines()[-1][:100]}"
    return "passes"


def _models(folder: Path) -> Path:
    """A configuration of the models that the clients ask for."""
    onnx_models.save(folder / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": ("n", 3)})
    ins, outs = (
        [helper.make_tensor_value_info(f"{way}{i}", TensorProto.INT32, ["n", 16]) for i in (0, 1)]
        for way in ("INPUT", "OUTPUT")
    )
    nodes = [helper.make_node(kind, ["INPUT0", "INPUT1"], [f"OUTPUT{i}"]) for i, kind in enumerate(("Add", "Sub"))]
    _save(folder / "simple.onnx", helper.make_graph(nodes, "simple", ins, outs))
    found = np.zeros((1, 20, 6), np.float32)  # as YOLO26 gives them: corners, confidence, class
    found[0, 3] = (24, 24, 40, 40, 0.9, 5)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["images"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", "zero"], ["nothing"]),
            helper.make_node("Add", ["found", "nothing"], ["output0"]),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 20, 6])],
        [numpy_helper.from_array(found, "found"), numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )
    names = {i: "bus" if i == 5 else f"class {i}" for i in range(80)}
    metadata = {"task": "detect", "names": str(names), "imgsz": "[64, 64]", "stride": "32", "batch": "1", "end2end": "True"}
    _save(folder / "detector.onnx", graph, metadata)
    lines = ["[server]", "port = 0", "shared_memory = true"]
    for name, file, options in (
        ("double", "double", ""), ("items", "double", "batching = { max_size = 8 }"),
        ("simple", "simple", "batching = { max_size = 8 }"), ("detector", "detector", ""),
    ):  # fmt: skip
        lines += [f"[models.{name}]", f'path = "{file}.onnx"', 'device = "host"', options]
    (folder / "models.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "models.toml"


def _save(path: Path, graph: onnx.GraphProto, metadata: dict[str, str] | None = None) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)


if __name__ == "__main__":
    sys.exit(main())
