"""Plots from the results' files, and from nothing else: `python -m benchmarks plot`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

__all__ = ["MissingMatplotlibError", "described", "draw"]

Record: TypeAlias = Mapping[str, Any]
Point: TypeAlias = tuple[float, float, float, float]  # x, y, and y's least and most over the runs
Series: TypeAlias = dict[str, list[Point]]  # by name


@dataclass(frozen=True)
class Picture:
    """What is drawn: lines, by panel and name; what the axes are; and the marks of y, none for a linear one."""

    panels: Mapping[str, Series]
    x: str
    y: str
    marks: tuple[int, ...]


class MissingMatplotlibError(Exception):
    """matplotlib is not installed."""


def draw(records: Sequence[Record], folder: Path, loops: Collection[str] = ()) -> list[Path]:
    """Draw whatever these results have: latency, CPU and lag over the length of the work, throughput over awaiters.

    Args:
        records: results.
        folder: for the plots; made if it is not there.
        loops: the event loops to draw; empty for all.

    Returns: the plots' files, SVG; each says in its description which run it shows.

    Raises:
        MissingMatplotlibError: as it says.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
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
                if loops and loop not in loops:
                    continue
                path = folder / f"{plot.__name__}-{device}-{loop}.svg"
                picture = plot(record, [row for row in record["rows"] if row["loop"] == loop])
                if not any(points for series in picture.panels.values() for points in series.values()):
                    continue
                # Letters as letters, names without chance: half as large, and the same file each time.
                with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aiotrt"}):
                    _draw(pyplot, record, picture, loop, path)
                drawn.append(path)
    return drawn


def described(record: Record) -> str:
    """Which run a plot shows, as its description says."""
    return f"{record['benchmark']}, {record['date']}"


def latency(record: Record, rows: Sequence[Record]) -> Picture:
    """An await's time over the device's, by the length of the work."""

    def spread(row: Record) -> Point:
        device = row["device_seconds"]
        low, high = (1e6 * (limit - device) for limit in row["spread"]["p50"])
        return row["setting"]["us"], 1e6 * row["overhead"]["p50"], low, high

    return Picture(
        {"": _by_way(rows, spread)}, "length of the work, us", "p50 over the device's time, us", (1, 10, 100, 1000)
    )


def cpu(record: Record, rows: Sequence[Record]) -> Picture:
    """Share of a core, by the length of the work."""

    def share(row: Record) -> Point:
        low, high = (100 * limit for limit in row["spread"]["cpu"])
        return row["setting"]["us"], 100 * row["cpu"], low, high

    return Picture({"": _by_way(rows, share)}, "length of the work, us", "CPU, % of a core", (1, 3, 10, 30, 100))


def lag(record: Record, rows: Sequence[Record]) -> Picture:
    """The loop's lag over the idle loop's, by the length of the work."""

    def over(row: Record) -> Point:
        idle = record["idle_lag"][row["loop"]]["p99"]
        p99 = row["lag"]["p99"]
        value, low, high = (1e3 * (lag - idle) for lag in (p99, *row["spread"].get("lag", (p99, p99))))
        return row["setting"]["us"], value, low, high

    series = _by_way([row for row in rows if row["lag"] is not None], over)
    return Picture({"": series}, "length of the work, us", "lag p99 over the idle loop's, ms", (1, 10, 100))


def throughput(record: Record, rows: Sequence[Record]) -> Picture:
    """Share of the ceiling, by awaiters."""
    panels: dict[str, Series] = {}
    for row in rows:
        setting = row["setting"]
        if row["way"].startswith("aiotrt call"):
            low, high = (100 * limit / row["ceiling"] for limit in row["spread"]["rate"])
            name = row["way"].replace("aiotrt call", f"aiotrt, slots {setting['slots']}")
            series = panels.setdefault(f"{setting['us']:,} us", {})
            series.setdefault(name, []).append((setting["awaiters"], 100 * row["rate"] / row["ceiling"], low, high))
    return Picture(panels, "awaiters", "% of back-to-back launches", ())


PLOTS: Final[dict[str, tuple[Callable[[Record, Sequence[Record]], Picture], ...]]] = {
    "completion": (latency, cpu, lag),
    "throughput": (throughput,),
}


def _by_way(rows: Sequence[Record], point: Callable[[Record], Point]) -> Series:
    series: Series = {}
    for row in rows:
        series.setdefault(row["way"], []).append(point(row))
    return series


def _draw(pyplot: Any, record: Record, picture: Picture, loop: str, path: Path) -> None:
    count = len(picture.panels)
    figure, planes = pyplot.subplots(1, count, sharey=True, squeeze=False, figsize=(9, 4.5), layout="constrained")
    colors: dict[str, str] = {}
    for (title, series), plane in zip(picture.panels.items(), planes[0], strict=True):
        for name, points in series.items():
            xs, ys, lows, highs = zip(*sorted(points), strict=True)
            ours = {"linewidth": 2.5} if name.startswith("aiotrt") else {"linewidth": 1, "linestyle": "--"}
            label = f"_{name}" if name in colors else name  # once in the legend
            color = colors.setdefault(name, f"C{len(colors)}")
            plane.plot(xs, ys, marker="o", markersize=4, color=color, label=label, **ours)
            plane.fill_between(xs, lows, highs, color=color, alpha=0.15, linewidth=0)
        _scale(plane, picture, sorted({point[0] for points in series.values() for point in points}))
        plane.set_title(title, fontsize=9)
        plane.set_xlabel(picture.x)
        plane.grid(visible=True, alpha=0.3)
    planes[0][0].set_ylabel(picture.y)
    machine = record["machine"]
    figure.suptitle(
        f"{loop}, {machine['gpu'] or machine['cpu']}, {record['date'][:10]}: medians, least and most of the runs", fontsize=9
    )
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, metadata={"Date": None, "Description": described(record)})
    pyplot.close(figure)


def _scale(plane: Any, picture: Picture, xs: Sequence[float]) -> None:
    """Logarithmic, with what was measured as marks; up to the first mark linear, since the best are near zero, or below."""
    plane.set_xscale("log")
    plane.set_xticks(xs, [f"{x:,.0f}" for x in xs], fontsize=8, rotation=45 if len(xs) > 4 else 0)
    plane.set_xticks([], minor=True)
    if picture.marks:
        plane.set_yscale("symlog", linthresh=picture.marks[0], linscale=0.3)
        plane.set_yticks([0, *picture.marks], [f"{mark:,}" for mark in (0, *picture.marks)])
    lines = [point for series in picture.panels.values() for points in series.values() for point in points]
    plane.set_ylim(1.2 * min(0.0, *(low for _, _, low, _ in lines)), 1.1 * max(high for *_, high in lines))
