"""RF-DETR-Seg-Nano from the package `rfdetr`, in a form that can be captured.

The module creates tensors in host memory in its forward pass, which makes capture fail; its `torch.export` program does not.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any, Final

import torch

from aiotrt.errors import EngineError, MissingDependencyError

__all__ = ["SIZE", "exported", "network"]

SIZE: Final = 312  # height and width of the network's input, in pixels

log = logging.getLogger("aiotrt.video")


def network(weights: str | os.PathLike[str] | None = None, *, seed: int = 0) -> torch.nn.Module:
    """Create the network on the CPU in FP32, for one image (1, 3, 312, 312); it returns boxes, logits and masks.

    Args:
        weights: a checkpoint of RF-DETR-Seg-Nano. None for random weights, with a warning in the log: their detections are
            meaningless, so they only serve to measure speed and to compare results.
        seed: of the random weights; the state of torch's own generator is restored.

    Raises:
        EngineError: the file is missing, or is not a checkpoint of RF-DETR-Seg-Nano.
        MissingDependencyError: the package is not installed.
    """
    if weights is not None and not Path(weights).is_file():
        raise EngineError(f"{os.fspath(weights)}: there is no such file")
    try:
        package = importlib.import_module("rfdetr")
    except ImportError as error:
        raise MissingDependencyError(f"RF-DETR needs the package rfdetr ({error}); pip install rfdetr") from error
    if weights is None:
        log.warning("RF-DETR has RANDOM WEIGHTS: its detections are meaningless; pass a checkpoint of RF-DETR-Seg-Nano")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of the package's dependencies
        torch.manual_seed(seed)
        try:
            model: Any = package.RFDETRSegNano(
                pretrain_weights=None if weights is None else os.fspath(weights), device="cpu"
            )
        except Exception as error:
            if weights is None:
                raise
            raise EngineError(f"{os.fspath(weights)}: not a checkpoint of RF-DETR-Seg-Nano: {error}") from error
        module: torch.nn.Module = model.model.model
        module.eval()
        prepare: Any = module.export
        prepare()  # changes the module, in place, to the form that exporters need
    return module.requires_grad_(requires_grad=False)


def exported(module: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """Export the network to a program for one device and dtype, for `load`. Moves the module there; takes some seconds."""
    module = module.to(device, dtype)
    example = torch.zeros(1, 3, SIZE, SIZE, device=device, dtype=dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), strict=False)
