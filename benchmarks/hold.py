"""Work whose length its input says: what a predictor must be tried on."""

from __future__ import annotations

import time
from typing import Any, Final

import torch

from aiotrt.devices import open_device
from benchmarks.waits import Line

__all__ = ["Hold", "MissingKernelError"]

SOURCE: Final = r"""
extern "C" __global__ void hold(const long long *cycles, long long *out) {
    const long long begin = clock64(), count = *cycles;
    while (clock64() - begin < count) {}
    *out = count;
}
"""


class MissingKernelError(Exception):
    """This torch cannot compile the kernel; the message says why."""


class Hold:
    """A function over a device tensor that takes as long as the tensor says.

    Attributes:
        device: where.
        base: what a launch takes that says nothing, copies included.

    Raises:
        MissingKernelError: on CUDA, where the kernel cannot be compiled.
    """

    def __init__(self, device_name: str) -> None:
        self.device = open_device(device_name)
        self._kernel: Any = None
        self._rate = 1.0  # of the numbers in tensors, a second
        if not self.device.unified:
            compile_kernel = getattr(torch.cuda, "compile_kernel", getattr(torch.cuda, "_compile_kernel", None))
            if compile_kernel is None:
                raise MissingKernelError(f"torch {torch.__version__} compiles no kernels")
            try:
                self._kernel = compile_kernel(SOURCE, "hold")
            except Exception as error:  # whatever the run-time compiler raises
                raise MissingKernelError(f"the kernel cannot be compiled: {error}") from error
            self._calibrate()
        line = Line(self.device, self, self.seconds(0.0))
        self.base = line.seconds()
        line.close()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernel is None:
            time.sleep(float(x[0]))
            return x.clone()
        out = torch.empty_like(x)
        self._kernel((1, 1, 1), (1, 1, 1), [x, out])
        return out

    def seconds(self, seconds: float) -> torch.Tensor:
        """An input that asks for so much."""
        if self._kernel is None:
            return torch.tensor([seconds], dtype=torch.float64)
        return torch.tensor([round(seconds * self._rate)], dtype=torch.int64, device=self.device.torch_device)

    def _calibrate(self) -> None:
        def taken(cycles: float) -> float:
            line = Line(self.device, self, self.seconds(cycles))
            found = line.seconds()
            line.close()
            return found

        taken(10_000_000)  # brings the clocks up
        few, many = 100_000, 1_100_000
        self._rate = (many - few) / (taken(many) - taken(few))
