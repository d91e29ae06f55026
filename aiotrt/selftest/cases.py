"""Choose the shapes and the random inputs with which a model is verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from aiotrt.engines.tensorrt_execution import Profile
from aiotrt.errors import InputError
from aiotrt.tensors import Shapes, TensorSpec

__all__ = ["Case", "Range", "check_ranges", "combine", "find_cases", "random_inputs"]

Shape: TypeAlias = tuple[int, ...]
#: The smallest and the largest value of an input, inclusive.
Range: TypeAlias = tuple[float, float]

#: For integers of more than one byte, because flags, masks, indices and lengths all accept these two.
_USUAL_INTEGERS: Final = (0, 1)


@dataclass(frozen=True)
class Case:
    """One set of shapes.

    Attributes:
        label: its origin, such as "profile 0 smallest".
        specs: the model's inputs.
        shapes: of the inputs, in their order.
        limits: the smallest and largest values that the profile allows, by host (shape) input.
    """

    label: str
    specs: tuple[TensorSpec, ...]
    shapes: Shapes
    limits: Mapping[str, tuple[Shape, Shape]]

    @property
    def named(self) -> dict[str, Shape]:
        """The shapes by input name, as for `Model.lease` and `Model.warmup`."""
        return {spec.name: shape for spec, shape in zip(self.specs, self.shapes, strict=True)}

    def __str__(self) -> str:
        return f"{self.label}: " + ", ".join(f"{name} {shape}" for name, shape in self.named.items())


def find_cases(
    file: str, specs: tuple[TensorSpec, ...], profiles: Sequence[Profile], given: Mapping[str, Sequence[Shape]]
) -> tuple[list[Case], Case]:
    """Choose the shapes to verify at.

    Args:
        file: for messages.
        specs: the model's inputs.
        profiles: of the engine, if it has any.
        given: the shapes that the user requests, by input; see `combine`.

    Returns:
        All cases, and the one to measure with: the first requested shapes, or those for which the first profile is tuned.

    Raises:
        InputError: an input of that name does not exist, a shape does not fit, or a dynamic shape is not given.
    """
    found: dict[Shapes, list[str]] = {}
    usual: Shapes | None = None
    for label, named in _given(file, specs, given) if given else _declared(profiles):
        shapes = tuple(_shape(file, spec, named.get(spec.name)) for spec in specs)
        if profiles and not any(profile.allows(dict(zip(_names(specs), shapes, strict=True))) for profile in profiles):
            got = ", ".join(f"{spec.name} {shape}" for spec, shape in zip(specs, shapes, strict=True))
            listing = "; ".join(map(str, profiles))
            raise InputError(f"{file}: --shape: no optimisation profile allows {got}; there are {listing}")
        found.setdefault(shapes, []).append(label)
        if usual is None and label.endswith(("usual", "given", "fixed")):
            usual = shapes
    cases = []
    for shapes, labels in found.items():
        named = dict(zip(_names(specs), shapes, strict=True))
        chosen = next((profile for profile in profiles if profile.allows(named)), None)
        values = {} if chosen is None else chosen.values
        limits = {name: (limit.minimum, limit.maximum) for name, limit in values.items()}
        cases.append(Case(", ".join(labels), specs, shapes, limits))
    return cases, next(case for case in cases if case.shapes == usual)


def combine(given: Mapping[str, Sequence[Shape]]) -> list[dict[str, Shape]]:
    """Combine the requested shapes to sets: a shape that is given once is used in every set.

    Raises:
        InputError: two inputs have several shapes each, but not the same number.
    """
    count = max(map(len, given.values()), default=0)
    for name, shapes in given.items():
        if len(shapes) not in (1, count):
            raise InputError(
                f"--shape {name}=: given {len(shapes)} times; expected once, or {count} times like another input"
            )
    return [{name: shapes[i if len(shapes) > 1 else 0] for name, shapes in given.items()} for i in range(count)]


def check_ranges(file: str, specs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]) -> None:
    """Check the requested ranges of values.

    Raises:
        InputError: an input of that name does not exist, or its dtype cannot represent these values.
    """
    for name, (low, high) in ranges.items():
        spec = _find(file, "--range", specs, name)
        if spec.dtype.is_floating_point:
            info: torch.finfo | torch.iinfo = torch.finfo(spec.dtype)
        else:
            info = torch.iinfo(torch.uint8 if spec.dtype is torch.bool else spec.dtype)
        least, most = (0, 1) if spec.dtype is torch.bool else (info.min, info.max)
        if not least <= low <= high <= most:
            raise InputError(
                f"{file}: --range {name}={low:g}:{high:g}: expected a smallest and a largest value between {least:g} and "
                f"{most:g}, for {spec}"
            )


def random_inputs(case: Case, ranges: Mapping[str, Range], seed: int) -> tuple[torch.Tensor, ...]:
    """Create inputs for a case; they depend only on the seed, on every machine.

    Floating-point inputs are normally distributed, bytes take all values, and wider integers are 0 or 1, which is valid as
    a flag, a mask, an index or a token. `ranges` overrides this, and so does the profile for host inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _random(spec, shape, ranges.get(spec.name), case.limits.get(spec.name), generator)
        for spec, shape in zip(case.specs, case.shapes, strict=True)
    )


