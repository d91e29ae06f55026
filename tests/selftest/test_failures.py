"""Each check can fail: with something broken on purpose, it says what, and the other checks go on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aiotrt.devices import open_device
from aiotrt.errors import DeviceError
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.slots import State
from aiotrt.selftest import CHECKS, Options, Outcome, Report, Result, checks, endurance, laws, verify
from aiotrt.selftest.bench import Bench, compare
from aiotrt.selftest.report import Finding
from aiotrt.tensors import own
from tests.tensorrt.double import Network
from tests.tensorrt.tools import AFFINE, PROFILES, Tensors, affine, double_on, loading, save


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "HOLD", 0.05)


class Silence:
    """Progress that nobody looks at, but for its order."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.fraction = 0.0

    def begin(self, name: str) -> None:
        self.began.append(name)

    def advance(self, fraction: float) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    def end(self, result: Result) -> None:
        assert self.began[-1] == result.name


def verified(tmp_path: Path, device: str, network: Network = AFFINE, **options: Any) -> Report:
    """Verify the double's engine, quickly."""
    double = double_on(device)
    path = save(tmp_path / "x.engine", double, network)
    quick: dict[str, Any] = {"inputs": 2, "replays": 60, "cancellations": 20, "duration": 0.06}
    with loading(double):
        return asyncio.run(verify(Options(path, device=device, **(quick | options)), Silence()))


def result(report: Report, name: str) -> Result:
    (found,) = (result for result in report.results if result.name == name)
    return found


def failures(report: Report) -> dict[str, str]:
    """What failed, and why."""
    return {result.name: result.detail for result in report.results if result.outcome is Outcome.FAILED}


def test_nothing_fails(device: str, tmp_path: Path) -> None:
    report = verified(tmp_path, device, PROFILES)
    assert failures(report) == {}
    assert report.passed


