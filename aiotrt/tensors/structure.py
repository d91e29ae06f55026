"""Structures of tensors: what a module returns, and the entries of a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from aiotrt.errors import EngineError

__all__ = ["examples", "flatten"]


def flatten(source: str, value: object) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Take apart what a module or function returned.

    Args:
        source: who returned it, for messages.
        value: a tensor, a flat tuple, list, named tuple or mapping of tensors.

    Raises:
        EngineError: it is anything else; the message says where and what.
    """
    if isinstance(value, torch.Tensor):
        return ("output",), [_strided(source, "output", value)]
    if isinstance(value, Mapping):
        names: tuple[str, ...] = tuple(str(name) for name in value)
        items: list[object] = list(value.values())
    elif isinstance(value, (tuple, list)):
        items = list(value)
        names = getattr(value, "_fields", None) or tuple(f"output_{i}" for i in range(len(items)))
    else:
        got = "nothing (None)" if value is None else f"{type(value).__name__}"
        raise EngineError(f"{source} returned {got}; it must return a tensor, or a flat tuple or dict of tensors")
    if not items:
        raise EngineError(f"{source} returned an empty {type(value).__name__}; it must return at least one tensor")
    tensors = []
    for name, item in zip(names, items, strict=True):
        if not isinstance(item, torch.Tensor):
            raise EngineError(
                f"{source} returned {type(item).__name__} as {name!r}; every output must be a tensor "
                "(flatten nested results in postprocess=)"
            )
        tensors.append(_strided(source, name, item))
    return names, tensors


def _strided(source: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise EngineError(f"{source} returned {name!r} as a {tensor.layout} tensor; return a strided one")
    return tensor.detach()


def examples(warmup: object) -> Iterator[tuple[tuple[object, ...], dict[str, object]]]:
    """The entries of ``warmup=``, each as positional and named inputs.

    A list holds one entry per shape; an entry is one tensor or array, or a tuple or dict of them. Anything else than a
    list is one entry.
    """
    for entry in warmup if isinstance(warmup, list) else [warmup]:
        if isinstance(entry, Mapping):
            yield (), {str(name): value for name, value in entry.items()}
        elif isinstance(entry, tuple):
            yield entry, {}
        else:
            yield (entry,), {}