def _random(
    spec: TensorSpec, shape: Shape, limits: Range | None, each: tuple[Shape, Shape] | None, generator: torch.Generator
) -> torch.Tensor:
    dtype = spec.dtype
    if each is not None and limits is None:
        values = [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in zip(*each, strict=True)]
        return torch.tensor(values).reshape(shape).to(dtype)
    if dtype.is_floating_point:
        wide = torch.float64 if dtype is torch.float64 else torch.float32  # torch has no random numbers of some dtypes
        if limits is None:
            return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
        low, high = limits
        return (torch.rand(shape, generator=generator, dtype=wide) * (high - low) + low).to(dtype)
    if limits is not None:
        first, last = int(limits[0]), int(limits[1])
    elif dtype in (torch.uint8, torch.int8):
        first, last = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    else:
        first, last = _USUAL_INTEGERS
    return torch.randint(first, last + 1, shape, generator=generator).to(dtype)


def _declared(profiles: Sequence[Profile]) -> list[tuple[str, Mapping[str, Shape]]]:
    """Return the sets of shapes that the engine's profiles declare."""
    declared: list[tuple[str, Mapping[str, Shape]]] = []
    for profile in profiles:
        if profile.extents:
            low = {name: shapes[0] for name, shapes in profile.extents.items()}
            high = {name: shapes[1] for name, shapes in profile.extents.items()}
            where = f"profile {profile.index}"
            declared += [(f"{where} smallest", low), (f"{where} usual", profile.usual), (f"{where} largest", high)]
    return declared or [("fixed", {})]


def _given(
    file: str, specs: tuple[TensorSpec, ...], given: Mapping[str, Sequence[Shape]]
) -> list[tuple[str, Mapping[str, Shape]]]:
    """Return the sets of shapes that the user requests."""
    for name in given:
        _find(file, "--shape", specs, name)
    return [("given", shapes) for shapes in combine(given)]


def _shape(file: str, spec: TensorSpec, shape: Shape | None) -> Shape:
    if shape is None:
        if spec.shape is not None and None not in spec.shape:
            return tuple(size or 0 for size in spec.shape)
        raise InputError(
            f"{file}: the shape of input {spec} is dynamic, and no profile declares one; "
            f"give one with --shape {spec.name}={_example(spec)}"
        )
    if not spec.fits(shape) or min(shape, default=1) < 1:
        limits = f", {spec.minimum} to {spec.maximum}" if spec.minimum is not None else ""
        written = "x".join(map(str, shape))
        raise InputError(f"{file}: --shape {spec.name}={written}: expected {spec}{limits}, got {shape}")
    return shape


def _example(spec: TensorSpec) -> str:
    if spec.shape is None:
        return "1x64"
    inner = 320 if len(spec.shape) == 4 else 64  # images, or sequences
    return "x".join(str(size or (1 if i == 0 else inner)) for i, size in enumerate(spec.shape))


def _find(file: str, option: str, specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    raise InputError(f"{file}: {option} {name}=: there is no input {name!r}; the inputs are {', '.join(map(str, specs))}")


def _names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]
