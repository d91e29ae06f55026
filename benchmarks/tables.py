"""Tables from the results' files: for the terminal, and for the documentation, where no figure is written by hand.

`python -m benchmarks table` fills every place of the documentation that is marked so, with what the file of that name says:

    <!-- table completion-cuda -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks.measure import NO_OVERLAP, RESULTS, busiest
from benchmarks.waits import NOT_LIKE_FOR_LIKE

__all__ = ["MARK", "Table", "as_markdown", "as_text", "filled", "heading_of", "load", "misses_of", "tables_of"]

Record: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = Callable[[Record], str]

#: Cores that other programs use without it being worth saying.
NOTED: Final = 0.2
MARK: Final = re.compile(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A table: what it shows, its headings, and its rows; the first column is words, the others are figures."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def load(path: Path) -> dict[str, Any]:
    """A results' file."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def tables_of(record: Record) -> list[Table]:
    """The tables of one part's results."""
    make = _MAKERS.get(str(record["benchmark"]).partition("-only")[0].removesuffix("-cuda").removesuffix("-host"))
    return make(record) if make is not None and record.get("rows", True) else []


def as_text(table: Table) -> str:
    """For the terminal."""
    lines = [table.headings, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headings))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join([table.title, *("  ".join(line).rstrip() for line in padded)])


