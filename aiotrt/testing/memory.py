"""Simulated memory: device memory and pinned memory, as CPU tensors that have the pitfalls of the real ones.

Rule 1: new memory holds garbage (`POISON`), never zeros, so that a read too early is visible.
Rule 2: pending work does not keep memory alive. When the last tensor over a block is deleted, the block is free, and the
next allocation of its size reuses it: device memory in the order of the stream that it was allocated on, as torch's caching
allocator does; pinned memory at once.

A tensor of the program owns a storage over a block. The device reads and writes the block through aliases, which own
nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

__all__ = ["POISON", "Block", "Memory", "Span"]

#: The byte that new memory is filled with: it reads as NaN in float16, bfloat16 and float32, and as -1 in signed integers.
POISON: Final = 0xFF
_ALIGNMENT: Final = 64


class Block:
    """One block of memory.

    Attributes:
        number: its number, for messages.
        pinned: whether it is host memory that the device may access; else it is device memory.
        generation: how often it was allocated; an access with an older generation is a use after free.
        stream: the handle of the stream on which it was allocated; None for pinned memory.
        is_free: whether it has no owner.
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
        """Fill the block with garbage."""
        self.memory.fill(POISON)

    def __repr__(self) -> str:
        return self._name


class Span(NamedTuple):
    """A range of bytes of one generation of a block."""

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
        """Allocate a tensor with garbage in it; in pinned memory if `stream` is None."""
        size = tuple(size)
        stride = _contiguous(size) if stride is None else tuple(stride)
        nbytes = _length(size, stride) * dtype.itemsize
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
        # Only the storage keeps this array alive: it is deleted with the last view of the tensor.
        owner = block.memory[:]
        weakref.finalize(owner, self._dropped.append, (block, block.generation)).atexit = False
        return torch.from_numpy(owner).view(dtype).as_strided(size, stride, 0)

    @property
    def is_any_dropped(self) -> bool:
        """Whether `dropped` would return any block."""
        return bool(self._dropped)

    def dropped(self) -> list[Block]:
        """Return the blocks whose owners were deleted since the last call. They are not reused before `give_back`."""
        blocks = []
        while self._dropped:
            block, generation = self._dropped.popleft()
            if block.generation == generation:
                block.is_free = True
                blocks.append(block)
        return blocks

    def give_back(self, block: Block) -> None:
        """Allow the next allocation to reuse a block."""
        self._free.setdefault((block.stream, block.memory.nbytes), []).append(block)

    def block(self, tensor: torch.Tensor) -> Block | None:
        """Return the block that holds this tensor; None for other memory."""
        return self._blocks.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor over the same memory that does not own it; other memory is kept alive."""
        block = self.block(tensor)
        if block is None:
            return tensor.detach()
        return block.base.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def span(self, tensor: torch.Tensor) -> Span | None:
        """Return the bytes from the first to the last element of `tensor`; None for other memory."""
        block = self.block(tensor)
        if block is None or tensor.numel() == 0:
            return None
        begin = int(tensor.storage_offset()) * tensor.element_size()
        end = begin + _length(tensor.size(), tensor.stride()) * tensor.element_size()
        return Span(block, block.generation, begin, end)

    def array_span(self, array: np.ndarray[Any, Any]) -> Span | None:
        """Return the span of a numpy view of pinned memory, as `span` does for a tensor."""
        begin = array.__array_interface__["data"][0]
        end = begin + sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
        return self._around(begin, end)

    def copy_span(self, tensor: torch.Tensor) -> Span | None:
        """Return the span of a tensor, as `span` does, also if it was created from a numpy view of pinned memory."""
        span = self.span(tensor)
        if span is not None or tensor.numel() == 0:
            return span
        begin = tensor.data_ptr()
        return self._around(begin, begin + _length(tensor.size(), tensor.stride()) * tensor.element_size())

    def _around(self, begin: int, end: int) -> Span | None:
        for address, block in self._blocks.items():
            if address <= begin and end <= address + block.memory.nbytes:
                return Span(block, block.generation, begin - address, end - address)
        return None


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for length in reversed(size):
        stride.insert(0, step)
        step *= max(length, 1)
    return tuple(stride)


def _length(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last, including gaps."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
