"""Simulated memory: device memory and pinned memory, as CPU tensors that misbehave as the real ones do.

Rule 1: fresh memory holds garbage (`POISON`), never zeros, so that reading it too early shows.
Rule 2: pending work does not keep memory alive. When the last tensor over a block is dropped, the block is free, and the
next allocation that it fits gets it at once: in the order of the stream that it was allocated on, as torch's caching
allocator does, or for pinned memory at once.

A tensor that a program sees has a storage of its own over a block; the device itself reads and writes the block through
aliases, which own nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

__all__ = ["POISON", "Block", "Memory", "Span"]

#: What fresh memory is filled with: a NaN as float16, bfloat16 and float32, and a large negative integer.
POISON: Final = 0xFF
_ALIGNMENT: Final = 64


class Block:
    """One piece of memory.

    Attributes:
        number: tells it from others, in messages.
        pinned: host memory that the device may access.
        generation: how often it was allocated; an access through an older one is a use after free.
        stream: the identity of the stream on which it was allocated; None for pinned memory.
        is_free: whether nobody owns it.
    """

    __slots__ = ("_name", "base", "generation", "is_free", "memory", "number", "pinned", "stream")

    def __init__(self, number: int, nbytes: int, *, pinned: bool) -> None:
        self.number = number
        self.pinned = pinned
        self.generation = 0
        self.stream: int | None = None
        self.is_free = True
        self._name = f"{'pinned' if pinned else 'device'} block {number}"
        self.memory = np.full(nbytes, POISON, np.uint8)
        self.base = torch.from_numpy(self.memory)

    def poison(self) -> None:
        """Fill it with garbage."""
        self.memory.fill(POISON)

    def __repr__(self) -> str:
        return self._name


class Span(NamedTuple):
    """A range of bytes of one block, as it was when somebody got hold of it."""

    block: Block
    generation: int
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.block!r}[{self.begin}:{self.end}]"


class Memory:
    """All blocks of one device."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}  # by address
        self._free: dict[tuple[int | None, int], list[Block]] = {}
        self._dropped: deque[tuple[Block, int]] = deque()  # filled by finalizers, on any thread

    def allocate(
        self, size: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype, stream: int | None
    ) -> torch.Tensor:
        """A tensor over garbage; pinned memory if `stream` is None."""
        size = tuple(size)
        stride = _contiguous(size) if stride is None else tuple(stride)
        nbytes = _extent(size, stride) * dtype.itemsize
        nbytes = max(_ALIGNMENT, -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        free = self._free.get((stream, nbytes))
        if free:
            block = free.pop()
        else:
            block = Block(len(self._blocks), nbytes, pinned=stream is None)
            self._blocks[block.memory.ctypes.data] = block
        block.generation += 1
        block.stream = stream
        block.is_free = False
        # The storage keeps this array, and nothing else does: when the last view of the tensor goes, so does the array.
        owner = block.memory[:]
        weakref.finalize(owner, self._dropped.append, (block, block.generation)).atexit = False
        return torch.from_numpy(owner).view(dtype).as_strided(size, stride, 0)

    @property
    def is_any_dropped(self) -> bool:
        """Whether `dropped` has anything to tell."""
        return bool(self._dropped)

    def dropped(self) -> list[Block]:
        """The blocks whose owners went since the last call. They are in nobody's hands until `give_back`."""
        blocks = []
        while self._dropped:
            block, generation = self._dropped.popleft()
            if block.generation == generation:
                block.is_free = True
                blocks.append(block)
        return blocks

    def give_back(self, block: Block) -> None:
        """The next allocation may have it."""
        self._free.setdefault((block.stream, block.memory.nbytes), []).append(block)

    def block(self, tensor: torch.Tensor) -> Block | None:
        """The block that holds this tensor; None for memory from elsewhere."""
        return self._blocks.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory without owning it; memory from elsewhere is kept alive."""
        block = self.block(tensor)
        if block is None:
            return tensor.detach()
        return block.base.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def span(self, tensor: torch.Tensor) -> Span | None:
        """The bytes between the first and the last element of `tensor`; None for memory from elsewhere."""
        block = self.block(tensor)
        if block is None or tensor.numel() == 0:
            return None
        begin = int(tensor.storage_offset()) * tensor.element_size()
        end = begin + _extent(tensor.size(), tensor.stride()) * tensor.element_size()
        return Span(block, block.generation, begin, end)

    def array_span(self, array: np.ndarray[Any, Any]) -> Span | None:
        """As `span`, for a numpy view of pinned memory."""
        begin = array.__array_interface__["data"][0]
        end = begin + sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
        return self._around(begin, end)

    def copy_span(self, tensor: torch.Tensor) -> Span | None:
        """As `span`, for a tensor that may also be made from a numpy view of pinned memory."""
        span = self.span(tensor)
        if span is not None or tensor.numel() == 0:
            return span
        begin = tensor.data_ptr()
        return self._around(begin, begin + _extent(tensor.size(), tensor.stride()) * tensor.element_size())

    def _around(self, begin: int, end: int) -> Span | None:
        for address, block in self._blocks.items():
            if address <= begin and end <= address + block.memory.nbytes:
                return Span(block, block.generation, begin - address, end - address)
        return None


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for extent in reversed(size):
        stride.insert(0, step)
        step *= max(extent, 1)
    return tuple(stride)


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """From the first element to behind the last, in elements."""
    if 0 in size:
        return 0
    return 1 + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
