"""Where results go: functions, JSON lines and a progress bar. `encoding` and `watching` have those that show frames.

A sink is called for one result of a source at a time, in order; of several sources at once. What blocks runs in a thread.
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
from aiotrt._workers import Workers
from aiotrt.errors import InputError, MissingDependencyError
from aiotrt.video.detection import Detections
from aiotrt.video.frames import Array, Frame

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
    """What a sink gets.

    Attributes:
        frame: what went in.
        output: what the model, or the function, gave for it. It belongs to all sinks together: do not write to it.
    """

    frame: Frame
    output: Any


#: From a frame's pixels and the model's output to the pixels to show; runs in a thread. It must not write to its input.
Draw: TypeAlias = Callable[[Array, Any], Array]


class Sink(ABC):
    """Takes results. Opened when its pipeline is entered, and closed when that is left, whatever happened."""

    @property
    def name(self) -> str:
        """What status and reports call it; the class's name, unless said otherwise."""
        return type(self).__name__

    async def open(self) -> None:
        """Get ready."""
        return

    @abstractmethod
    async def write(self, result: Result) -> None:
        """Take one result. What it raises is counted, and the next result comes all the same."""

    async def aclose(self) -> None:
        """Write out what is left, and let go."""
        return


SinkLike: TypeAlias = Sink | Callable[[Result], Awaitable[None] | None]


class Callback(Sink):
    """A function, or a coroutine function, of a `Result`.

    Args:
        function: a function that is not a coroutine function runs on the loop's thread, and must be quick.
        in_thread: run it in a thread instead.
    """

    def __init__(self, function: Callable[[Result], Awaitable[None] | None], *, in_thread: bool = False) -> None:
        self._function = function
        self._in_thread = in_thread

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self._function, "__name__", type(self._function).__name__))

    async def write(self, result: Result) -> None:
        """See `Sink`."""
        if self._in_thread:
            await asyncio.to_thread(self._function, result)
            return
        answer = self._function(result)
        if inspect.isawaitable(answer):
            await answer


class Threaded(Sink):
    """A sink that works in a thread of its own, one result after the other."""

    def __init__(self) -> None:
        self._pool: Workers | None = None

    async def open(self) -> None:
        """Get ready."""
        self._pool = Workers(1, "aiotrt-sink")
        await self._in_thread(self.begin)

    async def write(self, result: Result) -> None:
        """See `Sink`."""
        await self._in_thread(lambda: self.take(result))

    async def aclose(self) -> None:
        """See `Sink`."""
        if self._pool is not None:
            try:
                await self._in_thread(self.end)  # after what a cancelled write may still do there
            finally:
                self._pool.shutdown()  # idle: the thread ends at once
                self._pool = None

    def begin(self) -> None:
        """In the thread: get ready."""
        return

    @abstractmethod
    def take(self, result: Result) -> None:
        """In the thread: take one result."""

    def end(self) -> None:
        """In the thread: write out what is left, and let go. Also after `begin` has raised."""
        return

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


class JsonLines(Threaded):
    """A line of JSON for each result: source, index, time, and what `convert` makes of the output.

    Numbers that are not finite, which JSON has not, are null.

    Args:
        path: of the file, which is written anew; or an open text file, which stays open.
        convert: from the output to what JSON has; by default arrays become lists, and named results objects.
    """

    def __init__(self, path: str | os.PathLike[str] | IO[str], convert: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._path = path
        self._convert = convert or jsonable
        self._file: IO[str] | None = None

    def begin(self) -> None:
        """Get ready."""
        if isinstance(self._path, (str, os.PathLike)):
            self._file = Path(self._path).open("w", encoding="utf-8")  # noqa: SIM115  # `end` closes it
        else:
            self._file = self._path

    def take(self, result: Result) -> None:
        """See `Threaded`."""
        assert self._file is not None
        self._file.write(as_json(result, self._convert) + "\n")

    def end(self) -> None:
        """See `Threaded`."""
        if self._file is not None:
            if isinstance(self._path, (str, os.PathLike)):
                self._file.close()
            else:
                self._file.flush()


class Progress(Sink):
    """A progress bar for each source, with frames a second, by rich; to standard error.

    Args:
        total: how many frames there are, by the source's name, where that is known.

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
        """Get ready."""
        self._progress.start()

    async def write(self, result: Result) -> None:
        """See `Sink`."""
        name = result.frame.source
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=self._total.get(name), fps=0.0)
            self._counts[name] = (0, time.perf_counter())
        count, started = self._counts[name]
        self._counts[name] = (count + 1, started)
        fps = (count + 1) / max(1e-9, time.perf_counter() - started)
        self._progress.update(self._bars[name], advance=1, fps=fps)

    async def aclose(self) -> None:
        """See `Sink`."""
        self._progress.stop()


def sink_of(given: SinkLike) -> Sink:
    """A sink, from what a pipeline takes as one.

    Raises:
        InputError: it is none.
    """
    if isinstance(given, Sink):
        return given
    if callable(given):
        return Callback(given)
    raise InputError(f"a sink is a Sink, a function or a coroutine function of a Result, not {type(given).__name__}")


def as_json(result: Result, convert: Callable[[Any], Any]) -> str:
    """A result in one line: source, index, time, and what `convert` makes of the output; null for what is not finite."""
    frame = result.frame
    row = {"source": frame.source, "index": frame.index, "time": frame.time, "output": convert(result.output)}
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:  # JSON has no word for them, and what Python writes is refused by others
        return json.dumps(_finite(row), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def jsonable(output: Any) -> Any:
    """Arrays and tensors as lists, named tuples and mappings as objects, detections one object each, without masks."""
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
