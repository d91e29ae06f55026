"""Carries out what the slot machine decides: admits requests, serves them in order, moves slots, breaks and closes.

Rule 1: everything here runs on the event loop's thread, synchronously, except the few functions whose docstrings name a
worker thread. So no state is shared between threads, and there is no `await` between two halves of a change.
Rule 2: only the owner of a slot touches its memory, and the slot's state determines the owner (`slots.TABLE`).

The life of a request. `submit` checks the inputs and asks the machine for a slot. With the slot comes its program, built in
a worker thread if these shapes are new there (PREPARING). Inputs are staged: host inputs into pinned memory, in a worker
thread if they are large. Then one uninterrupted sequence goes to the slot's stream (`launch`), and the slot is IN_FLIGHT.
The hub calls back when the produce event is complete; host results are copied into memory that belongs to the caller; the
slot goes to the next request in the queue; the request is resolved. Every step calls the next one directly, or when a worker
thread has done its job.

A request that is abandoned (its await was cancelled) leaves the queue at once, or leaves its slot DRAINING until the
device is done with it. Until then the slot refers to the request, and through it to the caller's inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from itertools import chain
from math import inf
from typing import Any, Final

import numpy as np
import torch

from aiotrt.completion.hub import Hub, check_loop
from aiotrt.completion.lane import Lane
from aiotrt.completion.prediction import LONG
from aiotrt.devices import Event, Stream
from aiotrt.errors import (
    AiotrtError,
    DeviceError,
    DeviceHangError,
    EngineError,
    InputError,
    ModelBrokenError,
    ModelClosedError,
    QueueFullError,
    ResourceError,
    UsageError,
)
from aiotrt.runtime.alarm import Alarm
from aiotrt.runtime.copy_job import CopyJob, Job
from aiotrt.runtime.handshake import bound_inputs, carries_anything, carry, ready_events, wants_consumed
from aiotrt.runtime.launch import copy_in, fill, has_passed, open_gates, pass_turn, retire, submit_request
from aiotrt.runtime.memory import allocate, keep, release_when_idle
from aiotrt.runtime.programs import Program, ProgramCache, Recipe
from aiotrt.runtime.replay import Replay
from aiotrt.runtime.request import Request, Slot, Times
from aiotrt.runtime.route import IN_PLACE_BYTES, Route
from aiotrt.runtime.slots import BROKEN, COMPLETE, COPIED, DRAINING, FREE, IN_FLIGHT, LAUNCH, Grant, Slots, State
from aiotrt.runtime.slots import Event as Move
from aiotrt.tensors import DEVICE, Argument, InputSpecs, Kind, Shapes, Specs, own

__all__ = ["Counters", "Executor"]

_log: Final = logging.getLogger("aiotrt")


#: Host copies larger than this go to a worker thread. A thread hop costs tens of microseconds and copying a mebibyte about
#: as much, so below it the hop would cost the caller more than the copy costs the loop.
COPY_ON_LOOP_BYTES: Final = 1 << 20

#: How many ended requests are kept for the next calls.
MOST_SPARES: Final = 64

#: What a `DeviceHangError` says about a worker thread's job that did not end in time.
BUILD: Final = "the engine's first run for these shapes, or its capture, did not end"
LAUNCH_LATE: Final = "a launch without a graph did not return"

#: How many reasons for fall-backs are kept. A bound is needed because a reason may name what differs between signatures.
MOST_FALLBACKS: Final = 64

_COUNTERS: Final = (
    "submitted", "completed", "failed", "cancelled", "rejected", "replays", "fallback_runs", "captures", "hits", "misses",
    "evictions",
)  # fmt: skip

_forks = 0


class Counters:
    """What happened so far, in numbers.

    Attributes:
        submitted: requests that were admitted.
        completed: requests whose callers got results.
        failed: requests whose callers got an error.
        cancelled: requests that their callers abandoned.
        rejected: requests that found the queue full.
        replays: launches of programs that are one graph.
        fallback_runs: launches of programs that are not one graph.
        captures: programs built.
        hits: requests whose program was in the cache.
        misses: requests whose program had to be built first.
        evictions: programs freed to make room for others.
    """

    def __init__(self) -> None:
        self.submitted = self.completed = self.failed = self.cancelled = self.rejected = 0
        self.replays = self.fallback_runs = self.captures = self.hits = self.misses = self.evictions = 0

    def as_dict(self) -> dict[str, int]:
        """Return all counters by name."""
        return {name: getattr(self, name) for name in _COUNTERS}


class Executor:
    """All slots of one open model.

    Args:
        recipe: builds programs.
        specs: checks inputs.
        hub: finds completion. The caller has acquired it; `detach` or `discard` releases it.
        slots: the number of slots.
        max_queue: how many callers may wait; None for no bound.
        cache: the bounded cache of programs.
        outputs: the kind of results, or None for the kind of the inputs.
        hang_timeout: seconds after which work counts as hung; None for never.
        overlap: whether launches of several slots may run at the same time.
    """

    def __init__(
        self,
        recipe: Recipe,
        specs: InputSpecs,
        hub: Hub,
        *,
        slots: int,
        max_queue: int | None,
        cache: ProgramCache,
        outputs: Kind | None,
        hang_timeout: float | None,
        overlap: bool = True,
    ) -> None:
        self.recipe = recipe
        self.device = recipe.device
        self.specs = specs
        self.first_shapes: Shapes | None = None
        self.cache = cache
        self.outputs = outputs
        self.counters = Counters()
        self.hub = hub
        self.loop = asyncio.get_running_loop()
        self.machine: Slots = Slots(slots, max_queue)
        self.fallbacks: dict[str, None] = {}  # reasons, in order of appearance
        self.broken: DeviceError | None = None
        self.closing = False
        self.is_discarded = False
        self.hang_timeout = hang_timeout
        self.submitting: set[Replay] = set()  # launches of leases that a worker thread submits
        self.on_failure: list[Callable[[AiotrtError], None]] = []  # called with the error that every waiting caller gets
        #: Called with each request, and with each item of a batch, when it is submitted, in its caller's context. The
        #: request itself says how it ended, and its `times` say when.
        self.observer: Callable[[Any], None] | None = None
        self._unified = self.device.unified
        #: A worker thread may copy and launch calls with at least this many bytes of host inputs; infinite where inputs are
        #: not copied.
        self._thread_bytes: float = inf if self._unified else self.device.thread_copy_bytes
        self._overlap = overlap or slots == 1  # one slot's launches are in order anyway
        self.latest: Slot | None = None  # without overlap: the slot that launched last
        self._idle: asyncio.Future[None] | None = None
        self._granted: deque[Grant] = deque()
        self._serving = False
        self._forks = _forks
        self._route: Route | None = None  # of the previous call
        self._spares: list[Request] = []  # ended requests of `_route`, for the next calls
        self._nested_route: Route | None = None  # of the last call with names or with a structure
        self._likely: tuple[Shapes, Kind, Specs] | None = None  # of the last call without a route that could have one
        self._origin: Stream | None = None  # the current stream at the previous call
        self.complete = self.device.event()  # never recorded, and so complete: attached to results that are complete
        self.device.prepare_thread()
        self.slots: list[Slot] = []
        try:
            line = None if self._overlap else Lane()  # one lane for all slots: ordered launches are seen to end in order
            for i in range(slots):
                self.slots.append(Slot(i, self.device, line or Lane(), overlap=self._overlap))
                self.slots[i].on_done = partial(self._completed, self.slots[i])
        except BaseException:
            for slot in self.slots:
                slot.stream.close()
            raise
        self._workers = self.device.workers(slots + 1)  # last: after a later failure its shutdown could block the loop
        self._stop_listening = self.device.on_fault(partial(_device_failed, weakref.ref(self)))
        if self.device.fault is not None:
            self.break_down(self.device.fault)

    # Coming in...

    def submit(self, values: Sequence[object], named: Mapping[str, object], *, bounded: bool = True) -> Request:
        """Check the inputs, and start the request or queue it.

        Raises:
            InputError: the inputs do not fit. Nothing was submitted, as with all errors below.
            QueueFullError: `bounded` is true, and the queue is at its bound.
            ModelClosedError, ModelBrokenError, UsageError: see `check_usable`.
        """
        # This finds forks too: asyncio reports no running loop in a child process.
        if asyncio._get_running_loop() is not self.loop or self.closing or self.broken is not None:
            self.check_usable()
        route = self._route
        if route is None or named or not route.matches(values):
            return self._submit_new(values, named, bounded)
        if self._spares:
            request = self._spares.pop()
            request.is_done = False
        else:
            request = Request(self.loop, (), route.specs, route.shapes, self.outputs or route.kind)
            request.route = route
        request.values = values
        if route.on_device or request.kind is DEVICE:
            origin = self._origin
            if origin is None or origin.handle != self.device.current_handle():
                origin = self._origin = self.device.current_stream()
            request.origin = origin
        self._enter(request, bounded, route.holders)
        return request

    def _submit_new(self, values: Sequence[object], named: Mapping[str, object], bounded: bool) -> Request:
        """Submit by the long way: check every input, and remember the signature if the next call may have it too."""
        specs, leaves = self.specs.recognise(values, named)
        route = self._nested_route
        if route is not None and route.specs is specs and route.matches(leaves):
            request = Request(self.loop, (), specs, route.shapes, self.outputs or route.kind)
            request.route = route
            request.values = leaves
            if route.on_device or request.kind is DEVICE:
                request.origin = self.device.current_stream()
            self._enter(request, bounded, route.holders)
            return request
        arguments, shapes, kind = self.specs.check(specs, leaves)
        request = Request(self.loop, arguments, specs, shapes, self.outputs or kind)
        if not self.device.unified:
            for argument, spec in zip(arguments, specs, strict=True):
                if argument.host is not None and argument.host.nbytes >= IN_PLACE_BYTES:
                    argument.read_in_place(spec.dtype, self.device.is_pinned)
        if kind is DEVICE or request.kind is DEVICE:
            request.origin = self.device.current_stream()
            if carries_anything(arguments):
                request.ready = ready_events(arguments)
                request.bound = bound_inputs(arguments)
                if wants_consumed(arguments):
                    request.marked = arguments
        holders = self.cache.holders(request.key)
        # No route for programs without a graph: it would be found useless only when the slot is granted.
        if self._overlap and specs in self.specs.accepted and all(program.captured for program in holders.values()):
            likely = shapes, kind, specs
            if likely == self._likely and not request.marked and Route.suits(leaves, arguments, self.device):
                route = Route(leaves, arguments, specs, shapes, kind, holders, self.device, self.specs.holds)
                if route.nbytes <= COPY_ON_LOOP_BYTES or (self._thread_bytes < inf and request.origin is None):
                    if named or specs.structure is not None:
                        self._nested_route = route
                    else:
                        self._route = route
                        self._spares.clear()
            self._likely = likely
        self._enter(request, bounded, holders)
        return request

    def recycle(self, request: Request) -> None:
        """Keep an ended request for another call of its signature.

        The request was awaited to its result, and nothing else refers to it.
        """
        spares, route = self._spares, request.route
        if route is not None and route is self._route and request.times is None and len(spares) < MOST_SPARES:
            request.values = request.results = ()
            request._value = None
            spares.append(request)

    def lease(
        self,
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        *,
        is_warmup: bool = False,
        arguments: Sequence[Argument] = (),
        ready: Sequence[Event] = (),
    ) -> Request:
        """Request a slot to hold, prepared for these shapes. A warm-up is not counted. Raises as `submit` does.

        Args:
            specs: of the inputs.
            shapes: of the inputs.
            kind: where results should be.
            is_warmup: whether this only prepares the slot.
            arguments: example inputs, if any.
            ready: events of other devices that must complete before the example inputs are read.
        """
        self.check_usable()
        request = Request(self.loop, arguments, specs, shapes, kind, is_lease=True)
        if any(argument.tensor is not None for argument in arguments):
            request.origin = self.device.current_stream()
            request.ready = [*ready_events(arguments), *ready]
        request.is_warmup = is_warmup
        self._enter(request, not is_warmup, self.cache.holders(request.key))
        return request

    def admit(self, request: Request, prefer: Container[int]) -> None:
        """Submit a batch. Its items are already validated, counted and limited."""
        self._enter(request, False, prefer)

    def check_usable(self) -> None:
        """Raise unless requests may be submitted now, on this thread.

        Raises:
            UsageError: this is another loop or thread, or a fork.
            ModelClosedError: the model is closed or closing.
            ModelBrokenError: the model broke; `__cause__` is the reason.
        """
        if self._forks != _forks:  # first: in a child process asyncio reports no running loop, which is not the reason
            raise UsageError(
                f"{self.recipe.engine.name} was loaded before a fork; neither CUDA nor threads survive one: "
                "load the model in the child process, or start it with the 'spawn' method"
            )
        if asyncio._get_running_loop() is not self.loop:
            check_loop(self.loop, self.recipe.engine.name)
        if self.closing:
            raise ModelClosedError(f"{self.recipe.engine.name} is closed: load it again")
        if self.broken is not None:
            raise ModelBrokenError(f"{self.recipe.engine.name} is broken: {self.broken}") from self.broken

    def abandon(self, request: Request) -> None:
        """Abandon a request whose caller no longer waits; called once for a request.

        A queued request is withdrawn; one on the device drains.
        """
        if self.loop.is_closed():
            return  # garbage collection ended the caller's coroutine: `discard` follows, and nothing is launched any more
        slot = request.slot
        if request.is_queued:
            request.is_queued = False
            self.machine.withdraw(request)
            self._check_idle()
        elif slot is not None and self.machine.states[slot.index] not in (BROKEN, DRAINING):
            self.move(slot, Move.RELEASE)
        elif not request.cancelled():
            return  # it ended, and was counted, before its caller was cancelled
        self.counters.cancelled += not request.is_warmup

    def _enter(self, request: Request, bounded: bool, prefer: Container[int]) -> None:
        try:
            grant = self.machine.request(request, prefer, bounded)
        except OverflowError:
            raise self._full() from None
        self.counters.submitted += not request.is_warmup
        if self.observer is not None and not request.is_warmup:
            try:
                self.observe(request)
            except BaseException:  # an interrupt: no caller will await the request
                self.counters.cancelled += 1
                if grant is None:
                    self.machine.withdraw(request)
                else:
                    self.move(self.slots[grant[0]], Move.RELEASE)
                raise
        if grant is None:
            request.is_queued = True
        else:
            self._serve(grant)

    def observe(self, what: Any) -> None:
        """Call the observer with a request, or an item of a batch, that was submitted.

        An exception of the observer goes to the loop's exception handler, and does not affect the request.
        """
        assert self.observer is not None
        what.times = Times(time.perf_counter())
        try:
            self.observer(what)
        except Exception as error:
            message = f"aiotrt: the observer of {self.recipe.engine.name} raised"
            self.loop.call_exception_handler({"message": message, "exception": error})

    def _full(self) -> QueueFullError:
        self.counters.rejected += 1
        return QueueFullError(
            f"{self.recipe.engine.name}: {len(self.slots)} of {len(self.slots)} slots are busy and "
            f"{self.machine.max_waiting} of max_queue={self.machine.max_waiting} places in line are taken; "
            "call again later"
        )

    # Being served...

    def _serve(self, grant: Grant) -> None:
        # A loop, not a recursion: a request that fails at once frees its slot at once, and the queue may be long.
        if self._serving:
            self._granted.append(grant)
            return
        self._serving = True
        try:
            while True:
                index, request = grant
                slot = self.slots[index]
                slot.request = request
                request.slot = slot
                was_queued = request.is_queued
                request.is_queued = False
                if request.times is not None:
                    request.times.granted = time.perf_counter()
                try:
                    if request.route is None or not self._replay(slot, request, was_queued):
                        batch = request.batch
                        # A batch that was interrupted on its way into the queue has ended, and takes no items.
                        is_filled = batch is not None and not request.is_done and batch.fill(request, slot)
                        if not (is_filled and self._replay(slot, request, False)):
                            self.begin(slot, request)
                except Exception as error:
                    self._begin_failed(slot, request, error)
                except BaseException:
                    self._interrupted(slot, request)
                    self._serving = False
                    if self._granted:  # the loop above ends here: without this the other grants would never be served
                        self._serve(self._granted.popleft())
                    raise
                if not self._granted:
                    return
                grant = self._granted.popleft()
        finally:
            self._serving = False

    def _interrupted(self, slot: Slot, request: Request) -> None:
        """Finish or fail a request whose launch was interrupted, because the loop may go on, as a notebook's does."""
        state = self.machine.states[slot.index]
        if slot.request is not request or state in (BROKEN, FREE, State.PREPARING):
            return
        if request in slot.lane.pending:
            start = getattr(request.query, "start", None)
            if start is not None:  # a job that may not have been submitted to a thread yet
                start()
            return
        error = EngineError(f"{self.recipe.engine.name} was interrupted while this call was launched")
        if request.is_lease or slot.program is None:
            self.move(slot, Move.RELEASE, then=lambda: self.reject(request, error))
        else:
            self._launch_failed(slot, error)

    def _begin_failed(self, slot: Slot, request: Request, error: Exception) -> None:
        """Fail this request with an unexpected error, which must not reach the slot's previous or next request."""
        told = self.failed(error, "before it was launched")
        if slot.request is request and self.machine.states[slot.index] is State.CLAIMED:
            self.move(slot, Move.RELEASE)
        else:
            self.lost_track(error)
        self.reject(request, told)

    # From slot to result, by the short path...

    def _replay(self, slot: Slot, request: Request, was_queued: bool) -> bool:
        """Launch a request whose signature was recognised; False if it must take the long way.

        On the short path nothing has to be prepared: the program is one graph, which copies in and out by itself, and the
        inputs are plain. If the request `was_queued`, its inputs may have been changed meanwhile.
        """
        route = request.route
        assert route is not None
        program = route.holders.get(slot.index)
        if (
            program is None
            or program.graph is None
            or (was_queued and (request.is_done or not route.still_matches(request.values)))
        ):
            return self._detour(request)
        inputs: Sequence[Any] = program.inputs
        sources: Sequence[Any] = request.values
        if route.on_host:
            if self._unified and slot.gates:  # a consumer may still be reading the memory that would be written
                return self._detour(request)
            if route.nbytes >= self._thread_bytes and self._hand_over(slot, request, program):
                return True
            if route.nbytes > COPY_ON_LOOP_BYTES:
                return self._detour(request)
            for i in route.on_host:
                view = program.input_views[i]
                if view is None:
                    return self._detour(request)
                source = sources[i]
                view[...] = source if type(source) is np.ndarray else source.numpy()
            if route.on_device:
                sources = [program.staged_inputs[i] if i in route.on_host else source for i, source in enumerate(sources)]
            else:
                sources = program.staged_inputs  # the same list each time, which the graph recognises
        origin = request.origin if request.kind is DEVICE else None
        results: Any
        if self._unified:
            inputs = sources = results = ()  # staging and device buffers are the same memory
        elif origin is not None:
            spare, program.spare = program.spare, None
            results = spare[1] if spare is not None and spare[0] == origin.handle else self._results(program, origin)
            request.results = results
        else:
            results = program.staged_outputs
            for view in program.output_views:
                if view is None:
                    return self._detour(request)
        slot.program = program
        cache = self.cache
        cache.uses = program.used = cache.uses + 1
        counters = self.counters
        counters.hits += 1
        if slot.gates:
            open_gates(slot)
        try:
            program.graph.submit(
                slot.stream, request.origin, slot.mark, inputs, sources, program.outputs, results, slot.event
            )
        except DeviceError as error:
            self.device.fail(error)
            return True
        except Exception as error:
            self._launch_failed(slot, error)
            return True
        self.machine.move(slot.index, LAUNCH)
        counters.replays += 1
        request.query = slot.query
        request.confirm = slot.confirm
        request.on_done = slot.on_done
        request.estimate = program.estimate
        request.hang_timeout = self.hang_timeout
        prepares = origin is not None
        if prepares and program.estimate.seconds >= LONG and slot.when_complete is None:
            slot.lane.prepare = partial(self._prepare_results, program, origin, False)
            prepares = False
        self.hub.add(slot.lane, request, slot.when_complete)
        if prepares:
            self._prepare_results(program, origin, not was_queued)
        return True

    def _hand_over(self, slot: Slot, request: Request, program: Program) -> bool:
        """Let a worker thread copy a recognised request's host inputs and launch it; False if the loop must do it.

        After True the request is in flight. It is polled like any other, and is incomplete until the thread has launched it.
        """
        route = request.route
        assert route is not None
        if request.origin is not None or request.batch is not None:
            return False
        if route.nbytes <= COPY_ON_LOOP_BYTES and not self.machine.count(IN_FLIGHT):
            return False  # nothing else is in flight: waking a thread would cost the caller more than the copy
        copies: list[Any] = []
        for view, source in zip(program.input_views, request.values):  # noqa: B905  # all of them are on the host
            if view is None:
                return False
            copies.append((view, source if type(source) is np.ndarray else source.numpy()))
        sources: Sequence[Any] = program.staged_inputs
        results: Sequence[Any] = program.staged_outputs
        for view in program.output_views:
            if view is None:
                return False
        graph = program.graph
        assert graph is not None
        job: Job | None = graph.copy_job(
            slot.stream, copies, program.inputs, sources, program.outputs, results, slot.event, self
        )
        if job is None:
            submit = partial(self._submit_copied, slot, program, sources, results)
            job = CopyJob(self._workers, self.device, slot.stream, slot.event, copies, submit, slot.query)
        slot.program = program
        cache = self.cache
        cache.uses = program.used = cache.uses + 1
        self.counters.hits += 1
        if slot.gates:
            open_gates(slot)
        self.machine.move(slot.index, LAUNCH)
        self.counters.replays += 1
        request.query = job
        request.confirm = job.confirm
        request.on_done = slot.on_done
        request.estimate = program.estimate
        request.hang_timeout = self.hang_timeout
        self.hub.add(slot.lane, request)
        job.start()  # last: if anything above fails, no thread uses the slot's memory yet
        return True

    def _submit_copied(self, slot: Slot, program: Program, sources: Sequence[Any], results: Sequence[Any]) -> None:
        """Launch on a worker thread, after a job has copied the inputs.

        The job's reference to the executor keeps the program's memory alive.
        """
        graph = program.graph
        assert graph is not None
        try:
            graph.submit(slot.stream, None, slot.mark, program.inputs, sources, program.outputs, results, slot.event)
        finally:
            if self.is_discarded:  # perhaps before the launch: then nothing else waits for this launch
                keep(self)
                release_when_idle(self, self.device)

    def _prepare_results(self, program: Program, origin: Stream | None, is_current: bool) -> None:
        """Allocate results for the next call, which mostly comes from the same stream, and point the graph's copies at them.

        Args:
            program: the program in flight.
            origin: the caller's stream.
            is_current: whether `origin` is known to be the current stream; results are allocated for no other stream.
        """
        try:
            assert origin is not None
            is_current = is_current or origin.handle == self.device.current_handle()
            if is_current and not torch.is_inference_mode_enabled():  # perhaps another task's: results would be of that mode
                spares = [make() for make in program.makers]
                assert program.graph is not None
                program.graph.prepare(spares)
                program.spare = origin.handle, spares
        except DeviceError as error:
            self.device.fail(error)
        except Exception as error:  # such as out of memory: the next launch allocates again, and gets the error
            _log.debug("results for the next launch could not be allocated: %r", error)

    def warm_up_driver(self, current: Stream) -> None:
        """Make the queries of a lease's next launch, without effect: after a sleep the first driver calls are slow.

        Args:
            current: the caller's stream at the last launch.
        """
        try:
            self.device.current_handle()
            current.query()
        except Exception as error:  # the launch makes the same queries, and gets the error
            _log.debug("the current stream could not be queried: %r", error)

    def _results(self, program: Program, origin: Stream) -> list[torch.Tensor]:
        """Allocate results that belong to the caller, in the order of its stream: see `allocate`."""
        if origin.handle != self.device.current_handle() or torch.is_inference_mode_enabled():
            return allocate(self.device, origin, program.outputs)
        return [make() for make in program.makers]

    def _detour(self, request: Request) -> bool:
        """Send a recognised request the long way after all; always False.

        Raises:
            InputError: its inputs were changed while it waited, and do not fit any more.
        """
        if not request.is_done:
            request.arguments, request.shapes, _ = self.specs.check(request.specs, request.values)
        # The programs that routes have for the slots may be out of date.
        request.route = self._route = self._nested_route = self._likely = None
        return False

    # From slot to result, by the long way...

    def begin(self, slot: Slot, request: Request) -> None:
        """Prepare a request that got its slot, and go on as soon as that is done."""
        if request.is_done:  # cancelled while it was queued, and its task has not run yet
            self.move(slot, Move.RELEASE)
            return
        if request.specs is not self.specs.specs:
            try:
                # While this request waited, another one may have fixed the specs of the inputs.
                self.specs.confirm(request.specs)
            except InputError as error:
                refusal = error
                self.move(slot, Move.RELEASE, then=lambda: self.reject(request, refusal))
                return
        program = self.cache.get(slot.index, request.key)
        if not request.is_warmup:
            self.counters.hits += program is not None
            self.counters.misses += program is None
        if program is not None and program.is_staged(request.host_inputs(), outputs=request.kind is not DEVICE):
            self._prepared(slot, request, program)
        else:
            self.move(slot, Move.PREPARE)
            self.work(slot, lambda: self._build(slot, request, program, ()), self._built, BUILD)

    def _build(
        self, slot: Slot, request: Request, program: Program | None, evicted: Sequence[tuple[Program, Sequence[Event]]]
    ) -> Program:
        """Build, on a worker thread, the program for this slot and these shapes, and the staging memory for the request."""
        self.device.prepare_thread()
        for old, gates in evicted:
            retire(old, gates)
        if request.bound:
            request.order(slot)  # the warm-up reads bound inputs where they are
        recipe = self.recipe
        example = partial(fill, self.device, slot, request) if request.arguments else None
        built = program or recipe.build(slot.index, slot.stream, request.specs, request.key, request.bound, example)
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
        if self.machine.states[slot.index] is BROKEN:
            keep(program)
            return
        if isinstance(error, torch.OutOfMemoryError):
            evicted = self.cache.evict(self.busy(slot), None)
            self.counters.evictions += len(evicted)
            if evicted:  # with the memory of programs that are not in use, building may succeed
                have = self.cache.get(slot.index, request.key)
                # Copies of the consumer events: these slots are free, and the next launch in a slot empties its list.
                gated = [(old, list(self.slots[old.slot].gates)) for old in evicted]
                self.work(slot, lambda: self._build(slot, request, have, gated), self._built, BUILD)
                return
        if program is not None:
            try:
                self.specs.settle(request.specs)  # the engine has accepted these inputs
            except InputError as refusal:
                self.retire(program, ())
                program, error = None, refusal
        elif error is not None:
            error = self.specs.explain(request.specs, error)
        if program is not None and program not in self.cache.holders(program.key).values():
            self.cache.add(program)
            self.first_shapes = self.first_shapes or program.key[0]
            self.counters.captures += 1
            if len(self.fallbacks) < MOST_FALLBACKS:
                self.fallbacks.update(dict.fromkeys(program.fallbacks))
            self.evict(program)
        if self.resume(slot, error, "while it was prepared") is not None:
            assert program is not None
            self._prepared(slot, request, program)

    def _prepared(self, slot: Slot, request: Request, program: Program) -> None:
        slot.program = program
        if self.device.unified and slot.gates:
            # Staging and device buffers are the same memory: a consumer may still be reading what is about to be written.
            self.move(slot, Move.PREPARE)
            self.when_passed(slot.gates, lambda error: self._gates_passed(slot, error))
        else:
            self._stage(slot, request, program)

    def _gates_passed(self, slot: Slot, error: BaseException | None) -> None:
        slot.gates.clear()
        if isinstance(error, DeviceHangError):
            self.break_down(error)
            return
        request = self.resume(slot, error, "while its slot's last consumer was waited for")
        if request is not None:
            assert slot.program is not None
            self._stage(slot, request, slot.program)

    def _stage(self, slot: Slot, request: Request, program: Program) -> None:
        if request.is_lease:
            slot.launches = 0
            if not request.is_done:  # else cancelled in this very iteration: its task releases the slot when it runs
                request.resolve(None)
                self.hub.finish(request)
            return
        if program.blocking:
            self.move(slot, Move.PREPARE)
            slot.predecessor = None  # worker launches are not ordered: drop the previous launch's predecessor
            self.work(slot, lambda: self._stage_and_submit(slot, request, program), self._submitted, LAUNCH_LATE)
            return
        nbytes = 0  # of host inputs
        for argument in request.arguments:
            if argument.host is not None:
                nbytes += argument.host.nbytes
        if nbytes > COPY_ON_LOOP_BYTES:
            self.move(slot, Move.PREPARE)
            self.work(slot, lambda: copy_in(request, program), self._staged)
            return
        if nbytes:
            try:
                copy_in(request, program)
            except Exception as error:  # for example, its caller reshaped an array while the request was queued
                refusal = self.explain(error, "while its inputs were copied")
                self.move(slot, Move.RELEASE, then=lambda: self.reject(request, refusal))
                return
        self._launch(slot, request, program)

    def _staged(self, slot: Slot, _: None, error: BaseException | None) -> None:
        request = self.resume(slot, error, "while its inputs were copied")
        if request is not None:
            assert slot.program is not None
            self._launch(slot, request, slot.program)

    # On the device...

    def _launch(self, slot: Slot, request: Request, program: Program) -> None:
        self.follow_latest(slot)
        try:
            submit_request(self.device, slot, request, program)
        except DeviceError as error:
            self.device.fail(error)
        except Exception as error:
            self._launch_failed(slot, error)
        else:
            self.move(slot, LAUNCH)
            self.count(program)
            self._watch(slot, program)
            self._prepare_next(request, program)

    def _prepare_next(self, request: Request, program: Program) -> None:
        """Allocate results for the next call while the device is busy: it mostly comes from the same caller."""
        if not request.results or request.batch is not None or not program.captured or request.origin is None:
            return
        try:
            program.spare = request.origin.handle, allocate(self.device, request.origin, program.outputs)
        except DeviceError as error:
            self.device.fail(error)
        except Exception as error:  # such as out of memory: the next launch allocates again, and gets the error
            _log.debug("results for the next launch could not be allocated: %r", error)

    def _watch(self, slot: Slot, program: Program, *, has_ended: bool = False) -> None:
        """Poll the produce event of this slot's request, which is in the slot's lane from now on.

        With `has_ended`, the work has probably ended, and no task is running.
        """
        request = slot.request
        assert request is not None
        if not self._overlap:
            self.latest = slot
        request.query = slot.query
        request.confirm = slot.confirm
        request.on_done = slot.on_done
        request.estimate = program.estimate
        request.hang_timeout = self.hang_timeout
        if has_ended:
            self.hub.add_ended(slot.lane, request, slot.when_complete)
        else:
            self.hub.add(slot.lane, request, slot.when_complete)

    def _stage_and_submit(self, slot: Slot, request: Request, program: Program) -> None:
        """Copy in and submit, on a worker thread, for a program whose launch occupies the thread."""
        self.device.prepare_thread()
        copy_in(request, program)
        submit_request(self.device, slot, request, program)

    def _submitted(self, slot: Slot, _: None, error: BaseException | None) -> None:
        state = self.machine.states[slot.index]
        if state is BROKEN:
            return
        assert slot.program is not None
        if isinstance(error, DeviceError):
            self.device.fail(error)
        elif error is not None:
            self._launch_failed(slot, error)
        else:
            if state is State.PREPARING:
                self.move(slot, LAUNCH)
            self.count(slot.program)
            try:
                self.pass_turn(slot)
            except Exception as second:
                self.lost_track(second)
            else:
                self._watch(slot, slot.program, has_ended=True)  # a draining slot too is free only when the device is done

    def _launch_failed(self, slot: Slot, error: BaseException) -> None:
        """Fail a request whose launch raised, and drain its slot, because part of the work may be on the stream already."""
        request = slot.request
        assert request is not None
        self.reject(request, self.explain(error, "while it was launched"))
        if self.machine.states[slot.index] is not DRAINING:
            if self.machine.states[slot.index] is State.CLAIMED:
                self.move(slot, LAUNCH)
            self.move(slot, Move.RELEASE)
        assert slot.program is not None
        try:
            self.pass_turn(slot)
            slot.stream.record(slot.event)
        except Exception as second:
            self.lost_track(second)
        else:
            self._watch(slot, slot.program)

    # Coming out...

    def _completed(self, slot: Slot, error: BaseException | None) -> None:
        request = slot.request
        assert request is not None
        state = self.machine.states[slot.index]
        if request.route is not None and request.batch is None and error is None and state is IN_FLIGHT:
            # The end of the short path: the slot goes to the next request, and then this one is resolved.
            program = slot.program
            assert program is not None
            if request.times is not None:
                self._observe(slot, request.times)
            results: Any
            if request.kind is DEVICE:
                results = request.results
                complete = self.complete
                for result in results:
                    result._trt_produce_event = complete
            else:
                views = self._small_views(program)
                if views is None:
                    self._copy_out(slot, request)
                    return
                try:
                    results = _owned(request, program, views)
                except BaseException as failure:  # out of memory, or an interrupt: the slot must not stay in flight
                    self._copied(slot, None, failure)
                    if not isinstance(failure, Exception):
                        raise
                    return
            names = program.names
            packed = results[0] if names.is_bare else names.pack(results)
            grant = self.machine.move(slot.index, COPIED)
            slot.request = slot.program = request.slot = None
            try:
                if grant is not None:
                    self._serve(grant)
            finally:
                if not request.is_done:
                    self.counters.completed += 1
                    request.resolve(packed)
                    self.hub.finished.append(request)  # not `finish`: this is a callback of the hub, which is polling
                if self._idle is not None:
                    self._check_idle()
            return
        if state is BROKEN:
            return
        times = request.times
        if times is not None:
            self._observe(slot, times)
        if error is None and state is IN_FLIGHT:
            self._hand_out(slot, request)
        elif isinstance(error, DeviceError):
            self.failed_on_device(error)
        elif state is DRAINING:
            self.move(slot, COMPLETE)
        else:
            assert error is not None
            self._failed(slot, request, self.explain(error, "while it ran"))

    def _observe(self, slot: Slot, times: Times) -> None:
        times.seen, times.ran, times.late = time.perf_counter(), slot.lane.ran, slot.lane.late

    def _hand_out(self, slot: Slot, request: Request) -> None:
        if request.kind is not DEVICE:
            self._copy_out(slot, request)
            return
        complete = self.complete
        results: Sequence[Any] = request.results
        if request.batch is not None:
            results = request.batch.handed_out(results)
        for result in results if request.batch is None else chain.from_iterable(results):
            carry(result, complete)
        self._finish(slot, request, results)

    def _copy_out(self, slot: Slot, request: Request) -> None:
        program = slot.program
        assert program is not None
        views = self._small_views(program)
        if views is None:
            # Until the copy is done the slot stays IN_FLIGHT, and the worker owns its memory.
            views = [program.output_view(i) for i in range(len(program.outputs))]
            self.work(slot, partial(_owned, request, program, views), self._copied)
            return
        try:
            results = _owned(request, program, views)
        except BaseException as error:  # out of memory, or an interrupt: the slot must not stay in flight
            self._copied(slot, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._finish(slot, request, results)

    def _small_views(self, program: Program) -> list[Any] | None:
        """Return views of the outputs; None if together they are too large to be copied on the loop."""
        views = [program.output_view(i) for i in range(len(program.outputs))]
        return views if sum([view.nbytes for view in views]) <= COPY_ON_LOOP_BYTES else None

    def _copied(self, slot: Slot, results: Sequence[Any] | None, error: BaseException | None) -> None:
        request = slot.request
        assert request is not None
        state = self.machine.states[slot.index]
        if state is BROKEN:
            return
        if state is DRAINING:
            self.move(slot, COMPLETE)
        elif error is not None:
            self._failed(slot, request, self.explain(error, "while its results were copied"))
        else:
            assert results is not None
            self._finish(slot, request, results)

    def _failed(self, slot: Slot, request: Request, error: AiotrtError) -> None:
        self.move(slot, COPIED, then=lambda: self.reject(request, error))

    def _finish(self, slot: Slot, request: Request, results: Sequence[Any]) -> None:
        """Pass the slot on, and then give the caller its results, or each item of a batch its own."""
        assert slot.program is not None
        pack, batch = slot.program.names.pack, request.batch
        packed = pack(results) if batch is None else [pack(one) if one else None for one in results]

        def resolve() -> None:
            if not request.is_done:
                self.counters.completed += 1
                self.hub.finish(request)  # first: a batch ends before its items
                request.resolve(packed if batch is None else None)
                if batch is not None:
                    batch.settle(packed, None)

        self.move(slot, COPIED, then=resolve)

    # Errors for callers...

    def reject(self, request: Request, error: BaseException) -> None:
        """Fail a request with `error`, unless it was cancelled or has ended already."""
        if not request.is_done:
            self.counters.failed += 1
            self.hub.finish(request)
            request.reject(error)
            if request.batch is not None:
                request.batch.settle((), error)

    def failed(self, error: BaseException, when: str) -> AiotrtError:
        """Return the error that a caller gets for this one. A `DeviceError` breaks the device first."""
        if isinstance(error, DeviceError):
            self.device.fail(error)
        return self.explain(error, when)

    def failed_on_device(self, error: DeviceError) -> None:
        """Handle a `DeviceError` found while polling. A hang breaks this model only; any other fault breaks the device."""
        if isinstance(error, DeviceHangError):
            self.break_down(error)
        else:
            self.device.fail(error)

    def explain(self, error: BaseException, when: str) -> AiotrtError:
        """Return the error that a caller gets for this exception; `when` says what was being done."""
        if isinstance(error, AiotrtError):
            return error
        if isinstance(error, torch.OutOfMemoryError):
            when += "; use fewer slots, smaller shapes or a smaller graph cache"
        explained = EngineError(f"{self.recipe.engine.name} raised {type(error).__name__} {when}: {error}")
        explained.__cause__ = error
        return explained

    def resume(self, slot: Slot, error: BaseException | None, when: str) -> Request | None:
        """Go on with a slot that a worker thread is done with. Returns the request, unless it was abandoned or failed."""
        request = slot.request
        assert request is not None
        state = self.machine.states[slot.index]
        if state is BROKEN:
            return None
        if isinstance(error, DeviceError):
            self.device.fail(error)
            return None
        if state is DRAINING:
            self.move(slot, COMPLETE)
            return None
        self.move(slot, Move.PREPARED)
        if error is not None:
            self.move(slot, Move.RELEASE, then=lambda: self.reject(request, self.explain(error, when)))
            return None
        return request

    def count(self, program: Program) -> None:
        """Count a launch."""
        if program.captured:
            self.counters.replays += 1
        else:
            self.counters.fallback_runs += 1

    def follow_latest(self, slot: Slot) -> None:
        """Without overlap, make this slot's next launch wait, on the device, for the latest launch of another slot."""
        latest = self.latest
        slot.predecessor = None if latest is None or latest is slot else latest.turn

    def pass_turn(self, slot: Slot) -> None:
        """Without overlap, make the next launch wait for the work on this slot's stream, and for the launch before it.

        Called after a launch that may not have waited for the one before it: it failed, or a worker thread submitted it.

        Raises: what the device raises. The order of the launches is unknown then.
        """
        self.follow_latest(slot)
        pass_turn(slot)

    # Leases...

    def lease_completed(self, slot: Slot, number: int, error: BaseException | None) -> None:
        """Handle a lease's launch that has failed, or that ended after its lease."""
        if isinstance(error, DeviceError):
            self.failed_on_device(error)
        elif number == slot.launches:  # else it is an earlier launch of several
            if self.machine.states[slot.index] is DRAINING and slot.is_forgotten:
                self._drain(slot)
            else:
                self.move(slot, COMPLETE)

    def submit_in_worker(self, slot: Slot, job: Callable[[], None], then: Callable[[BaseException | None], None]) -> None:
        """Submit, on a worker thread, a lease's launch that occupies its thread."""
        self.move(slot, Move.PREPARE)
        slot.predecessor = None  # worker launches are not ordered: drop the previous launch's predecessor
        self.work(slot, job, lambda slot, _, error: then(error), LAUNCH_LATE)

    def end_lease(self, slot: Slot) -> None:
        """Release a lease's slot. The lease's consumer events are in the slot's `gates` already."""
        self.move(slot, Move.RELEASE)

    def reclaim(self, slot: Slot) -> None:
        """Reclaim a forgotten lease's slot. Its consumers are unknown, so it is free only when the whole device is idle."""
        if self.is_discarded:
            return  # the model was collected with the lease; memory that may still be in use is kept
        state = self.machine.states[slot.index]
        if state in (IN_FLIGHT, State.PREPARING):
            slot.is_forgotten = True
            self.move(slot, Move.RELEASE)
        elif state in (State.CLAIMED, State.READABLE):
            self.move(slot, Move.PREPARE)
            self.move(slot, Move.RELEASE)
            self._drain(slot)

    def _drain(self, slot: Slot) -> None:
        def drained(slot: Slot, _: None, error: BaseException | None) -> None:
            slot.is_forgotten = False
            self.resume(slot, error, "while a forgotten lease was reclaimed")

        self.work(slot, self.device.synchronize, drained, "a lease was forgotten, and the device was not idle")

    # Moving slots...

    def move(self, slot: Slot, move: Move, *, then: Callable[[], None] | None = None) -> None:
        """Apply a move. If it frees the slot, forget its request and serve the next one in the queue. Then call `then`.

        The next request is launched before this one is resolved, so that the device has work while the caller's
        coroutine runs.
        """
        machine = self.machine
        grant = machine.move(slot.index, move)
        if grant is not None or machine.states[slot.index] is FREE:
            request, slot.request, slot.program = slot.request, None, None
            if request is not None:
                request.slot = None
        try:
            if grant is not None:
                self._serve(grant)
        finally:  # an interrupt while the next request is served must not leave this one's caller waiting forever
            if then is not None:
                then()
            if self._idle is not None:
                self._check_idle()

    def work(
        self,
        slot: Slot,
        job: Callable[[], Any],
        then: Callable[[Slot, Any, BaseException | None], object],
        late: str = "a call's inputs or results were not copied",
    ) -> None:
        """Run `job` on a worker thread, and then call `then` on the loop's thread, even if the job raised.

        The job counts as hung after `hang_timeout`; `late` is what the error says.
        """
        alarm = Alarm(self.loop, self.device, self.hang_timeout, late, self.break_down)

        def done(slot: Slot, result: Any, error: BaseException | None) -> None:
            alarm.cancel()
            then(slot, result, error)

        def run() -> None:
            result, error = None, None
            try:
                result = job()
            except BaseException as failure:
                error = failure
            try:
                self.loop.call_soon_threadsafe(done, slot, result, error)
            except RuntimeError:
                # The loop was closed with work pending: no callback can run, and the device may still use the job's result.
                keep(self)
                release_when_idle(self, self.device)

        try:
            self._workers.submit(run)
        except ResourceError as error:
            self.loop.call_soon(done, slot, None, error)

    def evict(self, newest: Program) -> None:
        """Free the programs that exceed the cache's bounds now that `newest` is in it."""
        # A free slot's launches are complete, so each consumer that may still read its outputs has an event in `gates`. The
        # newest program's slot has launched nothing since it was granted, so this holds for its other programs too.
        for program in self.cache.evict(self.busy(self.slots[newest.slot]), newest):
            self.counters.evictions += 1
            self.retire(program, list(self.slots[program.slot].gates))

    def retire(self, program: Program, gates: Sequence[Event]) -> None:
        """Free a program in a worker thread, once its last readers are done."""

        def job() -> None:
            self.device.prepare_thread()  # it may be this thread's first job, and destroying an event needs a context
            retire(program, gates)

        self._workers.submit(job)

    def busy(self, besides: Slot) -> list[int]:
        """Return the indices of the slots that are not free, without this one."""
        return [s.index for s in self.slots if s is not besides and self.machine.states[s.index] is not FREE]

    # Breaking and closing...

    def _device_failed(self, error: DeviceError) -> None:
        """Break the model after a fault of its device. Called on the thread that found the fault."""
        if asyncio._get_running_loop() is self.loop:
            self.break_down(error)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits there any more
                self.loop.call_soon_threadsafe(self.break_down, error)

    def break_down(self, error: DeviceError) -> None:
        """Break the model: give up every slot, and fail all waiting callers with `error`."""
        if self.broken is not None:
            return
        self.broken = error
        keep(self)  # the device may still write to any of its memory
        waiting = [grant.ticket for grant in self._granted] + self.machine.withdraw_all()
        self._granted.clear()
        for slot in self.slots:
            if self.machine.states[slot.index] is not BROKEN:
                self.machine.move(slot.index, Move.FAULT)
            if slot.request is not None:
                self.reject(slot.request, error)
        for request in waiting:
            request.is_queued = False
            self.reject(request, error)
        self._fail_others(error)
        self._check_idle()

    def lost_track(self, error: Exception) -> None:
        """Break the device or the model: the end of a failed launch cannot be seen, so its slot can never be used again."""
        if isinstance(error, DeviceError):
            self.device.fail(error)
        else:
            self.break_down(DeviceError(f"a failed launch could not be followed up: {error}"))

    def _fail_others(self, error: AiotrtError) -> None:
        replays = list(self.submitting)
        for slot in self.slots:
            replays += [pending for pending in slot.lane.pending if isinstance(pending, Replay)]
        for replay in replays:
            if not replay.is_done:
                replay.set_exception(error)
        for told in self.on_failure:
            told(error)

    def refuse(self) -> None:
        """Accept no more requests."""
        self.closing = True

    def drop(self) -> None:
        """Fail all waiting callers; work on the device drains."""
        error = ModelClosedError(f"{self.recipe.engine.name} was closed while this call waited")
        for waiting in self.machine.withdraw_all():
            waiting.is_queued = False
            self.reject(waiting, error)
        for slot in self.slots:
            request = slot.request
            if request is None or self.machine.states[slot.index] in (BROKEN, DRAINING):
                continue
            request.is_revoked = True
            self._take_back(slot, request)
            self.reject(request, error)  # the holder of a lease gets an error from its next operation
        self._fail_others(error)
        self._check_idle()

    def _take_back(self, slot: Slot, request: Request) -> None:
        record_readers, request.record_readers = request.record_readers, None
        try:
            if record_readers is not None:  # the holder of the lease will not record its consumers itself any more
                record_readers()
        except Exception as error:
            self.failed(error, "while a lease was taken back")
            if self.broken is None:
                self.reclaim(slot)
        else:
            self.move(slot, Move.RELEASE)

    def idle(self) -> asyncio.Future[None]:
        """Return a future that is done when no request waits and every slot is free (or broken)."""
        idle = self._idle = self.loop.create_future()
        self._check_idle()
        return idle

    def consumed(self) -> asyncio.Future[None]:
        """Return a future that is done when all slots' consumers are done, or count as hung, which breaks the model."""
        passed: asyncio.Future[None] = self.loop.create_future()
        gates = [gate for slot in self.slots for gate in slot.gates]
        if self.broken is not None or not gates:
            passed.set_result(None)
            return passed

        def done(error: BaseException | None) -> None:
            if isinstance(error, DeviceError):
                self.break_down(error)
            if not passed.done():
                passed.set_result(None)

        self.when_passed(gates, done)
        return passed

    def when_passed(self, gates: Sequence[Event], then: Callable[[BaseException | None], None]) -> None:
        """Call `then` with None when all consumers are done, or with the error of the first query that raised."""
        lane = Lane()
        left = len(gates)

        def passed(error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                self.hub.forget(lane)
            if error is not None or left == 0:
                then(error)

        for gate in gates:
            self.hub.watch(
                lane, partial(has_passed, self.device, gate), passed, hang_timeout=self.hang_timeout,
                when_complete=partial(self.device.when_complete, gate) if self.device.tells else None,
            )  # fmt: skip

    def _is_idle(self) -> bool:
        return self.machine.waiting == 0 and all(state in (FREE, BROKEN) for state in self.machine.states)

    def _check_idle(self) -> None:
        if self._idle is not None and not self._idle.done() and self._is_idle():
            self._idle.set_result(None)
            self._idle = None

    def detach(self) -> None:
        """Release the hub and stop listening to the device: the first half of closing, on the loop's thread."""
        self._stop_listening()
        for slot in self.slots:
            self.hub.forget(slot.lane)
        self.hub.release()

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked after the model was loaded."""
        return self._forks != _forks

    def discard(self) -> None:
        """Release a model that was garbage collected without being closed. Any thread may run this, so it frees nothing."""
        self.closing = self.is_discarded = True
        self._stop_listening()
        if not self._is_idle():
            keep(self)  # the device may still be using its memory
            with contextlib.suppress(ResourceError):
                # In a new pool: the garbage collection has ended the threads of `_workers`.
                self.device.workers(1).submit(release_when_idle, self, self.device)
        self._workers.shutdown(wait=False)
        if self.loop.is_closed():
            self.hub.release()
        else:
            self.loop.call_soon_threadsafe(self.hub.release)

    def free(self) -> None:
        """Free everything: the second half of closing, on a worker thread. A broken executor keeps its memory instead."""
        self.device.prepare_thread()
        if self.broken is not None:
            self._workers.shutdown(wait=False)  # a worker may be waiting for a device that never answers
            return
        self._workers.shutdown(wait=True)
        for program in self.cache.clear():
            retire(program, self.slots[program.slot].gates)
        for slot in self.slots:
            slot.stream.close()
        self.recipe.engine.close()


def _owned(request: Request, program: Program, views: Sequence[Any]) -> Sequence[Any]:
    """Copy these views of the outputs to memory that belongs to the callers. A worker may call this."""
    if request.batch is not None:
        return request.batch.copied(program, views)
    kind = request.kind
    return [own(views[i], output.dtype, kind) for i, output in enumerate(program.outputs)]


def _device_failed(executor: weakref.ref[Executor], error: DeviceError) -> None:
    # A weak reference: the device outlives its models, and must not keep one whose loop was closed with calls pending.
    found = executor()
    if found is not None:
        found._device_failed(error)


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # a process has one fork count
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)
