"""Modules that no capture survives as they are, and that run as their `torch.export` instead."""

from __future__ import annotations

import threading

import pytest
import torch

from aiotrt.devices import open_device
from aiotrt.engines.module import ModuleEngine, ModuleExecution


class Copies(torch.nn.Module):
    """As RF-DETR's forward: something in it does what no capture allows, though nothing depends on it."""

    here = threading.local()  # where something captures: captures of other slots may go on meanwhile

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        if getattr(self.here, "capturing", False) and not torch.compiler.is_exporting():
            raise RuntimeError("cannot copy between CPU and CUDA tensors during CUDA graph capture")
        y: torch.Tensor = self.linear(x)
        return y if scale is None else y * scale


class Decides(Copies):
    """What cannot be exported either: a branch on a value."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        return y if bool(x.sum() > 0) else y * 2


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies.here, "capturing", True, raising=False)


def executed(engine: ModuleEngine, *shapes: tuple[int, ...]) -> ModuleExecution:
    device = open_device("host")
    stream = device.stream()
    try:
        return engine.execution(device, stream, ["x", "scale"][: len(shapes)], shapes)
    finally:
        stream.close()


@pytest.mark.usefixtures("capturing")
def test_an_export_takes_the_modules_place_for_all_slots(caplog: pytest.LogCaptureFixture) -> None:
    engine = ModuleEngine(module := Copies(), open_device("host"))
    x, scale = torch.randn(4, 3), torch.randn(4, 2)
    execution = executed(engine, (4, 3), (4, 2))
    assert not execution.export([x, scale], "nothing failed yet")
    with pytest.raises(RuntimeError, match="cannot copy"):
        execution([x, scale])
    assert execution.export([x, scale], "cannot copy")
    expected = module.linear(x) * scale
    assert torch.equal(torch.as_tensor(execution([x, scale])), expected)
    with torch.no_grad():
        module.linear.bias.add_(1)  # the same parameters: the owner's changes show
    expected = module.linear(x) * scale
    assert torch.equal(torch.as_tensor(executed(engine, (4, 3), (4, 2))([x, scale])), expected)  # the next slot
    with pytest.raises(RuntimeError):
        executed(engine, (5, 3), (5, 2))([torch.randn(5, 3), torch.randn(5, 2)])  # other shapes are another export
    (record,) = (record for record in caplog.records if record.name == "aiotrt")
    assert "Copies could not be captured (cannot copy): its torch.export takes its place" in record.message


@pytest.mark.usefixtures("capturing")
def test_what_cannot_be_exported_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    engine = ModuleEngine(Decides(), open_device("host"))
    x = torch.ones(2, 3)
    for _ in range(2):
        execution = executed(engine, (2, 3))
        with pytest.raises(RuntimeError):
            execution([x])
        assert not execution.export([x], "cannot copy")
    (record,) = (record for record in caplog.records if record.name == "aiotrt")  # it is tried once
    assert "nor exported" in record.message


@pytest.mark.usefixtures("capturing")
def test_an_export_that_cannot_be_captured_either_is_given_up_for_all_slots() -> None:
    engine = ModuleEngine(module := Copies(), open_device("host"))
    x = torch.randn(4, 3)
    execution = executed(engine, (4, 3))
    with pytest.raises(RuntimeError, match="cannot copy"):
        execution([x])
    assert execution.export([x], "cannot copy")
    execution.restore()
    with pytest.raises(RuntimeError, match="cannot copy"):  # the module itself runs again
        execution([x])
    assert not execution.export([x], "cannot copy"), "it was tried"
    with pytest.raises(RuntimeError, match="cannot copy"):
        executed(engine, (4, 3))([x])
    Copies.here.capturing = False
    assert torch.equal(torch.as_tensor(executed(engine, (4, 3))([x])), module.linear(x))


def test_functions_and_exported_programs_are_not_exported() -> None:
    def raises(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    engine = ModuleEngine(raises, open_device("host"))
    execution = executed(engine, (1,))
    with pytest.raises(RuntimeError):
        execution([torch.ones(1)])
    assert not execution.export([torch.ones(1)], "no")
