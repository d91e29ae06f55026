"""Tables from the results' files: for the terminal, and for the documentation, where no figure is written by hand.

What was measured is the file's, what is said of it is today's: bars are judged anew when a file is read.

`python -m benchmarks table` fills every place of the documentation that is marked so, with what the file of that name says:

    <!-- table completion-cuda -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks.measure import HEARTBEAT, NO_OVERLAP, PARTIAL, RESULTS, Spread, busiest, code
from benchmarks.parts import PARTS, is_judged
from benchmarks.rows import Row
from benchmarks.stored import unpacked
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


class UnreadableError(Exception):
    """A results' file is none, or is damaged; says which, and what to do."""


def load(path: Path) -> dict[str, Any]:
    """A results' file.

    Raises:
        UnreadableError: it is none.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in record:
            record["rows"] = unpacked(record["rows"])
        _judge(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnreadableError(
            f"{path} cannot be read as results ({type(error).__name__}: {error}); measure again, or name other files"
        ) from error
    return record


def of_other_code(results: Path) -> list[str]:
    """The files that were not measured with the package as it is, or do not say so."""
    files = [path for path in sorted(results.glob("*.json")) if not path.stem.endswith(PARTIAL)]
    return [path.stem for path in files if load(path)["machine"].get("code") != code()]


def _judge(record: dict[str, Any]) -> None:
    name = _part_of(record)
    if name not in PARTS or not record["rows"] or "setting" not in record["rows"][0]:
        return
    if record.get("heartbeat") != HEARTBEAT:
        # The loop's own timer: on uvloop it does not see what holds up every turn by less than a millisecond, and ways
        # that block were late once, by all of their calls.
        for row in record["rows"]:
            if row["loop"] == "uvloop" or name == "completion":
                row["lag"] = None
        record["lag_left_out"] = "measured with the loop's own timers, which do not see what they should"
    if is_judged(PARTS[name], record["device"]):
        rows = [Row.of(row) for row in record["rows"]]
        PARTS[name].judge(rows, {loop: Spread(**lag) for loop, lag in record["idle_lag"].items()})
        for row, judged in zip(record["rows"], rows, strict=True):
            row["verdict"] = judged.verdict


def _part_of(record: Record) -> str:
    return str(record["benchmark"]).removesuffix(PARTIAL).removesuffix("-cuda").removesuffix("-host")


def tables_of(record: Record) -> list[Table]:
    """The tables of one part's results."""
    make = _MAKERS.get(_part_of(record))
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
    counts = {row["runs"] for row in record.get("rows", ()) if row.get("runs", 0) > 1}
    medians = f"; medians of {min(counts)} runs" if len(counts) == 1 else ""
    quick = "; a quick run, whose figures say nothing" if record.get("quick") else ""
    others = others_of(record)
    beside = f"; other programs used {others:.1f} cores meanwhile" if others > NOTED else ""
    paces = paces_of(record)
    slowest = (
        f"; the same Python took up to {paces[1] / paces[0]:.1f} times as long in one run as in another" if paces else ""
    )
    when = record["date"][:10]
    return f"{where}, {machine['cores']} processors, {', '.join(versions)}, {when}{medians}{beside}{slowest}{quick}"


def paces_of(record: Record) -> tuple[float, float] | None:
    """The shortest and the longest time of a fixed piece of Python beside a run; None if it was not measured."""
    known = [pace for row in record.get("rows", ()) for pace in row.get("spread", {}).get("pace", ())]
    return (min(known), max(known)) if known else None


def others_of(record: Record) -> float:
    """Cores that other programs used, on average over all runs; 0.0 if unknown."""
    known = [(row["others"], row["runs"]) for row in record.get("rows", ()) if row.get("others") is not None]
    return sum(others * runs for others, runs in known) / sum(runs for _, runs in known) if known else 0.0


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


