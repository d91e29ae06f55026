"""Convert NV12 to RGB with torch, on any device, as FFmpeg does."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["Conversion"]

#: The weights of red and blue in luma, by the number of the matrix in H.273. FFmpeg takes BT.601 for all others.
WEIGHTS: Final = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
BT601: Final = (0.299, 0.114)


class Conversion:
    """The conversion of one stream's pictures.

    Args:
        colorspace: the number of the matrix in H.273.
        is_full: whether luma is from 0 to 255, not from 16 to 235.
        device: of the pictures.
    """

    def __init__(self, colorspace: int, is_full: bool, device: torch.device) -> None:
        red, blue = WEIGHTS.get(colorspace, BT601)
        green = 1 - red - blue
        low, luma, chroma = (0.0, 1.0, 1.0) if is_full else (16.0, 255 / 219, 255 / 224)
        self._luma = luma
        rows = [
            [0.0, -2 * (1 - blue) * blue / green * chroma, 2 * (1 - blue) * chroma],
            [2 * (1 - red) * chroma, -2 * (1 - red) * red / green * chroma, 0.0],
        ]
        self._matrix = torch.tensor(rows, dtype=torch.float32, device=device)
        # Chroma is around 128; 0.5 rounds, because the conversion to bytes truncates.
        shift = [0.5 - low * luma - 128 * (u + v) for u, v in zip(*rows, strict=True)]
        self._shift = torch.tensor(shift, dtype=torch.float32, device=device)

    def __call__(self, surface: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Convert rows of luma followed by rows of interleaved chroma to (height, width, 3) bytes, RGB."""
        half = (height + 1) // 2
        uv = surface[height : height + half].reshape(half, -1, 2).float()
        colour = torch.addmm(self._shift, uv.reshape(-1, 2), self._matrix).reshape(half, 1, -1, 1, 3)
        colour = colour.expand(half, 2, -1, 2, 3).reshape(2 * half, -1, 3)[:height, :width]
        # In place: `expand` and `reshape` made a copy.
        return colour.add_(surface[:height, :width, None], alpha=self._luma).clamp_(0, 255.5).to(torch.uint8)
