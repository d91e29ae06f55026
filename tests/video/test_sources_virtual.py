"""Sources in virtual time: pace, and coming back."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from aiotrt import video
from aiotrt.errors import InputError
from aiotrt.video import Backoff, Kind, SourceError
from tests.video.tools import clock, in_virtual_time, number_of, picture


async def four() -> AsyncIterator[tuple[float, np.ndarray[Any, Any]]]:
    for i in range(4):
        yield i / 10, picture(i)


def test_realtime_holds_frames_back_until_their_time() -> None:
    async def main() -> list[float]:
        source = video.open(four, realtime=True)
        source.clock = clock
        async with source:
            began = clock()
            return [clock() - began async for _ in source]

    assert in_virtual_time(main()) == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-3)


def test_reconnecting_waits_longer_each_time_and_begins_anew_after_success() -> None:
    attempts: list[float] = []

    async def frames() -> AsyncIterator[np.ndarray[Any, Any]]:
        attempts.append(clock())
        if len(attempts) in (2, 3, 4):
            raise ConnectionError("nobody there")
        yield picture(len(attempts))
        if len(attempts) < 6:
            raise ConnectionError("gone")

    async def main() -> list[int]:
        source = video.open(frames, reconnect=Backoff(first=1, factor=2, longest=3), live=True)
        reports: list[Kind] = []
        source.listener = lambda report: reports.append(report.kind)
        async with source:
            numbers = [number_of(frame.image) async for frame in source]
        assert reports == [Kind.LOST, Kind.RECONNECTED, Kind.LOST, Kind.RECONNECTED]
        return numbers

    assert in_virtual_time(main()) == [1, 5, 6]
    waits = [b - a for a, b in itertools.pairwise(attempts)]
    assert waits == pytest.approx([1, 2, 3, 3, 1], abs=1e-3)


def test_reconnecting_is_given_up_after_so_many_attempts() -> None:
    attempts: list[float] = []

    def frames() -> AsyncIterator[Any]:
        attempts.append(clock())
        raise ConnectionError("nobody there")

    async def main() -> None:
        source = video.open(frames, reconnect=Backoff(first=1, attempts=3))
        with pytest.raises(SourceError, match="nobody there"):
            await source.start()

    in_virtual_time(main())
    assert [at - attempts[0] for at in attempts] == pytest.approx([0, 1, 3, 7], abs=1e-3)


@pytest.mark.parametrize(("attempt", "delay"), [(0, 0.5), (1, 1.0), (5, 16.0), (6, 30.0), (10_000, 30.0)])
def test_backoff(attempt: int, delay: float) -> None:
    assert Backoff().delay(attempt) == delay


@pytest.mark.parametrize("options", [{"first": -1}, {"factor": -2}, {"longest": float("nan")}, {"attempts": -1}])
def test_backoff_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name} must be at least 0"):
        Backoff(**options)
