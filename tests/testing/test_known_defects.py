"""Each known defect makes the laws named for it fail, on each device where it can be seen, and they pass without it."""

from __future__ import annotations

import pytest

from aiotrt.runtime import slots
from aiotrt.testing import DeadlockError
from tests.testing.known_defects import DEFECTS, Defect, Edit, Trial
from tests.testing.mutation import StaleEditError
from tests.testing.portfolio import DoesNotEndError

pytestmark = pytest.mark.interpreted

TRIALS = [
    pytest.param(defect, [trial for trial in defect.trials if trial.device == device], id=f"{defect.name}, {device}")
    for defect in DEFECTS
    for device in dict.fromkeys(trial.device for trial in defect.trials)
]


@pytest.mark.parametrize(("defect", "trials"), TRIALS)
def test_each_law_fails_with_the_defect_and_passes_without(defect: Defect, trials: list[Trial]) -> None:
    for trial in trials:
        with defect.applied():
            error = trial.run()
        assert error is not None, f"{trial.name} does not find it: {defect.what}"
        plain = isinstance(error, AssertionError) and not isinstance(error, (DoesNotEndError, DeadlockError))
        assert plain, f"{trial.name} fails without saying what is wrong: {error!r}"
        assert trial.run() is None, f"{trial.name} fails without the defect"


@pytest.mark.parametrize(
    ("name", "before", "message"),
    [
        ("Slots.gone", "", r"aiotrt\.runtime\.slots\.Slots\.gone: expected one such function, found 0"),
        (
            "Slots.move",
            "no such text",
            r"aiotrt\.runtime\.slots\.Slots\.move: expected this text once, found it 0 times: 'no such text'",
        ),
    ],
)
def test_a_defect_whose_text_is_gone_says_so(name: str, before: str, message: str) -> None:
    defect = Defect("stale", "", [Edit(slots, name, before, "")], [])
    with pytest.raises(StaleEditError, match=message):
        with defect.applied():
            pass
