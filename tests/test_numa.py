"""Which processors are near a GPU, as the system describes it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from aiotrt._workers import Workers
from aiotrt.devices.numa import near, stay_near


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5\n", {5}), ("\n", set()), ("all of them\n", set())],
)
def test_the_list_of_the_system_is_read(tmp_path: Path, text: str, expected: set[int]) -> None:
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text(text)
    assert near("0000:3B:00.0", tmp_path) == expected
    assert near("0000:00:00.0", tmp_path) == set()
    assert near("", tmp_path) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which thread runs where")
def test_a_worker_stays_where_it_is_told_and_elsewhere_nothing_changes() -> None:
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    with Workers(1, begin=lambda: stay_near(one | {1 << 20})) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result(10) == one
    with Workers(1, begin=lambda: stay_near({1 << 20})) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result(10) == allowed
    assert os.sched_getaffinity(threading.get_native_id()) == allowed


def test_a_system_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not in this container")

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    with Workers(1, begin=lambda: stay_near(set(range(4)))) as pool:
        assert pool.submit(lambda: 3).result(10) == 3
