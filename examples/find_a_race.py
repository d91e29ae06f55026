"""Find a race in your own code, with no GPU: the simulated one runs in virtual time and knows who may touch what."""

from __future__ import annotations

import torch

import aiotrt
from aiotrt.testing import HazardError, SimulatedDevice, run


class Doubler(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


async def keep_last_frame(device: SimulatedDevice, *, mended: bool) -> None:
    """A consumer on a stream of its own copies each result; it must say so, or the next replay may overwrite it."""
    async with aiotrt.load(Doubler(), device=device, slots=1, warmup=torch.zeros(4)) as model:
        side = model.stream()
        for i in range(3):
            async with model.lease() as slot:
                slot.inputs.x[...] = float(i)
                side.wait(slot.launch())
                side.run(slot.outputs[0].tensor.clone)
                if mended:
                    slot.consumed(side)


def main() -> None:
    for mended in (False, True):
        device = SimulatedDevice(1)  # equal seeds give equal runs
        try:
            run(keep_last_frame(device, mended=mended), device)
        except HazardError as hazard:
            print("without consumed():", str(hazard).splitlines()[0])
        else:
            print("with consumed(): no race")


if __name__ == "__main__":
    main()
