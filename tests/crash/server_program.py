"""The server of the laboratory: `python -m tests.crash.server_program [--bug NAME] serve …`.

It is `lrpilot`, but that it trims states, writes snapshots and packs rows after a few steps, as a
server does after thousands. And it may have one planted bug, such as a change of the server could
bring in: the crash laboratory proves itself by catching them.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from lrpilot import core
from lrpilot.core import _canonical, _operators, _state
from lrpilot.core.policies import Observation
from lrpilot.server import _commit, _history, _packing, _sql_store, _sqlite
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._store import Append, AppendResult
from lrpilot.server.cli import _main

COMMITS_AFTER_S = 0.1
"""How long after its answer a change is written that is answered before its commit."""

LOOKS_BEFORE_S = 0.05
"""How long before it writes a replica without a fence has looked at the log."""

SHORT_HISTORY = {"snapshot_every": 24, "kept_steps": 12, "kept_delays": 1}
"""Thresholds of the history of runs."""

BUGS: dict[str, Callable[[], None]] = {}
"""Name to what plants the bug in this process."""


def _planted(bug: Callable[[], None]) -> Callable[[], None]:
    BUGS[bug.__name__.removeprefix("_").replace("_", "-")] = bug
    return bug


@_planted
def _reply_before_commit() -> None:
    """Answers go out while what they acknowledge is not written yet."""
    right = GroupCommitter._commit

    def commit(self: GroupCommitter, tasks: list[_commit._Task]) -> None:
        works = [task.work for task in tasks if isinstance(task.work, Append)]
        if any(work.create for work in works):
            right(self, tasks)
            return
        self._resolve([_commit._Outcome(task.done, True) for task in tasks])
        time.sleep(COMMITS_AFTER_S)
        self._store.append(works)

    _set(GroupCommitter, "_commit", commit)


@_planted
def _synchronous_off() -> None:
    """SQLite leaves it to the kernel when a commit reaches the disk."""
    make = _sqlite.sqlite_engine

    def engine(path: Any) -> sa.Engine:
        made = make(path)

        @sa.event.listens_for(made, "connect")
        def connect(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")

        return made

    _set(_sql_store, "sqlite_engine", engine)


@_planted
def _fence_dropped() -> None:
    """An append goes to the end of the log, wherever that is, with what was evaluated elsewhere."""
    write = _sql_store._append

    def append(connection: sa.Connection, batch: Sequence[Append]) -> list[AppendResult]:
        time.sleep(LOOKS_BEFORE_S)
        heads = _sql_store._heads(connection, [item.run for item in batch])
        moved = []
        for item in batch:
            head = heads.get(item.run)
            if head is None or item.create:
                moved.append(item)
                continue
            rows = []
            for row in item.rows:
                digest = _canonical.chain(head.digest, row.payload)
                head.last_seq, head.digest = head.last_seq + 1, digest
                rows.append(replace(row, seq=head.last_seq, digest=digest))
            moved.append(Append(item.run, tuple(rows)))
        return write(connection, moved)

    _set(_sql_store, "_append", append)


@_planted
def _horizon_off_by_one() -> None:
    """Values are handed out one step too early."""
    right: Any = core.RunState.horizon
    _set(core.RunState, "horizon", property(lambda self: right.__get__(self) + 1))


@_planted
def _dedup_dropped() -> None:
    """A report that comes again is appended again."""

    def report_losses(
        state: core.RunState, reports: Sequence[core.Report], *, rank: int, incarnation: str
    ) -> tuple[list[core.Event], list[core.Outcome]]:
        event = core.Reported(state.attempt, incarnation, tuple(reports))
        return [event], [core.Outcome.RECORDED for _ in reports]

    _set(core, "report_losses", report_losses)


@_planted
def _validation_dropped() -> None:
    """Of a step without a loss a validation loss is acknowledged, and only its end is appended."""
    right = core.report_losses

    def report_losses(
        state: core.RunState, reports: Sequence[core.Report], *, rank: int, incarnation: str
    ) -> tuple[list[core.Event], list[core.Outcome]]:
        kept = [item if item.loss is not None else replace(item, validation={}) for item in reports]
        return right(state, kept, rank=rank, incarnation=incarnation)

    _set(core, "report_losses", report_losses)


@_planted
def _recompute_instead_of_record() -> None:
    """Values are computed for each answer, and no record of them is made."""
    right = core.get_values

    def get_values(
        state: core.RunState, request: core.ValuesRequest
    ) -> core.Block | core.Recorded | None:
        found = right(state, request)
        if not isinstance(found, core.Recorded):
            return found
        return core.Block(
            begin=found.begin,
            stride=found.stride,
            groups=len(state.spec.group_names),
            learning_rates=found.learning_rates,
            weight_decays=found.weight_decays,
        )

    _set(core, "get_values", get_values)


@_planted
def _rewind_keeps_decisions() -> None:
    """A new attempt goes on with what the losses behind its begin decided."""
    right = core.Plan.forget
    _set(core.Plan, "forget", lambda self, progress: right(self, core.MAX_PROGRESS))


@_planted
def _request_id_forgotten() -> None:
    """What an operator asks for again is done again."""
    _set(_operators, "_is_done", lambda state, request_id: False)


@_planted
def _zombies_heard() -> None:
    """A request counts whichever attempt it is of."""
    _set(core, "check_attempt", lambda state, number, token: None)


@_planted
def _late_losses_observed() -> None:
    """A loss that comes after its waiver is decided on all the same."""
    right = core.RunState._report

    def report(self: core.RunState, event: core.Reported) -> None:
        known = {*self.late}
        right(self, event)
        for at, rank in self.late.keys() - known:
            seen = Observation(at, self.late[at, rank])
            self.observers, _ = self.observers.observe(self.plan, seen, self.seq, None)

    _set(core.RunState, "_report", report)


@_planted
def _attempt_opened_twice() -> None:
    """A repeated call to open an attempt opens another one."""

    def open_attempt(state: core.RunState, request: core.OpenRequest) -> list[core.Event]:
        state.answers.pop(request.request_id, None)
        state.keys.pop(request.key, None)
        return right(state, request)

    right = core.open_attempt
    _set(core, "open_attempt", open_attempt)


@_planted
def _declared_twice() -> None:
    """A repeated declaration is recorded again."""
    right = core.declare_values

    def declare_values(
        state: core.RunState, blocks: Sequence[core.Block], *, holder: str, offer: int = 0
    ) -> list[core.Event]:
        events = right(state, blocks, holder=holder, offer=offer)
        return events or [core.Declared(state.attempt, tuple(blocks), state.permits[-1].seq)]

    _set(core, "declare_values", declare_values)


def _set(owner: Any, name: str, value: object) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner!r} has no {name}: the bug needs another place")
    setattr(owner, name, value)


def _shorten_history() -> None:
    """Let a round of some hundred steps go through what a run of thousands does."""
    _set(_state, "MARK_EVERY", 8)
    _set(_packing, "SEGMENT_ROWS", 16)
    thresholds = _history.History.__init__.__kwdefaults__
    if thresholds is None or not thresholds.keys() >= SHORT_HISTORY.keys():
        raise AttributeError("the history of runs has other thresholds")
    thresholds.update(SHORT_HISTORY)


def main() -> None:
    """Be `lrpilot`, with the bug that the first arguments name, if any."""
    arguments = sys.argv[1:]
    _shorten_history()
    if arguments[:1] == ["--bug"]:
        _, name, *arguments = arguments
        if name not in BUGS:
            raise SystemExit(f"--bug {name}: known are {', '.join(sorted(BUGS))}")
        BUGS[name]()
    sys.argv[1:] = arguments
    _main.main()


if __name__ == "__main__":
    main()