def as_markdown(table: Table) -> str:
    """For the documentation."""
    lines = [table.headings, ["---", *("---:" for _ in table.headings[1:])], *table.rows]
    return f"{table.title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading_of(record: Record) -> str:
    """Where and when."""
    machine = record["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, no GPU"
    versions = [f"{name} {machine[name]}" for name in ("driver", "cuda", "python", "torch", "uvloop") if machine.get(name)]
    quick = "; a quick run, whose figures say nothing" if record.get("quick") else ""
    others = others_of(record)
    beside = f"; other programs used {others:.1f} cores meanwhile" if others > NOTED else ""
    return f"{where}, {machine['cores']} processors, {', '.join(versions)}, {record['date'][:10]}{beside}{quick}"


def others_of(record: Record) -> float:
    """Cores that other programs used, on average over all runs; 0.0 where that is not known."""
    runs = [run for row in record.get("rows", ()) for run in row.get("runs", ())]
    known = [run["others"] for run in runs if run.get("others") is not None]
    return sum(known) / len(known) if known else 0.0


def misses_of(record: Record) -> list[str]:
    """How many bars are met, and which are not, and by how much."""
    judged = [row for row in record["rows"] if row.get("verdict")]
    missed = [row for row in judged if row["verdict"] != "meets"]
    if not judged:
        return ["no bars here"]
    said = [f"meets {len(judged) - len(missed)} of {len(judged)} bars"]
    for row in missed:
        setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
        said.append(f"{setting}, {row['loop']}, {row['way']}: {row['verdict']}")
    return said


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with the tables where it has marks."""

    def replacement(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table {name} -->\n\n{_content(name, results)}\n\n<!-- end of table -->"

    return MARK.sub(replacement, text)


def _content(name: str, results: Path) -> str:
    if name == "not-like-for-like":
        return "\n".join(f"- `{way}` {what}." for way, what in NOT_LIKE_FOR_LIKE.items())
    if name == "summary":
        return as_markdown(_summary(results))
    path = results / f"{name}.json"
    if not path.exists():
        return f"*Not measured yet: there is no `benchmarks/results/{name}.json`.*"
    record = load(path)
    parts = [f"{heading_of(record)} (`benchmarks/results/{name}.json`)."]
    parts += [as_markdown(table) for table in tables_of(record)]
    if any("verdict" in row for row in record.get("rows", ())):
        said, *missed = misses_of(record)
        parts.append(
            "\n".join(
                [f"The bars: {said}{':' if missed else '.'}", *([""] if missed else []), *(f"- {line}" for line in missed)]
            )
        )
    return "\n\n".join(parts)


#: What the summary shows of the results' files: of which rows, what it says of each, and which of their ways.
_SUMMARY: Final[Sequence[tuple[str, str, Mapping[str, object], Cell, Sequence[str]]]] = (
    (
        "rfdetr_video-cuda",
        "RF-DETR segmentation of a film, TensorRT FP16: frames/s",
        {"engine": "TensorRT FP16"},
        lambda row: f"{row['facts']['mean']:,.0f}",
        ("enqueue", "graph, synchronised", "aiotrt, 3 slots"),
    ),
    (
        "pipeline-cuda",
        "camera frame to ResNet-50's classes: frames/s",
        {},
        lambda row: f"{row['rate']:,.0f}",
        ("torch", "graph, no overlap", "aiotrt, 3 slots"),
    ),
    (
        "serving-side-by-side-cuda",
        "ResNet-50 behind HTTP, 32 connections: requests/s (p99, ms)",
        {"load": "32 connections"},
        lambda row: f"{row['rate']:,.0f} ({1e3 * row['latency']['p99']:.0f})",
        ("FastAPI, thread pool", "LitServe, batches", "aiotrt, batches"),
    ),
    (
        "completion-cuda",
        "one awaiter, 1 ms of work: us over the device's time (CPU)",
        {"us": 1000},
        lambda row: f"{_us(row['overhead']['p50'])} ({_percent(row['cpu'])})",
        ("synchronize", "executor", "aiotrt lease"),
    ),
)


def _summary(results: Path) -> Table:
    """The most telling rows of several files, on uvloop, beside what one would have without aiotrt."""
    lines, dates = [], set()
    for name, what, setting, cell, ways in _SUMMARY:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        record = load(path)
        rows = {
            row["way"]: row
            for row in record["rows"]
            if row["loop"] in ("uvloop", "none") and setting.items() <= row["setting"].items()
        }
        if not rows.keys() >= set(ways):
            continue
        lines.append([what, *(f"{way}: {cell(rows[way])}" for way in ways)])
        dates.add((record["machine"]["gpu"], record["date"][:10]))
    measured = ", ".join(f"{gpu}, {date}" for gpu, date in sorted(dates)) or "not measured yet"
    return Table(f"{measured}, uvloop", ["", "without", "without", "aiotrt"], lines)


# Cells...


def _us(seconds: float) -> str:
    micros = 1e6 * seconds
    return f"{micros:,.1f}" if abs(micros) < 100 else f"{micros:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _size(size: float) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _pivot(title: str, rows: Sequence[Record], corner: str, row_of: Cell, column_of: Cell, cell_of: Cell) -> Table:
    columns = list(dict.fromkeys(column_of(row) for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row_of(row), {})[column_of(row)] = cell_of(row)
    return Table(
        title, [corner, *columns], [[name, *(cells.get(column, "") for column in columns)] for name, cells in lines.items()]
    )


def _by_loop(rows: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for loop in dict.fromkeys(row["loop"] for row in rows):
        if loop != "none":
            yield loop, [row for row in rows if row["loop"] in (loop, "none")]


def _completion(record: Record) -> list[Table]:
    return [
        _pivot(
            f"{loop}: one awaiter, us over the device's own time, p50 / p99 (CPU), by length of the work",
            rows,
            "way",
            lambda row: row["way"],
            lambda row: f"{row['setting']['us']:,} us",
            lambda row: f"{_us(row['overhead']['p50'])} / {_us(row['overhead']['p99'])} ({_percent(row['cpu'])})",
        )
        for loop, rows in _by_loop(record["rows"])
    ]


def _throughput(record: Record) -> list[Table]:
    return [
        _pivot(
            f"{loop}: awaits a second (share of the ceiling), by length of the work",
            sorted(rows, key=lambda row: (row["setting"]["us"], row["way"] != "aiotrt call")),
            "slots, awaiters, way",
            lambda row: f"{row['setting']['slots']}, {row['setting']['awaiters']}, {row['way']}",
            lambda row: f"{row['setting']['us']:,} us",
            lambda row: f"{row['rate']:,.0f} ({_percent(row['rate'] / row['ceiling'])})",
        )
        for loop, rows in _by_loop(record["rows"])
    ]


def _host_input(record: Record) -> list[Table]:
    def cell(row: Record) -> str:
        if row["setting"]["slots"] == 1:
            return f"{_us(row['latency']['p50'])} us"
        return f"{row['rate']:,.0f}/s ({_percent(row['rate'] / row['ceiling'])}, CPU {_percent(row['cpu'])})"

    return [
        _pivot(
            f"{loop}: 1 slot: p50 of an await; 4 slots: requests a second (share of the ceiling, CPU), by size of the input",
            sorted(rows, key=lambda row: (row["setting"]["bytes"], row["setting"]["slots"], row["setting"]["memory"])),
            "slots, memory, way",
            lambda row: f"{row['setting']['slots']}, {row['setting']['memory']}, {row['way']}",
            lambda row: _size(row["setting"]["bytes"]),
            cell,
        )
        for loop, rows in _by_loop(record["rows"])
    ]


def _scaling(record: Record) -> list[Table]:
    return [
        _pivot(
            "processor time for one await, us (awaits a second)",
            record["rows"],
            "axis",
            lambda row: f"{row['setting']['n']:,} {row['setting']['axis']}",
            lambda row: row["loop"],
            lambda row: f"{_us(row['cpu_seconds'])} ({row['rate']:,.0f})",
        )
    ]


def _jitter(record: Record) -> list[Table]:
    return [
        _pivot(
            f"{loop}: us over the work's length, p50 / p99 (CPU), by progress mode",
            rows,
            "durations",
            lambda row: row["setting"]["scenario"],
            lambda row: row["way"],
            lambda row: f"{_us(row['overhead']['p50'])} / {_us(row['overhead']['p99'])} ({_percent(row['cpu'])})",
        )
        for loop, rows in _by_loop(record["rows"])
    ]


def _endurance(record: Record) -> list[Table]:
    lines = []
    for row in record["rows"]:
        facts = row["facts"]
        grown = [f"{name} {size / 2**20:+.1f}" for name, size in facts["growth"].items()]
        lines.append(
            [
                row["setting"]["phase"],
                f"{facts['count']:,}",
                f"{facts['captures']:,}",
                f"{facts['cancelled']:,}",
                ", ".join(grown),
            ]
        )
    return [Table("growth of memory in MiB", ["phase", "count", "captures", "cancelled", "growth"], lines)]


def _pipeline(record: Record) -> list[Table]:
    height, width, _ = record["rows"][0]["facts"]["frame"]
    return [
        _pivot(
            f"{record['rows'][0]['facts']['network']}, frames of {width} by {height}: frames a second, p50 in ms (CPU)",
            record["rows"],
            "way",
            lambda row: row["way"] + ("" if row["facts"]["is_right"] else ", WRONG"),
            lambda row: row["loop"],
            lambda row: f"{row['rate']:,.0f}, {1e3 * row['latency']['p50']:.2f} ({_percent(row['cpu'])})",
        )
    ]


def _rfdetr_video(record: Record) -> list[Table]:
    def line(row: Record) -> list[str]:
        low, high = row["spread"]["rate"]
        facts = row["facts"]
        busy = facts["gpu_share"] if facts["gpu_share"] is not None else facts["shares"].get("device")
        return [
            row["way"]
            + ("" if facts["is_right"] else ", OTHER BITS")
            + ("" if facts.get("is_complete", True) else ", FRAMES LOST"),
            f"{statistics.fmean(run['rate'] for run in row['runs']):,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            "" if row["lag"] is None else f"{1e3 * row['lag']['p99']:.2f}",
            "" if busy is None else _percent(busy),
            # Anew, so that an older file is read by today's rule.
            facts["limit"] if facts["limit"] == NO_OVERLAP else busiest(facts["shares"], facts["gpu_share"]),
            _percent(row["cpu"]),
        ]

    headings = ["way", "frames/s, mean", "least to most", "lag p99, ms", "GPU busy", "limited by", "CPU"]
    first = record["rows"][0]["facts"]
    return [
        Table(f"{engine}; {first['network']}; {first['film']}", headings, [line(row) for row in rows])
        for engine in dict.fromkeys(row["setting"]["engine"] for row in record["rows"])
        if (rows := [row for row in record["rows"] if row["setting"]["engine"] == engine])
    ]


def _live_video(record: Record) -> list[Table]:
    facts = record["rows"][0]["facts"]
    lines = [
        [
            name,
            f"{source['fps']:.1f}",
            f"{source['frames']:,}",
            f"{source['dropped']:,}",
            f"{source['sink_drops']:,}",
            ", ".join(f"{count} {what}" for what, count in source["reports"].items()),
            "yes" if source["is_exact"] else "NO",
        ]
        for name, source in facts["sources"].items()
    ]
    title = f"{facts['seconds']:.0f} s; {facts['film']}; memory {facts['growth'] / 2**20:+.1f} MiB"
    if record["device"] == "cuda":
        title += f", on the device {facts['device_growth'] / 2**20:+.1f} MiB"
    return [Table(title, ["source", "frames/s", "frames", "dropped", "by its sink", "reports", "adds up"], lines)]


def _stages(record: Record) -> list[Table]:
    names = list(record["rows"][0]["facts"]["stages"])
    lines = []
    for row in record["rows"]:
        facts = row["facts"]
        parts = [_us(facts["stages"][name]) for name in names]
        ends = [_us(facts["sum"]), _us(row["latency"]["p50"]), f"±{_us(facts['clock_error'])}"]
        lines.append([f"{row['setting']['us']:,} us, {row['loop']}", *parts, *ends])
    return [Table("one await in us, by stage", ["work", *names, "sum", "unprobed p50", "clocks"], lines)]


def _loop_lag(record: Record) -> list[Table]:
    if "runs" in record["rows"][0] and "lag" in record["rows"][0]["runs"][0]:
        return _host_loop_lag(record)
    idle = record["idle_lag"]
    return [
        _pivot(
            "lag of the loop, p99 over the idle loop's, ms (calls a second)",
            record["rows"],
            "work, awaiters, way",
            lambda row: f"{row['setting']['us']:,} us, {row['setting']['awaiters']}, {row['way']}",
            lambda row: row["loop"],
            lambda row: f"{1e3 * (row['lag']['p99'] - idle[row['loop']]['p99']):.2f} ({row['rate']:,.0f})",
        )
    ]


def _host_loop_lag(record: Record) -> list[Table]:
    return [
        _pivot(
            f"PP-OCR detector, {record['awaiters']} awaiters: lag of the loop, p99 over the idle loop's, ms (calls/s)",
            record["rows"],
            "way",
            lambda row: row["way"],
            lambda row: row["loop"],
            lambda row: f"{1e3 * row['over_idle']:.1f} ({statistics.median(run['rate'] for run in row['runs']):,.0f})",
        )
    ]


def _tensorrt(record: Record) -> list[Table]:
    def cell(row: Record) -> str:
        if row["awaiters"] == 1:
            return f"{_us(row['overhead'])} us"
        return f"{row['rate']:,.0f}/s ({_percent(row['rate'] / row['ceiling'])})"

    return [
        _pivot(
            f"{record['loop']}: one awaiter: us over the GPU's time, p50; {record['awaiters']}: runs/s (of the ceiling)",
            record["rows"],
            "way",
            lambda row: row["way"] + (f", {row['slots']} slots" if row["awaiters"] > 1 else ""),
            lambda row: row["network"],
            cell,
        )
    ]


def _side_by_side(record: Record) -> list[Table]:
    def line(row: Record) -> list[str]:
        facts, (least, most), (low, high) = row["facts"], row["spread"]["rate"], row["spread"]["p99"]
        return [
            row["way"],
            f"{row['rate']:,.0f} ({least:,.0f}-{most:,.0f})",
            f"{1e3 * row['latency']['p50']:.1f}",
            f"{1e3 * row['latency']['p99']:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})",
            f"{1e3 * row['lag']['p50']:.2f} / {1e3 * row['lag']['p99']:.2f}",
            f"{row['cpu']:.2f}",
            f"{facts['memory'] / 2**20:,.0f}",
            f"{facts['client_cpu']:.2f}",
        ]

    headings = ["server", "requests/s", "p50, ms", "p99, ms", "loop lag p50 / p99, ms", "cores", "MiB", "client's cores"]
    settings = dict.fromkeys((row["setting"]["model"], row["setting"]["load"]) for row in record["rows"])
    return [
        Table(
            f"{model}, {load}, median of {len(record['rows'][0]['runs'])} rounds (least-most)",
            headings,
            [line(row) for row in record["rows"] if row["setting"] == {"model": model, "load": load}],
        )
        for model, load in settings
    ]


def _overload(record: Record) -> list[Table]:
    def times(of: Record | None) -> str:
        return "none" if of is None else " / ".join(f"{1e3 * of[name]:.1f}" for name in ("p50", "p99", "worst"))

    wrong, memory = sum(record["wrong"].values()), record["memory"]
    rows = [
        ["requests sent", f"{record['sent']:,}, {record['asked']:.0f} a second"],
        ["by status", ", ".join(f"{status}: {count:,}" for status, count in record["statuses"].items())],
        ["good answers a second", f"{record['good_rate']:.0f}; {record['capacity']:.0f} when asked for no more"],
        ["lost, duplicated or another's", f"{wrong:,}"],
        [
            "admitted: ms until the answer, p50 / p99 / worst",
            f"{times(record['admitted'])}; deadline {1e3 * record['deadline']:.0f}",
        ],
        ["refused: likewise", times(record["refused"])],
        ["`Retry-After`, s", ", ".join(record["retry_after"])],
        ["most in line", f"{record['most_waiting']} of {record['max_queue']}"],
        ["memory: most / growth, MiB", f"{memory['most'] / 2**20:.0f} / {memory['growth'] / 2**20:.1f}"],
        ["as quick as before after, s", f"{record['recovery']:.2f}"],
        ["cores: server / client", f"{record['server_cpu']:.2f} / {record['client_cpu']:.2f}"],
        ["the bars", record["verdict"]],
    ]
    title = f"{record['model']}, {record['slots']} slot, batches of up to {record['max_batch']}, {record['seconds']:.0f} s"
    return [Table(title, ["at twice the capacity", ""], rows)]


_MAKERS: Final[dict[str, Callable[[Record], list[Table]]]] = {
    "completion": _completion,
    "throughput": _throughput,
    "host_input": _host_input,
    "scaling": _scaling,
    "jitter": _jitter,
    "endurance": _endurance,
    "pipeline": _pipeline,
    "rfdetr_video": _rfdetr_video,
    "live_video": _live_video,
    "stages": _stages,
    "loop_lag": _loop_lag,
    "loop-lag": _loop_lag,
    "tensorrt": _tensorrt,
    "serving-overload": _overload,
    "serving-side-by-side": _side_by_side,
}
