"""An aiotrt model in a Ray Serve deployment: Ray places replicas and routes requests, aiotrt makes the batches.

python examples/ray_serve.py
curl --data-binary @image.npy http://127.0.0.1:8000/

- The replica is async: one has all requests that Ray lets in (`max_ongoing_requests`) under way at once, and whoever waits
  when the device is free goes together. `@serve.batch` would gather by a timer, and hand over what then waits once more.
- One replica has all GPUs of its host, which Ray makes visible to it. One queue serves them, and a GPU that fails leaves the
  others. `check_health` is readiness: a replica whose last GPU broke or hangs is replaced, in a new process.
"""

from __future__ import annotations

import io
import signal
import sys
import threading

import numpy as np
import ray  # type: ignore[import-not-found, unused-ignore]
import torch
from ray import serve  # type: ignore[import-not-found, unused-ignore]
from starlette.requests import Request

import aiotrt

GPUS = torch.cuda.device_count()  # of this host; each host that Ray places a replica on should have as many


class Classifier:
    """Ten numbers for each image (3, 64, 64)."""

    def __init__(self) -> None:
        torch.manual_seed(0)  # stands for weights that are read from a file: all replicas have the same
        layers = torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 15 * 15, 10)
        self.model = aiotrt.load(
            torch.nn.Sequential(*layers).eval(),  # copied to each GPU once
            device="cuda:*" if GPUS else ["host", "host"],
            warmup=[np.zeros((3, 64, 64), np.float32)],
            batching=aiotrt.Batching(max_size=16),
            retry=True,
        )

    async def classify(self, image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> list[float]:
        # The first call, or health check, opens the model and warms it up; the others wait for that.
        return (await (await self.model)(image, deadline=5.0)).tolist()  # type: ignore[no-any-return]

    async def __call__(self, request: Request) -> list[float]:
        return await self.classify(np.load(io.BytesIO(await request.body()), allow_pickle=False))

    async def check_health(self) -> None:
        if not (await self.model).is_ready:
            raise RuntimeError("the model is broken on every device")

    async def statistics(self) -> aiotrt.Statistics:
        return (await self.model).statistics()

    async def __del__(self) -> None:
        await self.model.aclose()


app = serve.deployment(
    max_ongoing_requests=64 * max(GPUS, 1),  # several full batches for each, so that one gathers while another runs
    max_queued_requests=256,  # beyond which Ray answers 503
    ray_actor_options={"num_gpus": GPUS, "num_cpus": 1},
    health_check_period_s=2,
    graceful_shutdown_timeout_s=30,
)(Classifier).bind()

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app)
    print(f"serving at http://127.0.0.1:{port}", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
