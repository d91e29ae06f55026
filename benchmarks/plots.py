"""Plots from the results' files, and from nothing else: `python -m benchmarks plot`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

__all__ = ["MissingMatplotlibError", "draw"]

Record: TypeAlias = Mapping[str, Any]
Series: TypeAlias = dict[str, list[tuple[float, float, float, float]]]  # by name: x, y, and y's least and most over the runs


class MissingMatplotlibError(Exception):
    """matplotlib is not installed."""


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw whatever these results have: latency and CPU over the device's time, throughput over awaiters, lag.

    Raises:
        MissingMatplotlibError: as it says.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingMatplotlibError(f"plots need matplotlib ({error}): pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for record in records:
        part, _, device = str(record["benchmark"]).partition("-")
        for plot in PLOTS.get(part, ()):
            for loop in dict.fromkeys(row["loop"] for row in record["rows"]):
                path = folder / f"{plot.__name__}-{device}-{loop}.svg"
                plot(pyplot, record, [row for row in record["rows"] if row["loop"] == loop], loop, path)
                drawn.append(path)
    return drawn


def latency(pyplot: Any, record: Record, rows: Sequence[Record], loop: str, path: Path) -> None:
    """An await's time over the device's, by the device's."""

    def spread(row: Record) -> tuple[float, float, float, float]:
        device = row["device_seconds"]
        low, high = (1e6 * (limit - device) for limit in row["spread"]["p50"])
        return 1e6 * device, 1e6 * row["overhead"]["p50"], low, high

    _lines(
        pyplot, record, _series(rows, spread), ("device time, us", "p50 over the device's time, us"), loop, path, log=True
    )


def cpu(pyplot: Any, record: Record, rows: Sequence[Record], loop: str, path: Path) -> None:
    """Share of a core, by the device's time."""

    def share(row: Record) -> tuple[float, float, float, float]:
        low, high = (100 * limit for limit in row["spread"]["cpu"])
        return 1e6 * row["device_seconds"], 100 * row["cpu"], low, high

    _lines(pyplot, record, _series(rows, share), ("device time, us", "CPU, % of a core"), loop, path, log=True)


def lag(pyplot: Any, record: Record, rows: Sequence[Record], loop: str, path: Path) -> None:
    """The loop's lag over the idle loop's, by the device's time."""
    idle = record["idle_lag"][loop]["p99"]

    def over(row: Record) -> tuple[float, float, float, float]:
        value = 1e3 * (row["lag"]["p99"] - idle)
        return 1e6 * row["device_seconds"], value, value, value

    measured = [row for row in rows if row["lag"] is not None]
    _lines(
        pyplot,
        record,
        _series(measured, over),
        ("device time, us", "lag p99 over the idle loop's, ms"),
        loop,
        path,
        log=False,
    )


def throughput(pyplot: Any, record: Record, rows: Sequence[Record], loop: str, path: Path) -> None:
    """Share of the ceiling, by awaiters."""

    def share(row: Record) -> tuple[float, float, float, float]:
        low, high = (limit / row["ceiling"] for limit in row["spread"]["rate"])
        return row["setting"]["awaiters"], row["rate"] / row["ceiling"], low, high

    series: Series = {}
    for row in rows:
        if row["way"] == "aiotrt call":
            series.setdefault(f"{row['setting']['us']:,} us, slots {row['setting']['slots']}", []).append(share(row))
    _lines(pyplot, record, series, ("awaiters", "share of the ceiling"), loop, path, log=False)


PLOTS: Final[dict[str, tuple[Callable[[Any, Record, Sequence[Record], str, Path], None], ...]]] = {
    "completion": (latency, cpu, lag),
    "throughput": (throughput,),
}


def _series(rows: Sequence[Record], point: Callable[[Record], tuple[float, float, float, float]]) -> Series:
    series: Series = {}
    for row in rows:
        series.setdefault(row["way"], []).append(point(row))
    return series


def _lines(pyplot: Any, record: Record, series: Series, axes: tuple[str, str], loop: str, path: Path, *, log: bool) -> None:
    figure, plane = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in series.items():
        xs, ys, lows, highs = zip(*sorted(points), strict=True)
        is_ours = name.startswith("aiotrt") or "slots" in name
        (line,) = plane.plot(
            xs, ys, marker="o", linewidth=2.5 if is_ours else 1, linestyle="-" if is_ours else "--", label=name
        )
        plane.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    plane.set_xscale("log")
    plane.set_ylim(bottom=min(0.0, *(low for points in series.values() for _, _, low, _ in points)))
    if log:
        plane.set_yscale("symlog", linthresh=1)
    plane.set_xlabel(axes[0])
    plane.set_ylabel(axes[1])
    machine = record["machine"]
    plane.set_title(
        f"{loop}, {machine['gpu'] or machine['cpu']}, {record['date'][:10]}: medians, least and most of the runs", fontsize=9
    )
    plane.legend(fontsize=8)
    plane.grid(visible=True, alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
