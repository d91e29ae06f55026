"""ONNX models on the host device, through ONNX Runtime."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from aiotrt._install import install_hint
from aiotrt.building.files import foreign, is_inside
from aiotrt.building.proto import external_locations, unranked
from aiotrt.devices.base import Device, Stream
from aiotrt.errors import EngineError, MissingDependencyError
from aiotrt.tensors import Parameters, Shapes, TensorSpec, numpy_view

__all__ = ["OnnxEngine"]

_DTYPES: Final = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8, "tensor(int16)": torch.int16, "tensor(int32)": torch.int32, "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8, "tensor(uint16)": torch.uint16, "tensor(uint32)": torch.uint32,
    "tensor(uint64)": torch.uint64, "tensor(bool)": torch.bool, "tensor(bfloat16)": torch.bfloat16,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn, "tensor(float8e4m3fnuz)": torch.float8_e4m3fnuz,
    "tensor(float8e5m2)": torch.float8_e5m2, "tensor(float8e5m2fnuz)": torch.float8_e5m2fnuz,
}  # fmt: skip
#: The dtypes that numpy lacks, with their numbers in ONNX's `TensorProto.DataType`.
_WITHOUT_NUMPY: Final = {
    torch.bfloat16: 16, torch.float8_e4m3fn: 17, torch.float8_e4m3fnuz: 18, torch.float8_e5m2: 19, torch.float8_e5m2fnuz: 20,
}  # fmt: skip


class OnnxEngine:
    """One ONNX Runtime session, shared by all slots: `run` is thread-safe and releases the interpreter lock.

    Args:
        path: the ``.onnx`` file.
        threads: how many threads one run may use; this bounds the session's thread pool.

    Attributes:
        runtime: the package that runs it, with its version.
        outputs: the declared outputs.

    Raises:
        EngineError: the file is empty, truncated, not an ONNX model, or has inputs or outputs that are not tensors.
        MissingDependencyError: ONNX Runtime is not installed.
    """

    parameters = Parameters()
    uncapturable: str | None = None

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                f"{path.name}: running an ONNX file on the host device needs onnxruntime; {install_hint('onnx')}"
            ) from error
        self.name = path.name
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # By default idle pool threads spin for a while after each run, and compete with the event loop for the CPU.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = _session(path, options)
        except Exception as error:  # for a bad file the binding raises many unrelated classes
            with path.open("rb") as file:
                kind = foreign(file.read(64))
            raise EngineError(
                f"{path}: ONNX Runtime cannot load this file ({path.stat().st_size:,} bytes){kind}: {error}; "
                "copy it again, with any files of its weights, or export it again"
            ) from error
        try:
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            # ONNX Runtime reports an empty shape both for a scalar and for a tensor of any rank.
            any_rank = set() if all(node.shape for node in (*inputs, *outputs)) else unranked(path)
            self.inputs: tuple[TensorSpec, ...] | None = tuple(_spec(path, node, any_rank) for node in inputs)
            self.outputs = tuple(_spec(path, node, any_rank) for node in outputs)
        except UnicodeDecodeError as error:
            raise EngineError(f"{path}: the name of an input or output is not UTF-8 ({error}); export it again") from error
        except ValueError as error:
            raise EngineError(f"{path}: its inputs and outputs cannot be read: {error}; export it again") from error

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> OnnxExecution:
        outputs = {spec.name: spec.dtype for spec in self.outputs}
        if _WITHOUT_NUMPY.keys().isdisjoint({*outputs.values(), *(spec.dtype for spec in self.inputs or ())}):
            return OnnxExecution(self.name, self._session, names, list(outputs))
        return _ValueExecution(self.name, self._session, names, outputs)

    def close(self) -> None:
        self._session = None


class OnnxExecution:
    """An execution that uses the shared session; ONNX Runtime's arena owns the memory."""

    nbytes = 0

    def __init__(self, name: str, session: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._name = name
        self._session = session
        self._inputs = tuple(inputs)
        self._outputs = list(outputs)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        feed = {name: numpy_view(tensor) for name, tensor in zip(self._inputs, inputs, strict=True)}
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {error}") from error
        # ONNX Runtime's uint64 is numpy's "unsigned long long", which torch rejects: view it as the usual dtype.
        arrays = [result.view(result.dtype.str) for result in results]
        return {name: torch.from_numpy(array) for name, array in zip(self._outputs, arrays, strict=True)}

    def close(self) -> None:
        self._session = None


class _ValueExecution(OnnxExecution):
    """An execution with inputs or outputs of dtypes that numpy lacks; it passes `OrtValue` objects and not arrays."""

    def __init__(self, name: str, session: Any, inputs: Sequence[str], outputs: Mapping[str, torch.dtype]) -> None:
        from onnxruntime import OrtValue

        super().__init__(name, session, inputs, list(outputs))
        self._dtypes = outputs
        self._value: Any = OrtValue

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        feed = {}
        for name, tensor in zip(self._inputs, inputs, strict=True):
            array, number = numpy_view(tensor), _WITHOUT_NUMPY.get(tensor.dtype)
            if number is None:
                feed[name] = self._value.ortvalue_from_numpy(array)
            else:
                feed[name] = self._value.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.itemsize}"), number)
        try:
            results = self._session.run_with_ort_values(self._outputs, feed)
        except Exception as error:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {error}") from error
        return {name: _copied(value, self._dtypes[name]) for name, value in zip(self._outputs, results, strict=True)}


def _copied(value: Any, dtype: torch.dtype) -> torch.Tensor:
    # For these dtypes ONNX Runtime provides an address, a size and a shape, but no array.
    tensor = torch.empty(value.shape(), dtype=dtype)
    ctypes.memmove(tensor.data_ptr(), value.data_ptr(), value.tensor_size_in_bytes())
    return tensor


def _session(path: Path, options: Any) -> Any:
    from onnxruntime import InferenceSession

    try:
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:
        if not (linked := _linked_files(path)):
            raise
    # Download caches consist of links out of the folder. ONNX Runtime rejects them, but accepts the files' contents.
    with contextlib.ExitStack() as stack:
        contents = []
        for file in linked.values():
            opened = stack.enter_context(file.open("rb"))
            contents.append(stack.enter_context(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))
        options.add_external_initializers_from_files_in_memory(list(linked), contents, list(map(len, contents)))
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _linked_files(path: Path) -> dict[str, Path]:
    """Return the files of weights that are links out of the model's folder, by their names in the model."""
    try:
        locations = external_locations(path)
    except (OSError, ValueError):  # ONNX Runtime's own error, which the caller raises again, says more
        return {}
    files = {location: path.parent / location for location in locations if is_inside(location)}
    folder = path.parent.resolve()
    return {name: file for name, file in files.items() if file.is_file() and folder not in file.resolve().parents}


def _spec(path: Path, node: Any, any_rank: Collection[str]) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise EngineError(f"{path}: {node.name!r} has type {node.type}, which torch does not support")
    shape = None
    if node.shape or node.name not in any_rank:
        shape = tuple(size if isinstance(size, int) else None for size in node.shape or ())
    return TensorSpec(node.name, shape, dtype)
