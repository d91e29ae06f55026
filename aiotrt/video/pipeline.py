"""`Pipeline`: run models on frames of many sources; each source keeps its own order and rate."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias

from aiotrt.completion.hub import check_asyncio
from aiotrt.errors import DeviceError, InputError, ModelBrokenError, ModelClosedError, UsageError
from aiotrt.video.cancellation import own_cancellation_only, wait_until_done
from aiotrt.video.frames import Frame
from aiotrt.video.lanes import Lane
from aiotrt.video.loop_workers import LoopWorkers
from aiotrt.video.policies import Keep, Policy
from aiotrt.video.reports import Kind, Listener, Report
from aiotrt.video.runners import ModelLike, Runner, check_models, runner_of
from aiotrt.video.sinks import Sink, SinkLike, sink_of
from aiotrt.video.sources import Source, SourceLike
from aiotrt.video.sources import open as open_source
from aiotrt.video.status import PipelineStatus

__all__ = ["Pipeline", "number_duplicates"]

log = logging.getLogger("aiotrt.video")

Sinks: TypeAlias = SinkLike | Iterable[SinkLike] | Mapping[str, SinkLike | Iterable[SinkLike]]


class Pipeline:
    """Frames of many sources through models to sinks: ``async with Pipeline(...) as pipeline: await pipeline.wait()``.

    The pipeline calls the model once per frame, so a model loaded with ``batching=`` batches frames of different sources.
    Entering opens the sinks and starts all tasks. Leaving the block stops the sources, waits until every frame read has
    reached its sinks, and closes everything; after an exception or a cancellation the frames are dropped instead. No task,
    thread, open file or slot is left: leaving waits for this even if the task is cancelled again.

    Args:
        models: a model; several by name, each of which gets every frame; or a coroutine function from `Frame` to a result,
            such as one that calls two models in sequence.
        sources: one, several, or several by name. Each is an argument of `video.open`, or a source that it returned.
        sinks: one or several, for the results of all sources; or a dict of these by the source's name. A sink is a `Sink`,
            or a function or coroutine function of a `Result`.
        policy: "every_frame", "latest", a `Policy`, or a dict of these by the source's name. By default, every frame of
            files and iterables, and the latest of live sources.
        in_flight: the maximum number of frames submitted to the models at once; by default two for each slot, one on the
            device and one queued.
        sink_buffer: the number of results that may wait for a sink. If it is full, a source with "every_frame" waits; for
            a source with "latest", the oldest waiting result is dropped for that sink, and counted.
        threads: the number that convert frames.
        listener: called with a `Report` for each problem that does not end the pipeline. By default it is logged.
        clock: in seconds; for tests in virtual time.

    Raises:
        InputError: there is no model or no source, a model, source or sink has the wrong type, or an option is out of
            range.
    """

    def __init__(
        self,
        models: ModelLike,
        sources: SourceLike | Iterable[SourceLike] | Mapping[str, SourceLike],
        sinks: Sinks = (),
        *,
        policy: Keep | Policy | Mapping[str, Keep | Policy] | None = None,
        in_flight: int | None = None,
        sink_buffer: int = 4,
        threads: int = 2,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("in_flight", in_flight), ("sink_buffer", sink_buffer), ("threads", threads)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value!r}")
        check_models(models)
        self._models = models
        self._in_flight = in_flight
        self._threads = threads
        self._clock = clock
        self._listener = listener or _log
        self._sinks: list[Sink] = []
        self._lanes: dict[str, Lane] = {}
        known: dict[int, Sink] = {}  # by the id of the given object: a sink for several sources is opened once
        found = _sources(sources)
        number_duplicates(found)
        _check_names([source.name for source in found], policy, sinks)
        for source in found:
            wanted = sinks.get(source.name, ()) if isinstance(sinks, Mapping) else sinks
            mine = []
            for given in [wanted] if isinstance(wanted, Sink) or callable(wanted) else wanted:
                sink = known.setdefault(id(given), sink_of(given))
                if sink not in self._sinks:
                    self._sinks.append(sink)
                mine.append(sink)
            self._lanes[source.name] = Lane(self, source, _policy_of(source, policy), mine, sink_buffer)
        self._pool: LoopWorkers | None = None
        self._opened: list[Sink] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._fatal: BaseException | None = None
        self._reports: Counter[str] = Counter()  # reports that belong to no source
        self._state = "closed"

    async def __aenter__(self) -> Self:
        if self._state != "closed":
            raise UsageError("a pipeline can be entered only once; create another one")
        check_asyncio("a pipeline")
        self._state = "running"
        self._pool = LoopWorkers(self._threads, "aiotrt-video")
        try:
            self.runner: Runner = runner_of(self._models, self._pool, self._clock, self._in_flight)
            self.limit = self._in_flight or self.runner.capacity
            self.permits = asyncio.Semaphore(self.limit)
            for sink in self._sinks:
                self._opened.append(sink)
                await sink.open()
        except BaseException:
            await self._close()
            raise
        self._ended = asyncio.get_running_loop().create_future()
        for lane in self._lanes.values():
            self._tasks.append(asyncio.create_task(self._guard(lane), name=f"aiotrt video: {lane.source.name}"))
        self._supervisor = asyncio.create_task(self._supervise(), name="aiotrt video")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
                await self.wait()
        finally:
            await self._close()

    async def wait(self) -> None:
        """Wait until all sources have ended, and all their results have reached their sinks.

        A source that fails ends, and its status contains the error; the other sources continue. A frame that a model
        rejects and a result for which a sink raises are counted, and the source continues. Cancelling this has no effect on
        the pipeline.

        Raises:
            ModelBrokenError, ModelClosedError, DeviceError: a model is not usable any more; all lanes have stopped.
            UsageError: the pipeline was not entered.
        """
        if self._ended is None:
            raise UsageError("the pipeline was not entered: use 'async with'")
        await asyncio.shield(self._ended)

    def pause(self, source: str | None = None) -> None:
        """Stop processing frames of one source, or of all. A live source continues; its policy drops frames.

        Raises:
            UsageError: there is no source of this name.
        """
        for lane in self._chosen(source):
            lane.resumed.clear()

    def resume(self, source: str | None = None) -> None:
        """Continue to process frames of one source, or of all.

        Raises:
            UsageError: there is no source of this name.
        """
        for lane in self._chosen(source):
            lane.resumed.set()

    def stop(self, source: str | None = None) -> None:
        """Stop reading one source, or all. Frames that were read are still processed; `wait` waits for them.

        Raises:
            UsageError: there is no source of this name.
        """
        if source is None and self._state == "running":
            self._state = "stopping"
        for lane in self._chosen(source):
            lane.stop()

    def status(self) -> PipelineStatus:
        """Return a snapshot of all states and counts."""
        now = self._clock()
        sources = {name: lane.status(now) for name, lane in self._lanes.items()}
        return PipelineStatus(
            self._state,
            sources,
            sum(status.in_flight for status in sources.values()),
            self.limit if self._state != "closed" else 0,
            sum(status.completed for status in sources.values()),
            sum(status.dropped for status in sources.values()),
            sum(status.fps for status in sources.values()),
            _limit([status.limited_by for status in sources.values()]),
            dict(self._reports),
        )

    @property
    def clock(self) -> Callable[[], float]:
        """The clock for all times, in seconds."""
        return self._clock

    def report(self, report: Report) -> None:
        """Pass a report to the listener, and log an exception that it raises."""
        try:
            self._listener(report)
        except Exception:
            log.exception("the listener raised for %s", report)

    def _chosen(self, source: str | None) -> Iterable[Lane]:
        if source is None:
            return self._lanes.values()
        if source not in self._lanes:
            raise UsageError(f"there is no source {source!r}; there are {', '.join(self._lanes)}")
        return [self._lanes[source]]

    async def _guard(self, lane: Lane) -> None:
        """Run a lane. An error that makes a model unusable cancels the other lanes too."""
        try:
            await lane.run()
        except (ModelBrokenError, ModelClosedError, DeviceError) as error:
            if self._fatal is None:
                self._fatal = error
                for task in self._tasks:
                    if task is not asyncio.current_task():
                        task.cancel()

    async def _supervise(self) -> None:
        """Resolve `_ended`, on which `wait` waits, when all lanes have ended."""
        assert self._ended is not None
        await asyncio.wait(self._tasks)
        self._state = "ended"
        raised = (task.exception() for task in self._tasks if not task.cancelled())
        failure = self._fatal or next((error for error in raised if error is not None), None)
        if self._ended.done():
            return
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)
            self._ended.exception()  # retrieved, or asyncio would log it if nothing waits

    async def _close(self) -> None:
        """Close everything, even when cancelled again; otherwise threads and incomplete video files would remain."""
        await wait_until_done(asyncio.create_task(self._end(), name="aiotrt video: closing"))

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._supervisor is not None:
            await asyncio.wait([self._supervisor])
        while self._opened:
            sink = self._opened.pop()
            try:
                with own_cancellation_only():
                    await sink.aclose()
            except Exception as error:
                self._reports[Kind.SINK.value] += 1
                self.report(Report(Kind.SINK, "", f"{sink.name} could not be closed: {error}", error))
        self._state = "ended"
        if self._pool is not None:
            self._pool.shutdown()  # all of its users have waited for it, so its threads are idle and end at once


def _sources(sources: Any) -> list[Source]:
    if isinstance(sources, Mapping):
        found = [open_source(source, name=name) for name, source in sources.items()]
        for source, name in zip(found, sources, strict=True):
            source.name = name
    elif isinstance(sources, (list, tuple)) and not _is_frames(sources):
        found = [open_source(source) for source in sources]
    else:
        found = [open_source(sources)]
    if not found:
        raise InputError("a pipeline needs at least one source")
    return found


def number_duplicates(sources: Sequence[Source]) -> None:
    """Append a number to the names of sources that have the same name."""
    names = [source.name for source in sources]
    for i, source in enumerate(sources):
        if names.count(source.name) > 1:
            source.name = f"{source.name} {i}"


def _is_frames(values: Any) -> bool:
    """Return whether a list holds the frames of one source, rather than several sources."""
    return bool(values) and all(isinstance(value, Frame) or hasattr(value, "dtype") for value in values)


def _check_names(names: Iterable[str], *by_name: object) -> None:
    for given in by_name:
        unknown = set(given) - set(names) if isinstance(given, Mapping) else set()
        if unknown:
            raise InputError(f"there is no source {min(unknown)!r}; there are {', '.join(names)}")


def _policy_of(source: Source, given: Any) -> Policy:
    if isinstance(given, Mapping):
        given = given.get(source.name)
    if given is None:
        # An older frame of a live source is useless once there is a newer one.
        return Policy("latest") if source.is_live else Policy()
    return given if isinstance(given, Policy) else Policy(given)


def _limit(limits: Sequence[str]) -> str:
    return "models" if "models" in limits else max(limits, key=limits.count)


def _log(report: Report) -> None:
    log.warning("%s: %s: %s", report.source or "sinks", report.kind.value, report.detail)
