"""A launch that a thread makes after it has copied the host inputs, while the event loop goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

from aiotrt.devices import Device, Event, Stream
from aiotrt.errors import DeviceError
from aiotrt.tensors.conversion import Array

__all__ = ["CopyJob", "Job"]


class Job(Protocol):
    """Host inputs to copy, and work to submit after them; used once."""

    def __call__(self) -> bool:
        """Return whether the work is complete. If this raises, `confirm` must be called."""
        ...

    def confirm(self) -> bool:
        """Return whether the work is complete; see `Device.query`.

        Raises:
            DeviceError: the device broke.
            Exception: what copying or submitting raised; whatever part was submitted is complete.
        """
        ...

    def start(self) -> None:
        """Submit the job to a thread. Later calls do nothing. Never raises: if there is no thread, the job runs here."""
        ...


class CopyJob:
    """A `Job` in plain Python, for a thread of the model's pool.

    Args:
        workers: the pool of threads.
        device: the model's device.
        stream: the slot's stream, to which `submit` submits the work.
        event: the event that `submit` records last.
        copies: pairs of destination and source.
        submit: submits the work; called after the copies.
        query: whether the event is complete, at the least cost.
    """

    __slots__ = (
        "_copies",
        "_device",
        "_error",
        "_event",
        "_is_started",
        "_is_submitted",
        "_query",
        "_stream",
        "_submit",
        "_workers",
    )

    def __init__(
        self,
        workers: Executor,
        device: Device,
        stream: Stream,
        event: Event,
        copies: Sequence[tuple[Array, Array]],
        submit: Callable[[], None],
        query: Callable[[], bool],
    ) -> None:
        self._workers = workers
        self._device = device
        self._stream = stream
        self._event = event
        self._copies = copies
        self._submit: Callable[[], None] | None = submit
        self._query = query
        self._error: BaseException | None = None
        self._is_started = self._is_submitted = False

    def __call__(self) -> bool:
        """See `Job`."""
        if not self._is_submitted or not self._query():
            return False
        if self._error is not None:
            raise self._error
        return True

    def confirm(self) -> bool:
        """See `Job`."""
        if isinstance(self._error, DeviceError):
            raise self._error
        if not self._is_submitted or not self._device.query(self._event):
            return False
        if self._error is not None:
            raise self._error
        return True

    def start(self) -> None:
        """See `Job`."""
        if self._is_started:
            return
        self._is_started = True
        try:
            self._workers.submit(self._run)
        except Exception:  # no thread can be started, or the pool was shut down
            self._run()

    def _run(self) -> None:
        submit, self._submit = self._submit, None
        assert submit is not None
        try:
            for destination, source in self._copies:
                destination[...] = source
            self._device.prepare_thread()
            self._error = self._submitted(submit)
        except BaseException as error:  # nothing was submitted: the event is complete, because its previous record is
            self._error = error
        finally:
            self._copies = ()
            self._is_submitted = True  # last: from here on the loop's thread may read the other attributes

    def _submitted(self, submit: Callable[[], None]) -> BaseException | None:
        try:
            submit()
        except DeviceError as error:
            return error
        except BaseException as error:
            try:  # part of the work may be on the stream: the slot is in use until that has ended
                self._stream.record(self._event)
            except BaseException as second:
                return DeviceError(f"a failed launch could not be followed up: {second}")
            return error
        return None
