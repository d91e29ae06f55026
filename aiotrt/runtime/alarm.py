"""`hang_timeout` for jobs of worker threads, which have no event that could be polled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiotrt.devices import Device
from aiotrt.errors import DeviceHangError

__all__ = ["Alarm"]

#: A timer that fires later than this share of its timeout shows that the loop stood still, and perhaps the whole process.
LATE_SHARE: Final = 0.1


class Alarm:
    """Reports a job of a worker thread that does not end within `timeout`.

    Args:
        loop: the loop that runs the timer.
        device: the device that the thread uses.
        timeout: in seconds; None for never.
        late: what did not happen in time, for the error.
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
        """Cancel the timer, because the job has ended."""
        if self._handle is not None:
            self._handle.cancel()

    def _set(self, timeout: float) -> None:
        self._captures = self._device.captures
        self._ends = self._loop.time() + timeout
        self._handle = self._loop.call_at(self._ends, self._ring, timeout)

    def _ring(self, timeout: float) -> None:
        # Captures run one at a time: while others end, this job may still be waiting to begin its own.
        if self._loop.time() - self._ends > LATE_SHARE * timeout or self._device.captures != self._captures:
            self._set(timeout)
        else:
            self._report(DeviceHangError(f"{self._late} within hang_timeout={timeout:g} s"))
