"""What holds for every test of the project: `gpu` tests need a GPU, and a run without them says so."""

from __future__ import annotations

import pytest

_deselected = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        stash = gpu[0].config.stash
        stash[_deselected] = stash.get(_deselected, 0) + len(gpu)


@pytest.hookimpl(trylast=True)  # after -m and -k, so that torch is asked only when a gpu test is about to run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch sees none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "not gpu" not in config.option.markexpr:
        return
    count = config.stash.get(_deselected, 0)
    noun = "test was" if count == 1 else "tests were"
    terminalreporter.section("gpu tests not run")
    terminalreporter.line(
        f"{count} {noun} deselected by -m {config.option.markexpr!r}: marked gpu, they need an NVIDIA GPU. "
        "Run them on a machine that has one: make gpu"
    )
