"""What a function may be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Parameters", "arrange"]


@dataclass(frozen=True)
class Parameters:
    """What a function may be called with; the default is one that will not say.

    Attributes:
        names: of its parameters, in order.
        positional: those of them that inputs by position stand for.
        required: those that must be given.
        any_position: whether it takes more by position; those are called input_0 and so on.
        any_name: whether it takes others by name.
    """

    names: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    any_position: bool = True
    any_name: bool = False

    @classmethod
    def of(cls, function: Callable[..., object]) -> Parameters:
        """Ask the function."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return cls()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return cls(
            tuple(p.name for p in plain),
            # Where a position means nothing else, it may stand for a keyword-only parameter too.
            tuple(p.name for p in plain if not (variadic and p.kind is p.KEYWORD_ONLY)),
            tuple(p.name for p in plain if p.default is p.empty),
            variadic,
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )


def arrange(function: Callable[..., object], names: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Which of the inputs of these names `function` takes by position, in its order, and which by name."""
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
