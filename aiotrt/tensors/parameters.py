"""The parameters of a function, and how inputs are matched to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Parameters", "arrange"]


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function. The default is for a function without an inspectable signature.

    Attributes:
        names: the names of its parameters, in order.
        positional: the parameters that may be passed by position.
        required: the parameters without a default.
        any_position: whether it takes further inputs by position; these are named by it: ``input_0`` and so on.
        any_name: whether it takes other names as well.
    """

    names: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    any_position: bool = True
    any_name: bool = False

    @classmethod
    def of(cls, function: Callable[..., object]) -> Parameters:
        """Inspect a function."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return cls()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return cls(
            tuple(p.name for p in plain),
            # Without *args, keyword-only parameters may be passed by position too.
            tuple(p.name for p in plain if not (variadic and p.kind is p.KEYWORD_ONLY)),
            tuple(p.name for p in plain if p.default is p.empty),
            variadic,
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )


def arrange(function: Callable[..., object], names: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Return the indices of the inputs that `function` takes by position, in its order, and of those it takes by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return list(range(len(names))), {}
    named = {name: i for i, name in enumerate(names)}
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    ordered = (inspect.Parameter.POSITIONAL_ONLY, *[inspect.Parameter.POSITIONAL_OR_KEYWORD] * variadic)
    positions = [named.pop(p.name) for p in parameters if p.kind in ordered and p.name in named]
    if variadic:
        positions += [named.pop(name) for i, name in enumerate(names) if name == f"input_{i}" and name in named]
    return positions, named
