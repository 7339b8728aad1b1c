"""Group commit: what is batched, in which order, and who learns of which failure."""

import asyncio
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import (
    Append,
    AppendResult,
    LogRow,
    Reason,
    SeqTaken,
    StoreUnavailable,
)


def row(seq: int, mark: str = "") -> LogRow:
    return LogRow(seq, f"{mark}{seq}".encode(), f"digest-{mark}{seq}", seq)


class GatedStore(MemoryStore):
    """A store whose commits wait at a gate, so that a test decides what gathers meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        """Set when a commit has arrived at the gate."""
        self.batches: list[list[Append]] = []
        self.failures: list[Exception | None] = []
        """What the next commits and deletes raise, one each."""

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        self.batches.append(list(batch))
        self.entered.set()
        assert self.gate.wait(timeout=30)
        self._fail()
        return super().append(batch)

    def delete(self, run: str, after: str | None = None) -> bool:
        self._fail()
        return super().delete(run, after)

    def _fail(self) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class Observed:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.commits: list[tuple[int, int, Reason | None]] = []
        self.seconds: list[float] = []

    def commit_finished(
        self, seconds: float, appends: int, rows: int, failure: Reason | None
    ) -> None:
        self.seconds.append(seconds)
        self.commits.append((appends, rows, failure))


async def held(store: GatedStore, committer: GroupCommitter) -> asyncio.Task[int]:
    """Occupy the writer with a first append, until the gate opens."""
    store.gate.clear()
    store.entered.clear()
    name = f"first-{len(store.batches)}"
    first = asyncio.create_task(committer.append(name, [row(1)], create=True))
    assert await asyncio.to_thread(store.entered.wait, 30)
    return first


async def started(*tasks: asyncio.Task[Any]) -> None:
    """Let every task run up to where it waits."""
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_an_append_returns_when_its_rows_are_in(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    committer = GroupCommitter(store)
    await committer.append("a", [row(1), row(2)], create=True)
    assert store.read("a") == [row(1), row(2)]
    await committer.append("a", [row(3)])
    assert store.head("a") == (3, "digest-3")
    await committer.close()
    store.close()


async def test_what_gathers_during_a_commit_goes_into_the_next() -> None:
    store = GatedStore()
    observed = Observed()
    committer = GroupCommitter(store, observed)
    first = await held(store, committer)
    others = [
        asyncio.create_task(committer.append(f"run-{n}", [row(1), row(2)], create=True))
        for n in range(25)
    ]
    await started(first, *others)
    store.gate.set()
    await asyncio.gather(first, *others)
    await committer.close()
    assert store.sizes() == [1, 25]
    assert observed.commits == [(1, 1, None), (25, 50, None)]
    assert all(seconds > 0 for seconds in observed.seconds)


async def test_appends_to_one_run_stay_in_order() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    first = await held(store, committer)
    tasks = [
        asyncio.create_task(committer.append("a", [row(seq)], create=seq == 1))
        for seq in range(1, 40)
    ]
    await started(first, *tasks)
    store.gate.set()
    await asyncio.gather(first, *tasks)
    await committer.close()
    assert store.sizes() == [1, 39]
    assert [append.rows[0].seq for append in store.batches[1]] == list(range(1, 40))


async def test_a_conflict_fails_its_own_append_alone() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    await committer.append("a", [row(1)], create=True)
    first = await held(store, committer)
    winner = asyncio.create_task(committer.append("a", [row(2, "won-")]))
    loser = asyncio.create_task(committer.append("a", [row(2, "lost-")]))
    missing = asyncio.create_task(committer.append("nobody", [row(1)]))
    other = asyncio.create_task(committer.append("b", [row(1)], create=True))
    await started(winner, loser, missing, other)
    store.gate.set()
    results = await asyncio.gather(first, winner, loser, missing, other, return_exceptions=True)
    assert store.sizes() == [1, 1, 4]
    # Each is told how many appends its commit had.
    assert [results[0], results[1], results[4]] == [1, 4, 4]
    assert isinstance(results[2], SeqTaken)
    assert (results[2].run, results[2].seq, results[2].last_seq) == ("a", 2, 2)
    assert isinstance(results[3], SeqTaken)
    assert (results[3].run, results[3].last_seq) == ("nobody", None)
    assert store.read("a", 1) == [row(2, "won-")]
    await committer.close()


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (StoreUnavailable("disk full"), "^disk full$"),
        (ZeroDivisionError("a bug"), "^ZeroDivisionError: a bug$"),
    ],
)
async def test_a_failing_store_fails_those_appends_and_no_later_ones(
    failure: Exception, text: str
) -> None:
    store = GatedStore()
    observed = Observed()
    committer = GroupCommitter(store, observed)
    first = await held(store, committer)
    store.failures = [None, failure]
    tasks = [
        asyncio.create_task(committer.append(f"run-{n}", [row(1), row(2)], create=True))
        for n in range(3)
    ]
    await started(first, *tasks)
    store.gate.set()
    await first
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        assert type(result) is StoreUnavailable
        assert re.search(text, str(result))
        assert result.__cause__ is failure
    # Raised in three places, so three exceptions: one would gather the traces of all.
    assert len({id(result) for result in results}) == 3
    await committer.append("run-0", [row(1)], create=True)
    await committer.close()
    assert store.runs() == ["first-0", "run-0"]
    assert observed.commits == [(1, 1, None), (3, 6, "other"), (1, 1, None)]


async def test_close_flushes() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    first = await held(store, committer)
    tasks = [
        asyncio.create_task(committer.append(f"run-{n}", [row(1)], create=True)) for n in range(10)
    ]
    await started(first, *tasks)
    closing = asyncio.create_task(committer.close())
    await started(closing)
    store.gate.set()
    await closing
    assert store.sizes() == [1, 10]
    await asyncio.gather(first, *tasks)
    await committer.close()


async def test_nothing_is_taken_after_close() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    await committer.close()
    with pytest.raises(StoreUnavailable, match="shutting down"):
        await committer.append("a", [row(1)], create=True)
    with pytest.raises(StoreUnavailable, match="shutting down"):
        await committer.delete("a")
    assert store.batches == []


async def test_a_cancelled_caller_withdraws_nothing() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    first = await held(store, committer)
    cancelled = asyncio.create_task(committer.append("a", [row(1)], create=True))
    other = asyncio.create_task(committer.append("a", [row(2)]))
    await started(first, cancelled, other)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    store.gate.set()
    await asyncio.gather(first, other)
    assert store.read("a") == [row(1), row(2)]
    await committer.close()


async def test_a_delete_keeps_its_place() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    first = await held(store, committer)
    before = asyncio.create_task(committer.append("a", [row(1), row(2)], create=True))
    delete = asyncio.create_task(committer.delete("a"))
    again = asyncio.create_task(committer.delete("a"))
    after = asyncio.create_task(committer.append("a", [row(1, "new-")], create=True))
    await started(first, before, after)
    store.gate.set()
    await asyncio.gather(first, before, after)
    assert (await delete, await again) == (True, False)
    assert store.sizes() == [1, 1, 1]
    assert store.read("a") == [row(1, "new-")]
    await committer.close()


async def test_a_failed_delete() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    await committer.append("a", [row(1)], create=True)
    store.failures = [StoreUnavailable("disk full")]
    with pytest.raises(StoreUnavailable, match="disk full"):
        await committer.delete("a")
    assert await committer.delete("a")
    await committer.close()


async def test_rows_that_no_log_takes_reach_no_store() -> None:
    store = GatedStore()
    committer = GroupCommitter(store)
    with pytest.raises(ValueError, match="at least one row"):
        await committer.append("a", [])
    with pytest.raises(ValueError, match="expected seq 2, got 3"):
        await committer.append("a", [row(1), row(3)], create=True)
    await committer.close()
    assert store.batches == []


async def test_an_observer_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def commit_finished(
            self, seconds: float, appends: int, rows: int, failure: Reason | None
        ) -> None:
            raise ZeroDivisionError

    committer = GroupCommitter(MemoryStore(), Broken())
    await committer.append("a", [row(1)], create=True)
    await committer.append("a", [row(2)])
    await committer.close()
    assert [record.message for record in caplog.records] == ["a commit could not be counted"] * 2


def test_an_event_loop_that_ends_early_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store = GatedStore()
    committer = GroupCommitter(store)

    async def leave() -> None:
        await held(store, committer)

    async def come_back() -> None:
        await committer.append("a", [row(1)], create=True)
        await committer.close()

    asyncio.run(leave())
    store.gate.set()
    asyncio.run(come_back())
    assert store.runs() == ["a", "first-0"]
    assert [record.message for record in caplog.records] == [
        "the event loop ended before 1 writes did"
    ]
