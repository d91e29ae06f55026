"""A Hypothesis machine over the whole runtime on the simulated GPU: everything that may happen, in any order.

Time stands still unless a rule moves it: by turns of a loop, by one completion on the device or in a worker thread, or by
waiting. So a fault, a cancellation or a close can come at every moment there is. After each step everything is looked at
that must always hold; in the end all leases are left, all models are closed, and every await must have ended.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import aiotrt
from aiotrt.testing import VERBS, FaultKind, SimulatedDevice
from tests.machine.party import Awaited, Holder, Party, Saboteur, World, check
from tests.simulated import auditing

__all__ = ["Runtime"]

T = TypeVar("T")

WHO: Final = st.integers(0, 7)  # of whoever is there, counted round
SHAPES: Final = st.sampled_from([(1, 3), (1, 3), (2, 3), (3, 3)])  # mostly one, so that its buffers are used again
KINDS: Final = st.sampled_from(["numpy", "torch", "device", "ready"])
PATIENCE: Final = st.sampled_from([0.0, 1e-5, 1e-3, 1e-2])  # seconds of virtual time that a rule waits
#: How a call on the device may fail; what breaks it comes less often, since little can happen after that.
PASSING: Final = [(verb, kind) for verb, kinds in VERBS.items() for kind in kinds if kind.value not in ("sticky", "hang")]
FATAL: Final = [(verb, kind) for verb, kinds in VERBS.items() for kind in kinds if kind.value in ("sticky", "hang")]
POINTS: Final = PASSING * 3 + FATAL


def choose(among: Sequence[T], who: int) -> T:
    return among[who % len(among)]


class Runtime(RuleBasedStateMachine):
    """One or two loops, each with a model, on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.parties: list[Party] = []
        self.is_sound = False  # since the last step; where not, the end is not looked at
        self._stack = contextlib.ExitStack()

    @initialize(
        seed=st.integers(0, 2**16),
        slots=st.integers(1, 3),
        max_queue=st.sampled_from([None, 0, 3]),
        graphs=st.booleans(),
        entries=st.integers(1, 4),
    )
    def open(self, seed: int, slots: int, max_queue: int | None, graphs: bool, entries: int) -> None:
        gc.disable()  # when memory is given back is part of the schedule: a collection at any moment would not repeat
        self._stack.callback(gc.enable)
        device = Saboteur(SimulatedDevice(seed))
        audit = self._stack.enter_context(auditing(device.simulated))
        self._stack.enter_context(device.simulated.intercepting())
        self.world = World(device, audit)
        self.options: dict[str, Any] = {
            "slots": slots, "max_queue": max_queue, "graphs": graphs, "graph_cache_entries": entries,
        }  # fmt: skip
        self.parties.append(Party(self.world, **self.options))

    def party(self, who: int) -> Party:
        self.is_sound = False
        return choose(self.parties, who)

    def awaited(self) -> list[tuple[Party, Awaited]]:
        return [(party, awaited) for party in self.parties for awaited in party.awaited if awaited is not party.closing]

    def holders(self) -> list[tuple[Party, Holder]]:
        return [(party, holder) for party in self.parties for holder in party.holders if holder.is_held]

    # Time...

    @rule(who=WHO, count=st.integers(1, 10))
    def turn(self, who: int, count: int) -> None:
        self.party(who).turn(count)

    @rule(count=st.integers(1, 5))
    def complete(self, count: int) -> None:
        """Things happen on the device or in worker threads, and no loop has looked yet."""
        self.is_sound = False
        for _ in range(count):
            self.world.device.simulated.time.step()

    @rule(who=WHO, seconds=PATIENCE)
    def wait(self, who: int, seconds: float) -> None:
        self.party(who).wait(seconds)

    # Requests...

    @rule(who=WHO, kind=KINDS, shape=SHAPES, count=st.integers(1, 4), patience=PATIENCE)
    def call(self, who: int, kind: str, shape: tuple[int, int], count: int, patience: float) -> None:
        party = self.party(who)
        for _ in range(count):
            party.call(kind, shape)
        party.wait(patience)

    @rule(who=WHO, count=st.integers(1, 5), in_flight=st.integers(1, 4), shape=SHAPES)
    def map(self, who: int, count: int, in_flight: int, shape: tuple[int, int]) -> None:
        self.party(who).map(count, in_flight, shape)

    @precondition(lambda self: self.awaited())
    @rule(who=WHO)
    def cancel(self, who: int) -> None:
        self.is_sound = False
        party, awaited = choose(self.awaited(), who)
        party.cancel(awaited)

    # Leases...

    @precondition(lambda self: any(party.is_usable for party in self.parties))
    @rule(who=WHO, shape=SHAPES, on_host=st.booleans(), patience=PATIENCE)
    def enter_lease(self, who: int, shape: tuple[int, int], on_host: bool, patience: float) -> None:
        self.is_sound = False
        party = choose([party for party in self.parties if party.is_usable], who)
        party.enter(shape, on_host=on_host)
        party.wait(patience)

    @precondition(lambda self: any(party.captured and holder.is_ready for party, holder in self.holders()))
    @rule(who=WHO, readers=st.integers(0, 2), from_device=st.booleans(), then_leave=st.booleans())
    def launch(self, who: int, readers: int, from_device: bool, then_leave: bool) -> None:
        """Read by others, on streams of theirs, some time after the lease was left perhaps."""
        self.is_sound = False
        ready = [(party, holder) for party, holder in self.holders() if party.captured and holder.is_ready]
        party, holder = choose(ready, who)
        party.launch(holder, readers, from_device=from_device)
        if then_leave:
            party.leave(holder)

    @precondition(lambda self: any(holder.is_ready for _, holder in self.holders()))
    @rule(who=WHO, from_device=st.booleans())
    def replay(self, who: int, from_device: bool) -> None:
        self.is_sound = False
        party, holder = choose([(party, holder) for party, holder in self.holders() if holder.is_ready], who)
        party.replay(holder, from_device=from_device)

    @precondition(lambda self: self.holders())
    @rule(who=WHO)
    def leave_lease(self, who: int) -> None:
        self.is_sound = False
        party, holder = choose(self.holders(), who)
        party.leave(holder)

    @precondition(lambda self: any(holder.is_ready for _, holder in self.holders()))
    @rule(who=WHO)
    def forget_lease(self, who: int) -> None:
        """Its holder is gone without having left."""
        self.is_sound = False
        party, holder = choose([(party, holder) for party, holder in self.holders() if holder.is_ready], who)
        party.holders.remove(holder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del holder
            gc.collect()  # an error's traceback may refer to it in a circle
        party.turn()

    # What goes wrong...

    @rule(point=st.sampled_from(POINTS), after=st.integers(0, 20))
    def strike(self, point: tuple[str, FaultKind], after: int) -> None:
        """A call on the device will fail; or the device will break there, or never be done."""
        self.world.device.strike(*point, after=after)

    # Models and loops...

    @precondition(lambda self: any(party.is_usable or party.is_closed for party in self.parties))
    @rule(who=WHO, drain=st.booleans())
    def close_or_reopen(self, who: int, drain: bool) -> None:
        self.is_sound = False
        party = choose([party for party in self.parties if party.is_usable or party.is_closed], who)
        if party.is_closed:
            party.reopen()
        else:
            party.close(drain=drain)

    @rule(who=WHO)
    def other_loop(self, who: int) -> None:
        """A second loop, with a model of its own. A model belongs to the loop that opened it."""
        self.is_sound = False
        if len(self.parties) == 1:
            self.parties.append(Party(self.world, **self.options))
        mine, other = self.party(who), self.party(who + 1)

        async def call() -> None:
            await mine.model([0.0])

        try:
            other.finish(call())
        except aiotrt.UsageError:
            return
        except aiotrt.ModelClosedError:
            assert not mine.is_usable
            return
        raise AssertionError("a call from another loop was let in")

    # What must hold...

    @invariant()
    def all_is_well(self) -> None:
        if not self.parties:
            return
        self.world.audit.step()
        for party in self.parties:
            party.judge()
            party.check()
        self.world.device.simulated.check()
        assert not self.world.audit.contexts, f"a loop's exception handler was told: {self.world.audit.contexts}"
        self.is_sound = True

    def teardown(self) -> None:
        try:
            if self.is_sound:
                self._end()
        finally:
            for party in self.parties:
                party.abandon()
            if self.parties:
                self.world.device.simulated.time.end()
            for party in self.parties:
                party.loop.close()
            self._stack.close()

    def _end(self) -> None:
        """Everybody leaves, and everything ends."""
        device = self.world.device.simulated
        for party in self.parties:
            party.end()
            party.judge()
            assert not party.awaited, f"an await never ended: {[*map(str, party.awaited)]}"
        for party in self.parties:
            party.do(self.world.audit.end)
        device.run_until_idle()
        if device.broken is None and self.world.device.error is None:
            device.synchronize()
            for value, copy in self.world.kept:
                check(device.read(copy), value, tuple(copy.shape))
        device.check()
