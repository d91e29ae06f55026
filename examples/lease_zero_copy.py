"""Write into the model's own input, and let another stream read its own output: nothing is copied, nobody waits."""

from __future__ import annotations

import torch

import aiotrt


def brighten(image: torch.Tensor) -> torch.Tensor:
    return (image * 1.5).clamp(0, 1)


async def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    example = torch.zeros(1, 3, 256, 256, device=device)
    async with aiotrt.load(brighten, device="auto", slots=1, warmup=[example]) as model:
        side = model.stream()  # the consumer's; on CUDA any torch.cuda.Stream will do
        means = torch.zeros(4, device=device)

        for i in range(4):
            async with model.lease() as slot:
                slot.inputs.image[...] = 0.1 * (i + 1)
                event = slot.launch()  # returns at once
                side.wait(event)  # on the device: this thread goes on

                def consume(slot: aiotrt.Lease = slot, i: int = i) -> None:
                    means[i] = slot.outputs[0].tensor.mean()

                side.run(consume)
                slot.consumed(side)
            # There is one slot, and it is free again as soon as its replay is complete. `consumed` is why the next launch
            # waits, on the device, until `side` has read this one's output.

        await aiotrt.wait(side.record())
        print(f"{model.statistics().replays} replays on {model.statistics().device}, and no output was copied to be read")
        print("mean brightness of each, found on another stream:", [round(mean, 2) for mean in means.tolist()])
        side.close()


if __name__ == "__main__":
    aiotrt.run(main())
