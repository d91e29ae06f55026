"""The examples run as they stand, and say what they should."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

#: What each prints, line by line, as regular expressions; {device} is where it ran.
SAYS: dict[str, list[str]] = {
    "quickstart": [
        r"64 coroutines awaited one model on {device}, each got its own \(1, 10\) array",
        r"same numbers as the module itself: True",
        r"the event loop took \d+ turns for others meanwhile",
    ],
    "lease_zero_copy": [
        r"4 replays on {device}, and no output was copied to be read",
        r"mean brightness of each, found on another stream: \[0\.15, 0\.3, 0\.45, 0\.6\]",
    ],
    "chain_two_models": [
        r"the second model was launched (before|after) the first was known to be done",
        r"the strongest edge is right of column 19, strength 1\.0",
    ],
    "await_foreign_event": [
        r"done: every element is \[(128|512)\.0\]",
        r"the loop was free while it ran: \d+ turns for others",
    ],
    "pre_and_postprocess": [
        r"a spot at \[32, 48, 48, 64\], score 1\.0",
        r"a spot at \[160, 96, 176, 112\], score 0\.8",
        r"a spot at \[288, 208, 304, 224\], score 0\.6",
        r"1 call, 1 replay, fallbacks: \[\]",
    ],
    "cut_a_module": [
        r"with postprocess=: \d+ of 64 boxes, as expected: True",
        r"parts without a graph: [01]",
        r"on the CPU: \d+ of 64 boxes, as expected: True",
        r"parts without a graph: 0",
    ],
    "find_a_race": [
        r"without consumed\(\): write before read: 'a graph' may come before 'torch\.clone' is done; missing: .*",
        r"with consumed\(\): no race",
    ],
    "batching": [
        r"65 served, 35 made way for newer ones",
        r"each got its own \(10,\) array: True",
        r"urgent: class \d; too late: dropped",
        r"batches by size: \{1: 2, 16: 4\}, 0 rows of padding",
    ],
    "cancellation_and_timeouts": [
        r"gave up after \d+\.\d ms: 1 cancelled, 1 slot draining",
        r"the next call got the right answer after \d+ ms: True",
        r"1 completed, 0 failed, 1 slot free: <aiotrt\.Model slow on {device}: 1 free; 0 waiting>",
    ],
}


def run(name: str, *, hide_gpu: bool) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDEVMODE": "1"}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # Development mode shows what was never awaited or closed; asyncio's debug mode comes with it.
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    problems = [line for line in finished.stderr.splitlines() if "Warning" in line or "Traceback" in line]
    assert not problems, finished.stderr
    return finished.stdout


def check(name: str, printed: str, device: str) -> None:
    lines = printed.splitlines()
    assert len(lines) == len(SAYS[name]), printed
    for line, pattern in zip(lines, SAYS[name], strict=True):
        assert re.fullmatch(pattern.replace("{device}", re.escape(device)), line), line


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_without_a_gpu(name: str) -> None:
    check(name, run(name, hide_gpu=True), "host")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_on_a_gpu(name: str) -> None:
    check(name, run(name, hide_gpu=False), f"cuda:{torch.cuda.current_device()}")


@pytest.mark.parametrize("name", SAYS)
def test_an_example_is_short_and_hopes_for_nothing(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    assert not re.search(r"sleep\((?!0\))", text), "an example must not sleep until something has probably happened"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["examples/live_view.py", "8820", "door"], r"expected \[PORT \[NAME=SOURCE\.\.\.\]\], such as .*, got 8820 door"),
        (["examples/live_view.py", "door=film.mp4"], r"expected \[PORT \[NAME=SOURCE\.\.\.\]\], .*"),
        (["examples/rfdetr_segmentation.py", "missing.mp4"], r"missing\.mp4: No such file or directory"),
        (["benchmarks/clips.py"], r"expected FRAMES\.npz \[COUNT \[VIDEO\]\]"),
        (["benchmarks/clips.py", "a.npz", "b.mp4"], r"expected FRAMES\.npz \[COUNT \[VIDEO\]\]"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(command: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *arguments = command
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert re.fullmatch(says, str(caught.value)), caught.value
