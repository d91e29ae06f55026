"""Race detection: finds unordered accesses to the same memory, even if the run's result was right.

Rule 1: the order that the program requested counts, and not the order in which operations ran: a race without
consequences in this run is reported too.
Rule 2: this module depends neither on torch nor on time. Its input is which actor accesses which bytes, and which accesses
each actor is ordered after.

Theory of operation. Each stream, and the host, is an actor with a vector clock: for every actor, the number of its accesses
that are known to have completed. An operation is ordered after all earlier operations on its stream, and after everything
the host knew when it submitted the operation. A record is a copy of its stream's clock. A stream that waits for the record
merges this clock into its own, and so does the host when it sees the event complete. Two overlapping accesses, one of them
a write, are a hazard unless the clock of the one submitted later includes the earlier one.

Limits. All host threads are one actor, so races between them are not found. A tensor that is not contiguous counts
with all bytes from its first element to its last.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from aiotrt.testing.memory import Block, Span

__all__ = ["HOST", "Access", "Clock", "Detector", "HazardError"]

Clock: TypeAlias = dict[int, int]
#: A call stack: files, lines and functions, innermost first.
Stack: TypeAlias = tuple[tuple[str, int, str], ...]

HOST: Final = 0
_DEPTH: Final = 8
_MACHINERY: Final = frozenset({"asyncio", "concurrent", "contextlib", "threading", "torch"})  # left out of stacks
_RUNNERS: Final = frozenset({"_pytest", "pluggy", "hypothesis"})  # where stacks end


class Access(NamedTuple):
    """An access of an actor to a range of bytes.

    Attributes:
        actor: the actor: `HOST` or a stream.
        name: the actor's name.
        what: the name of the operation.
        writes: whether it writes the bytes; else it reads them.
        span: the bytes.
        epoch: the number of the operation, counted per actor.
        stack: the call stack of its submission.
    """

    actor: int
    name: str
    what: str
    writes: bool
    span: Span
    epoch: int
    stack: Stack

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"{self.name}: {self.what} {verb} {self.span}\n{describe(self.stack)}"


class HazardError(AssertionError):
    """Raised for two unordered accesses, or for one invalid access.

    Attributes:
        kind: "read before write", "write before read", "write before write", "use after free", "read of garbage",
            "host write during a copy" or "record while waited for".
        first: the access that was submitted first, or None.
        second: the access that was submitted second, or None.
    """

    def __init__(self, kind: str, message: str, first: Access | None = None, second: Access | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.first = first
        self.second = second


class Detector:
    """The race detector of one device.

    Attributes:
        found: the hazards so far, each once.
        tells_where: whether reports include call stacks. These cost more than all other bookkeeping: a search with very many
            runs leaves them out, and repeats the run that fails with them.
    """

    def __init__(self) -> None:
        self.found: list[HazardError] = []
        self.tells_where = True
        self._names: dict[int, str] = {HOST: "host"}
        self._clocks: dict[int, Clock] = {HOST: {}}
        self._history: dict[Block, list[Access]] = {}
        self._written: dict[Block, list[tuple[int, int]]] = {}  # since its allocation, merged and in order
        self._seen: set[object] = set()

    def actor(self, name: str) -> int:
        """Register a stream as a new actor, and return its number."""
        actor = len(self._names)
        self._names[actor] = name
        self._clocks[actor] = {}
        return actor

    # Ordering...

    def mark(self, actor: int) -> Clock:
        """Return the clock of an event that is recorded on this stream now."""
        self._join(actor, self._clocks[HOST])
        return dict(self._clocks[actor])

    def wait(self, actor: int, clock: Clock) -> None:
        """Order all later operations of this stream after all accesses in `clock`."""
        self._join(actor, clock)

    def observe(self, clock: Clock) -> None:
        """Order all later operations of the host after an event that the host has seen complete."""
        self._join(HOST, clock)

    # Accesses...

    def allocated(self, block: Block) -> None:
        """Record that a block was allocated: it holds garbage."""
        self._written[block] = []

    def freed(self, span: Span, actor: int) -> None:
        """Record that memory was freed: it may be allocated again in the order of `actor`."""
        self.access(actor, "free", (), (span,))

    def access(self, actor: int, what: str, reads: Iterable[Span], writes: Iterable[Span]) -> None:
        """Record and check the accesses of one operation, submitted to a stream or made by the host."""
        clock = self._clocks[actor]
        self._join(actor, self._clocks[HOST])
        epoch = clock[actor] = clock.get(actor, 0) + 1
        stack = self.where()
        name = self._names[actor]
        writes = tuple(writes)
        for span in writes:
            self._check(Access(actor, name, what, True, span, epoch, stack), clock)
            if what != "free":
                self._cover(span)
        for span in reads:
            access = Access(actor, name, what, False, span, epoch, stack)
            self._check(access, clock)
            if span.block.generation == span.generation and not span.block.pinned and not self._is_covered(span):
                self._report("read of garbage", f"this memory was not written since its allocation\n{access}", None, access)

    def found_rerecord(self, name: str, polled: Stack) -> None:
        """Report that an event is recorded again while the host still waits for its last record."""
        self._report(
            "record while waited for",
            f"{name} is recorded again, but the host found it not complete and may still be waiting for it: the wait would "
            f"include later work\npolled\n{describe(polled)}\nrecorded again\n{describe(self.where())}",
            None,
            None,
        )

    def found_host_write(self, what: str, span: Span, stack: Stack) -> None:
        """Report that the host changed pinned memory between the submission and the execution of a copy that reads it."""
        self._report(
            "host write during a copy",
            f"{span} was changed by the host after {what} was submitted and before it was done; missing: the host must wait "
            f"for an event recorded after it\n{describe(stack)}",
            None,
            None,
        )

    def found_early_close(self) -> None:
        """Report that a graph is freed before the host has seen its last launch complete."""
        message = f"a graph is freed, but the host has not seen its last launch complete\n{describe(self.where())}"
        self._report("use after free", message, None, None)

    def knows(self, clock: Clock) -> bool:
        """Whether the host is ordered after all accesses in `clock`."""
        mine = self._clocks[HOST]
        return all(mine.get(actor, 0) >= epoch for actor, epoch in clock.items())

    def where(self) -> Stack:
        """Return the call stack of the calling program; empty unless `tells_where`."""
        return where() if self.tells_where else ()

    def check(self) -> None:
        """Raise the first hazard found, if any.

        Raises:
            HazardError: the first hazard.
        """
        if self.found:
            raise self.found[0]

    def _join(self, actor: int, clock: Clock) -> None:
        mine = self._clocks[actor]
        if mine is not clock:
            for other, epoch in clock.items():
                if mine.get(other, 0) < epoch:
                    mine[other] = epoch

    def _check(self, new: Access, clock: Clock) -> None:
        block = new.span.block
        if new.span.generation != block.generation or (block.is_free and new.what != "free"):
            self._report("use after free", f"the memory was freed before this access was submitted\n{new}", None, new)
            return
        history = self._history.get(block, [])
        kept = []
        for old in history:
            if old.span.end <= new.span.begin or new.span.end <= old.span.begin:
                kept.append(old)
                continue
            ordered = clock.get(old.actor, 0) >= old.epoch
            if not ordered and (old.writes or new.writes):
                self._conflict(old, new)
            inside = new.span.begin <= old.span.begin and old.span.end <= new.span.end
            # An access ordered after the new one is then ordered after this one too, so this one can be dropped.
            if not (inside and ordered and (new.writes or not old.writes)):
                kept.append(old)
        kept.append(new)
        self._history[block] = kept

    def _conflict(self, old: Access, new: Access) -> None:
        if "free" in (old.what, new.what):
            kind = "use after free"
        elif new.writes:
            kind = "write before write" if old.writes else "write before read"
        else:
            kind = "read before write"
        if new.actor == HOST:
            edge = f"the host must see an event complete that was recorded on {old.name} after {old.what!r}"
        else:
            edge = f"{new.name} must wait for an event recorded on {old.name} after {old.what!r}"
        message = f"{new.what!r} may come before {old.what!r} is done; missing: {edge}\nfirst   {old}\nsecond  {new}"
        self._report(kind, message, old, new)

    def _report(self, kind: str, message: str, first: Access | None, second: Access | None) -> None:
        places = tuple((a.actor, a.what, a.stack) for a in (first, second) if a is not None)
        key = (kind, places or message)
        if key not in self._seen:
            self._seen.add(key)
            self.found.append(HazardError(kind, message, first, second))

    def _cover(self, span: Span) -> None:
        if self._is_covered(span):
            return
        begin, end = span.begin, span.end
        merged = []
        for low, high in self._written.setdefault(span.block, []):
            if high < begin or end < low:
                merged.append((low, high))
            else:
                begin, end = min(begin, low), max(end, high)
        self._written[span.block] = sorted([*merged, (begin, end)])

    def _is_covered(self, span: Span) -> bool:
        for low, high in self._written.get(span.block, ()):  # noqa: SIM110  # any() costs three times as much
            if low <= span.begin and span.end <= high:
                return True
        return False


def where() -> Stack:
    """Return the call stack of the calling program, without the frames of this package and of torch."""
    stack: list[tuple[str, int, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(stack) < _DEPTH:
        code = frame.f_code
        known = _roles.get(id(code))
        if known is None:
            known = _roles[id(code)] = _role(frame.f_globals.get("__name__", "")), code
        if known[0] == "shown":
            stack.append((code.co_filename, frame.f_lineno, code.co_name))
        elif known[0] == "end":
            break
        frame = frame.f_back
    return tuple(stack)


#: The role of a code object's frames in a stack, by the object's id; the object is kept, so that its id is not reused.
_roles: Final[dict[int, tuple[str, CodeType]]] = {}


def _role(module: str) -> str:
    package = module.partition(".")[0]
    if package in _RUNNERS:
        return "end"
    return "left out" if package in _MACHINERY or module.startswith("aiotrt.testing") else "shown"


def describe(stack: Stack) -> str:
    """Format a call stack."""
    lines = [f"    {file}:{line} in {name}: {linecache.getline(file, line).strip()}" for file, line, name in stack]
    return "\n".join(lines)
