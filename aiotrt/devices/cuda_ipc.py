"""Device memory of another process, opened by a handle that it made."""

from __future__ import annotations

import contextlib
import threading

import torch
from cuda.bindings import driver, runtime

from aiotrt.errors import InputError

__all__ = ["IpcMemory"]


class IpcMemory:
    """Memory that another process allocated on a GPU of this machine. That process must not free it while it is open here.

    ``torch.as_tensor(memory, device=memory.device)`` is a view of the memory, a tensor of UINT8. The memory is closed when
    neither this object nor a view of it is left. Its own thread closes it, because that may block. Opening blocks too.

    Args:
        handle: the handle that ``cudaIpcGetMemHandle`` returned in that process.
        index: the index of the GPU in this process.
        size: how many bytes of the memory to use.

    Attributes:
        device: the memory's device.

    Raises:
        InputError: there is no such GPU or memory, or it is smaller than `size`.
    """

    def __init__(self, handle: bytes, index: int, size: int) -> None:
        self._address = 0
        if not torch.cuda.is_available() or not 0 <= index < torch.cuda.device_count():
            raise InputError(f"there is no GPU {index} here")
        self.device = torch.device("cuda", index)
        raw = runtime.cudaIpcMemHandle_t()
        raw.reserved = handle
        with torch.cuda.device(index):
            torch.cuda.current_stream().query()  # creates the context
            status, address = runtime.cudaIpcOpenMemHandle(raw, runtime.cudaIpcMemLazyEnablePeerAccess)
            if status != runtime.cudaError_t.cudaSuccess:
                runtime.cudaGetLastError()  # clear the error, which torch's next call would raise
                raise InputError(f"this is no handle of device memory that can be opened here: {status.name}")
            self._address = int(address)
            # The client's size is checked: reading past the end of the memory would break the device for all models.
            found, base, whole = driver.cuMemGetAddressRange(self._address)
        left = int(base) + int(whole) - self._address if found == driver.CUresult.CUDA_SUCCESS else 0
        if size > left:
            raise InputError(f"the device memory has {left:,} bytes, and not {size:,}")
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self._address, False), "version": 2}

    def __del__(self) -> None:
        if self._address:
            with contextlib.suppress(RuntimeError):  # no thread can be started at process exit, which closes the memory
                threading.Thread(target=_close, args=(self._address, self.device.index), daemon=True).start()


def _close(address: int, index: int) -> None:
    with torch.cuda.device(index):
        runtime.cudaIpcCloseMemHandle(address)
