"""Another program on the same device: bursts of work with pauses, until its standard input is closed.

python -m benchmarks.neighbour host|cuda
"""

from __future__ import annotations

import random
import select
import sys
import time
from typing import Final

import torch

BURST: Final = (0.2e-3, 2e-3)  # seconds
PAUSE: Final = (0.0, 1e-3)  # seconds


def main() -> None:
    """The command line."""
    device = sys.argv[1]
    numbers = random.Random(0)
    torch.set_num_threads(1)
    x = torch.rand(
        2048 if device == "cuda" else 128, 2048 if device == "cuda" else 128, device="cuda" if device == "cuda" else "cpu"
    )
    x @ x
    if device == "cuda":
        torch.cuda.synchronize()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        end = time.perf_counter() + numbers.uniform(*BURST)
        while time.perf_counter() < end:
            x @ x
            if device == "cuda":
                torch.cuda.synchronize()
        time.sleep(numbers.uniform(*PAUSE))


if __name__ == "__main__":
    main()
