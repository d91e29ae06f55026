"""A model as the protocol sees it: what is said of it, which requests fit it, and how one is run."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import torch
from prometheus_client import CollectorRegistry

from aiotrt.decoding.threads import COPIED, off_loop
from aiotrt.engines.tensorrt_plan import read_plan
from aiotrt.errors import EngineError, InputError
from aiotrt.model import Model
from aiotrt.serving.errors import BodyError
from aiotrt.serving.kserve.binary import InferRequest, Input, Result, raw, result_tensor
from aiotrt.serving.kserve.classes import classified
from aiotrt.serving.kserve.datatypes import of_torch
from aiotrt.serving.kserve.image_input import ImageInput, image_inputs
from aiotrt.serving.kserve.settings import ModelSettings, read_text
from aiotrt.tensors import TensorSpec

__all__ = ["VERSION", "Servable"]

#: There is one version of each model: what its file is.
VERSION: Final = "1"
_log: Final = logging.getLogger("aiotrt")
#: Of a model, that are remembered.
_MOST_SHAPES: Final = 1000
#: The protocol's names, by a file's suffix.
_PLATFORMS: Final = {".onnx": "onnx_onnxv1", ".pt2": "pytorch_pt2"}
_METADATA_PROPS: Final = 14  # field of ONNX's ModelProto


@dataclass
class Duration:
    """How often something was done, and for how many seconds altogether."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += seconds

    def described(self) -> dict[str, int]:
        """As the statistics extension has it."""
        return {"count": self.count, "ns": round(1e9 * self.seconds)}


