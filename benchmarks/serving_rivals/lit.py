"""LitServe, which calls the model in processes of its own."""

# No `from __future__ import annotations`: LitServe looks at the hooks' annotations, and a string would say nothing to it.

import importlib
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Body, Response

from benchmarks.serving_rivals.work import OCTETS, Array, Heart, Job, Run, decode, encode

__all__ = ["serve"]

litserve: Any = importlib.import_module("litserve")


class Single(litserve.LitAPI):  # type: ignore[misc]  # it has no types where it is not installed
    """A model, called for one request at a time. Each of LitServe's processes makes its own, and on CUDA its own graphs."""

    def __init__(self, job: Job, **options: Any) -> None:
        super().__init__(**options)
        self._job = job

    def setup(self, device: str) -> None:
        self._run: Run = self._job.run()

    def decode_request(self, request: Annotated[bytes, Body(media_type=OCTETS)]) -> tuple[Array, Array]:
        return decode(request, self._job.shape)

    def predict(self, x: Sequence[Any]) -> tuple[Array, Array]:
        (output,), (checksum,) = self._run(x[0][None], x[1][None])
        return output, checksum

    def encode_response(self, output: tuple[Array, Array]) -> Response:
        return Response(encode(*output), media_type=OCTETS)


class Batched(Single):
    """A model, called for as many requests as came within `batch_timeout` seconds, and at most `max_batch`."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, max_batch_size=job.settings["max_batch"], batch_timeout=job.settings["batch_timeout"])

    def batch(self, inputs: Sequence[tuple[Array, Array]]) -> Sequence[tuple[Array, ...]]:
        return list(zip(*inputs, strict=True))  # not stacked: graphs copy each item to pinned memory

    def predict(self, x: Sequence[Any]) -> tuple[Array, Array]:
        return self._run(*x)

    def unbatch(self, output: tuple[Array, Array]) -> list[tuple[Array, Array]]:
        return list(zip(*output, strict=True))


def serve(job: Job, port: int, **options: Any) -> None:
    """Until the process is ended; `options` are uvicorn's."""
    accelerator = "cuda" if job.device == "cuda" else "cpu"
    server = litserve.LitServer(
        Batched(job) if "max_batch" in job.settings else Single(job),
        accelerator=accelerator,
        devices=1,
        workers_per_device=job.settings["workers"],
        fast_queue=job.settings.get("fast_queue", False),
        middlewares=[Heart],
    )
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, **options)
