"""All laws of the simulator as functions of a seed, to be tried against a changed runtime.

A law is a test function: of those that take a `group` or a `seed`, each seed is one schedule; of those that try faults, each
point of failure is one; all others are one, state machines of hypothesis too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import itertools
import signal
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from aiotrt.completion import hub as completion
from aiotrt.runtime import memory
from aiotrt.testing import HazardError
from aiotrt.testing import loop as virtual_loop

__all__ = [
    "MODULES", "ON_THE_HOST", "PROCESSOR_LIMIT", "REAL_LIMIT", "DoesNotEndError", "Law", "laws", "outcome", "prepare",
    "story",
]  # fmt: skip

MODULES: Final = (
    "tests.test_laws_simulated",
    "tests.test_laws_of_owners_simulated",
    "tests.test_laws_of_memory_simulated",
    "tests.test_laws_of_failure_simulated",
    "tests.test_laws_of_opening_simulated",
    "tests.test_laws_of_batches_simulated",
    "tests.test_laws_of_spares_simulated",
    "tests.test_laws_of_pinned_simulated",
    "tests.test_laws_of_turns_simulated",
    "tests.test_laws_of_closing_simulated",
    "tests.test_laws_of_observing_simulated",
    "tests.test_laws_of_interrupts_simulated",
    "tests.test_laws_of_routes_simulated",
    "tests.test_laws_of_copy_jobs_simulated",
    "tests.test_laws_of_programs_simulated",
    "tests.test_laws_of_handover",
    "tests.test_laws_of_estimates",
    "tests.test_laws_virtual_host",
    "tests.test_batches_simulated",
    "tests.test_laws_of_several_devices_simulated",
    "tests.test_handshake",
    "tests.test_found_simulated",
    "tests.test_completion",
    "tests.test_waiters",
    "tests.test_laws_of_looking",
    "tests.test_laws_of_hubs",
    "tests.test_slots",
    "tests.test_laws_of_slots",
    "tests.test_batching",
    "tests.test_prediction",
    "tests.test_laws_of_prediction",
)
#: Tests in real time on the host device, for what the simulator does not reach: loading, threads and files of its own.
ON_THE_HOST: Final = (
    "tests.test_lifecycle",
    "tests.test_asyncio_only",
    "tests.test_engine_functions",
    "tests.test_model",
    "tests.test_lease",
    "tests.test_faults",
    "tests.test_batches",
    "tests.test_engine_modules",
    "tests.test_resources",
    "tests.test_signatures",
)
#: These try every schedule or step or pair there is, compare two runs or need a GPU: not one schedule of one program.
NOT_LAWS: Final = (
    "every_schedule", "every_step", "every_pair", "equal_seeds", "ten_thousand", "ctrl_c", "after_a_fork",
    "on_the_device_only", "thousands_of",
)  # fmt: skip

#: Seconds of processor time, and of real time, that one schedule may take before it counts as one that does not end.
PROCESSOR_LIMIT: Final = 2.0
REAL_LIMIT: Final = 15.0


class DoesNotEndError(AssertionError):
    """A law went on for too long."""


@dataclass(frozen=True)
class Law:
    """Something that must hold.

    Attributes:
        name: the test's, with its other parameters.
        module: where it stands.
        run: tries it under one schedule.
        schedules: how many there are; None for as many as one likes.
    """

    name: str
    module: str
    run: Callable[[int], object]
    schedules: int | None = None


def prepare() -> None:
    """For a process that does nothing else than to try laws: failing fast matters more than failing well."""
    settings.register_profile(
        "laws", max_examples=30, stateful_step_count=40, phases=[Phase.explicit, Phase.generate], derandomize=True,
        database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    settings.load_profile("laws")
    virtual_loop.PATIENCE = 0.1  # type: ignore[misc]  # threads that an earlier law left do not wake a later one's loop


def laws() -> list[Law]:
    """All of them."""
    found: list[Law] = []
    for name in (*MODULES, *ON_THE_HOST):
        module: Any = importlib.import_module(name)
        if hasattr(module, "under_schedules"):
            module.SEEDS = range(1)  # so that a group is one schedule
        taken = {law.name for law in found}
        for law in _laws_of(module):
            found.append(replace(law, name=f"{law.module}.{law.name}") if law.name in taken else law)
    return found


def _laws_of(module: types.ModuleType) -> Iterator[Law]:
    short = module.__name__.removeprefix("tests.")
    for kind, law in getattr(module, "FAULT_LAWS", {}).items():
        points = [point for point in module.POINTS if point.kind is kind]
        yield Law(f"{law.__name__}[{kind.value}]", short, functools.partial(_nth, law, points), len(points))
    for name, function in vars(module).items():
        if (
            inspect.isclass(function)
            and issubclass(function, RuleBasedStateMachine)
            and function.__module__ == module.__name__
        ):
            yield Law(name, short, functools.partial(_once, functools.partial(_machine, function)), 1)
        if not name.startswith("test_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        if any(part in name for part in NOT_LAWS) or "FAULT_LAWS" in function.__code__.co_names:
            continue
        yield from _laws_in(name.removeprefix("test_"), short, function)


def _laws_in(name: str, module: str, function: Callable[..., Any]) -> Iterator[Law]:
    """One for each combination of the test's parameters."""
    seeded = ""
    faults: Sequence[Any] = ()
    choices: list[list[dict[str, Any]]] = []
    unknown = set(inspect.signature(function).parameters)
    for mark in getattr(function, "pytestmark", ()):
        if mark.name in ("xfail", "gpu"):
            return  # it finds what is wrong already, or cannot run
        if mark.name != "parametrize":
            continue
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        unknown -= set(names)
        if names in (["group"], ["seed"]):
            (seeded,) = names
        elif names == ["fault"]:
            faults = list(mark.args[1])
        else:
            values = [value for value in mark.args[1] if not getattr(value, "marks", ())]  # else too long: in the proof only
            choices.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    if unknown == {"device"}:
        function = functools.partial(function, device="host")
    elif unknown:
        return  # other fixtures
    if inspect.iscoroutinefunction(inspect.unwrap(getattr(function, "func", function))):
        function = functools.partial(_in_a_loop, function)
    for combination in itertools.product(*choices):
        arguments = {key: value for part in combination for key, value in part.items()}
        label = name + (f"[{', '.join(map(_label, arguments.values()))}]" if arguments else "")
        one = functools.partial(function, **arguments)
        if faults:
            yield Law(label, module, functools.partial(_nth, one, faults), len(faults))
        elif seeded:
            yield Law(label, module, functools.partial(_seeded, one, seeded))
        else:
            yield Law(label, module, functools.partial(_once, one), 1)


