"""The life of a request, from the slot that it is granted to its result: prepared, staged, launched, watched, copied out.

The slot's state is moved by the executor, whose rules hold here too: everything runs on the loop's thread, synchronously,
except the functions that say they are a worker thread's; and a slot's memory is touched only by its owner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from aiotrt.devices import Event
from aiotrt.errors import AiotrtError, DeviceError, DeviceHangError, InputError
from aiotrt.runtime.handshake import carry
from aiotrt.runtime.launch import Request, Slot, copy_in, keep_for_ever, retire, submit_request
from aiotrt.runtime.programs import Program
from aiotrt.runtime.slots import BROKEN, COMPLETE, COPIED, DRAINING, IN_FLIGHT, LAUNCH, State
from aiotrt.runtime.slots import Event as Move
from aiotrt.tensors import DEVICE, own

if TYPE_CHECKING:
    from aiotrt.runtime.executor import Executor

__all__ = ["Requests"]

_log: Final = logging.getLogger("aiotrt")

#: Host copies larger than this go to a worker thread. A thread hop costs tens of microseconds and copying a mebibyte about
#: as much, so below it the hop would cost the caller more than the copy costs the loop.
COPY_ON_LOOP_BYTES: Final = 1 << 20

#: Work of fewer seconds is over before the next launch is prepared beside it, and would be seen late for that. On an H200
#: the look came 10 to 14 us later at 20 us, for a launch that was 4 to 6 faster; at 50 us and more only the gain was left.
WORTH_PREPARING: Final = 40e-6


class Requests:
    """Serves requests on the slots of one executor."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def adopt(self, slot: Slot) -> None:
        """Hear of the completion of this slot's requests, from the first one on."""
        slot.on_done = partial(self._completed, slot)

    def begin(self, slot: Slot, request: Request) -> None:
        """A request got its slot: prepare it, and go on as soon as that is done."""
        executor = self._executor
        if request.future.done():  # cancelled while it stood in line, and its task has not run yet
            executor.move(slot, Move.RELEASE)
            return
        fixed = executor.specs.specs
        if fixed is not None and fixed is not request.specs:
            try:
                # While this one waited, another may have fixed what the inputs are.
                executor.specs.settle(request.specs)
            except InputError as error:
                refusal = error
                executor.move(slot, Move.RELEASE, then=lambda: executor.reject(request, refusal))
                return
        program = executor.cache.get(slot.index, request.key)
        if not request.is_warmup:
            executor.counters.hits += program is not None
            executor.counters.misses += program is None
        if program is not None and program.is_staged(request.host_inputs(), outputs=request.kind is not DEVICE):
            self._prepared(slot, request, program)
        else:
            executor.move(slot, Move.PREPARE)
            executor.work(slot, lambda: self._build(slot, request, program, ()), self._built)

    def _build(
        self, slot: Slot, request: Request, program: Program | None, evicted: Sequence[tuple[Program, Sequence[Event]]]
    ) -> Program:
        """On a worker thread: the program for this slot and these shapes, with the staging that the request needs."""
        self._executor.device.prepare_thread()
        for old, gates in evicted:
            retire(old, gates)
        if request.bound:
            request.order(slot)  # the warm-up reads them where they are
        recipe = self._executor.recipe
        built = program or recipe.build(slot.index, slot.stream, request.specs, request.key, request.bound)
        try:
            built.stage(request.host_inputs(), outputs=request.kind is not DEVICE)
        except BaseException:
            if program is None:
                built.close()
            raise
        return built

    def _built(self, slot: Slot, program: Program | None, error: BaseException | None) -> None:
        request = slot.request
        assert request is not None
        if self._executor.machine.states[slot.index] is BROKEN:
            keep_for_ever(program)
            return
        if isinstance(error, torch.OutOfMemoryError):
            evicted = self._executor.cache.evict(self._executor.busy(slot), None)
            self._executor.counters.evictions += len(evicted)
            if evicted:  # with the memory of programs that nobody uses now, it may do
                have = self._executor.cache.get(slot.index, request.key)
                # The gates as they are now: their slots are free, and whoever gets one next opens them.
                gated = [(old, list(self._executor.slots[old.slot].gates)) for old in evicted]
                self._executor.work(slot, lambda: self._build(slot, request, have, gated), self._built)
                return
        if program is not None:
            try:
                self._executor.specs.settle(request.specs)  # the engine has accepted these inputs
            except InputError as refusal:
                self._executor.retire(program, ())
                program, error = None, refusal
        if program is not None and program not in self._executor.cache.holders(program.key).values():
            self._executor.cache.add(program)
            self._executor.first_shapes = self._executor.first_shapes or program.key[0]
            self._executor.counters.captures += 1
            self._executor.fallbacks.update(dict.fromkeys(program.fallbacks))
            self._executor.evict(program)
        if self._executor.resume(slot, error, "while it was prepared") is not None:
            assert program is not None
            self._prepared(slot, request, program)

    def _prepared(self, slot: Slot, request: Request, program: Program) -> None:
        slot.program = program
        if self._executor.device.unified and slot.gates:
            # Where staging and device buffers are one, a consumer may still be reading what is about to be written.
            self._executor.move(slot, Move.PREPARE)
            self._executor.when_passed(slot.gates, lambda error: self._gates_passed(slot, error))
        else:
            self._stage(slot, request, program)

    def _gates_passed(self, slot: Slot, error: BaseException | None) -> None:
        slot.gates.clear()
        if isinstance(error, DeviceHangError):
            self._executor.break_down(error)
            return
        request = self._executor.resume(slot, error, "while its slot's last consumer was waited for")
        if request is not None:
            assert slot.program is not None
            self._stage(slot, request, slot.program)

    def _stage(self, slot: Slot, request: Request, program: Program) -> None:
        if request.is_lease:
            slot.launches = 0
            if not request.future.done():  # cancelled in this very turn: its task lets the slot go when it runs
                request.future.set_result(None)
            return
        if program.blocking:
            self._executor.move(slot, Move.PREPARE)
            slot.predecessor = None  # it waits for nobody, whom this slot's last launch waited for included
            self._executor.work(slot, lambda: self._stage_and_submit(slot, request, program), self._submitted)
            return
        nbytes = 0  # of host inputs
        for argument in request.arguments:
            if argument.host is not None:
                nbytes += argument.host.nbytes
        if nbytes > COPY_ON_LOOP_BYTES:
            self._executor.move(slot, Move.PREPARE)
            self._executor.work(slot, lambda: copy_in(request, program), self._staged)
            return
        if nbytes:
            try:
                copy_in(request, program)
            except Exception as error:  # its caller reshaped an array while it stood in line, say
                refusal = self._executor.explain(error, "while its inputs were copied")
                self._executor.move(slot, Move.RELEASE, then=lambda: self._executor.reject(request, refusal))
                return
        self._launch(slot, request, program)

    def _staged(self, slot: Slot, _: None, error: BaseException | None) -> None:
        request = self._executor.resume(slot, error, "while its inputs were copied")
        if request is not None:
            assert slot.program is not None
            self._launch(slot, request, slot.program)

    # On the device...

    def _launch(self, slot: Slot, request: Request, program: Program) -> None:
        executor = self._executor
        executor.follow_latest(slot)
        try:
            submit_request(executor.device, slot, request, program)
        except DeviceError as error:
            executor.device.fail(error)
        except Exception as error:
            self._launch_failed(slot, error)
        else:
            executor.move(slot, LAUNCH)
            executor.count(program)
            self._watch(slot, program)
            self._prepare_next(request, program)

    def _prepare_next(self, request: Request, program: Program) -> None:
        try:
            machine = self._executor.machine
            is_alone = machine.count(IN_FLIGHT) + machine.count(DRAINING) == 1
            expect = is_alone and program.estimate.seconds > WORTH_PREPARING
            request.allocate_spare(self._executor.device, program, expect=expect)
        except DeviceError as error:
            self._executor.device.fail(error)
        except Exception as error:  # out of memory, say: whoever launches next does it anew, and is told
            _log.debug("the next launch could not be prepared: %r", error)

    def _watch(self, slot: Slot, program: Program) -> None:
        self._executor.watch(slot, slot.event, slot.on_done, program.estimate)

    def _stage_and_submit(self, slot: Slot, request: Request, program: Program) -> None:
        """On a worker thread: all of it, for a program whose launch occupies the thread."""
        self._executor.device.prepare_thread()
        copy_in(request, program)
        submit_request(self._executor.device, slot, request, program)

    def _submitted(self, slot: Slot, _: None, error: BaseException | None) -> None:
        state = self._executor.machine.states[slot.index]
        if state is BROKEN:
            return
        assert slot.program is not None
        if isinstance(error, DeviceError):
            self._executor.device.fail(error)
        elif error is not None:
            self._launch_failed(slot, error)
        else:
            if state is State.PREPARING:
                self._executor.move(slot, LAUNCH)
            self._executor.count(slot.program)
            try:
                self._executor.pass_turn(slot)
            except Exception as second:
                self._executor.lost_track(second)
            else:
                self._watch(slot, slot.program)  # a draining slot too is free only when the device is done with it

    def _launch_failed(self, slot: Slot, error: BaseException) -> None:
        """Part of the work may be on the stream already: the slot is not free before that has passed."""
        request = slot.request
        assert request is not None
        self._executor.reject(request, self._executor.explain(error, "while it was launched"))
        if self._executor.machine.states[slot.index] is not DRAINING:
            if self._executor.machine.states[slot.index] is State.CLAIMED:
                self._executor.move(slot, LAUNCH)
            self._executor.move(slot, Move.RELEASE)
        assert slot.program is not None
        try:
            self._executor.pass_turn(slot)
            slot.stream.record(slot.event)
        except Exception as second:
            self._executor.lost_track(second)
        else:
            self._watch(slot, slot.program)

    # Coming out...

    def _completed(self, slot: Slot, error: BaseException | None) -> None:
        request, executor = slot.request, self._executor
        assert request is not None
        state = executor.machine.states[slot.index]
        if state is BROKEN:
            return
        times = request.times
        if times is not None:
            times.seen, times.ran, times.late = time.perf_counter(), slot.lane.ran, slot.lane.late
        if error is None and state is IN_FLIGHT:
            self._hand_out(slot, request)
        elif isinstance(error, DeviceError):
            executor.failed_on_device(error)
        elif state is DRAINING:
            executor.move(slot, COMPLETE)
        else:
            assert error is not None
            self._failed(slot, request, executor.explain(error, "while it ran"))

    def _hand_out(self, slot: Slot, request: Request) -> None:
        if request.kind is not DEVICE:
            self._copy_out(slot, request)
            return
        complete = self._executor.complete
        for result in request.results:
            carry(result, complete)
        self._finish(slot, request, request.results)

    def _copy_out(self, slot: Slot, request: Request) -> None:
        program = slot.program
        assert program is not None
        views = [program.output_view(i) for i in range(len(program.outputs))]
        dtypes = [output.dtype for output in program.outputs]
        kind = request.kind

        def copy() -> list[Any]:
            parts = request.parts(program, list(zip(views, dtypes, strict=True)))
            return [own(view, dtype, kind) for view, dtype in parts]

        if sum(view.nbytes for view in views) > COPY_ON_LOOP_BYTES:
            # The slot stays IN_FLIGHT, and its memory the worker's, until that is done.
            self._executor.work(slot, copy, self._copied)
            return
        try:
            results = copy()
        except Exception as error:  # out of memory: without this the slot would be in flight for ever
            self._copied(slot, None, error)
        else:
            self._finish(slot, request, results)

    def _copied(self, slot: Slot, results: list[Any] | None, error: BaseException | None) -> None:
        request = slot.request
        assert request is not None
        state = self._executor.machine.states[slot.index]
        if state is BROKEN:
            return
        if state is DRAINING:
            self._executor.move(slot, COMPLETE)
        elif error is not None:
            self._failed(slot, request, self._executor.explain(error, "while its results were copied"))
        else:
            assert results is not None
            self._finish(slot, request, results)

    def _failed(self, slot: Slot, request: Request, error: AiotrtError) -> None:
        self._executor.move(slot, COPIED, then=lambda: self._executor.reject(request, error))

    def _finish(self, slot: Slot, request: Request, results: Sequence[object]) -> None:
        assert slot.program is not None
        packed = request.pack(slot.program, results)

        def resolve() -> None:
            if not request.future.done():
                self._executor.counters.completed += 1
                request.future.set_result(packed)

        self._executor.move(slot, COPIED, then=resolve)
