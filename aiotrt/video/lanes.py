"""The path of one source through a pipeline.

Each source has a lane. One task reads the source into a mailbox, whose policy drops frames or applies backpressure. A second
task takes frames from it as the pipeline permits, and starts an inference task for each. A third collects the results in
the frames' order and gives them to the sinks; each sink has its own mailbox and task. A slow sink therefore fills its own
mailbox and then, if every frame must be kept, delays its own lane, but never another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from aiotrt.errors import DeviceError, ModelBrokenError, ModelClosedError
from aiotrt.video.boxes import Box
from aiotrt.video.cancellation import CancelledElsewhereError, own_cancellation_only
from aiotrt.video.frames import Frame
from aiotrt.video.policies import OVERTAKEN, Policy
from aiotrt.video.reports import Kind, Report
from aiotrt.video.runners import Outcome, Runner
from aiotrt.video.sinks import Result, Sink
from aiotrt.video.sources import Source, SourceState
from aiotrt.video.status import Meter, SinkStatus, SourceStatus

__all__ = ["Lane"]

T = TypeVar("T")


class Shared(Protocol):
    """What all lanes of a pipeline share.

    Attributes:
        runner: runs the models on frames.
        limit: the maximum number of frames in the runner at once.
        permits: a semaphore of that number.
    """

    runner: Runner
    limit: int
    permits: asyncio.Semaphore

    @property
    def clock(self) -> Callable[[], float]:
        """The clock for all times, in seconds."""
        ...

    def report(self, report: Report) -> None:
        """Pass a report to the listener."""
        ...


class Lane:
    """The path of one source through the pipeline."""

    def __init__(self, pipeline: Shared, source: Source, policy: Policy, sinks: Iterable[Sink], buffer: int) -> None:
        self.source = source
        self.resumed = asyncio.Event()
        self.resumed.set()
        self._pipeline = pipeline
        self._frames: Box[Frame] = Box(policy)
        delivery = Policy(policy.keep, buffer=buffer)
        self._outlets = [_Outlet(sink, Box(delivery)) for sink in sinks]
        self._results: asyncio.Queue[tuple[Frame, asyncio.Task[Outcome | None]] | None] = asyncio.Queue()
        self._meter = Meter()
        self._counts: Counter[str] = Counter()
        self._in_flight = 0
        self._is_held = False  # a result waits for room in a sink's mailbox
        self._reader: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._error: str | None = None
        source.clock = pipeline.clock
        source.listener = pipeline.report

    async def run(self) -> None:
        """Process the source until all of its results have reached the sinks.

        If cancelled, the frames in the lane are dropped, and the source is closed.

        Raises:
            ModelBrokenError, ModelClosedError, DeviceError: a model is not usable any more.
        """
        self._room = asyncio.Semaphore(self._pipeline.limit)
        inferences: set[asyncio.Task[Outcome | None]] = set()
        try:
            async with asyncio.TaskGroup() as group:
                self._reader = group.create_task(self._read())
                # A callback, because a task that is cancelled before its first step does not run its `finally`.
                self._reader.add_done_callback(lambda _: self._frames.close())
                if self._is_stopped:
                    self._reader.cancel()
                for outlet in self._outlets:
                    group.create_task(self._deliver(outlet))
                group.create_task(self._collect())
                await self._dispatch(inferences)
        except BaseExceptionGroup as raised:
            raise raised.exceptions[0] from None
        finally:
            for task in inferences:
                task.cancel()
            if inferences:
                await asyncio.wait(inferences)
            await self.source.aclose()

    def stop(self) -> None:
        """Stop reading the source. Frames that were read are still processed."""
        self._is_stopped = True
        self.resumed.set()
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        """Read frames from the source into the mailbox."""
        frames = self._frames
        try:
            while True:
                if not frames.mail.has_room:
                    await frames.wait_for_room()
                frame = await self.source.take()
                if frame is None:
                    return
                self._meter.add("decode", frame.decode_seconds)
                frames.put(frame, frame.received)
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
        except Exception as error:
            self._error = str(error)
            self.source.report(Kind.FAILED, str(error), error)

    async def _dispatch(self, inferences: set[asyncio.Task[Outcome | None]]) -> None:
        """Take frames from the mailbox and start their inference."""
        clock, permits = self._pipeline.clock, self._pipeline.permits
        frames, room = self._frames, self._room
        # Where nothing has to be waited for, nothing is measured: that would take longer than the rest.
        while len(frames) or await self._waiting("source", frames.wait_for_item()):
            if not self.resumed.is_set():
                await self.resumed.wait()
            if (delay := frames.mail.delay(clock())) > 0:
                await asyncio.sleep(delay)
                continue
            if room.locked():
                await self._waiting("sinks" if self._is_held else "models", room.acquire())
            else:
                await room.acquire()
            if permits.locked():
                await self._waiting("models", permits.acquire())
            else:
                await permits.acquire()
            # Take the frame last, because a waiting frame may be replaced or become stale during the waits above.
            frame = frames.take(clock()) if self.resumed.is_set() else None
            if frame is None:
                permits.release()
                room.release()
                continue
            self._meter.add("queue", clock() - frame.received)
            self._in_flight += 1
            task = asyncio.create_task(self._infer(frame))
            inferences.add(task)
            task.add_done_callback(inferences.discard)
            self._results.put_nowait((frame, task))
        self._results.put_nowait(None)

    async def _waiting(self, what: str, awaitable: Awaitable[T]) -> T:
        started = self._pipeline.clock()
        try:
            return await awaitable
        finally:
            self._meter.waited(what, self._pipeline.clock() - started)

    async def _infer(self, frame: Frame) -> Outcome | None:
        """Run the models on a frame; None if a model rejected it or failed."""
        try:
            return await self._pipeline.runner(frame)
        except (ModelBrokenError, ModelClosedError, DeviceError):
            raise
        except Exception as error:
            failure = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            if isinstance(failure, (ModelBrokenError, ModelClosedError, DeviceError)):
                raise failure from None
            self.source.report(Kind.INFERENCE, f"{frame}: {failure}", failure)
            return None
        finally:
            self._in_flight -= 1
            self._pipeline.permits.release()

    async def _collect(self) -> None:
        """Put the results into every sink's mailbox, in the order of the frames."""
        clock = self._pipeline.clock
        try:
            while (entry := await self._results.get()) is not None:
                frame, task = entry
                try:
                    with own_cancellation_only():
                        outcome = await task
                except CancelledElsewhereError as failure:
                    self.source.report(Kind.INFERENCE, f"{frame}: {failure}", failure)
                    outcome = None
                if outcome is None:
                    self._counts["failed"] += 1
                else:
                    now = clock()
                    self._counts["completed"] += 1
                    self._meter.completed(now)
                    if outcome.convert is not None:
                        self._meter.add("convert", outcome.convert)
                    self._meter.add("device", outcome.device)
                    result = Result(frame, outcome.result)
                    for outlet in self._outlets:
                        if not outlet.box.mail.has_room:
                            self._is_held = True
                            await outlet.box.wait_for_room()
                            self._is_held = False
                        outlet.box.put(result, now)
                self._room.release()
        finally:
            for outlet in self._outlets:
                outlet.box.close()

    async def _deliver(self, outlet: _Outlet) -> None:
        """Write the results in a sink's mailbox to the sink."""
        clock = self._pipeline.clock
        while len(outlet.box) or await outlet.box.wait_for_item():
            result = outlet.box.take(clock())
            if result is None:
                continue
            started = clock()
            try:
                with own_cancellation_only():
                    await outlet.sink.write(result)
                outlet.delivered += 1
            except Exception as error:
                outlet.failed += 1
                self.source.report(Kind.SINK, f"{outlet.sink.name} raised for {result.frame}: {error}", error)
            self._meter.add("sink", clock() - started)

    def status(self, now: float) -> SourceStatus:
        """Return a snapshot of the source's state and counts."""
        source = self.source
        state = source.state.value
        if not self.resumed.is_set() and source.state is SourceState.RUNNING:
            state = "paused"
        return SourceStatus(
            state=state,
            error=self._error,
            frames=source.count,
            expected=source.frames,
            waiting=len(self._frames),
            in_flight=self._in_flight,
            completed=self._counts["completed"],
            failed=self._counts["failed"],
            drops=dict(self._frames.mail.drops),
            reports={kind.value: count for kind, count in source.counts.items()},
            fps=self._meter.fps(now),
            latency=self._meter.latency(),
            limited_by=self._meter.limit(),
            sinks=tuple(
                SinkStatus(o.sink.name, o.delivered, o.failed, o.box.mail.drops[OVERTAKEN], len(o.box))
                for o in self._outlets
            ),
        )


class _Outlet:
    """A sink's mailbox and counts for one source."""

    def __init__(self, sink: Sink, box: Box[Result]) -> None:
        self.sink = sink
        self.box = box
        self.delivered = 0
        self.failed = 0
