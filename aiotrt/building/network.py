"""The TensorRT calls of a build. Every return value is checked: most calls report an error by returning False or None."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from aiotrt.building.files import Write, replacing
from aiotrt.building.log import Log, log_of
from aiotrt.building.products import Product
from aiotrt.building.profiles import Dynamic, Profile, check_profiles
from aiotrt.errors import EngineError, InputError

if TYPE_CHECKING:
    import onnx

__all__ = ["Plan", "Recipe", "build_plan", "check_targets"]

_log: Final = logging.getLogger("aiotrt.tensorrt")
#: How many of the log's lines an error shows.
_SHOWN: Final = 10
_DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The options of a build, checked and normalised.

    Attributes:
        precision: None for the types in the file, or ``"fp32"``, ``"fp16"``, ``"bf16"``.
        profiles: from `normal_profiles`.
        targets: names of TensorRT-RTX's compute capabilities, such as ``"SM89"``; empty for its default.
        timing_cache: the file to read and to write, or None.
        workspace_bytes: the maximum scratch memory of one layer; None for TensorRT's default, all of the device's memory.
        optimization_level: 0 to 5; None for TensorRT's default, 3.
    """

    precision: str | None
    profiles: Sequence[Profile]
    targets: Sequence[str]
    timing_cache: Path | None
    workspace_bytes: int | None
    optimization_level: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A description of the engine that was built and written.

    Attributes:
        size: the engine's size in bytes.
        sha256: its SHA-256 in hexadecimal.
        inputs: ``name``, ``dtype`` and ``shape`` of each input.
        outputs: ``name``, ``dtype`` and ``shape`` of each output.
        layers: ``name`` and ``type`` of each layer of the network, before the builder fused layers.
        warnings: the builder's last warnings.
    """

    size: int
    sha256: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    layers: list[dict[str, str]]
    warnings: list[str]


def check_targets(product: Product, capabilities: Iterable[str]) -> list[str]:
    """Convert compute capabilities such as ``"sm89"``, ``"8.9"`` or ``"current"`` to the product's names for them.

    Raises:
        InputError: the product builds only for the GPU it runs on, or does not know a compute capability.
    """
    wanted = [capabilities] if isinstance(capabilities, str) else list(capabilities)
    if not wanted:
        return []
    if not product.offers_targets:
        raise InputError(
            f"compute_capabilities={wanted!r}: {product} builds for the GPU it runs on; leave it out, or use TensorRT-RTX"
        )
    offered = [name for name in product.module.ComputeCapability.__members__ if name != "NONE"]
    targets = []
    for entry in wanted:
        digits = re.sub(r"^sm_?|\.", "", str(entry).strip().lower())
        name = f"SM{digits}" if digits.isdigit() else digits.upper()
        if name not in offered:
            raise InputError(
                f"compute capability {entry!r}: {product} supports {', '.join(offered)}; without compute_capabilities= the "
                "engine runs on every supported GPU from Ampere on"
            )
        targets.append(name)
    return targets


def build_plan(
    product: Product, path: Path, model: onnx.ModelProto, recipe: Recipe, monitor: Any, device: int | None, write: Write
) -> Plan:
    """Parse, check, build, and write the engine. Blocks, with the interpreter lock released most of the time.

    Args:
        product: the TensorRT to use.
        path: the model's file: for messages, and for finding weights that are in files beside it.
        model: the model, repaired.
        recipe: the options.
        monitor: from `make_monitor`.
        device: the GPU to build on; None without a GPU.
        write: called with the engine.

    Raises:
        InputError: the profiles do not fit the network.
        EngineError: TensorRT failed or was cancelled; the message has its last warnings and errors.
    """
    if device is not None:
        import torch

        torch.cuda.set_device(device)  # TensorRT builds on the current device, which is per thread
    log = log_of(product.module)
    mark = log.mark()
    try:
        return _Build(product, path, log, mark).run(model, recipe, monitor, write)
    except EngineError as error:
        lines = "".join(f"\n  {line}" for line in log.since(mark)[-_SHOWN:])
        raise EngineError(f"{error}" + (f"\n{product}'s last messages:{lines}" if lines else "")) from error.__cause__


class _Build:
    """One build. Its attributes keep TensorRT's objects alive while other objects point to them."""

    def __init__(self, product: Product, path: Path, log: Log, mark: int) -> None:
        self._product = product
        self._path = path
        self._log = log
        self._mark = mark
        self._builder = self._made("a builder", product.module.Builder, log.logger)

    def run(self, model: onnx.ModelProto, recipe: Recipe, monitor: Any, write: Write) -> Plan:
        trt = self._product.module
        network = self._parse(model, recipe.precision)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        layers = [_layer(network.get_layer(i)) for i in range(network.num_layers)]
        check_profiles(str(self._path), [_dynamic(tensor) for tensor in inputs], recipe.profiles)

        config = self._made("a configuration", self._builder.create_builder_config)
        config.progress_monitor = monitor
        for profile in recipe.profiles:
            self._add_profile(config, profile, {tensor.name for tensor in inputs if tensor.is_shape_tensor})
        if recipe.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        elif recipe.precision is not None and self._product.weakly_typed:
            config.set_flag(getattr(trt.BuilderFlag, recipe.precision.upper()))
        if recipe.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
        if recipe.optimization_level is not None:
            config.builder_optimization_level = recipe.optimization_level
        if recipe.targets:
            config.num_compute_capabilities = len(recipe.targets)
            for i, target in enumerate(recipe.targets):
                if not config.set_compute_capability(trt.ComputeCapability.__members__[target], i):
                    self._fail(f"cannot build for {target}", "leave it out of compute_capabilities")
        timings = self._read_timings(config, recipe.timing_cache)

        engine = self._builder.build_serialized_network(network, config)
        if engine is None:
            self._fail("cannot build this model", "fix the reported problem, or try another precision or other profiles")
        if recipe.timing_cache is not None and timings is not None:
            with replacing(recipe.timing_cache) as write_timings:
                write_timings(memoryview(timings.serialize()))
        data = memoryview(engine)
        write(data)
        return Plan(
            size=data.nbytes,
            sha256=hashlib.sha256(data).hexdigest(),
            inputs=_records(inputs),
            outputs=_records(outputs),
            layers=layers,
            warnings=self._log.since(self._mark),
        )

    def _parse(self, model: onnx.ModelProto, precision: str | None) -> Any:
        trt = self._product.module
        flags = 0
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if strongly_typed is not None and not (self._product.weakly_typed and precision in ("fp16", "bf16")):
            flags = 1 << int(strongly_typed)
        network = self._made("a network", self._builder.create_network, flags)
        self._parser = self._made("a parser", trt.OnnxParser, network, self._log.logger)
        if not self._parser.parse(model.SerializeToString(), str(self._path)):  # the path: weights may be in files beside it
            reasons = [_describe(self._parser.get_error(i)) for i in range(self._parser.num_errors)]
            cause = "; ".join(reasons[:5]) or "no reason given"
            self._fail(
                f"cannot parse this model: {cause}",
                "export it without that operator (another opset, plain ONNX operators), or with a newer TensorRT",
            )
        if not network.num_outputs:
            self._fail("found no outputs in this model", "export it again")
        return network

    def _add_profile(self, config: Any, profile: Profile, values: set[str]) -> None:
        made = self._made("a profile", self._builder.create_optimization_profile)
        for name, (low, usual, high) in profile.items():
            try:
                if name in values:
                    made.set_shape_input(name, low, usual, high)
                else:
                    made.set_shape(name, low, usual, high)
            except (ValueError, RuntimeError) as error:
                self._fail(f"rejects the profile of input {name!r}: {error}", "correct the profile")
        if not made or config.add_optimization_profile(made) < 0:
            self._fail(f"rejects the profile {profile}", "correct the profile")

    def _read_timings(self, config: Any, path: Path | None) -> Any:
        if path is None:
            return None
        if self._product.offers_targets:
            _log.info(
                "%s compiles kernels when a model is loaded and records no timings; %s is not used", self._product, path
            )
            return None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise EngineError(f"{path}: the timing cache cannot be read: {error.strerror}; choose another file") from error
        for content in (data, b""):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return cache
            _log.warning("%s: the timing cache is damaged, or of another GPU or version; starting with an empty one", path)
        return None

    def _made(self, what: str, function: Any, *arguments: Any) -> Any:
        """Return the object that `function` creates. For a null pointer of TensorRT's the bindings raise or return None."""
        try:
            made = function(*arguments)
        except (TypeError, RuntimeError) as error:
            self._fail(f"cannot create {what}: {error}", "check that driver, CUDA and TensorRT are compatible")
        if made is None:
            self._fail(f"cannot create {what}", "check that driver, CUDA and TensorRT are compatible")
        return made

    def _fail(self, what: str, remedy: str) -> NoReturn:
        raise EngineError(f"{self._path}: {self._product} {what}; {remedy}")


def _describe(error: Any) -> str:
    """Format one of the parser's errors as one line."""
    name, operator = error.node_name(), error.node_operator()
    node = f"node {error.node()}" + (f" {name!r}" if name else "") + (f" ({operator})" if operator else "")
    reason = " ".join(error.desc().split())[:500]
    return f"{node}: {reason}" if error.node() >= 0 else reason


def _dynamic(tensor: Any) -> Dynamic:
    shape = tuple(tensor.shape)
    symbols = tuple(tensor.get_dimension_name(i) or None for i in range(len(shape)))
    return Dynamic(tensor.name, tuple(None if size < 0 else size for size in shape), symbols, tensor.is_shape_tensor)


def _layer(layer: Any) -> dict[str, str]:
    return {"name": layer.name, "type": layer.type.name.lower()}


def _records(tensors: Iterable[Any]) -> list[dict[str, Any]]:
    records = []
    for tensor in tensors:
        try:
            shape: list[int | None] | None = [None if size < 0 else size for size in tensor.shape]
        except ValueError:  # of unknown rank
            shape = None
        kind = tensor.dtype.name
        records.append({"name": tensor.name, "dtype": _DTYPES.get(kind, kind.lower()), "shape": shape})
    return records
