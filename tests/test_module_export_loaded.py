"""`load` of a module that is capturable only as its export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import CaptureError, Stream
from aiotrt.devices.host import HostDevice
from tests.test_module_export import Copies, Decides


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def more(y: torch.Tensor) -> torch.Tensor:
    return y + 1


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host device on which a capture fails as it does on CUDA: the body runs, and then raises under capture."""
    real = HostDevice.capture

    def capture(self: HostDevice, stream: Stream, body: Callable[[], Any], inputs: Any = (), **options: Any) -> Any:
        self.call(stream, body)

        def strictly() -> None:
            Copies.here.capturing = True
            try:
                body()
            finally:
                Copies.here.capturing = False

        try:
            self.call(stream, strictly)
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        return real(self, stream, body, inputs)

    monkeypatch.setattr(HostDevice, "capture", capture)


@pytest.mark.asyncio
@pytest.mark.usefixtures("strict")
async def test_load_tries_an_export(caplog: pytest.LogCaptureFixture) -> None:
    module = Copies().eval()
    x = np.random.default_rng(0).standard_normal((4, 3), np.float32)
    async with aiotrt.load(module, device="host", slots=2, preprocess=double, postprocess=more, warmup=[x]) as model:
        got = await model(x)
        assert model.statistics().fallbacks == ()
        assert model.statistics().captures == 2
    assert np.array_equal(got, (module.linear(torch.from_numpy(x) * 2) + 1).detach().numpy())
    assert sum("torch.export takes its place" in record.message for record in caplog.records) == 1


@pytest.mark.asyncio
@pytest.mark.usefixtures("strict")
async def test_where_there_is_no_export_it_runs_without_a_graph() -> None:
    x = np.ones((4, 3), np.float32)
    async with aiotrt.load(Decides().eval(), device="host", slots=1, warmup=[x]) as model:
        await model(x)
        (reason,) = model.statistics().fallbacks
        assert "could not be captured" in reason