def missing_of(record: Record) -> list[str]:
    """What is not in the tables, and why."""
    # Of a way that was not come to, older files have the function's name too.
    skipped = {re.sub(r", functools\.partial\(.*", "", what): why for what, why in record.get("skipped", {}).items()}
    said = [f"{what}: {why}" for what, why in skipped.items() if isinstance(why, str)]
    said += [f"{what}: there was no time" for what in record.get("unreached", ())]
    said += [f"{what}: FAILED" for what in record.get("failed", {})]
    if record.get("lag_left_out") and _part_of(record) in ("completion", "loop_lag", "rfdetr_video"):
        said.append(f"lag{' on uvloop' if _part_of(record) != 'completion' else ''}: {record['lag_left_out']}")
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
    if missing := missing_of(record):
        parts.append("\n".join(["Not there:", "", *(f"- {line}" for line in missing)]))
    if any("verdict" in row for row in record.get("rows", ())):
        said, *missed = misses_of(record)
        parts.append(
            "\n".join(
                [f"The bars: {said}{':' if missed else '.'}", *([""] if missed else []), *(f"- {line}" for line in missed)]
            )
        )
    return "\n\n".join(parts)


#: What the summary shows of the results' files: of which rows, what it says of each, which of their ways one has without
#: aiotrt, and which with. Of ways without it the best is shown, on whichever loop that was.
_SUMMARY: Final[Sequence[tuple[str, str, Mapping[str, object], Cell, Sequence[str], Sequence[str]]]] = (
    (
        "rfdetr_video-cuda",
        "RF-DETR segmentation of a film, TensorRT FP16: frames/s",
        {"engine": "TensorRT FP16"},
        lambda row: f"{row['facts']['mean']:,.0f}",
        ("enqueue", "graph, synchronised", "graph, zero copy", "whole graph"),
        ("aiotrt, 3 slots",),
    ),
    (
        "pipeline-cuda",
        "camera frame to ResNet-50's classes: frames/s",
        {},
        lambda row: f"{row['rate']:,.0f}",
        ("torch", "torch in threads", "graph, no overlap"),
        ("aiotrt, 3 slots",),
    ),
    (
        "serving-side-by-side-cuda",
        "ResNet-50 behind HTTP, 32 connections: requests/s (p99, ms)",
        {"load": "32 connections", "model": "resnet50"},
        lambda row: f"{row['rate']:,.0f} ({1e3 * row['latency']['p99']:.0f})",
        ("FastAPI, thread pool", "LitServe, batches"),
        ("aiotrt", "aiotrt, batches"),
    ),
    (
        "completion-cuda",
        "one awaiter, 1 ms of work: us over the device's time (CPU)",
        {"us": 1000},
        lambda row: f"{_us(row['overhead']['p50'])} ({_percent(row['cpu'])})",
        ("synchronize", "executor"),
        ("aiotrt call", "aiotrt lease"),
    ),
)


def _summary(results: Path) -> Table:
    """The most telling rows of several files, on uvloop, beside what one would have without aiotrt."""
    lines, dates = [], set()
    for name, what, setting, cell, without, ours in _SUMMARY:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        record = load(path)
        found: dict[str, list[Record]] = {}
        for row in record["rows"]:
            if setting.items() <= row["setting"].items() and (row["way"] in without or row["loop"] != "asyncio"):
                found.setdefault(row["way"], []).append(row)
        if not found.keys() >= {*without, *ours}:
            continue
        best = {way: min(rows, key=lambda row: row["latency"]["p50"]) for way, rows in found.items()}
        cells = ["; ".join(f"{way}: {cell(best[way])}" for way in ways) for ways in (without, ours)]
        lines.append([what, *cells])
        dates.add((record["machine"]["gpu"], record["date"][:10]))
    gpus = {gpu: " and ".join(sorted(date for other, date in dates if other == gpu)) for gpu, _ in sorted(dates)}
    measured = ", ".join(f"{gpu}, {when}" for gpu, when in gpus.items()) or "not measured yet"
    return Table(f"{measured}; aiotrt on uvloop", ["", "without aiotrt", "with"], lines)


