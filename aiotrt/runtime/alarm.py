"""`hang_timeout` for what a worker thread does: no event can be polled there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiotrt.devices import Device
from aiotrt.errors import DeviceHangError

__all__ = ["Alarm"]

#: A timer that fires later than this, in shares of its timeout, says that the loop stood still, and maybe the process.
LATE_SHARE: Final = 0.1


class Alarm:
    """Reports a worker thread that does not come back within `timeout`.

    Args:
        loop: whose timer it is.
        device: what the thread works on.
        timeout: in seconds; None for never.
        late: what did not happen in time.
        report: called with the error, on the loop's thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        device: Device,
        timeout: float | None,
        late: str,
        report: Callable[[DeviceHangError], object],
    ) -> None:
        self._loop = loop
        self._device = device
        self._late = late
        self._report = report
        self._handle: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._set(timeout)

    def cancel(self) -> None:
        """The thread came back."""
        if self._handle is not None:
            self._handle.cancel()

    def _set(self, timeout: float) -> None:
        self._captures = self._device.captures
        self._ends = self._loop.time() + timeout
        self._handle = self._loop.call_at(self._ends, self._ring, timeout)

    def _ring(self, timeout: float) -> None:
        # One capture at a time: while others end, this one may be waiting for its turn.
        if self._loop.time() - self._ends > LATE_SHARE * timeout or self._device.captures != self._captures:
            self._set(timeout)
        else:
            self._report(DeviceHangError(f"{self._late} within hang_timeout={timeout:g} s"))
