"""Real networks for TensorRT, for the GPU tests and the benchmark: where each comes from, and which shapes it is built for.

All of them compute in FP16 and have one input, ``x``. PP-OCR's two are FP32 outside; `aiotrt.build` converts them. The
others are torch networks with random weights, exported in FP16 as they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch

import aiotrt

__all__ = ["NETWORKS", "Array", "MissingError", "Network", "Shape"]

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]

BATCH: Final = 16  # the largest that the torch networks are exported and built for


class MissingError(Exception):
    """Something that a network is made from is not installed; the message says what."""


@dataclass(frozen=True)
class Network:
    """A network, and how it is built.

    Attributes:
        name: short.
        onnx: gives its ONNX file, written to a folder if it has to be made.
        dtype: of its input.
        precision: for `aiotrt.build`.
        profiles: its optimisation profiles, each the input's smallest, usual and largest shape; empty if nothing is dynamic.
        shapes: to run it with, of more than one profile where there are several; each takes seconds to compile for.
        usual: the shape to measure with.
    """

    name: str
    onnx: Callable[[Path], Path]
    dtype: type[np.floating[Any]]
    precision: str | None
    profiles: tuple[tuple[Shape, Shape, Shape], ...]
    shapes: tuple[Shape, ...]
    usual: Shape

    def build(self, folder: Path) -> Path:
        """Build its engine in `folder`.

        Raises:
            MissingError: what it is made from, or what exports or builds it, is not installed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporter, converter and the networks' packages warn of their own future
            try:
                return aiotrt.build(
                    self.onnx(folder),
                    folder / f"{self.name}.engine",
                    runtime="tensorrt_rtx",
                    precision=self.precision,
                    profiles=[{"x": profile} for profile in self.profiles],
                )
            except (ImportError, FileNotFoundError) as error:
                raise MissingError(f"{self.name}: {error}") from error

    def example(self, seed: int, shape: Shape | None = None) -> Array:
        """Random numbers as its input."""
        return np.random.default_rng(seed).standard_normal(shape or self.usual, np.float32).astype(self.dtype)


def _ocr(file: str) -> Callable[[Path], Path]:
    def find(_: Path) -> Path:
        """A file inside the rapidocr-onnxruntime package, whose code is never imported."""
        distribution = importlib.metadata.distribution("rapidocr-onnxruntime")
        path = Path(str(distribution.locate_file(f"rapidocr_onnxruntime/models/{file}")))
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        return path

    return find


def _resnet() -> torch.nn.Module:
    import torchvision

    network: torch.nn.Module = torchvision.models.resnet50(weights=None)
    return network


def _vit() -> torch.nn.Module:
    import timm

    network: torch.nn.Module = timm.create_model("vit_small_patch16_224", pretrained=False)
    return network


def _rfdetr() -> torch.nn.Module:
    # Imported by name: the type checker need not know it.
    network: Any = importlib.import_module("rfdetr").RFDETRSegNano(pretrain_weights=None).model.model
    network.eval().export()
    module: torch.nn.Module = network
    return module


def _torch(make: Callable[[], torch.nn.Module], example: Shape, *, dynamic: bool) -> Callable[[Path], Path]:
    def export(folder: Path) -> Path:
        path = folder / f"{make.__name__.strip('_')}.onnx"
        torch.manual_seed(0)
        batch = torch.export.Dim("batch", min=1, max=BATCH)
        torch.onnx.export(
            make().eval().half().cpu(),
            (torch.zeros(example, dtype=torch.float16),),
            path,
            input_names=["x"],
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes=({0: batch},) if dynamic else None,
        )
        return path

    return export


def _images(n: int) -> Shape:
    return n, 3, 224, 224


#: Few and many images at once: two profiles that do not touch.
_BATCHES: Final = ((_images(1), _images(1), _images(4)), (_images(5), _images(8), _images(BATCH)))

NETWORKS: Final = {
    network.name: network
    for network in (
        Network(
            "detector",
            _ocr("ch_PP-OCRv4_det_infer.onnx"),
            np.float32,
            "fp16",
            (
                ((1, 3, 32, 32), (1, 3, 320, 320), (1, 3, 640, 640)),
                ((2, 3, 32, 32), (4, 3, 320, 320), (8, 3, 320, 320)),
            ),
            ((1, 3, 320, 320), (1, 3, 192, 416), (4, 3, 160, 320)),
            (1, 3, 640, 640),
        ),
        Network(
            "recogniser",
            _ocr("ch_PP-OCRv4_rec_infer.onnx"),
            np.float32,
            "fp16",
            (((1, 3, 48, 32), (1, 3, 48, 320), (1, 3, 48, 640)), ((2, 3, 48, 32), (6, 3, 48, 320), (8, 3, 48, 320))),
            ((1, 3, 48, 320), (1, 3, 48, 200), (6, 3, 48, 160)),
            (6, 3, 48, 320),
        ),
        Network(
            "resnet50",
            _torch(_resnet, _images(2), dynamic=True),
            np.float16,
            None,
            _BATCHES,
            (_images(1), _images(3), _images(8)),
            _images(1),
        ),
        Network(
            "vit",
            _torch(_vit, _images(2), dynamic=True),
            np.float16,
            None,
            _BATCHES,
            (_images(1), _images(8)),
            _images(1),
        ),
        Network(
            "rfdetr",
            _torch(_rfdetr, (1, 3, 312, 312), dynamic=False),
            np.float16,
            None,
            (),
            ((1, 3, 312, 312),),
            (1, 3, 312, 312),
        ),
    )
}  # fmt: skip
