"""Optimisation profiles: the shapes that an engine must accept, checked before TensorRT gets them.

TensorRT's own checks accept a wrong rank, and their messages name neither the input nor the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral  # numpy's integers too
from typing import NoReturn, TypeAlias

from aiotrt.errors import InputError

__all__ = [
    "Dynamic", "Examples", "OpenShapesError", "Profile", "ProfileArgument", "Range", "check_profiles", "normal_profiles",
    "profile_of",
]  # fmt: skip

Shape: TypeAlias = Sequence[int]
#: A profile as a caller writes it: for each input its smallest, usual and largest shape, or one shape that is all three.
ProfileArgument: TypeAlias = Mapping[str, "Sequence[Shape] | Shape"]
Range: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile: TypeAlias = dict[str, Range]


@dataclass(frozen=True, slots=True)
class Examples:
    """The shapes of the example inputs that a model is warmed up with.

    Attributes:
        shapes: for each example, the shapes of its inputs by position, and those of its inputs by name.
        batch: the largest batch, if the examples are single items of batches; else None.
    """

    shapes: tuple[tuple[tuple[tuple[int, ...], ...], Mapping[str, tuple[int, ...]]], ...]
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class Dynamic:
    """The properties of a network's input that profiles depend on.

    Attributes:
        name: the input's name.
        shape: the sizes of its dimensions; None for a dynamic size.
        symbols: the names of its dimensions; None for a dimension without a name. Equal names mean equal sizes.
        values: whether the network reads this input as a shape: a profile then gives the range of its *values*.
    """

    name: str
    shape: tuple[int | None, ...]
    symbols: tuple[str | None, ...]
    values: bool = False

    def __str__(self) -> str:
        sizes = (symbol or "*" if size is None else str(size) for size, symbol in zip(self.shape, self.symbols, strict=True))
        return f"{self.name!r} ({', '.join(sizes)})"

    @property
    def needs_profile(self) -> bool:
        """Whether the engine cannot be built without a profile for this input."""
        return self.values or None in self.shape


class OpenShapesError(InputError):
    """Raised when a model has dynamic inputs and no profile is given.

    Attributes:
        what: the message without the example: the file and the inputs.
        example: a profile to start from.
    """

    def __init__(self, what: str, example: Profile) -> None:
        text = ", ".join(f'"{name}": {shapes}' for name, shapes in example.items())
        super().__init__(f"{what}, for instance profiles=[{{{text}}}]")
        self.what = what
        self.example = example


def normal_profiles(profiles: Iterable[ProfileArgument] | ProfileArgument | None) -> list[Profile]:
    """Normalise profiles as a caller wrote them.

    Raises:
        InputError: a profile is not a mapping of names to shapes.
    """
    if profiles is None:
        return []
    if isinstance(profiles, Mapping):
        profiles = [profiles]
    entries: Iterable[object] = profiles  # callers without a type checker pass anything
    normal = []
    for number, profile in enumerate(entries):
        if not isinstance(profile, Mapping) or not profile:
            raise InputError(f"profile {number}: expected a dict of input names to shapes, got {profile!r}")
        normal.append({str(name): _range(number, name, shapes) for name, shapes in profile.items()})
    return normal


def profile_of(inputs: Sequence[Dynamic], examples: Examples) -> Profile | None:
    """Derive the profile that allows the examples and all shapes between them; its usual shapes are the first example's.

    Returns:
        None if no input is dynamic, or if the examples do not cover all dynamic inputs.
    """
    needed = [item for item in inputs if item.needs_profile]
    if not needed or not examples.shapes:
        return None
    profile: Profile = {}
    for item in needed:
        given: list[tuple[int, ...]] = []
        for by_position, by_name in examples.shapes:
            index = inputs.index(item)
            shape = by_position[index] if index < len(by_position) else by_name.get(item.name)
            if shape is None or len(shape) + (examples.batch is not None) != len(item.shape):
                return None
            given.append(shape)
        low, usual, high = tuple(map(min, *given, given[0])), given[0], tuple(map(max, *given, given[0]))
        if examples.batch is not None:
            least, most = (1, examples.batch) if item.shape[0] is None else (item.shape[0], item.shape[0])
            low, usual, high = (least, *low), (most, *usual), (most, *high)
        profile[item.name] = low, usual, high
    return profile


def check_profiles(model: str, inputs: Sequence[Dynamic], profiles: Sequence[Profile]) -> None:
    """Check that the profiles fit the inputs.

    Args:
        model: the model's file, for messages.
        inputs: all of the network's inputs.
        profiles: from `normal_profiles`; may be empty if no input is dynamic.

    Raises:
        InputError: a profile does not fit; the message names the first mismatch.
        OpenShapesError: a profile is needed and none is given; the message names every dynamic input and has an example.
    """
    known = {item.name: item for item in inputs}
    needed = [item for item in inputs if item.needs_profile]
    if needed and not profiles:
        _refuse_without_profile(model, needed)
    for number, profile in enumerate(profiles):
        where = f"{model}: profile {number}"
        for name, triple in profile.items():
            if name not in known:
                raise InputError(f"{where}: there is no input {name!r}; the inputs are {', '.join(map(repr, known))}")
            _check_range(where, known[name], triple)
        missing = [str(item) for item in needed if item.name not in profile]
        if missing:
            raise InputError(f"{where}: lacks the dynamic input{'s' * (len(missing) > 1)} {', '.join(missing)}")
        _check_symbols(where, [known[name] for name in profile if not known[name].values], profile)


def _range(number: int, name: object, shapes: object) -> Range:
    """Return the three shapes of an input's range; one shape stands for all three."""
    given = list(shapes) if isinstance(shapes, Sequence) and not isinstance(shapes, str) else None
    if given is not None and all(isinstance(size, Integral) for size in given):
        given = [given, given, given]
    if (
        given is None
        or len(given) != 3
        or not all(isinstance(shape, Sequence) and all(isinstance(size, Integral) for size in shape) for shape in given)
    ):
        raise InputError(
            f"profile {number}: input {name!r}: expected (smallest, usual, largest) shapes or one shape, got {shapes!r}"
        )
    low, usual, high = (tuple(int(size) for size in shape) for shape in given)
    return low, usual, high


