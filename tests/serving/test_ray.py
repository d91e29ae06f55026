"""aiotrt in Ray Serve, on a local Ray: the example as it stands, and a replica whose model breaks.

Ray is an extra of its own, and large: where it is not installed these tests say so and are skipped.
"""

from __future__ import annotations

import io
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray does as it is imported is Ray's own business
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray import serve  # type: ignore[import-not-found, unused-ignore]

    from examples.ray_serve import Classifier

from aiotrt.errors import DeviceError
from tests.serving.test_processes import ROOT, process
from tests.tools import free_port

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore"),  # likewise
]


def network() -> torch.nn.Module:
    """The example's."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 15 * 15, 10)
    )


NETWORK = network()


def expected(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the example's network says, computed here."""
    with torch.no_grad():
        result: np.ndarray[Any, Any] = NETWORK(torch.from_numpy(image[None])).numpy()[0]
    return result


def image(i: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(i).random((3, 64, 64), np.float32)


def test_the_example_over_http() -> None:
    def ask(i: int) -> None:
        file = io.BytesIO()
        np.save(file, image(i))
        answer = httpx.post(url, content=file.getvalue(), timeout=60, trust_env=False)
        np.testing.assert_allclose(answer.json(), expected(image(i)), rtol=1e-4, atol=1e-5)

    with process(ROOT / "examples" / "ray_serve.py", free_port(), PYTHONPATH=str(ROOT)) as (server, url):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(64)))
        assert httpx.post(url, content=b"nonsense", timeout=60, trust_env=False).status_code == 500
        ask(65)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(include_dashboard=False, num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    yield
    serve.shutdown()
    ray.shutdown()


class Breakable(Classifier):
    """The example's, with a switch."""

    async def break_down(self, count: int) -> bool:
        """Break so many devices; returns whether the model goes on with the others."""
        for executor in self.model._executors[:count]:
            executor.break_down(DeviceError("the device", code=700, name="illegal address"))
        return self.model.is_degraded


@pytest.mark.usefixtures("local_ray")
def test_requests_make_batches_and_a_replica_whose_model_broke_is_replaced() -> None:
    deployment = serve.deployment(
        max_ongoing_requests=64, ray_actor_options={"num_cpus": 1}, health_check_period_s=1, graceful_shutdown_timeout_s=1
    )(Breakable)
    handle = serve.run(deployment.bind())
    responses = [handle.classify.remote(image(i)) for i in range(64)]
    for i, response in enumerate(responses):
        np.testing.assert_allclose(response.result(timeout_s=60), expected(image(i)), rtol=1e-4, atol=1e-5)
    before = handle.statistics.remote().result(timeout_s=60)
    assert before.completed == 64
    assert max(before.batches) > 1, "they were under way at once, and gathered"

    assert len(before.devices) == 2, "the host twice"
    assert all(device.completed for device in before.devices)

    assert handle.break_down.remote(1).result(timeout_s=60), "degraded"
    for i, response in enumerate([handle.classify.remote(image(i)) for i in range(16)]):
        np.testing.assert_allclose(response.result(timeout_s=60), expected(image(i)), rtol=1e-4, atol=1e-5)

    assert not handle.break_down.remote(2).result(timeout_s=60)
    while True:  # until Ray has looked three times, and started another; the test's timeout is the bound
        try:
            after = handle.statistics.remote().result(timeout_s=60)
        except Exception:  # the old one went while it was asked
            continue
        if after.completed < 64:
            break
        time.sleep(0.2)
    np.testing.assert_allclose(
        handle.classify.remote(image(1)).result(timeout_s=60), expected(image(1)), rtol=1e-4, atol=1e-5
    )
