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
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    import torch

__all__ = ["LAG", "MODELS", "OCTETS", "READY", "Array", "Heart", "Job", "Run", "decode", "encode", "network"]

Array: TypeAlias = npt.NDArray[Any]
#: From pixels (n, ...) and numbers (n,) to outputs (n, 20) and checksums (n,).
Run: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]

#: An item's pixels, by the model's name: PP-OCR's recogniser, torchvision's ResNet-50, and a network to try things with.
MODELS: Final = {"reader": (3, 48, 160), "resnet50": (3, 224, 224), "tiny": (3, 32, 32)}
OCTETS: Final = "application/octet-stream"
READY: Final = "/health"  # LitServe's
LAG: Final = "/lag"
SCORES: Final = 20  # of a network's, that are sent
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
        """The model, as one calls it without aiotrt, from any thread; it blocks, and releases the interpreter lock."""
        if self.file is not None:
            return _session(self.file, self.settings["threads"], spins=self.settings.get("spin", False))
        return _eager(self.model, self.device)


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
        inside = _tiny() if name == "tiny" else importlib.import_module("torchvision.models").resnet50(weights=None)
    module = Scored(inside).eval().to(device.replace("host", "cpu"), dtype)
    return module.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]  # torch's hint lacks it


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

    def run(pixels: Array, numbers: Array) -> tuple[Array, Array]:
        letters, checksums = session.run(None, {"pixels": pixels, "number": numbers})
        return letters, checksums

    return run


def _eager(name: str, device: str) -> Run:
    """A torch model, called as it is; on CUDA each thread has a stream of its own."""
    import torch

    module = network(name, device)
    place = next(module.parameters()).device
    own = threading.local()
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    if place.type == "cuda":
        torch.cuda.synchronize()  # the weights are on their way on another stream than those that will read them

    @torch.inference_mode()
    def run(pixels: Array, numbers: Array) -> tuple[Array, Array]:
        if place.type == "cuda" and not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream()
        with torch.cuda.stream(getattr(own, "stream", None)):
            # What came with a request cannot be written to, of which torch would warn; a batch was stacked.
            sent = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in (pixels, numbers)]
            outputs, checksums = module(*(tensor.to(place) for tensor in sent))
            return outputs.cpu().numpy(), checksums.cpu().numpy()

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
