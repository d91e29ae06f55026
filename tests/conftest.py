"""The loops and devices that tests run on, and the leaks that fail them."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator

import pytest
import uvloop

import aiotrt.completion.hub
import aiotrt.model
from aiotrt.runtime.executor import Executor

if aiotrt.__impl__ == "native":

    class _OpenExecutor(Executor):
        """The compiled class, on whose instances tests may replace methods: extension types are closed."""

    vars(aiotrt.model)["Executor"] = _OpenExecutor


def _debug() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0  # the machine's speed is not what is tested
    return loop


def _eager() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "debug": _debug,
    "uvloop": uvloop.new_event_loop,
}
if sys.version_info >= (3, 12):
    LOOPS["eager"] = _eager


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return LOOPS


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The name of a device, for bodies that run on all of them."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines and kernels that tests make go to a folder of this run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOTRT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Exempt what exists before a module's first test from the collections after its tests: each would cost 0.8 s more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaks: whatever it made and forgot to close is collected here, and warns."""
    yield
    gc.collect()
    hubs = aiotrt.completion.hub._hubs
    leaked = {key: hub for key, hub in hubs.items() if hub._users}
    for key in leaked:  # the next test has not leaked them
        del hubs[key]
    assert not leaked, f"hubs with users after the test: {list(leaked.values())}"
