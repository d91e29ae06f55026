"""The progress of a build, and its cancellation, which is possible only from the progress callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiotrt._install import install_hint
from aiotrt.errors import InputError, MissingDependencyError

__all__ = ["BuildProgress", "Report", "make_monitor", "reporter"]


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """The progress of a build.

    Attributes:
        phase: TensorRT's name for the current phase; it differs between versions.
        step: how many of the phase's steps are done.
        steps: how many steps the phase has.
        fraction: the completed part of the whole build, 0 to 1; never decreases. Steps take unequal times, so it does not
            predict the remaining time.
    """

    phase: str
    step: int
    steps: int
    fraction: float


Report: TypeAlias = Callable[[BuildProgress], object]


@contextmanager
def reporter(progress: bool | Report | None, label: str) -> Iterator[Report | None]:
    """Yield the function that reports progress: the caller's own, for True one that draws a bar on standard error, or None.

    Raises:
        InputError: `progress` is neither a bool, None nor a function.
        MissingDependencyError: `progress` is True, and rich is not installed.
    """
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        if not callable(progress):
            raise InputError(f"progress must be True, None or a function, got {type(progress).__name__}")
        yield progress
    else:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        except ImportError as error:
            raise MissingDependencyError(f"progress=True draws its bar with rich; {install_hint('cli')}") from error
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=1.0, phase="")

            def report(progress: BuildProgress) -> None:
                bar.update(task, completed=progress.fraction, phase=progress.phase)

            yield report
            bar.update(task, completed=1.0, phase="")


class Phases:
    """The builder's nested phases, combined into one fraction."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done; the innermost is the last
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> BuildProgress:
        """Record that a phase begins inside `parent`."""
        self._open[name] = (parent, max(steps, 1), 0)
        return self._at(name)

    def step(self, name: str, step: int) -> BuildProgress:
        """Record that step number `step` of a phase is done."""
        parent, steps, _ = self._open.get(name, (None, step + 1, 0))
        self._open[name] = (parent, steps, min(step + 1, steps))
        return self._at(name)

    def finish(self, name: str) -> None:
        """Record that a phase ends, with or without all its steps done."""
        self._open.pop(name, None)

    def _at(self, name: str) -> BuildProgress:
        _, steps, done = self._open[name]
        fraction, current = 0.0, self._open.get(name)
        while current is not None:
            parent, total, finished = current
            fraction = (finished + fraction) / total if finished < total else 1.0
            current = None if parent is None else self._open.get(parent)
        self._fraction = max(self._fraction, min(fraction, 1.0))
        return BuildProgress(name, done, steps, self._fraction)


def make_monitor(trt: Any, report: Report | None) -> Any:
    """Create a TensorRT progress monitor.

    Its method `cancel()` may be called on any thread: the builder then stops at its next step and returns no engine. An
    exception that `report` raises also cancels the build, and is kept in the attribute `error`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # super() would not construct the C++ object
            self.error: BaseException | None = None
            self._phases = Phases()
            self._lock = threading.Lock()  # TensorRT may call from several threads
            self._cancelled = False

        def cancel(self) -> None:
            self._cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._report(self._phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._report(self._phases.step(phase_name, step))
            return not self._cancelled

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.finish(phase_name)

        def _report(self, progress: BuildProgress) -> None:
            if report is None or self._cancelled:
                return
            try:
                report(progress)
            except BaseException as error:  # an exception that enters TensorRT's C++ code ends the process
                self.error = error
                self._cancelled = True

    return Monitor()
