"""Two models, one after the other on the device: the host does not wait in between, and nothing comes back to it."""

from __future__ import annotations

import numpy as np
import torch

import aiotrt


def edges(image: torch.Tensor) -> torch.Tensor:
    return (image[..., 1:] - image[..., :-1]).abs()


def strongest(edge: torch.Tensor) -> dict[str, torch.Tensor]:
    strength, column = edge.mean(dim=0).max(dim=0)
    return {"column": column, "strength": strength}


async def main() -> None:
    image = np.zeros((48, 64), np.float32)
    image[:, 20:] = 1.0  # one edge, between the columns 19 and 20

    async with (
        aiotrt.load(edges, warmup=[image]) as first_model,
        aiotrt.load(strongest, warmup=[image[:, 1:]]) as second_model,
        first_model.lease() as first,
        second_model.lease() as second,
    ):
        first.inputs[0][...] = image
        produced = first.launch()
        second.inputs[0][...] = first.outputs[0]  # copied on the device, as soon as it is produced
        already = produced.query()
        found = await second.replay()  # the only wait

        print(f"the second model was launched {'after' if already else 'before'} the first was known to be done")
        print(f"the strongest edge is right of column {int(found['column'])}, strength {float(found['strength']):.1f}")


if __name__ == "__main__":
    aiotrt.run(main())
