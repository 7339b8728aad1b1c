"""Random use of a store, held against a model: a dict of lists, which is all that a store promises.

Every backend is held against that one model, the store in memory too. Segments, pages and
milestones are made so small that a few rows make many of them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lrpilot import core
from lrpilot.server import _memory_store, _packing, _sql_store
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._packing import PackedLog
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import MAX_SEQ, Append, LogRow, SeqTaken, Snapshot, Store
from tests.packing import compact_all

SEGMENT_ROWS = 4
MILESTONE_ROWS = 6

RUNS = st.sampled_from(["a", "B", "é"])
LIMITS = st.none() | st.integers(0, 12)
TIMES = st.integers(-5, 5)
PAYLOADS = st.sampled_from([b"", b'{"lr":[0.1,0.2],"n":1}', b'{"lr":[0.3],"n":2}', b"\xff%"])


class StoreMachine(RuleBasedStateMachine):
    """One store and its model."""

    def __init__(self, reopened: Callable[[Store | None], Store]) -> None:
        super().__init__()
        self.reopened = reopened
        self.store = reopened(None)
        for name in self.store.runs():
            self.store.delete(name)
        self.logs: dict[str, list[LogRow]] = {}
        self.snapshots: dict[str, dict[int, Snapshot]] = {}
        self.count = 0

    def row(self, seq: int, before: str, payload: bytes, time: int, chained: bool) -> LogRow:
        """Return a new row, whose digest says which one it is and perhaps continues the chain."""
        self.count += 1
        payload += b"%d" % self.count
        digest = core.chain(before, payload) if chained else f"digest {self.count}"
        return LogRow(seq, payload, digest, time)

    def expected(self, append: Append) -> bool:
        """Carry an append out on the model; return whether it fits."""
        log = self.logs.get(append.run)
        first = append.rows[0].seq
        if append.create:
            if log is not None:
                return False
            log = self.logs[append.run] = []
        elif log is None or first != log[-1].seq + 1 or append.after not in {None, log[-1].digest}:
            return False
        log.extend(append.rows)
        return True

    @rule(data=st.data(), size=st.integers(1, 4))
    def append(self, data: st.DataObject, size: int) -> None:
        draw = data.draw
        batch: list[Append] = []
        ends = {run: log[-1] for run, log in self.logs.items()}
        for _ in range(size):
            run = draw(RUNS)
            end = ends.get(run)
            # Most fit; some leave a gap, come late, or take a run for new or for there.
            create = (end is None) != (draw(st.integers(0, 9)) == 0)
            shift = draw(st.sampled_from([0] * 8 + [-2, 1]))
            first = max(1, (end.seq + 1 if end else draw(st.sampled_from([1, 1, 3]))) + shift)
            digest = end.digest if end else "0" * 64
            after = draw(st.sampled_from([None, digest, digest, digest, "another"]))
            rows: list[LogRow] = []
            for seq in range(first, first + draw(st.integers(1, 9))):
                before = rows[-1].digest if rows else digest
                rows.append(self.row(seq, before, draw(PAYLOADS), draw(TIMES), draw(st.booleans())))
            batch.append(Append(run, tuple(rows), create, after))
            ends[run] = rows[-1]
        lasts = {run: log[-1].seq for run, log in self.logs.items()}
        results = self.store.append(batch)
        for append, result in zip(batch, results, strict=True):
            last = lasts.get(append.run)
            if self.expected(append):
                assert result is None
                lasts[append.run] = append.rows[-1].seq
            else:
                assert isinstance(result, SeqTaken)
                found = (result.run, result.seq, result.last_seq)
                assert found == (append.run, append.rows[0].seq, last)

    @rule(run=RUNS, data=st.data(), first=st.sampled_from([1, 1, 3]), size=st.integers(1, 20))
    def adopt(self, run: str, data: st.DataObject, first: int, size: int) -> None:
        rows: list[LogRow] = []
        for seq in range(first, first + size):
            before = rows[-1].digest if rows else "0" * 64
            rows.append(self.row(seq, before, data.draw(PAYLOADS), data.draw(TIMES), chained=True))
        log = PackedLog(rows)
        if run not in self.logs:
            self.store.adopt(run, log)
            self.logs[run] = rows
            return
        with pytest.raises(SeqTaken) as caught:
            self.store.adopt(run, log)
        found = (caught.value.run, caught.value.seq, caught.value.last_seq)
        assert found == (run, first, self.logs[run][-1].seq)

    @rule(run=RUNS, data=st.data(), limits=st.lists(LIMITS, min_size=1, max_size=5))
    def read(self, run: str, data: st.DataObject, limits: list[int | None]) -> None:
        log = self.logs.get(run, [])
        last = log[-1].seq if log else 0
        begins = st.integers(-2, last + 2) | st.sampled_from([MAX_SEQ, MAX_SEQ + 1])
        for limit in limits:
            after = data.draw(begins)
            rows = [row for row in log if row.seq > after]
            assert self.store.read(run, after, limit) == rows[:limit]

    @rule(runs=st.lists(RUNS))
    def heads(self, runs: Sequence[str]) -> None:
        ends = {run: (log[-1].seq, log[-1].digest) for run, log in self.logs.items()}
        assert self.store.heads(runs) == {run: ends[run] for run in runs if run in ends}
        assert [self.store.head(run) for run in runs] == [ends.get(run) for run in runs]

    @rule(after=RUNS | st.just(""), limit=LIMITS)
    def runs(self, after: str, limit: int | None) -> None:
        names = [run for run in sorted(self.logs) if run > after]
        assert self.store.runs(after, limit) == names[:limit]

    @rule(since=TIMES)
    def recent(self, since: int) -> None:
        names = [run for run in sorted(self.logs) if self.logs[run][-1].recorded_at_ns >= since]
        assert self.store.recent(since) == names

    @rule(run=RUNS)
    def delete(self, run: str) -> None:
        assert self.store.delete(run) == (self.logs.pop(run, None) is not None)
        self.snapshots.pop(run, None)

    @rule(run=RUNS, through=st.integers(-1, 60) | st.just(MAX_SEQ + 1))
    def compact(self, run: str, through: int) -> None:
        count = compact_all(self.store, run, through)
        assert count % SEGMENT_ROWS == 0
        assert self.store.compact(run, through) == 0

    @precondition(lambda self: self.logs)
    @rule(data=st.data(), size=st.integers(1, 5))
    def save_snapshots(self, data: st.DataObject, size: int) -> None:
        run = data.draw(st.sampled_from(sorted(self.logs)))
        for _ in range(size):
            row = data.draw(st.sampled_from(self.logs[run]))
            is_there = data.draw(st.integers(0, 5)) > 0
            digest = row.digest if is_there else "another"
            self.count += 1
            floor = data.draw(st.integers(0, 5))
            snapshot = Snapshot(row.seq, digest, floor, b"%d" % self.count)
            assert self.store.save_snapshot(run, snapshot) == is_there
            if is_there:
                self.keep(run, snapshot)

    def keep(self, run: str, snapshot: Snapshot) -> None:
        """Save a snapshot in the model, and drop those that are not to be kept."""
        saved = self.snapshots.setdefault(run, {})
        saved[snapshot.seq] = snapshot
        kept: list[int] = []
        for seq in sorted(saved):
            if not kept or seq - kept[-1] >= MILESTONE_ROWS or seq == max(saved):
                kept.append(seq)
        self.snapshots[run] = {seq: saved[seq] for seq in kept}

    @rule(
        run=RUNS,
        floor=st.none() | st.integers(-1, 6),
        before=st.none() | st.integers(-1, 60) | st.just(MAX_SEQ + 1),
    )
    def snapshot(self, run: str, floor: int | None, before: int | None) -> None:
        fit = [
            one
            for _, one in sorted(self.snapshots.get(run, {}).items())
            if (floor is None or one.floor <= floor) and (before is None or one.seq < before)
        ]
        assert self.store.snapshot(run, floor, before) == (fit[-1] if fit else None)

    @rule()
    def reopen(self) -> None:
        self.store = self.reopened(self.store)

    @invariant()
    def all_is_there(self) -> None:
        assert {run: self.store.read(run) for run in self.store.runs()} == self.logs
        for run, saved in self.snapshots.items():
            found: list[Snapshot] = []
            while one := self.store.snapshot(run, before_seq=found[-1].seq if found else None):
                found.append(one)
            assert found == [one for _, one in sorted(saved.items(), reverse=True)]
        self.store.check()
        assert self.store.size() >= 0


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few rows make many segments, pages and milestones."""
    monkeypatch.setattr(_packing, "SEGMENT_ROWS", SEGMENT_ROWS)
    monkeypatch.setattr(_packing, "CACHED_SEGMENTS", 2)
    monkeypatch.setattr(_packing, "_BLOCKS_PER_QUERY", 2)
    monkeypatch.setattr(_sql_store, "_ROWS_PER_QUERY", 7)
    monkeypatch.setattr(_memory_store, "MILESTONE_ROWS", MILESTONE_ROWS)


def run(reopened: Callable[[Store | None], Store], steps: int = 40) -> None:
    """Use a store in random ways; `reopened` closes the one given and opens it again."""

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(reopened)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            # 25, unless the profile asks for more.
            max_examples=settings().max_examples // 4,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def reopened_at(address: Any) -> Callable[[Store | None], Store]:
    """Return what opens the one store at an address, again where it is open."""
    stores: list[Store] = []

    def reopened(_: Store | None) -> Store:
        while stores:
            stores.pop().close()
        stores.append(open_store(address))
        return stores[0]

    return reopened


def test_in_memory() -> None:
    run(lambda store: store or MemoryStore())


def test_on_sqlite(tmp_path: Path) -> None:
    reopened = reopened_at(tmp_path)
    run(reopened)
    reopened(None).close()


@pytest.mark.needs_program("postgres")
def test_on_postgresql(postgres: str) -> None:
    reopened = reopened_at(postgres)
    run(reopened, steps=20)
    reopened(None).close()
