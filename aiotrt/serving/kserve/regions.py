"""Shared memory: regions that clients register by name, for the tensors of requests and answers.

A region of system memory is read with `pread` and written with `pwrite`, and never mapped. A client can truncate its memory
at any time, which with a mapping would crash the server. It can also write to the memory while it is read, which with a
mapping would change a tensor after its check. The price is one copy, which is as fast as the copy out of a socket.
"""

from __future__ import annotations

import binascii
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import torch

from aiotrt.decoding.threads import COPIED, off_loop
from aiotrt.errors import InputError
from aiotrt.serving.errors import BodyError
from aiotrt.serving.kserve.binary import InferRequest, Input, Placed, bytes_of, from_bytes

__all__ = ["CudaRegion", "Kind", "Regions", "SystemRegion"]

Kind: TypeAlias = Literal["system", "cuda"]

#: The folder of POSIX shared memory.
_FOLDER: Final = Path("/dev/shm")
#: The pattern of a key of shared memory: a single name, as for `shm_open`.
_KEY: Final = re.compile(r"/?[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
#: Bytes of a handle of CUDA memory.
_HANDLE: Final = 64
_MOST_REGIONS: Final = 1024
_LONGEST_NAME: Final = 1024


class Region(Protocol):
    """Registered memory. It stays open while a request uses it, even after it was unregistered."""

    kind: Kind
    size: int

    def read(self, offset: int, size: int) -> torch.Tensor:
        """Return a part of the region as UINT8. May block."""
        ...

    def write(self, offset: int, result: torch.Tensor) -> None:
        """Write a result's bytes. May block."""
        ...

    def described(self) -> dict[str, Any]:
        """Return the fields of the region's status."""
        ...


class SystemRegion:
    """Part of a POSIX shared memory object.

    Args:
        key: the object's name, as for ``shm_open``.
        offset: the offset of the region in the object, in bytes.
        size: the size of the region, in bytes.

    Raises:
        BodyError: the object does not exist, or is too small.
    """

    kind: Kind = "system"

    def __init__(self, key: str, offset: int, size: int) -> None:
        self._file = -1
        if not _KEY.fullmatch(key):
            raise BodyError("the key of shared memory must be a name of letters, digits, '_', '.' and '-' after one '/'")
        self._key, self._offset, self.size = key, offset, size
        try:
            self._file = os.open(_FOLDER / key.removeprefix("/"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self._file)
        except OSError as error:
            raise BodyError(f"Unable to open shared memory region: '{key}': {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode) or offset + size > found.st_size:
            raise BodyError(
                f"shared memory {key!r} has {found.st_size:,} bytes, and not {size:,} from its byte {offset:,} on"
            )

    def read(self, offset: int, size: int) -> torch.Tensor:
        """Return a copy of a part of the region.

        Raises:
            BodyError: the memory was truncated.
        """
        data: Any = np.empty(size, np.uint8)
        at = 0
        while at < size:
            count = os.preadv(self._file, [data[at:]], self._offset + offset + at)
            if not count:
                raise BodyError(f"shared memory {self._key!r} was cut short after it was registered")
            at += count
        return torch.from_numpy(data)

    def write(self, offset: int, result: torch.Tensor) -> None:
        """Write a result's bytes."""
        data = bytes_of(result.cpu())
        at = 0
        while at < len(data):
            at += os.pwrite(self._file, data[at:], self._offset + offset + at)

    def described(self) -> dict[str, Any]:
        """Return the fields of the region's status."""
        return {"key": self._key, "offset": self._offset, "byte_size": self.size}

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class CudaRegion:
    """Memory on a GPU that another process allocated.

    Args:
        handle: the handle from ``cudaIpcGetMemHandle``.
        index: the index of the GPU.
        size: the size of the region, in bytes.

    Raises:
        BodyError: the memory cannot be opened here.
    """

    kind: Kind = "cuda"

    def __init__(self, handle: bytes, index: int, size: int) -> None:
        if len(handle) != _HANDLE:
            raise BodyError(f"a handle of CUDA memory has {_HANDLE} bytes, got {len(handle)}")
        try:
            self._memory = _open_cuda(handle, index, size)
        except ImportError as error:
            raise BodyError("this server has no CUDA shared memory: cuda.bindings is not installed") from error
        except InputError as error:
            raise BodyError(str(error)) from error
        self._index, self.size = index, size

    def read(self, offset: int, size: int) -> torch.Tensor:
        """Return a view of a part of the region."""
        return self._view[offset : offset + size]

    def write(self, offset: int, result: torch.Tensor) -> None:
        """Write a result's bytes, and wait until the copy is complete."""
        data = result.contiguous().reshape(-1).view(torch.uint8)
        self._view[offset : offset + len(data)].copy_(data)
        if data.is_cuda:  # a copy from the host is complete when copy_ returns
            torch.cuda.current_stream(data.device).synchronize()

    @property
    def _view(self) -> torch.Tensor:
        view: torch.Tensor = torch.as_tensor(self._memory, device=self._memory.device)  # keeps the memory open
        return view

    def described(self) -> dict[str, Any]:
        """Return the fields of the region's status."""
        return {"device_id": self._index, "byte_size": self.size}


class Regions:
    """The regions of a server, by name. Call its methods on the loop's thread."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    async def register(self, kind: Kind, name: str, fields: Mapping[str, Any]) -> None:
        """Register a region from a client's description.

        Args:
            kind: the kind of memory.
            name: the region's name in requests.
            fields: the fields of the protocol; `raw_handle` as in JSON, or as bytes.

        Raises:
            BodyError: the description is wrong, the name is in use, or the memory cannot be opened.
        """
        size = _count(fields, "byte_size")
        if kind == "system":
            key, offset = fields.get("key"), _count(fields, "offset", 0)
            if not isinstance(key, str):
                raise BodyError("the key of shared memory must be a string")
            region: Region = await off_loop(lambda: SystemRegion(key, offset, size))
        else:
            handle, index = _handle(fields.get("raw_handle")), _count(fields, "device_id", 0)
            region = await off_loop(lambda: CudaRegion(handle, index, size))
        if name in self._regions:
            raise BodyError(f"shared memory region '{name[:80]}' already in manager")
        if len(self._regions) >= _MOST_REGIONS or not 0 < len(name) <= _LONGEST_NAME:
            raise BodyError(f"at most {_MOST_REGIONS:,} regions are taken, with names of 1 to {_LONGEST_NAME:,} characters")
        self._regions[name] = region

    def unregister(self, kind: Kind, name: str | None) -> None:
        """Unregister the region of this name, if there is one, or all of a kind. Requests that use it are not affected."""
        for found in [name] if name is not None else list(self._regions):
            if (region := self._regions.get(found)) is not None and region.kind == kind:
                del self._regions[found]

    def status(self, kind: Kind, name: str | None) -> list[dict[str, Any]]:
        """Return the status of all regions of a kind, or of the region of this name.

        Raises:
            KeyError: no region of this kind has this name.
        """
        found = {name: self._regions[name]} if name is not None else self._regions
        entries = [{"name": name, **region.described()} for name, region in found.items() if region.kind == kind]
        if name is not None and not entries:
            raise KeyError(name)
        return entries

    def find(self, placed: Placed) -> Region:
        """Return the region of a tensor.

        Raises:
            BodyError: no region has this name, or the tensor would exceed the region.
        """
        region = self._regions.get(placed.region)
        if region is None:
            raise BodyError(f"Unable to find shared memory region: '{placed.region[:80]}'")
        if placed.offset + placed.size > region.size:
            raise BodyError(
                f"shared memory region '{placed.region[:80]}' has {region.size:,} bytes, and not {placed.size:,} from its "
                f"byte {placed.offset:,} on"
            )
        return region

    async def filled(self, called: InferRequest, images: Mapping[str, object], *, on_gpu: bool) -> InferRequest:
        """Return the request with the inputs that it has in regions.

        Args:
            called: the request.
            images: the inputs whose strings are image files.
            on_gpu: whether inputs on a GPU may stay there.

        Raises:
            BodyError: a region does not exist, is too small or was truncated.
        """

        def one(given: Input, placed: Placed, region: Region) -> Input:
            data = region.read(placed.offset, placed.size)
            return from_bytes(given, placed, data if on_gpu else data.cpu(), images)

        inputs = []
        for given in called.inputs:
            placed = given.placed
            if placed is not None:
                region = self.find(placed)
                size = None if region.kind == "cuda" else placed.size  # reading a GPU's memory may block
                inputs.append(await off_loop(partial(one, given, placed, region), size, COPIED))
            else:
                inputs.append(given)
        return replace(called, inputs=tuple(inputs))

    async def put(self, called: InferRequest, results: Mapping[str, Any], found: Mapping[str, Region]) -> set[str]:
        """Write the outputs that the request places in regions.

        Args:
            called: the request.
            results: the model's results, by name.
            found: the regions that `find` returned before the model ran, by output.

        Returns:
            The names of these outputs.

        Raises:
            BodyError: an output is larger than the place that its client reserved; other outputs may be written by then.
        """
        written = set()
        for one in called.outputs:
            if one.placed is None:
                continue
            result, placed, region = results[one.name], one.placed, found[one.name]
            size = result.nbytes
            if size > placed.size:
                raise BodyError(
                    f"shared memory size specified with the request for output '{one.name}' ({placed.size} bytes) should "
                    f"be at least {size} bytes to hold the results"
                )
            write = partial(region.write, placed.offset, result)
            await off_loop(write, None if region.kind == "cuda" else size, COPIED)
            written.add(one.name)
        return written


def _open_cuda(handle: bytes, index: int, size: int) -> Any:
    from aiotrt.devices.cuda_ipc import IpcMemory

    return IpcMemory(handle, index, size)


def _count(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise BodyError(f"the {name} of shared memory must be an integer of at least 0")
    return value


def _handle(raw: object) -> bytes:
    if isinstance(raw, bytes):
        return raw
    text = raw.get("b64") if isinstance(raw, dict) else None
    try:
        return binascii.a2b_base64(text, strict_mode=True) if isinstance(text, str) else b""
    except ValueError as error:
        raise BodyError(f"the raw_handle of CUDA memory is not base64: {error}") from error
