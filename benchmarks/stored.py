"""The stored form of a benchmark's rows: one line for each row, and the names of the figures once.

A row in memory is a mapping from names to figures, for example ``{"way": "aiotrt call", "latency": {"p50": 1e-4, ...}}``.
Stored, the rows are one mapping:

- ``same``: the values that are equal in all rows, by name;
- ``columns``: the other names in order, each with the names inside it if its cells are lists of figures;
- ``lines``: the cells of each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["DIGITS", "LIMIT", "as_text", "packed", "rounded", "unpacked"]

Row: TypeAlias = Mapping[str, Any]

#: Significant digits of a stored figure.
DIGITS: Final = 6
#: The most bytes that a stored file may have.
LIMIT: Final = 60_000


def rounded(value: Any) -> Any:
    """Round every float inside a value of JSON's types to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value


def packed(rows: Sequence[Row]) -> dict[str, Any] | list[dict[str, Any]]:
    """Put rows into the stored form. Rows whose names differ, and fewer than two, stay mappings."""
    plain = [{name: value for name, value in row.items() if not _is_derived(name, row)} for row in rows]
    if len(plain) < 2 or any(list(row) != list(plain[0]) for row in plain):
        return plain
    same = {name: value for name, value in plain[0].items() if all(row[name] == value for row in plain)}
    columns = {name: _inner([row[name] for row in plain]) for name in plain[0] if name not in same}
    lines = [[_cell(row[name], inner) for name, inner in columns.items()] for row in plain]
    return {"same": same, "columns": columns, "lines": lines}


def unpacked(stored: Mapping[str, Any] | Sequence[Row]) -> list[dict[str, Any]]:
    """Make rows of the stored form, and add the figure it leaves out: an await's time over the device's.

    Args:
        stored: the stored form, or plain rows.
    """
    if isinstance(stored, Mapping):
        columns = stored["columns"]
        rows = [
            {**stored["same"], **{name: _value(cell, columns[name]) for name, cell in zip(columns, line, strict=True)}}
            for line in stored["lines"]
        ]
    else:
        rows = [dict(row) for row in stored]
    return [{**row, "overhead": _overhead(row)} if "device_seconds" in row else row for row in rows]


def as_text(record: Mapping[str, Any]) -> str:
    """Format a record for its file: one line for each entry, and for each row."""
    entries = []
    for name, value in record.items():
        if isinstance(value, Mapping) and value.keys() == {"same", "columns", "lines"}:
            lines = ",\n".join(_compact(line) for line in value["lines"])
            head = "".join(f"{_compact(part)}: {_compact(value[part])},\n" for part in ("same", "columns"))
            text = f'{{\n{head}"lines": [\n{lines}\n]}}'
        elif name == "rows" and value:
            text = "[\n" + ",\n".join(_compact(row) for row in value) + "\n]"
        else:
            text = _compact(value)
        entries.append(f"{_compact(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _inner(values: Sequence[Any]) -> list[str]:
    """The names inside a column, if all its mappings have the same ones; else none."""
    mappings = [list(value) for value in values if isinstance(value, Mapping)]
    are_alike = bool(mappings) and all(names == mappings[0] for names in mappings)
    return mappings[0] if are_alike and all(value is None or isinstance(value, Mapping) for value in values) else []


def _cell(value: Any, inner: Sequence[str]) -> Any:
    return [value[name] for name in inner] if inner and value is not None else value


def _value(cell: Any, inner: Sequence[str]) -> Any:
    return dict(zip(inner, cell, strict=True)) if inner and cell is not None else cell


def _is_derived(name: str, row: Row) -> bool:
    return name == "overhead" and "device_seconds" in row


def _overhead(row: Row) -> dict[str, Any]:
    less = row["device_seconds"] or 0.0
    return {name: value if name == "count" else value - less for name, value in row["latency"].items()}