class Servable:
    """One model, loaded or not.

    Args:
        settings: what the server was told of it.

    Attributes:
        outputs: what the loaded model gives; with batching, of one item.
        images: the inputs for which image files may be sent as strings, by name.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.name = settings.name
        self.outputs: Sequence[TensorSpec] = ()
        self.images: Mapping[str, ImageInput] = {}
        self._path = settings.path
        self._batching = settings.batching
        self._heeds_timeout = settings.heeds_timeout
        self._labels_path = settings.labels
        self._labels: Sequence[str] = ()
        self._takes_images = settings.takes_images
        self._decodes_on_device = settings.decodes_on_device
        self._done, self._read, self._ran, self._wrote, self._failed = (Duration() for _ in range(5))
        self._last = 0.0
        self._parameters: dict[str, str] = {}
        self._taken: set[tuple[tuple[int, ...], ...]] = set()  # shapes of inputs

    async def opened(self, model: Model) -> None:
        """Learn what the model is, which was loaded just now.

        Raises:
            InputError: it is to take images, and has no input for them; or its labels cannot be read.
        """
        # A client asks for outputs by name, and a single output comes bare, so its name is known from here alone.
        specs = model.outputs
        assert specs is not None  # engines that come from files all declare them
        is_item = self._batching.stack
        self.outputs = [
            replace(s, shape=s.shape and s.shape[1:], minimum=None, maximum=None) if is_item else s for s in specs
        ]
        self._taken = set()
        if self._takes_images:
            now = model.statistics()
            if self._decodes_on_device and now.devices:
                raise InputError(f"model {self.name!r}: decode_on_device = true is for models on one device")
            self.images = image_inputs(self.name, model.inputs or (), now.device if self._decodes_on_device else None)
        if (file := self._labels_path) is not None:
            self._labels = (await off_loop(lambda: read_text(file))).splitlines()
        try:
            self._parameters = await off_loop(lambda: _parameters(self._path))
        except (OSError, ValueError) as error:
            _log.warning("model %s: what its file says of itself cannot be read: %s", self.name, error)

    # What is said of it...

    def metadata(self, model: Model) -> dict[str, Any]:
        """Inputs and outputs. Dimensions whose size may differ from call to call are -1."""
        axis = [-1] if self._batching.stack else []
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": self._platform,
            "inputs": [_tensor(spec, axis) for spec in model.inputs or ()],
            "outputs": [_tensor(spec, axis) for spec in self.outputs],
        }

    def config(self, model: Model) -> dict[str, Any]:
        """Triton's model configuration, of which clients read the tensors and the size of batches."""
        now = model.statistics()
        is_host = now.device.startswith("host")
        config: dict[str, Any] = {
            "name": self.name,
            "platform": self._platform,
            "backend": "aiotrt",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self._batching.max_size if self._batching.stack else 0,
            "input": [
                {**_configured(spec), "format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": False}
                for spec in model.inputs or ()
            ],
            "output": [
                {**_configured(spec), "label_filename": self._labels_path.name if self._labels_path else ""}
                for spec in self.outputs
            ],
            "batch_input": [],
            "batch_output": [],
            "instance_group": [
                {"name": self.name, "kind": "KIND_CPU" if is_host else "KIND_GPU", "count": model.slots, "gpus": []}
            ],
            "default_model_filename": self._path.name,
            "parameters": {name: {"string_value": value} for name, value in self._parameters.items()},
            "model_warmup": [],
        }
        if self._batching.stack:
            delay = self._batching.max_delay
            config["dynamic_batching"] = {
                "preferred_batch_size": [],
                "max_queue_delay_microseconds": round(1e6 * delay),
                "preserve_ordering": False,
                "priority_levels": self._batching.priorities,
            }
        return config

    def statistics(self, model: Model | None, registry: CollectorRegistry) -> dict[str, Any]:
        """Counts and times since the server began; executions and items since the model was loaded."""

        def total(metric: str) -> float:
            return registry.get_sample_value(metric, {"model": self.name}) or 0.0

        # Of items, several of which may belong to one request, and wait beside each other.
        waited = total("aiotrt_queue_seconds_sum") / max(total("aiotrt_queue_seconds_count"), 1.0)
        queue = Duration(self._done.count, min(waited * self._done.count, self._ran.seconds))
        ran = Duration(self._done.count, self._ran.seconds - queue.seconds)
        now = None if model is None else model.statistics()
        items = 0 if now is None else now.completed
        nothing = Duration().described()
        return {
            "name": self.name,
            "version": VERSION,
            "last_inference": round(1e3 * self._last),
            "inference_count": items,
            "execution_count": sum(now.batches.values()) if now is not None and self._batching.stack else items,
            "inference_stats": {
                "success": self._done.described(),
                "fail": self._failed.described(),
                "queue": queue.described(),
                "compute_input": self._read.described(),
                "compute_infer": ran.described(),
                "compute_output": self._wrote.described(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }

    @contextmanager
    def counted(self) -> Iterator[Callable[[], None]]:
        """Count a request, and how it ends. Call the result when it was read, when it was run and when it was written."""
        began = time.perf_counter()
        moments = [began]
        try:
            yield lambda: moments.append(time.perf_counter())
        except BaseException:
            self._failed.add(time.perf_counter() - began)
            raise
        for duration, (start, end) in zip((self._read, self._ran, self._wrote), pairwise(moments), strict=True):
            duration.add(end - start)
        self._done.add(moments[-1] - began)
        self._last = time.time()

    @property
    def _platform(self) -> str:
        return _PLATFORMS.get(self._path.suffix.lower(), "tensorrt_plan")

    # Requests...

    def raw(self, model: Model, body: bytearray) -> InferRequest:
        """The request that a body without JSON is: the bytes of the only input, with a batch axis of 1 where there is one.

        Raises:
            BodyError: the model has several inputs, or one that these bytes are not.
        """
        specs = model.inputs or ()
        if len(specs) != 1:
            raise BodyError(f"a raw request is for a model of one input, and {self.name!r} has {len(specs)}")
        return raw(body, specs[0], has_axis=self._batching.stack, is_image=specs[0].name in self.images)

    async def decoded(self, called: InferRequest) -> InferRequest:
        """The request with pixels for image files.

        Raises:
            BodyError: a file is no image, or images that belong together differ in size.
            BodyTooLargeError: they have more pixels than one image may have.
        """
        inputs = []
        for one in called.inputs:
            if one.files:
                tensor = await self.images[one.name].decoded(one.files, has_axis=self._batching.stack)
                inputs.append(replace(one, tensor=tensor, files=()))
            else:
                inputs.append(one)
        return replace(called, inputs=tuple(inputs))

    async def run(self, model: Model, called: InferRequest, most: float) -> dict[str, Result]:
        """Outputs by name, within the client's deadline, and within `most` seconds; strings where classes were asked for.

        With batching the inputs may have a batch axis, and the outputs have one if they do: the items are queued one by one,
        and meet those of others in batches.

        Raises:
            BodyError: the inputs are not such as the model takes.
            AiotrtError: as a call of the model does.
        """
        outputs = self.outputs  # this model's: another may be loaded before the results are here
        tensors, rows = self._checked(model, called)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        deadlines = [called.deadline, called.timeout if self._heeds_timeout else None, most]
        deadline = min(seconds for seconds in deadlines if seconds is not None)
        options: dict[str, Any] = {"deadline": deadline, "priority": called.priority}
        try:
            if rows is None:
                results = await _call(model, tensors, options)
            else:
                results = await _call_rows(model, tensors, rows, options)
        except EngineError as error:
            # Inputs of other shapes than it ever took, for which it fails, are the client's mistake.
            if not self._taken or shapes in self._taken:
                raise
            _log.warning("model %s failed for inputs of shapes %s", self.name, shapes, exc_info=error)
            listing = ", ".join(f"{spec.name} {list(shape)}" for spec, shape in zip(model.inputs or (), shapes, strict=True))
            raise BodyError(f"the model fails for inputs of these shapes: {listing}; it took others") from error
        if shapes not in self._taken and len(self._taken) < _MOST_SHAPES:
            self._taken.add(shapes)
        found: dict[str, Any] = {output.name: result for output, result in zip(outputs, results, strict=True)}
        for name, classes in ((one.name, one.classes) for one in called.outputs if one.classes):
            classify = partial(classified, f"output {name!r}", found[name], classes, self._labels, has_axis=rows is not None)
            found[name] = await off_loop(classify, None if found[name].is_cuda else found[name].numel())
        return found

    def _checked(self, model: Model, called: InferRequest) -> tuple[list[torch.Tensor], int | None]:
        """The inputs in the model's order, since by name one called ``deadline`` would be the call's; and how many items."""
        classes = self._batching.priorities
        if called.priority is not None and called.priority >= classes:
            raise BodyError(f"the parameter priority must be at most {classes}, got {called.priority + 1}")
        given = {one.name: one for one in called.inputs}
        specs = model.inputs or ()
        if {spec.name for spec in specs} != set(given):
            listing = ", ".join(f"{spec.name} {_datatype(spec)}" for spec in specs)
            raise BodyError(f"the model's inputs are {listing}; the request has {', '.join(map(repr, given))}"[:2000])
        # With a batch axis all have one dimension more; an input that declares no rank leaves that to the others.
        ranks = [(given[s.name].tensor.dim(), len(s.shape)) for s in specs if s.shape is not None]
        has_axis = self._batching.stack and bool(ranks) and all(dims == rank + 1 for dims, rank in ranks)
        rows: set[int] = set()
        for spec in specs:
            one = given[spec.name]
            shape = one.tensor.shape[has_axis:]
            if one.datatype.torch is not spec.dtype or not spec.fits(shape):
                self._refuse(spec, one)
            if has_axis:
                rows.add(one.tensor.shape[0])
        if has_axis and (len(rows) > 1 or not 1 <= min(rows) <= self._batching.max_size):
            sizes = " and ".join(map(str, sorted(rows)))
            raise BodyError(f"the batch axis must have the same size, from 1 to {self._batching.max_size}, got {sizes}")
        return [given[spec.name].tensor for spec in specs], rows.pop() if has_axis else None

    def _refuse(self, spec: TensorSpec, given: Input) -> NoReturn:
        """Say in the protocol's words why an input is not as the model declares it."""
        if given.datatype.torch is not spec.dtype:
            raise BodyError(f"input {spec.name!r} must be {_datatype(spec)}, got {given.datatype.name}")
        wanted = f"{_dims(spec)}"
        if spec.minimum and spec.maximum:
            wanted += f", from {list(spec.minimum)} to {list(spec.maximum)}"
        if self._batching.stack:
            wanted += " with or without a batch axis before it"
        shape = list(given.tensor.shape)
        raise BodyError(f"input {spec.name!r} must have the shape {wanted}, where -1 is any size, got {shape}")


async def _call(model: Model, tensors: Sequence[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    results = await model(*tensors, **options)
    return [result_tensor(result) for result in (results if isinstance(results, tuple) else (results,))]


async def _call_rows(
    model: Model, tensors: Sequence[torch.Tensor], rows: int, options: dict[str, Any]
) -> list[torch.Tensor]:
    if rows == 1:
        return [result[None] for result in await _call(model, [tensor[0] for tensor in tensors], options)]
    calls = [asyncio.ensure_future(_call(model, [tensor[i] for tensor in tensors], options)) for i in range(rows)]
    try:
        found = await asyncio.gather(*calls)
    except BaseException:  # no caller is left for the other items' results
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        raise
    columns = list(zip(*found, strict=True))
    size = sum(one.numel() * one.element_size() for column in columns for one in column)
    if any(one.shape != column[0].shape for column in columns for one in column):
        raise BodyError("the items' outputs differ in shape, so that they have no batch axis: send items by themselves")
    return await off_loop(lambda: [torch.stack(column) for column in columns], size, COPIED)


def _dims(spec: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in spec.shape or ()]


def _datatype(spec: TensorSpec) -> str:
    datatype = of_torch(spec.dtype)
    return "UNKNOWN" if datatype is None else datatype.name


def _tensor(spec: TensorSpec, axis: list[int]) -> dict[str, Any]:
    return {"name": spec.name, "datatype": _datatype(spec), "shape": [*axis, *_dims(spec)]}


def _configured(spec: TensorSpec) -> dict[str, Any]:
    name = _datatype(spec)
    kind = "TYPE_INVALID" if name == "UNKNOWN" else f"TYPE_{name}"
    return {"name": spec.name, "data_type": kind, "dims": _dims(spec), "is_shape_tensor": False}


def _parameters(path: Path) -> dict[str, str]:
    """What the model's file says of itself: metadata of ONNX or Ultralytics, whose client reads them as one literal."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".onnx":
            found = dict(_onnx_metadata(file))
        else:
            head = file.read(1 << 20)
            found = json.loads(head[4 : read_plan(head).offset] or "{}")
    return {"metadata": repr(found)} if found else {}


def _onnx_metadata(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """The metadata of an ONNX model. Its graph, which may have gigabytes, is not read."""
    for number, size in _fields(file):
        if number == _METADATA_PROPS:
            entry = io.BytesIO(file.read(size))
            texts = {number: entry.read(size).decode() for number, size in _fields(entry)}
            yield texts.get(1, ""), texts.get(2, "")


def _fields(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Number and size of each field of a Protocol Buffers message that has a size; `file` stands at its content."""
    while tag := _varint(file):
        size = _varint(file)
        if tag & 7 == 2:
            end = file.tell() + size
            yield tag >> 3, size
            file.seek(end)
        elif tag & 7:  # not a number of variable length
            raise ValueError(f"unexpected wire type {tag & 7}")


def _varint(file: BinaryIO) -> int:
    """The next number; 0 at the end."""
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        if (shift := shift + 7) > 56:
            raise ValueError("a number of more than eight bytes")
    return 0
