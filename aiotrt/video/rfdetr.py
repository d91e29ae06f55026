"""RF-DETR-Seg-Nano from the `rfdetr` package, in the form that a graph can hold.

The module itself makes tensors on the host in its forward pass, which no capture survives; its `torch.export` does not.
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

SIZE: Final = 312  # pixels, of the network's square input

log = logging.getLogger("aiotrt.video")


def network(weights: str | os.PathLike[str] | None = None, *, seed: int = 0) -> torch.nn.Module:
    """The network on the host in FP32, for one image (1, 3, 312, 312); gives boxes, logits and masks.

    Args:
        weights: a checkpoint of RF-DETR-Seg-Nano. None for random weights, of which a warning is logged: what they detect
            means nothing, and only speed and equality can be looked at.
        seed: of the random weights; torch's own generator is left as it was.

    Raises:
        EngineError: the file is missing, or is no such checkpoint.
        MissingDependencyError: the package is not installed.
    """
    if weights is not None and not Path(weights).is_file():
        raise EngineError(f"{os.fspath(weights)}: there is no such file")
    try:
        package = importlib.import_module("rfdetr")
    except ImportError as error:
        raise MissingDependencyError(f"RF-DETR needs the package rfdetr ({error}); pip install rfdetr") from error
    if weights is None:
        log.warning("RF-DETR has RANDOM WEIGHTS: what it detects means nothing; pass a checkpoint of RF-DETR-Seg-Nano")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, of its dependencies' future
        torch.manual_seed(seed)
        try:
            model: Any = package.RFDETRSegNano(
                pretrain_weights=None if weights is None else os.fspath(weights), device="cpu"
            )
        except Exception as error:
            if weights is None:
                raise
            raise EngineError(f"{os.fspath(weights)}: no weights of RF-DETR-Seg-Nano: {error}") from error
        module: torch.nn.Module = model.model.model
        module.eval()
        prepare: Any = module.export
        prepare()  # the form that exporters take; it changes the module
    return module.requires_grad_(requires_grad=False)


def exported(module: torch.nn.Module, device: str | torch.device, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """The network as a program for one device and dtype, for `load`. Moves the module there. Takes some seconds."""
    module = module.to(device, dtype)
    example = torch.zeros(1, 3, SIZE, SIZE, device=device, dtype=dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), strict=False)
