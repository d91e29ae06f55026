"""Which frames are kept: pure decisions over times that the test chooses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotrt.errors import InputError
from aiotrt.video.policies import OVERTAKEN, STALE, TOO_MANY, Mailbox, Policy


def test_every_frame_is_kept_and_the_source_waits_for_room() -> None:
    mail: Mailbox[int] = Mailbox(Policy(buffer=2))
    rooms = []
    for i in range(2):
        rooms.append(mail.has_room)
        mail.put(i, 0.0)
    assert [*rooms, mail.has_room] == [True, True, False]
    assert [mail.take(9.0), mail.take(9.0), mail.take(9.0)] == [0, 1, None]
    assert not mail.drops


def test_the_latest_overtakes_and_drops_are_counted() -> None:
    mail: Mailbox[int] = Mailbox(Policy("latest"))
    for i in range(5):
        assert mail.has_room
        mail.put(i, float(i))
    assert mail.take(9.0) == 4
    assert mail.take(9.0) is None
    assert mail.drops == {OVERTAKEN: 4}


def test_latest_with_a_buffer_keeps_the_newest_few_in_order() -> None:
    mail: Mailbox[int] = Mailbox(Policy("latest", buffer=3))
    for i in range(5):
        mail.put(i, 0.0)
    assert [mail.take(0.0) for _ in range(3)] == [2, 3, 4]
    assert mail.drops == {OVERTAKEN: 2}


@pytest.mark.parametrize("keep", ["every_frame", "latest"])
def test_what_waited_too_long_is_dropped_when_its_turn_comes(keep: str) -> None:
    mail: Mailbox[int] = Mailbox(Policy(keep, max_staleness=0.5, buffer=3))  # type: ignore[arg-type]
    for i in range(3):
        mail.put(i, i / 10)
    assert mail.take(0.65) == 2
    assert mail.drops == {STALE: 2}


def test_exactly_as_old_as_allowed_is_not_stale() -> None:
    mail: Mailbox[int] = Mailbox(Policy(max_staleness=0.5))
    mail.put(0, 1.0)
    assert mail.take(1.5) == 0


def test_max_fps_drops_of_a_live_source_on_a_grid() -> None:
    mail: Mailbox[int] = Mailbox(Policy("latest", max_fps=10))
    taken = []
    for i in range(31):
        mail.put(i, i / 30)
        taken.append(mail.take(i / 30))
    assert [i for i in taken if i is not None] == list(range(0, 31, 3))
    assert mail.drops == {TOO_MANY: 20}


def test_max_fps_holds_a_file_back_instead() -> None:
    mail: Mailbox[int] = Mailbox(Policy(max_fps=10))
    mail.put(0, 0.0)
    mail.put(1, 0.0)
    assert mail.delay(0.0) == 0
    assert mail.take(0.0) == 0
    assert mail.delay(0.04) == pytest.approx(0.06)
    assert mail.delay(0.1) == 0
    assert mail.take(0.1) == 1
    assert not mail.drops


def test_two_frames_at_once_are_not_both_let_through() -> None:
    mail: Mailbox[int] = Mailbox(Policy("latest", max_fps=10, buffer=9))
    for at in (0.0, 0.0, 0.0, 0.1):
        mail.put(0, at)
    assert len(mail) == 2
    assert mail.drops == {TOO_MANY: 2}


@given(st.lists(st.floats(0, 0.2), min_size=2, max_size=60), st.floats(1, 50))
def test_no_window_has_more_than_max_fps_and_nothing_is_lost_uncounted(gaps: list[float], fps: float) -> None:
    mail: Mailbox[int] = Mailbox(Policy("latest", max_fps=fps, buffer=100))
    times = list(itertools.accumulate(gaps))
    kept = []
    for i, at in enumerate(times):
        before = len(mail)
        mail.put(i, at)
        if len(mail) > before:
            kept.append(at)
    assert len(mail) + sum(mail.drops.values()) == len(times)
    for a in range(len(kept)):
        for b in range(a + 1, len(kept)):
            # On a grid, one may come early by as much as the one before it was late: one more than the rate, at most.
            assert b - a <= (kept[b] - kept[a]) * fps + 1 + 1e-6


@pytest.mark.parametrize("options", [{"keep": "some"}, {"max_fps": 0}, {"max_staleness": -1}, {"buffer": 0}])
def test_policies_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Policy(**options)  # type: ignore[arg-type]