def _check_range(where: str, item: Dynamic, triple: Range) -> None:
    where = f"{where}: input {item}"
    wanted = item.shape[0] if item.values and item.shape else len(item.shape)
    for label, shape in zip(("smallest", "usual", "largest"), triple, strict=True):
        if wanted is not None and len(shape) != wanted:
            raise InputError(f"{where}: has {wanted} dimensions, and the {label} shape has {len(shape)}: {shape}")
        if item.values:
            continue
        for size, got in zip(item.shape, shape, strict=True):
            if got < 1:
                raise InputError(f"{where}: the {label} shape has a dimension below 1: {shape}")
            if size is not None and size != got:
                raise InputError(f"{where}: the {label} shape is {shape}, which has {got} where the model has {size}")
    low, usual, high = triple
    if any(not a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
        raise InputError(f"{where}: smallest <= usual <= largest must hold for each dimension, got {low}, {usual}, {high}")


def _check_symbols(where: str, items: Sequence[Dynamic], profile: Profile) -> None:
    """Check that dimensions of one name have equal sizes. TensorRT requires that, but its message does not explain it."""
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for item in items:
        for i, symbol in enumerate(item.symbols):
            if symbol is None or item.shape[i] is not None:
                continue
            sizes = tuple(shape[i] for shape in profile[item.name])
            place = f"{item.name!r} dimension {i}"
            other, expected = seen.setdefault(symbol, (place, sizes))
            if sizes != expected:
                raise InputError(
                    f"{where}: {other} and {place} are both named {symbol!r} in the model, so their sizes must be equal, "
                    f"but the profile has {expected} and {sizes}; use equal sizes, or rename one dimension in the model"
                )


def _refuse_without_profile(model: str, needed: Sequence[Dynamic]) -> NoReturn:
    """Raise an error that names the dynamic inputs, with an example of a profile."""
    listing = ", ".join(map(str, needed))
    raise OpenShapesError(
        f"{model}: the shape of {listing} is dynamic: give the smallest, usual and largest shapes the engine must accept",
        {item.name: _example(item) for item in needed},
    )


def _example(item: Dynamic) -> Range:
    if item.values:
        count = (item.shape[0] if item.shape else 1) or 1
        return (1,) * count, (8,) * count, (16,) * count
    space = (32, 320, 640) if len(item.shape) == 4 else (1, 64, 256)  # images, or sequences
    choices = [(size,) * 3 if size is not None else (1, 1, 8) if i == 0 else space for i, size in enumerate(item.shape)]
    low, usual, high = (tuple(choice[i] for choice in choices) for i in range(3))
    return low, usual, high
