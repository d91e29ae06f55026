"""Memory of another process: it is seen and written, its size is not believed, and it is closed with the last view."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from aiotrt.devices.cuda_ipc import IpcMemory
from aiotrt.errors import InputError

pytestmark = pytest.mark.gpu
SIZE = 1 << 20
#: Allocates memory of sevens, prints its handle, and says at the end what its first byte is then.
OTHER = """
import sys
from cuda.bindings import runtime
from tests.gpu.test_cuda_ipc import SIZE

def done(answer):
    status, *values = answer
    assert int(status) == 0, status
    return values[0] if values else None

address = done(runtime.cudaMalloc(SIZE))
done(runtime.cudaMemset(address, 7, SIZE))
done(runtime.cudaDeviceSynchronize())
print(bytes(done(runtime.cudaIpcGetMemHandle(address)).reserved).hex(), flush=True)
sys.stdin.readline()
first = bytearray(1)
done(runtime.cudaMemcpy(first, address, 1, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost))
print(first[0], flush=True)
"""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def test_memory_of_another_process(other: subprocess.Popen[str]) -> None:
    assert other.stdout is not None
    handle = bytes.fromhex(other.stdout.readline())
    with pytest.raises(InputError, match="bytes, and not"):
        IpcMemory(handle, 0, 1 << 40)
    memory = IpcMemory(handle, 0, SIZE)
    view = torch.as_tensor(memory, device=memory.device)
    assert (view.dtype, view.shape, view.device) == (torch.uint8, (SIZE,), memory.device)
    del memory
    assert bool((view == 7).all()), "a view keeps it open"
    part = view[8 : 8 + 4 * 6].view(torch.float32)
    part.copy_(torch.arange(6.0))
    view[0] = 42
    torch.cuda.synchronize()
    assert part.tolist() == list(range(6))
    threads = threading.active_count()
    del view, part
    assert threading.active_count() >= threads  # one more, unless it has ended already, closes it
    answer, _ = other.communicate("\n", timeout=60)
    assert answer.strip() == "42"


def test_what_is_no_memory_of_another_process() -> None:
    with pytest.raises(InputError, match="no handle of device memory"):
        IpcMemory(bytes(range(64)), 0, SIZE)
    with pytest.raises(InputError, match="no GPU 99 here"):
        IpcMemory(bytes(64), 99, SIZE)
    assert torch.ones(3, device="cuda").sum().item() == 3, "the device is sound"