def _label(value: object) -> str:
    return str(getattr(value, "value", value))


def _nth(law: Callable[[Any], object], points: Sequence[Any], seed: int) -> None:
    law(points[seed % len(points)])


def _seeded(law: Callable[..., object], name: str, seed: int) -> None:
    law(**{name: seed})


def _once(law: Callable[[], object], seed: int) -> None:
    law()


def _machine(kind: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(kind, settings=settings.get_profile("laws"))


def _in_a_loop(law: Callable[..., Any], **arguments: object) -> None:
    asyncio.run(law(**arguments))


def outcome(law: Law, seed: int, processor: float = PROCESSOR_LIMIT, real: float = REAL_LIMIT) -> BaseException | None:
    """Try it under one schedule: how it failed, if it did. Leaves no trace of a runtime that did wrong.

    Args:
        law: it.
        seed: of the schedule.
        processor: seconds of processor time after which it does not end.
        real: likewise, seconds of real time.
    """
    try:
        with _limited(processor, real):
            law.run(seed)
    except BaseException as error:  # DeadlockError, KeyboardInterrupt from a callback, whatever it is: it failed
        return error
    finally:
        memory._kept.clear()
        completion._hubs.clear()
    return None


@contextlib.contextmanager
def _limited(processor: float, real: float) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise DoesNotEndError("it does not end")

    timers = {signal.SIGVTALRM: (signal.ITIMER_VIRTUAL, processor), signal.SIGALRM: (signal.ITIMER_REAL, real)}
    before = {number: signal.signal(number, expire) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit, 0.5)  # and again: the first may end in something that catches everything
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0.0)
            signal.signal(number, before[number])


def story(error: BaseException) -> str:
    """How a law failed, in a few words."""
    hazards = [note.splitlines()[1] for note in getattr(error, "__notes__", ()) if note.startswith("The detector found")]
    if isinstance(error, HazardError):
        return f"hazard: {error.kind}"
    if hazards:
        return f"hazard: {hazards[0].partition(':')[0]}"
    name = type(error).__name__
    match name:
        case "DeadlockError":
            return "somebody waits for ever"
        case "LoopBlockedError":
            return "the loop is blocked"
        case "DoesNotEndError":
            return "it does not end"
        case "AssertionError" | "Failed":
            return " ".join(str(error).split("\n")[0].split())[:60] or "a wrong result"
        case _:
            return name
