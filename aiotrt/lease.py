"""`Lease`: hold a slot, write into the graph's input buffers, replay, and read its output buffers. No copies.

Work is ordered on the device. A launch waits for the work that is on the caller's current stream, and that stream waits
for the launch. Leaving records consumer-done events, for which the slot's next launch waits, whichever caller makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiotrt.buffers import Buffer, Buffers
from aiotrt.devices import Event
from aiotrt.errors import AiotrtError, ModelClosedError, UsageError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.hold import Hold
from aiotrt.tensors import Kind, Shapes, Specs

__all__ = ["Lease"]


class Lease:
    """One slot, held from entering to leaving the block.

    Made by `Model.lease`. Entering waits for a free slot and, for new shapes, for its graph. Cancelling the entry gives up
    the place in the queue, and the lease can be entered later. Leaving is immediate: work that is still on the device goes
    on, and the slot becomes free after it.
    """

    def __init__(
        self,
        executor: Executor,
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        model: object,
        choose: Callable[[], Executor] | None = None,
    ) -> None:
        self._executor = executor
        self._choose = choose  # with several devices: called on entry to choose the device
        self._model = model  # keeps the model alive: a garbage-collected model releases its slots, this one included
        self._specs = specs
        self._shapes = shapes
        self._kind = kind
        self._is_entered = False  # set before the wait: a second entry meanwhile would be granted a slot too
        self._hold: Hold | None = None
        self._inputs: Buffers | None = None
        self._outputs: Buffers | None = None

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise UsageError("a lease can be entered once; ask the model for another one")
        if self._choose is not None:
            self._executor = self._choose()
        request = self._executor.lease(self._specs, self._shapes, self._kind)
        self._is_entered = True
        try:
            await request
        except BaseException:
            self._is_entered = False
            # The slot may have been granted in the same loop iteration as the cancellation: without this it would stay
            # claimed permanently, without an owner.
            self._executor.abandon(request)
            raise
        slot = request.slot
        if slot is None or request.is_revoked:  # the model was closed in the same loop iteration as the grant
            raise ModelClosedError(f"{self._executor.recipe.engine.name} was closed before this lease could be entered")
        program = slot.program
        assert program is not None
        hold = self._hold = Hold(self._executor, slot, request, program)
        self._inputs = Buffers("input", [Buffer(hold, i, s.name, is_input=True) for i, s in enumerate(self._specs)])
        self._outputs = Buffers(
            "output", [Buffer(hold, i, name, is_input=False) for i, name in enumerate(program.names.names)]
        )
        try:
            hold.open()
        except Exception as error:
            # Python does not call __aexit__ when __aenter__ raises: without this the slot would stay claimed permanently.
            self._is_entered = False
            self._hold = request.record_readers = None
            self._executor.abandon(request)
            raise self._executor.failed(error, "while a lease was entered") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hold is not None:
            self._hold.leave()

    @property
    def device(self) -> str:
        """The name of the slot's device. If the model is on several devices, it is chosen when the lease is entered."""
        return self._executor.device.name

    @property
    def inputs(self) -> Buffers:
        """The input buffers, to write to."""
        return self._entered(self._inputs)

    @property
    def outputs(self) -> Buffers:
        """The output buffers, to read from after a launch."""
        return self._entered(self._outputs)

    def launch(self) -> Event:
        """Replay the graph on the current contents of the inputs.

        Returns at once, with the produce event (a `torch.cuda.Event` on CUDA). Each launch has a new event, which is never
        recorded again. The caller's current stream waits for it on the device, so work that is submitted there later reads
        the outputs in order. An input that was not written since the last launch keeps its value. A model that runs
        without a graph is launched op by op on this thread: prefer `replay` then, which uses a worker thread.

        Raises:
            UsageError: the lease has ended, an input was never written, or a worker thread still submits a replay without
                a graph.
            ModelBrokenError, ModelClosedError: the model is broken or closed, and the lease has ended with it.
            EngineError: without a graph, the model raised.
            DeviceError: the device broke.
        """
        hold = self._held()
        hold.check_submitted()
        return hold.launch(True).event

    async def replay(self) -> Any:
        """Launch, and wait for the results.

        Returns:
            The outputs as views of the slot's buffers, in the structure that a call returns. They are valid until the next
            launch or the end of the lease. They are device tensors, or host tensors or arrays if the lease was taken with
            ``outputs="torch"`` or ``"numpy"``. numpy lacks bfloat16, float8 and complex32: such results are copied on the
            loop's thread, to arrays of float32 or complex64.

        Cancellation stops the waiting; the launch goes on, and the lease is still held. Raises as `launch` does. Without a
        graph it also raises UsageError while the last launch is not complete. After an EngineError the lease is usable.
        """
        hold = self._hold or self._held()
        replay = hold.replay()
        try:
            await replay
        except asyncio.CancelledError:
            with contextlib.suppress(AiotrtError):  # the next use of the lease raises it
                hold.order()  # the launch goes on
            raise
        return hold.awaited(replay)

    def consumed(self, stream: object = None) -> None:
        """Register a stream that reads this slot's buffers, so that the slot's next launch waits for it too.

        Args:
            stream: a stream of `Model.stream`, a `torch.cuda.Stream`, anything with ``__cuda_stream__``, or a handle;
                None for the current stream, which is always registered.

        The launch waits for the work that is submitted to the stream up to the next launch or the end of the lease.

        Raises:
            UsageError: the lease has ended, or this is not a stream of the model's device.
        """
        self._held().consumed(stream)

    def __repr__(self) -> str:
        if self._hold is None:
            return "<Lease not entered>"
        return f"<Lease of slot {self._hold.slot.index}, {self._hold.describe()}>"

    def __del__(self) -> None:
        hold = self._hold
        if hold is not None and hold.forget() and not sys.is_finalizing():
            message = f"a lease of slot {hold.slot.index} was never left: use 'async with'"
            warnings.warn(message, ResourceWarning, stacklevel=1, source=self)

    def _entered(self, buffers: Buffers | None) -> Buffers:
        if buffers is None:
            raise UsageError("this lease has not been entered: use 'async with model.lease() as slot'")
        return buffers

    def _held(self) -> Hold:
        if self._hold is None:
            raise UsageError("this lease has not been entered: use 'async with model.lease() as slot'")
        self._hold.check()
        return self._hold
