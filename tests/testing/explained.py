"""Statements of the runtime whose removal no law finds, and why: see `seeded_defects`.

By file, function, text and the how manieth of those that are alike there, counted from 0. "Not needed" means that a reader
of the runtime may take it out.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EXPLAINED"]

LOGS: Final = "only writes to the log"

EXPLAINED: Final[dict[tuple[str, str, str, int], str]] = {
    ("launch.py", "has_passed", "_ignore(error)", 0): LOGS,
    ("launch.py", "await_gates", "_ignore(error)", 0): LOGS,
    ("launch.py", "_ignore", "_log.debug('a consumer failed: %r', error)", 0): LOGS,
    ("executor.py", "Executor._built", "keep(program)", 0): (
        "a build ends when the device is done with it, so dropping it frees nothing that is in use; kept because destroying "
        "a graph on a broken device can block, which the simulator does not model"
    ),
    ("executor.py", "Executor._gates_passed", "slot.gates.clear()", 0): (
        "saves the next launch a wait for events that are complete"
    ),
    (
        "executor.py",
        "Executor._prepare_next",
        "_log.debug('results for the next launch could not be allocated: %r', error)",
        0,
    ): LOGS,
    (
        "executor.py",
        "Executor._prepare_results",
        "_log.debug('results for the next launch could not be allocated: %r', error)",
        0,
    ): LOGS,
    (
        "executor.py",
        "Executor.warm_up_driver",
        "_log.debug('the current stream could not be queried: %r', error)",
        0,
    ): LOGS,
    ("executor.py", "Executor._stage", "slot.launches = 0", 0): (
        "not needed: launches are told apart by equality, and numbers that only grow do that as well"
    ),
    ("executor.py", "Executor.abandon", "self._check_idle()", 0): (
        "not needed: while somebody stands in line no slot is free, so leaving the line cannot make the model idle"
    ),
    ("executor.py", "Executor.drop", "self._check_idle()", 0): (
        "not needed: for the same reason; and each `move` before it has checked"
    ),
    ("executor.py", "Executor._check_idle", "self._idle = None", 0): (
        "not needed: only closing waits for it, and a model that was idle while it closed never works again"
    ),
    ("executor.py", "Executor.work.run", "keep(self)", 0): (
        "not needed: a slot with a worker is not free, so `discard` keeps the executor; and a build that came too late is "
        "complete on the device"
    ),
    ("executor.py", "Executor.break_down", "self._granted.clear()", 0): (
        "not needed: one grant at a time is under way, and it is taken out before its request can break anything"
    ),
    ("programs.py", "Program.output_view", "self.staged_outputs[i] = output", 0): "saves making the same view for each call",
    ("hold.py", "Hold.results", "self._kept = tensor", 0): "saves making the same tensor for each launch",
    (
        "hub.py",
        "Hub._notify",
        "self._is_told = True",
        0,
    ): "the loop is called for each lane, and the first call finds all",
    ("hold.py", "Hold.order", "self._ordered.add(current.handle)", 0): "saves a second wait for the same event",
    ("hold.py", "Hold._launched", "self._ordered.add(ordered.handle)", 0): "saves a second wait for the same event",
    ("hold.py", "Hold.leave", "self._left = True", 1): (
        "not needed: a lease that leave() finds not held was revoked, or its model broke; both are refused without it, in "
        "their own words"
    ),
    ("hub.py", "Hub._poll", "lane.due = self._first_poll(lane.last_done, pending[0])", 0): (
        "saves a poll: `add` has said when, unless other work was before it, and then it is polled at once"
    ),
    ("hub.py", "Hub.close", "self._soon.cancel()", 0): "saves a turn of the loop: a closed hub does not look",
    ("hub.py", "Hub.close", "self._soon = None", 0): "lets go of a handle that will never be called",
    ("programs.py", "Program.launch", "steps[-1].own = own", 0): (
        "saves copying the results once more: results in memory of the program's own are right as well"
    ),
    ("programs.py", "Program.close", "self.graph = None", 0): "frees it: a closed program is dropped right after",
    ("programs.py", "Program.close", "self._steps = ()", 0): "lets go of what ran: a closed program is dropped right after",
    ("programs.py", "Program.close", "self._closers = ()", 0): "makes closing idempotent; nobody closes twice",
    ("model.py", "Model._warm", "request.exception()", 0): (
        "not needed: `Future.cancel`, two lines above, counts as having looked"
    ),
    ("model.py", "_start_thread", "pool.shutdown(wait=False)", 0): "ends the thread now and not when the pool is collected",
    ("model.py", "_in_background", "task._log_destroy_pending = False", 0): (
        "only keeps asyncio from writing to the log about a loop that is closed under it, which `test_lifecycle` has"
    ),
    ("mapping.py", "map_in_order", "request.cancel()", 0): (
        "not needed: `abandon` withdraws it; kept so that an abandoned request is cancelled, whoever abandons it"
    ),
    ("batcher.py", "Gatherer._assemble", "self._held = None", 0): "lets go of a timer that was cancelled",
    ("batcher.py", "Gatherer._release", "self._held = None", 0): "lets go of a timer that has rung",
    ("batcher.py", "Gatherer._fail", "self._open = None", 0): "lets go of a batch: a model that ended takes no more items",
    ("batcher.py", "Gatherer._fail", "self.close()", 0): (
        "not needed: nobody waits any more, so what rings finds nothing to do, and `Model.aclose` closes as well"
    ),
}