def test_a_graph_that_gives_something_else(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiotrt.runtime.programs import _Builder

    captured = _Builder._captured

    def wrong(self: Any, function: Any, inputs: Any) -> Any:
        return captured(self, lambda values: [tensor + 1 for tensor in function(values)], inputs)

    monkeypatch.setattr(_Builder, "_captured", wrong)
    found = failures(verified(tmp_path, device))
    assert list(found) == ["parity"]
    assert (
        "output 'y' with a graph, compared with none: fixed: x (2, 3), input 0, call 0: differs in 6 of 6" in found["parity"]
    )
    assert "by up to 1" in found["parity"]


@pytest.mark.parametrize(("noise", "fails"), [(1e-4, False), (10.0, True)])
def test_an_engine_that_does_not_repeat_itself(device: str, tmp_path: Path, noise: float, fails: bool) -> None:
    network = Network(
        AFFINE.inputs, AFFINE.outputs, lambda v: {"y": v["x"] * 3 + 1 + noise * torch.rand(2, 3, device=v["x"].device)}
    )
    report = verified(tmp_path, device, network)
    parity = result(report, "parity")
    assert "is not deterministic" in parity.detail
    if fails:
        assert "more than the tolerance of 0.01 times" in failures(report)["parity"]
    else:
        assert failures(report) == {}
        assert "compared within 0.01 of the largest value; none bit for bit" in parity.detail
        assert parity.figures["not_repeatable"] == ["y"]


@pytest.mark.interpreted
def test_results_that_do_not_wait_for_the_device(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(open_device(device)), "query", lambda self, event: True)
    monkeypatch.setattr(type(open_device(device)), "probe", lambda self, event: lambda: True)
    monkeypatch.setattr(type(open_device(device)), "when_complete", lambda self, event, callback: callback())
    free = Executor.free

    def late(self: Executor) -> None:
        """Closing believes the events too; what still runs writes to addresses, on the host into this process's heap."""
        self.device.synchronize()
        free(self)

    monkeypatch.setattr(Executor, "free", late)
    found = failures(verified(tmp_path, device))
    assert found["results wait for the device"] == "2 of 2 calls returned while the device was held"


@pytest.mark.interpreted
def test_consumers_that_are_not_waited_for(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotrt.runtime.hold.Hold.consumed", lambda self, stream: None)
    found = failures(verified(tmp_path, device))
    assert found == {"consumers are waited for": "a slot ran again while a consumer of its results had not read them"}


@pytest.mark.gpu
@pytest.mark.interpreted
def test_inputs_that_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotrt.runtime.launch.Request.order", lambda self, slot: None)
    found = failures(verified(tmp_path, "cuda"))
    assert found["inputs are waited for"] == "a call returned while its input was still being written"


def test_results_that_are_not_the_callers_own(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the slot's memory, which the next call overwrites."""
    monkeypatch.setattr("aiotrt.runtime.executor.own", lambda view, dtype, kind: torch.from_numpy(view))
    found = failures(verified(tmp_path, device))
    assert (
        "one of 64 concurrent calls got wrong results (fixed: x (2, 3)): output 'y' differs"
        in found["callers are kept apart"]
    )
    assert "they are the results of another call's inputs" in found["callers are kept apart"]


def test_an_engine_that_mixes_up_its_callers(tmp_path: Path) -> None:
    """Right one at a time, wrong with two at once, as with memory that two contexts share."""
    shared: dict[int, torch.Tensor] = {}
    lock = threading.Lock()

    def mixed(values: Tensors) -> Tensors:
        if values["x"].is_meta:
            return affine(values)
        with lock:
            shared[0] = values["x"].clone()
        time.sleep(1e-3)
        return affine({"x": shared[0]})

    found = failures(verified(tmp_path, "host", Network(AFFINE.inputs, AFFINE.outputs, mixed)))
    assert "they are the results of another call's inputs" in found["callers are kept apart"]


def test_inputs_that_tell_nobody_apart(device: str, tmp_path: Path) -> None:
    network = Network(AFFINE.inputs, AFFINE.outputs, lambda v: {"y": v["x"] * 0 + 1})
    report = verified(tmp_path, device, network, ranges={"x": (1.0, 2.0)})
    assert report.passed
    callers = result(report, "callers are kept apart")
    assert callers.outcome is Outcome.NOT_APPLICABLE
    assert "mixed-up results cannot be detected" in callers.detail


@pytest.mark.interpreted
@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
def test_slots_that_cancellation_loses(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiotrt.runtime.executor import Executor

    completed = Executor._completed

    def lost(self: Any, slot: Any, error: Any) -> None:
        if self.machine.states[slot.index] is not State.DRAINING:
            completed(self, slot, error)

    monkeypatch.setattr(Executor, "_completed", lost)
    monkeypatch.setattr(endurance, "FREE_WITHIN", 0.2)
    monkeypatch.setattr(checks, "CLOSES_WITHIN", 0.2)
    monkeypatch.setattr("aiotrt.selftest.bench.CALL_TIMEOUT", 0.5)
    found = failures(verified(tmp_path, device, cancellations=100))
    assert "cancellation" in found
    assert "draining" in found["cancellation"] or "was not done after 0.5 s" in found["cancellation"]
    assert "the model was not closed after 0.2 s" in found["close"]


def test_memory_that_grows(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    where = open_device(device).torch_device

    def leaking(view: Any, dtype: torch.dtype, kind: Any) -> Any:
        kept.append(torch.ones(1 << 18, device=where))
        return own(view, dtype, kind)

    monkeypatch.setattr("aiotrt.runtime.executor.own", leaking)
    found = failures(verified(tmp_path, device, replays=200))
    what = "host memory" if device == "host" else "torch's device memory"
    assert list(found) == ["endurance"]
    assert found["endurance"].startswith(f"{what} grew by ")
    assert " bytes over 200 runs, at most " in found["endurance"]


def test_results_that_go_wrong_late(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def late(view: Any, dtype: torch.dtype, kind: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(view, dtype, kind) + (1 if calls > 400 else 0)

    monkeypatch.setattr("aiotrt.runtime.executor.own", late)
    found = failures(verified(tmp_path, device, replays=2000))
    assert "returned wrong results" in found["endurance"]


def test_a_check_that_raises_fails_and_the_others_go_on(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr("aiotrt.selftest.latency.StreamClock", refuse)
    report = verified(tmp_path, device)
    assert failures(report) == {"latency": "raised RuntimeError: no clock"}
    assert report.results[-1].outcome is Outcome.PASSED


@pytest.mark.interpreted
def test_a_program_that_is_stuck_while_the_device_is_held(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever blocks on the device in a call that should return at once would hold itself up for ever."""
    from aiotrt.runtime.executor import Executor

    launch, replay = Executor._launch, Executor._replay

    def blocking(self: Any, slot: Any, request: Any, program: Any) -> None:
        launch(self, slot, request, program)
        slot.stream.synchronize()

    def blocking_too(self: Any, slot: Any, request: Any, was_queued: bool) -> bool:
        is_launched = replay(self, slot, request, was_queued)
        slot.stream.synchronize()
        return is_launched

    monkeypatch.setattr(Executor, "_launch", blocking)
    monkeypatch.setattr(Executor, "_replay", blocking_too)
    monkeypatch.setattr(laws, "STUCK", 0.3)
    found = failures(verified(tmp_path, device))
    assert "blocks on the device" in found["callers are kept apart"]


def test_a_model_that_breaks(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(bench: Bench) -> Finding:
        bench.executor.break_down(DeviceError("on purpose"))
        await bench.model(*bench.inputs(bench.usual, 0))
        return Finding("not reached")

    monkeypatch.setitem(CHECKS, "cancellation", breaks)
    report = verified(tmp_path, device)
    assert list(failures(report)) == ["cancellation"]
    for name in ("endurance", "latency"):
        assert result(report, name).outcome is Outcome.NOT_APPLICABLE
        assert "the model broke before: on purpose" in result(report, name).detail
    assert result(report, "close").outcome is Outcome.PASSED


# Comparing...


def tensor(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_bit_for_bit() -> None:
    nan, inf = float("nan"), float("inf")
    assert compare(tensor([1, nan, inf]), tensor([1, nan, inf])) is None
    assert compare(tensor([]), tensor([])) is None
    assert compare(torch.tensor(1.0), torch.tensor(1.0)) is None
    assert compare(tensor([0.0]), tensor([-0.0])) == "differs in 1 of 1 elements, by up to 0"
    assert compare(tensor([1, 2, 5]), tensor([1, 2, 3])) == "differs in 1 of 3 elements, by up to 2"
    assert compare(tensor([1]), tensor([1, 2])) == "is float32 (1,), expected float32 (2,)"
    assert compare(tensor([1]), tensor([1], torch.int32)) == "is float32 (1,), expected int32 (1,)"
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int64):
        assert compare(tensor([0, 1], dtype), tensor([0, 1], dtype)) is None
        assert compare(tensor([0, 0], dtype), tensor([0, 1], dtype)) == "differs in 1 of 2 elements, by up to 1"


def test_within_a_tolerance() -> None:
    nan, inf = float("nan"), float("inf")
    assert compare(tensor([100.5, 1]), tensor([100, 0]), 0.01) is None
    found = compare(tensor([102, 1]), tensor([100, 1]), 0.01)
    assert found == "differs in 1 of 2 elements, by up to 2, more than the tolerance of 0.01 times 100"
    for odd in (nan, inf):
        assert compare(tensor([odd, 100]), tensor([0, 100]), 0.01) is not None
        assert compare(tensor([0, 100]), tensor([odd, 100]), 0.01) is not None
        assert compare(tensor([odd, 100.1]), tensor([odd, 100]), 0.01) is None
    assert compare(tensor([inf]), tensor([-inf]), 0.01) is not None
