"""A slot of one's own for a while: write into the graph's input buffers, replay, read its output buffers. No copies.

The order of things is the device's: a launch waits for what the caller's current stream did before, that stream waits
for the launch, and leaving records consumer-done events that gate the slot's next launch, whoever makes it.
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

    Made by `Model.lease`. Entering waits for a free slot and, for new shapes, for its graph; cancelling that gives up the
    place in line, and the lease can be entered later. Leaving is immediate: whatever is still on the device goes on, and the
    slot is free after it.
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
        self._choose = choose  # of several devices, the one whose slot this is to be, once it is entered
        self._model = model  # a model that is garbage lets go of its slots, and so of this one
        self._specs = specs
        self._shapes = shapes
        self._kind = kind
        self._is_entered = False  # or about to be: whoever came meanwhile would be granted a slot too
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
            # Also where the slot was granted in the same turn of the loop as the cancellation: without this it would
            # belong to nobody for ever.
            self._executor.abandon(request)
            raise
        slot = request.slot
        if slot is None or request.is_revoked:  # granted, and in the same turn of the loop the model was closed under it
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
            # Nobody calls __aexit__ when __aenter__ raises: without this the slot would stay claimed for ever.
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
        """The name of the device that the slot is on. Of a model on several it is chosen when the lease is entered."""
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
        """Replay the graph on what the inputs hold now.

        Returns at once, with the produce event (a `torch.cuda.Event` on CUDA): new for each launch and never recorded
        again. From now on the caller's current stream waits for it, on the device, so work submitted there later reads
        the outputs in order. An input that was not written since the last launch keeps its value. A model that runs
        without a graph is launched op by op, on this thread: prefer `replay` then, which uses a worker.

        Raises:
            UsageError: the lease has ended, an input was never written, or a replay without a graph is under way.
            ModelBrokenError, ModelClosedError: the model is; the lease has ended with it.
            EngineError: without a graph, the model raised.
            DeviceError: the device broke.
        """
        hold = self._held()
        hold.check_submitted()
        return hold.launch(True).event

    async def replay(self) -> Any:
        """Launch, and wait for the results.

        Returns:
            The outputs as views of the slot's buffers, valid until the next launch or the end of the lease, in the structure
            that a call returns. They are device tensors, or host tensors or arrays if the lease asked for them. bfloat16,
            float8 and complex32, which numpy lacks, are copied here and now, to arrays of float32 or complex64.

        Cancellation stops the waiting; the launch goes on, and the lease is still held. Raises as `launch` does, and without
        a graph also a UsageError while the last launch is not complete; after an EngineError the lease is usable.
        """
        hold = self._hold or self._held()
        replay = hold.replay()
        try:
            await replay
        except asyncio.CancelledError:
            with contextlib.suppress(AiotrtError):  # of which whoever uses the lease next is told
                hold.order()  # the launch goes on
            raise
        return hold.awaited(replay)

    def consumed(self, stream: object = None) -> None:
        """Name a stream that reads this slot's buffers, so that the slot's next launch waits for it too.

        Args:
            stream: a stream of `Model.stream`, a `torch.cuda.Stream`, anything with ``__cuda_stream__``, or a handle;
                None for the current stream, which is always among them.

        What was submitted there up to the end of the lease (or the next launch) is waited for.

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
