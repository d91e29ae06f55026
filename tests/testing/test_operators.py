"""The changes that mutation testing makes: all of them, one at a time, and taken back."""

from __future__ import annotations

import sys

import pytest

from tests.testing.mutation import applied, deletions, instrumented
from tests.testing.operators import changes

HERE = sys.modules[__name__]


def decide(a: int, b: int, names: list[str]) -> int | None:
    if a < b and not names:
        return min(a, b) + 1
    names.append(f"{a + 1}")
    return None


def ordered(a: int, b: int) -> bool:
    return a <= b


CHANGES = {change.what.split(", in:")[0]: change for change in changes(HERE) if change.place.name == "decide"}


def test_every_change_there_is() -> None:
    assert set(CHANGES) == {
        "a < b and (not names) -> not (a < b and (not names))",
        "a < b and (not names) -> a < b or not names",
        "a < b -> a <= b",
        "a < b -> a >= b",
        "not names -> names",
        "return min(a, b) + 1 -> return None",
        "min(a, b) + 1 -> min(a, b) - 1",
        "min(a, b) -> max(a, b)",
        "1 -> 2",
        "1 -> 0",
    }


@pytest.mark.parametrize(
    ("what", "arguments", "result"),
    [
        ("a < b -> a <= b", (1, 1, []), 2),
        ("a < b -> a >= b", (1, 2, []), None),
        ("not names -> names", (1, 2, []), None),
        ("a < b and (not names) -> a < b or not names", (1, 2, ["x"]), 2),
        ("min(a, b) -> max(a, b)", (1, 2, []), 3),
        ("min(a, b) + 1 -> min(a, b) - 1", (1, 2, []), 0),
        ("1 -> 0", (1, 2, []), 1),
        ("return min(a, b) + 1 -> return None", (1, 2, []), None),
    ],
)
def test_a_change_is_made_and_taken_back(what: str, arguments: tuple[int, int, list[str]], result: int | None) -> None:
    a, b, names = arguments
    before = decide(a, b, names[:])
    with applied(CHANGES[what]):
        assert decide(a, b, names[:]) == result
    assert decide(a, b, names[:]) == before != result


def test_a_chain_of_comparisons_and_an_operator_of_a_result() -> None:
    found = [change.what for change in changes(HERE) if change.place.name == "ordered"]
    assert found == [
        "return a <= b -> return None",
        *(f"a <= b -> {other}, in: return a <= b" for other in ("a < b", "a > b")),
    ]


def test_statements_that_act_are_taken_out_and_counted_where_they_run() -> None:
    (removal,) = (mutation for mutation in deletions(HERE) if mutation.place.name == "decide")
    names: list[str] = []
    with applied(removal):
        decide(2, 1, names)
    assert names == []
    seen: set[int] = set()
    with instrumented([removal, *CHANGES.values()], seen.update):
        decide(1, 2, [])
    assert 0 not in seen
    assert seen == set(range(1, len(CHANGES) + 1))
    with instrumented([removal], seen.update):
        decide(2, 1, names)
    assert 0 in seen
    assert names == ["3"]
