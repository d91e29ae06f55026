"""Programs on a simulated device, with what the host reads and writes told to its hazard detector."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

import torch

from aiotrt import submission, tensors
from aiotrt.graphs import Program
from aiotrt.testing import FaultInjector, SimulatedDevice, run

T = TypeVar("T")


def run_simulated(main: Coroutine[Any, Any, T], device: SimulatedDevice | FaultInjector) -> T:
    """`testing.run`, with the runtime's own host copies checked for races as well."""
    simulated = device.simulated if isinstance(device, FaultInjector) else device

    def own(view: Any, dtype: torch.dtype, kind: tensors.Kind) -> Any:
        simulated.host_read(view, "copying results out")
        return tensors.own(view, dtype, kind)

    def copy_in(request: submission.Request, program: Program) -> None:
        for argument, view in zip(request.arguments, program.input_views, strict=True):
            if argument.host is not None and view is not None:
                simulated.host_write(view, "copying inputs in")
        submission.copy_in(request, program)

    with mock.patch("aiotrt.requests.own", own), mock.patch("aiotrt.requests.copy_in", copy_in):
        return run(main, device)
