"""torch operations on a simulated device: each is split into its immediate part and the work that the device does later.

Rule 1: the operation's schema decides, never its name: what it writes, whether it is a view, whether its result depends
on data. So every torch operation works, and its reads and writes are known exactly.
Rule 2: nothing is computed at submission. Result shapes come from torch's meta device; the memory holds garbage until the
device executes the work.

An operation belongs to the device if one of its tensors is in device memory, or if it is called inside `Stream.run`,
`Device.call` or a capture. A view is created at once. An operation whose result the host must see (``.item()``, a mask as
an index) blocks until the stream is idle, and cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from aiotrt.testing.memory import Memory, Span

__all__ = ["Interceptor", "Target", "Work"]

#: In-place operations that do not read what they overwrite.
_WRITE_ONLY: Final = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"})


class Work(NamedTuple):
    """An operation that the device executes later.

    Attributes:
        what: its name, for messages.
        run: executes it, on aliases that own no memory.
        reads: the bytes that it reads.
        writes: the bytes that it writes.
    """

    what: str
    run: Callable[[], object]
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]


class Target(Protocol):
    """The interface of the device that the interceptor uses."""

    memory: Memory

    def is_mine(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an operation on these tensors belongs to the device."""
        ...

    def is_a_peers(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an operation on these tensors belongs to another device of the machine, which intercepts it too."""
        ...

    def new(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate device memory in the current stream's order, with the size, strides and dtype of `like`."""
        ...

    def submit(self, work: Work) -> None:
        """Submit work to the current stream, or add it to the graph that is being captured."""
        ...

    def drain(self, what: str) -> None:
        """Block until the current stream is idle, because the host must see the result of `what`."""
        ...

    def touched(self, what: str, reads: Sequence[Span], writes: Sequence[Span]) -> None:
        """Record an access of the host to pinned memory."""
        ...


class Interceptor(TorchDispatchMode):
    """Intercepts every torch operation of a thread while it is active there.

    Args:
        target: the device.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._target = target

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = self._target
        if func.is_view:
            result = func(*args, **kwargs)
            if _share_memory(result, args[0]):
                return result
        call = _Call(func, args, kwargs)
        if not target.is_mine(call.tensors):
            spans = call.spans(target.memory)
            if any(spans) and not target.is_a_peers(call.tensors):
                target.touched(call.what, *spans)
            return func(*args, **kwargs)
        if call.needs_host():
            target.drain(call.what)
            target.touched(call.what, *call.spans(target.memory))
            return tree_map(lambda t: _settled(target, t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))
        return call.submit(target)


class _Call:
    """One operation with its arguments."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.tensors: list[torch.Tensor] = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.name: str = func._schema.name.removeprefix("aten::")
        self.what = f"torch.{self.name}"

    def mutated(self) -> list[torch.Tensor]:
        """Return the tensors that the operation writes in place."""
        found: list[torch.Tensor] = []
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                found += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        return found

    def needs_host(self) -> bool:
        tags = self.func.tags
        if torch.Tag.data_dependent_output in tags:
            return True
        if torch.Tag.dynamic_output_shape not in tags:
            return False
        if self.name != "index":
            return True
        return any(t.dtype in (torch.bool, torch.uint8) for t in self.tensors[1:])  # integers: the shape is known

    def spans(self, memory: Memory) -> tuple[list[Span], list[Span]]:
        """Return the bytes of the arguments that the operation reads, and those that it writes."""
        mutated = self.mutated()
        unread = {id(t) for t in mutated} if self.name in _WRITE_ONLY else set()
        reads = [s for t in self.tensors if id(t) not in unread and (s := memory.span(t)) is not None]
        return reads, [s for t in mutated if (s := memory.span(t)) is not None]

    def submit(self, target: Target) -> Any:
        func, memory = self.func, target.memory
        reads, writes = self.spans(memory)
        mutated = self.mutated()
        args, kwargs = tree_map(_alias(memory, snapshot=self.name == "copy_"), (self.args, self.kwargs))
        if mutated:
            target.submit(Work(self.what, lambda: func(*args, **kwargs), tuple(reads), tuple(writes)))
            returned = func._schema.returns
            if not returned:
                return None
            return mutated[0] if len(returned) == 1 else tuple(mutated)
        results = tree_map(
            lambda t: target.new(t) if isinstance(t, torch.Tensor) else t,
            func(*tree_map(_meta, self.args), **tree_map(_meta, {**self.kwargs, **self._meta_device()})),
        )
        fresh = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        aliases = [memory.alias(t) for t in fresh]
        writes = [s for t in fresh if (s := memory.span(t)) is not None]

        def compute() -> None:
            values = func(*args, **kwargs)
            if isinstance(values, torch.Tensor):
                aliases[0].copy_(values)
                return
            values = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
            for alias, value in zip(aliases, values, strict=True):
                alias.copy_(value)

        # torch.empty writes nothing: its result is garbage until another operation writes it.
        if not self.name.startswith(("empty", "new_empty")):
            target.submit(Work(self.what, compute, tuple(reads), tuple(writes)))
        return results

    def _meta_device(self) -> dict[str, object]:
        names = [argument.name for argument in self.func._schema.arguments]
        return {"device": "meta", "pin_memory": False} if "device" in names and "pin_memory" in names else {}


def _alias(memory: Memory, *, snapshot: bool) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if snapshot and memory.block(value) is None:
            return value.detach().clone()  # a copy from pageable memory reads it before the call returns
        return memory.alias(value)

    return convert


def _meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0 and value.untyped_storage().nbytes() <= 16 and not value.is_meta:
        return torch.empty((), dtype=value.dtype, device="meta")
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _settled(target: Target, result: torch.Tensor) -> torch.Tensor:
    """Return a result that was computed synchronously, in device memory."""
    tensor = target.new(result)
    span = target.memory.span(tensor)
    alias = target.memory.alias(tensor)
    target.submit(Work("a result", lambda: alias.copy_(result), (), () if span is None else (span,)))
    return tensor


def _share_memory(result: Any, viewed: torch.Tensor) -> bool:
    mine = viewed.untyped_storage().data_ptr()
    views = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
    return all(t.untyped_storage().data_ptr() == mine for t in views if isinstance(t, torch.Tensor))
