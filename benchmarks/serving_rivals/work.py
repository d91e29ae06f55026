"""What each of the compared servers does with a request: bytes to an item, the model, bytes back; and a heartbeat.

A request's body is the item's pixels and a number of eight bytes; the answer is the model's output for that item and a
checksum of eight bytes, the sum of the pixels and the number, which no other request has.

Torch is imported where it is used and nowhere else: a server that can do without it is not charged with its memory.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import math
import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    import torch

__all__ = [
    "BEAT",
    "LAG",
    "MODELS",
    "OCTETS",
    "READY",
    "Array",
    "Heart",
    "Job",
    "Run",
    "decode",
    "directly",
    "encode",
    "network",
]

Array: TypeAlias = npt.NDArray[Any]
Items: TypeAlias = Sequence[Array] | Array
#: From n items' pixels and numbers to outputs (n, 20, ...) and checksums (n,).
Run: TypeAlias = Callable[[Items, Items], tuple[Array, Array]]

#: An item's pixels, by the model's name: PP-OCR's recogniser, torchvision's ResNet-50 and RetinaNet, and a network to try
#: things with.
MODELS: Final = {"reader": (3, 48, 160), "resnet50": (3, 224, 224), "detector": (3, 320, 320), "tiny": (3, 32, 32)}
OCTETS: Final = "application/octet-stream"
READY: Final = "/health"  # LitServe's
LAG: Final = "/lag"
SCORES: Final = 20  # of a network's, or boxes of a detector's, that are sent
BEAT: Final = 5e-3  # seconds
_SEED: Final = 1


@dataclass(frozen=True)
class Job:
    """What is to be served, and how.

    Attributes:
        model: of `MODELS`.
        file: the model's, if it has one.
        device: "host" or "cuda".
        settings: what was tuned, by name; each server has its own.
    """

    model: str
    file: Path | None
    device: str
    settings: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """An item's."""
        return MODELS[self.model]

    def run(self) -> Run:
        """The model with the best engine that there is without aiotrt.

        That is ONNX Runtime for a file, and CUDA graphs or torch on the CPU for a network. It may be called from as many
        threads as the settings' `at_once`; it blocks, and releases the interpreter lock.
        """
        if self.file is not None:
            return _session(self.file, self.settings["threads"], spins=self.settings.get("spin", False))
        return _replayed(self) if self.device == "cuda" else directly(self.model, None, self.device)


def decode(body: bytes, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A request's pixels and number; views of it.

    Raises:
        ValueError: it is too short or too long.
    """
    size = math.prod(shape)
    return np.frombuffer(body, np.uint8, size).reshape(shape), np.frombuffer(body, np.int64, -1, size).reshape(())


def encode(output: Array, checksum: Array) -> bytes:
    """An answer's body."""
    return output.tobytes() + checksum.tobytes()


def network(name: str, device: str) -> torch.nn.Module:
    """A torch model with the same weights wherever it is made, in FP16 on CUDA; its layout is what convolutions like best.

    Raises:
        ImportError: torchvision is not installed, and it is needed.
    """
    import torch

    class Scored(torch.nn.Module):
        """From pixels and numbers to the first scores and checksums."""

        def __init__(self, inside: torch.nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, pixels: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scaled = (pixels.to(dtype) - 127.5) / 64
            scores = self.inside(scaled.contiguous(memory_format=torch.channels_last))
            return scores[:, :SCORES].float(), pixels.sum((1, 2, 3), dtype=torch.int64) + number

    dtype = torch.float16 if device == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        module = Scored(_inside(name)).eval().to(device.replace("host", "cpu"), dtype)
    return module.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]  # torch's hint lacks it


def _inside(name: str) -> torch.nn.Module:
    if name == "tiny":
        return _tiny()
    if name == "detector":
        from benchmarks.serving_rivals.detector import Detector

        return Detector(MODELS[name][-1], SCORES)
    made: torch.nn.Module = importlib.import_module("torchvision.models").resnet50(weights=None)
    return made


def _tiny() -> torch.nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, SCORES)
    )


def _session(file: Path, threads: int, *, spins: bool) -> Run:
    """An ONNX Runtime session that uses so many threads for one call, which may spin when they have nothing to do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(pixels: Items, numbers: Items) -> tuple[Array, Array]:
        letters, checksums = session.run(None, {"pixels": np.asarray(pixels), "number": np.asarray(numbers)})
        return letters, checksums

    return run


def directly(name: str, file: Path | None, device: str) -> Run:
    """The model as it is, for one call at a time on CUDA."""
    if file is not None:
        return _session(file, 1, spins=False)
    import torch

    module = network(name, device)
    place = next(module.parameters()).device
    torch.set_num_threads(1)

    @torch.inference_mode()
    def run(pixels: Items, numbers: Items) -> tuple[Array, Array]:
        # torch warns of memory that is read-only, as a request's is.
        sent = [torch.from_numpy(np.array(items)) for items in (pixels, numbers)]
        outputs, checksums = module(*(tensor.to(place) for tensor in sent))
        return outputs.cpu().numpy(), checksums.cpu().numpy()

    return run


def _replayed(job: Job) -> Run:
    """CUDA graphs, `at_once` of them for each batch size: powers of two up to `max_batch`, as aiotrt has them."""
    from benchmarks.serving_rivals.graphs import Graphs

    module, most = network(job.model, job.device), job.settings.get("max_batch", 1)
    sizes = [1 << i for i in range(most.bit_length())]
    free: queue.SimpleQueue[Graphs] = queue.SimpleQueue()
    for _ in range(job.settings.get("at_once", 1)):
        free.put(Graphs(module, job.shape, sizes, blocks=job.settings.get("blocks", False)))

    def run(pixels: Items, numbers: Items) -> tuple[Array, Array]:
        graphs = free.get()
        try:
            return graphs(pixels, numbers)
        finally:
            free.put(graphs)

    return run


class Heart:
    """Middleware that measures the loop's lag from the first request on, and tells it in seconds when it is asked.

    With that request, when everything is loaded, it also puts what is there out of the garbage collector's sight, as the
    documentation says and `aiotrt serve` does: for all alike, since otherwise what each imports would decide the p99.

    `GET /lag` answers all lags since it was last asked: how late a task woke that slept 5 ms, again and again; and the
    server's process.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._task is None:
            gc.collect()
            gc.freeze()
            self._task = asyncio.create_task(self._beat())
        if scope["type"] != "http" or scope["path"] != LAG:
            await self._app(scope, receive, send)
            return
        lags, self._lags = self._lags, []
        await JSONResponse({"pid": os.getpid(), "lags": lags})(scope, receive, send)

    async def _beat(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(BEAT)
            self._lags.append(time.perf_counter() - began - BEAT)