# Cells...


def _us(seconds: float) -> str:
    micros = 1e6 * seconds
    return f"{micros:,.1f}" if abs(micros) < 100 else f"{micros:,.0f}"


def _half(row: Record, name: str, scale: float = 1.0) -> str:
    """Half of what the runs differ by, to be read after their median."""
    low, high = (scale * limit for limit in row["spread"][name])
    half = (high - low) / 2
    return f"±{half:,.1f}" if half < 10 else f"±{half:,.0f}"


def _over(row: Record) -> str:
    """An await's time over the device's, of which there is a 99th percentile if there were a hundred."""
    over = row["overhead"]
    most = _us(over["p99"]) if row["samples"] >= 100 else f"worst {_us(over['worst'])}"
    return f"{_us(over['p50'])}{_half(row, 'p50', 1e6)} / {most} ({_percent(row['cpu'])})"


def _rate(row: Record, more: str) -> str:
    return f"{row['rate']:,.0f}{_half(row, 'rate')} ({more})"


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
            _over,
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
            lambda row: _rate(row, _percent(row["rate"] / row["ceiling"])),
        )
        for loop, rows in _by_loop(record["rows"])
    ]


def _host_input(record: Record) -> list[Table]:
    def cell(row: Record) -> str:
        if row["setting"]["slots"] == 1:
            return f"{_us(row['latency']['p50'])}{_half(row, 'p50', 1e6)} us"
        return _rate(row, f"{_percent(row['rate'] / row['ceiling'])}, CPU {_percent(row['cpu'])}")

    older = any(row["loop"] == "none" for row in record["rows"])
    shared = " (the blocking loop runs on none, and is the same in all)" if older else ""
    return [
        _pivot(
            f"{loop}{shared}: 1 slot: p50 of an await; 4 slots: requests a second (share of the ceiling, CPU), by size of "
            "the input",
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
            lambda row: f"{_us(row['cpu_seconds'])} ({row['rate']:,.0f}{_half(row, 'rate')})",
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
            _over,
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
            lambda row: (
                f"{row['rate']:,.0f}{_half(row, 'rate')}, {1e3 * row['latency']['p50']:.2f} ({_percent(row['cpu'])})"
            ),
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
            f"{facts['mean']:,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            *([f"{1e3 * row['lag']['p99']:.2f}"] if has_lag else []),
            "" if busy is None else _percent(busy),
            # Anew, so that an older file is read by today's rule.
            facts["limit"]
            if facts["limit"] == NO_OVERLAP
            else busiest(facts["shares"], facts["gpu_share"], facts.get("limited_by")),
            _percent(row["cpu"]),
        ]

    has_lag = all(row["lag"] is not None for row in record["rows"])
    lag = ["lag p99, ms"] if has_lag else []
    headings = ["way", "frames/s, mean", "least to most", *lag, "GPU busy", "limited by", "CPU"]
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
    if "over_idle" in record["rows"][0]:
        return _host_loop_lag(record)
    idle = record["idle_lag"]

    def half(row: Record) -> str:
        return _half(row, "lag", 1e3) if "lag" in row["spread"] else ""

    def beside(row: Record) -> float:
        late: float = row["facts"].get("idle_lag", idle[row["loop"]])["p99"]
        return late

    return [
        _pivot(
            "lag of the loop, p99 over the idle loop's, ms (calls a second)",
            record["rows"],
            "work, awaiters, way",
            lambda row: f"{row['setting']['us']:,} us, {row['setting']['awaiters']}, {row['way']}",
            lambda row: row["loop"],
            lambda row: (
                ("- " if row["lag"] is None else f"{1e3 * (row['lag']['p99'] - beside(row)):.2f}{half(row)} ")
                + f"({row['rate']:,.0f})"
            ),
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
            lambda row: f"{1e3 * row['over_idle']:.1f} ({row['rate']:,.0f})",
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

    headings = [
        "server",
        "requests/s",
        "p50, ms",
        "p99, ms",
        "loop lag p50 / p99, ms",
        "cores",
        "MiB",
        "busiest client's cores",
    ]
    settings = dict.fromkeys((row["setting"]["model"], row["setting"]["load"]) for row in record["rows"])
    return [
        Table(
            f"{model}, {load}, {_rounds(record['rows'][0]['runs'])}",
            headings,
            [line(row) for row in record["rows"] if row["setting"] == {"model": model, "load": load}],
        )
        for model, load in settings
    ]


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"median of {count} rounds (least-most)"


def _attacks(record: Record) -> list[Table]:
    def refused(row: Record) -> str:
        asked = sum(row["innocent"].values())
        return f"{asked - row['innocent'].get('200', 0):,} of {asked:,}" if asked else "-"

    rows = [
        [
            what,
            " / ".join(f"{1e3 * row['livez'][name]:.0f}" for name in ("p50", "p99", "worst")),
            f"{row['memory'] / (1 << 20):.0f}",
            refused(row),
            ", ".join(f"{status}: {count}" for status, count in row["attacker"].items()) or "-",
        ]
        for what, row in record["attacks"].items()
    ]
    headings = ["attack", "`/livez`, ms, p50 / p99 / worst", "more memory, MiB", "innocent refused", "attacker got"]
    return [Table("Requests that are meant to stop a server", headings, rows)]


def _protocols(record: Record) -> list[Table]:
    rows = [
        [
            f"{row['size']}, {row['clients']} clients, {row['way']}",
            f"{row['rate']:,.0f}",
            " / ".join(f"{1e3 * row['latency'][name]:.1f}" for name in ("p50", "p99")),
            f"{1e3 * row['cpu']:.2f}",
        ]
        for row in record["settings"]
    ]
    headings = ["tensor and way", "requests/s", "p50 / p99, ms", "server's CPU for each, ms"]
    return [Table("HTTP and gRPC, in turns", headings, rows)]


def _shared_memory(record: Record) -> list[Table]:
    rows = [
        [
            way,
            " / ".join(f"{1e3 * row['seconds'][name]:.1f}" for name in ("p50", "p99")),
            f"{1e3 * row['server_cpu']:.1f} / {1e3 * row['client_cpu']:.1f}",
        ]
        for way, row in record["ways"].items()
    ]
    headings = ["tensors in", "a request, ms, p50 / p99", "processor time for one, ms, server / client"]
    return [Table(f"One client, {record['size'] >> 20} MiB each way", headings, rows)]


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


def _targets(record: Record) -> list[Table]:
    """A table for each group of targets, with a column for each loop."""
    lines = unpacked(record["lines"])
    made = []
    for group in dict.fromkeys(line["group"] for line in lines):
        own = [line for line in lines if line["group"] == group]
        on = list(dict.fromkeys(line["loop"] for line in own))
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for line in own:
            measured = f"{line['measured']:,.1f}" if line["target"].endswith("us") else f"{line['measured']:.2f}"
            cells.setdefault((line["what"], line["target"]), {})[line["loop"]] = f"{measured} {line['verdict']}"
        rows = [[what, target, *(said.get(loop, "") for loop in on)] for (what, target), said in cells.items()]
        made.append(Table(f"targets: {group}", ["line", "target", *on], rows))
    return made


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
    "targets": _targets,
    "tensorrt": _tensorrt,
    "serving-attacks": _attacks,
    "serving-overload": _overload,
    "serving-protocols": _protocols,
    "serving-shared-memory": _shared_memory,
    "serving-side-by-side": _side_by_side,
    "serving-side-by-side-detector": _side_by_side,
}
