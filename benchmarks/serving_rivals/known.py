"""What the compared servers are sent, and what they must answer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.serving_rivals.work import MODELS, Array, directly

__all__ = ["ITEMS", "Known"]

ITEMS: Final = 64  # different ones
#: Of the largest output: as near as FP16 comes to itself with other batches. Integers must be equal.
TOLERANCE: Final = 0.02


class Known:
    """Items, and what the model, called directly, returns for each."""

    def __init__(self, model: str, file: Path | None, device: str) -> None:
        random = np.random.default_rng(1)
        _, height, width = shape = MODELS[model]
        if model == "reader":
            from benchmarks.serving_model import crops  # needs onnx and scikit-image, which no other model does

            items: list[Array] = [*crops(ITEMS, width, random)]
        else:
            items = list(random.integers(0, 256, (ITEMS, *shape), np.uint8))
        assert items[0].shape == (3, height, width), "the reader's items are not what its server takes"
        run = directly(model, file, device)
        found = [run(item[None], np.zeros(1, np.int64)) for item in items]
        self.bodies = [item.tobytes() for item in items]
        self.outputs = [outputs[0] for outputs, _ in found]
        self.sums = [int(item.astype(np.int64).sum()) for item in items]

    def is_output(self, data: bytes, item: int) -> bool:
        """Whether this is the model's output for that item."""
        wanted = self.outputs[item]
        if len(data) != wanted.nbytes:
            return False
        output = np.frombuffer(data, wanted.dtype).reshape(wanted.shape)
        if wanted.dtype.kind != "f":
            return bool((output == wanted).all())
        if wanted.ndim > 1:  # boxes: of two nearly equal scores either may be first, so only the scores are compared
            output, wanted = output[:, 0], wanted[:, 0]
        return bool(np.abs(output - wanted).max() <= TOLERANCE * np.abs(wanted).max())
