"""Sinks for results: functions, JSON lines and a progress bar. Sinks that show frames are in `encoding` and `watching`.

A sink gets the results of one source in order, one at a time; those of different sources concurrently. Blocking calls run in
a thread.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

import numpy as np

from aiotrt._install import install_hint
from aiotrt.errors import InputError, MissingDependencyError
from aiotrt.video.detection import Detections
from aiotrt.video.frames import Array, Frame
from aiotrt.video.loop_workers import LoopWorkers

__all__ = [
    "Callback",
    "Draw",
    "JsonLines",
    "Progress",
    "Result",
    "Sink",
    "SinkLike",
    "Threaded",
    "as_json",
    "jsonable",
    "sink_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A frame and the output for it, as passed to sinks.

    Attributes:
        frame: the input.
        output: of the model or the function. All sinks share it, so do not write to it.
    """

    frame: Frame
    output: Any


#: A function from a frame's pixels and the model's output to the pixels to show. It runs in a thread, and must not change
#: its input.
Draw: TypeAlias = Callable[[Array, Any], Array]


class Sink(ABC):
    """Base class of sinks. The pipeline opens a sink on entering, and always closes it on leaving."""

    @property
    def name(self) -> str:
        """The name in status and reports, by default that of the class."""
        return type(self).__name__

    async def open(self) -> None:
        """Prepare for results. An exception makes entering the pipeline fail."""
        return

    @abstractmethod
    async def write(self, result: Result) -> None:
        """Process one result. An exception is counted, and the next result follows."""

    async def aclose(self) -> None:
        """Write buffered results and release resources. An exception is counted."""
        return


SinkLike: TypeAlias = Sink | Callable[[Result], Awaitable[None] | None]


class Callback(Sink):
    """A sink that calls a function or a coroutine function with each `Result`.

    Args:
        function: what to call. A plain function runs on the event loop's thread, and must return quickly.
        in_thread: run a plain function in a worker thread instead.
    """

    def __init__(self, function: Callable[[Result], Awaitable[None] | None], *, in_thread: bool = False) -> None:
        self._function = function
        self._in_thread = in_thread

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(getattr(self._function, "__name__", type(self._function).__name__))

    async def write(self, result: Result) -> None:
        """Call the function with a result."""
        if self._in_thread:
            await asyncio.to_thread(self._function, result)
            return
        answer = self._function(result)
        if inspect.isawaitable(answer):
            await answer


class Threaded(Sink):
    """Base class of sinks that process results in their own thread, one at a time."""

    def __init__(self) -> None:
        self._pool: LoopWorkers | None = None

    async def open(self) -> None:
        """Start the thread and call `begin` in it."""
        self._pool = LoopWorkers(1, "aiotrt-sink")
        await self._in_thread(self.begin)

    async def write(self, result: Result) -> None:
        """Call `take` in the thread. If this is cancelled, `take` continues to run."""
        await self._in_thread(lambda: self.take(result))

    async def aclose(self) -> None:
        """Call `end` in the thread, and end the thread."""
        if self._pool is not None:
            try:
                await self._in_thread(self.end)  # runs after a cancelled write that is still in the thread
            finally:
                self._pool.shutdown()  # the thread is idle, and ends at once
                self._pool = None

    def begin(self) -> None:
        """Prepare for results. Called in the thread."""
        return

    @abstractmethod
    def take(self, result: Result) -> None:
        """Process one result. Called in the thread."""

    def end(self) -> None:
        """Write buffered results and release resources. Called in the thread, even if `begin` raised."""
        return

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


class JsonLines(Threaded):
    """A sink that writes a line of JSON for each result: source, index, time and the converted output.

    Numbers that are not finite are written as null, because JSON has none.

    Args:
        path: of the file, which is overwritten; or an open text file, which stays open.
        convert: a function from the output to JSON types; by default arrays become lists, and named results objects.
    """

    def __init__(self, path: str | os.PathLike[str] | IO[str], convert: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._path = path
        self._convert = convert or jsonable
        self._file: IO[str] | None = None

    def begin(self) -> None:
        """Open the file."""
        if isinstance(self._path, (str, os.PathLike)):
            self._file = Path(self._path).open("w", encoding="utf-8")  # noqa: SIM115  # `end` closes it
        else:
            self._file = self._path

    def take(self, result: Result) -> None:
        """Write the line of a result."""
        assert self._file is not None
        self._file.write(as_json(result, self._convert) + "\n")

    def end(self) -> None:
        """Close the file, or flush one that was passed open."""
        if self._file is not None:
            if isinstance(self._path, (str, os.PathLike)):
                self._file.close()
            else:
                self._file.flush()


class Progress(Sink):
    """A sink that shows a progress bar for each source, with frames a second, on standard error.

    Args:
        total: the number of frames by the source's name, where it is known.

    Raises:
        MissingDependencyError: rich is not installed.
    """

    def __init__(self, total: Mapping[str, int] | None = None) -> None:
        try:
            import rich.console
            import rich.progress
        except ImportError as error:
            raise MissingDependencyError(f"a progress bar needs rich; {install_hint('cli')}") from error
        self._total = dict(total or {})
        self._bars: dict[str, Any] = {}
        self._counts: dict[str, tuple[int, float]] = {}
        columns = rich.progress
        self._progress = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TextColumn("{task.fields[fps]:.1f} frames/s"),
            columns.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
        )

    async def open(self) -> None:
        """Show the display."""
        self._progress.start()

    async def write(self, result: Result) -> None:
        """Advance the bar of the result's source."""
        name = result.frame.source
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=self._total.get(name), fps=0.0)
            self._counts[name] = (0, time.perf_counter())
        count, started = self._counts[name]
        self._counts[name] = (count + 1, started)
        fps = (count + 1) / max(1e-9, time.perf_counter() - started)
        self._progress.update(self._bars[name], advance=1, fps=fps)

    async def aclose(self) -> None:
        """Stop the display."""
        self._progress.stop()


def sink_of(given: SinkLike) -> Sink:
    """Convert an argument of a pipeline to a sink.

    Raises:
        InputError: it is neither a sink nor a function.
    """
    if isinstance(given, Sink):
        return given
    if callable(given):
        return Callback(given)
    raise InputError(f"a sink must be a Sink, a function or a coroutine function of a Result, got {type(given).__name__}")


def as_json(result: Result, convert: Callable[[Any], Any]) -> str:
    """Write a result as a line of JSON: source, index, time and the converted output; null for non-finite numbers."""
    frame = result.frame
    row = {"source": frame.source, "index": frame.index, "time": frame.time, "output": convert(result.output)}
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:  # JSON has no NaN or infinity, and other parsers reject those that Python writes
        return json.dumps(_finite(row), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def jsonable(output: Any) -> Any:
    """Convert to JSON types: arrays to lists, named tuples and mappings to objects, detections to objects without masks."""
    if isinstance(output, Detections):
        rows = zip(output.boxes.tolist(), output.scores.tolist(), output.classes.tolist(), strict=True)
        return [{"box": box, "score": score, "class": number} for box, score, number in rows]
    if isinstance(output, Mapping):
        return {str(name): jsonable(value) for name, value in output.items()}
    if hasattr(output, "_asdict"):
        return jsonable(output._asdict())
    if isinstance(output, (list, tuple)):
        return [jsonable(value) for value in output]
    if isinstance(output, (str, int, float, bool, type(None))):
        return output
    return np.asarray(output).tolist()
