"""Long runs over a store: snapshots, packed rows, and history that is looked up again."""

import asyncio
import json
import math
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lrpilot import core
from lrpilot.server import _history, _packing
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._run_file import RunFileReader, RunFileWriter
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import LogRow, Snapshot, Store, StoreUnavailable
from tests.trimmed import marks_every, trimmed

SPEC = {
    "name": "long",
    "total": 10_000,
    "learning_rate": {"peak": 1.0, "warmup": 50, "decay": {"style": "cosine"}},
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
    "groups": [{"name": "a"}, {"name": "b", "peak": 0.3}, {"name": "c", "peak": 0.1}],
    "policies": [{"kind": "plateau", "patience": 3, "factor": 0.9}],
    "feedback": {"delay": 4},
}
SNAPSHOT_EVERY, KEPT_STEPS = 60, 30


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let marks, segments and reads be small, so that a short run is a long one."""
    monkeypatch.setattr(_packing, "SEGMENT_ROWS", 16)
    monkeypatch.setattr(_history, "ROWS_PER_READ", 64)
    with marks_every(8):
        yield


class Counted:
    """Counts what is told of snapshots and packed rows."""

    def __init__(self) -> None:
        self.rows = self.failures = 0

    def rows_compacted(self, rows: int) -> None:
        self.rows += rows

    def snapshot_failed(self) -> None:
        self.failures += 1


class Server:
    """A ledger over a store, and what a job does with its run."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen = Counted()
        self.committer = GroupCommitter(store)
        history = History(
            store, self.seen, snapshot_every=SNAPSHOT_EVERY, kept_steps=KEPT_STEPS, kept_delays=2
        )
        self.ledger = Ledger(store, self.committer, history)

    async def run(self) -> LiveRun:
        return await self.ledger.run("long")

    async def write(self, evaluate: Callable[[core.RunState], list[core.Event]]) -> None:
        run = await self.ledger.find("long")
        await self.ledger.transact(run, lambda state: (evaluate(state), None))

    async def create(self) -> None:
        await self.write(lambda state: core.create_run(state, core.parse_spec(SPEC), "create"))

    async def open(self, saved: core.SavedState | None = None, **fields: object) -> None:
        digest = None if saved is None else await self.ledger.digest_at("long", saved.seq)
        number = (await self.run()).state.attempt + 1
        request = core.OpenRequest(
            request_id=f"open {number}", token=f"{number:032x}", incarnation="one", saved=saved,
            digest_at_saved=digest, **fields,  # type: ignore[arg-type]
        )  # fmt: skip
        await self.write(lambda state: core.open_attempt(state, request))

    async def train(self, begin: int, end: int, salt: float = 0.0) -> None:
        """Take values, and report a loss, step by step."""
        for at in range(begin, end):
            await self.take(at)
            await self.report(at, 2.0 + math.sin(at + salt))

    async def take(self, at: int) -> core.Block:
        wanted = core.ValuesRequest(begin=at, count=1, in_use=at)

        def evaluate(state: core.RunState) -> list[core.Event]:
            found = core.get_values(state, wanted)
            return [found] if isinstance(found, core.Recorded) else []

        await self.write(evaluate)
        found = await self.ledger.look(
            await self.run(), lambda state: core.get_values(state, wanted)
        )
        assert isinstance(found, core.Block)
        return found

    async def report(self, at: int, loss: float) -> None:
        said = [core.Report(at, loss, 1.0, at + 1)]
        await self.write(
            lambda state: core.report_losses(state, said, rank=0, incarnation="one")[0]
        )

    async def save(self, at: int) -> core.SavedState:
        run = await self.run()
        data = await self.ledger.look(run, lambda state: core.save_state(state, at))
        return core.read_state(data, "long")

    def whole(self) -> core.RunState:
        """The fold of the whole log, which nothing has trimmed."""
        return core.fold("long", (row.payload for row in self.store.read("long")))

    async def check(self) -> core.RunState:
        """Assert that the state is that of an untrimmed twin; return that one."""
        run = await self.run()
        await self.ledger.settle()
        whole = self.whole()
        assert run.state.snapshot() == trimmed(whole, run.state.floor).snapshot()
        assert run.state.values(whole.horizon) == whole.values(whole.horizon)
        return whole


@asynccontextmanager
async def served(store: Store) -> AsyncIterator[Server]:
    server = Server(store)
    yield server
    await server.ledger.settle()
    await server.committer.close()


async def trained(server: Server, steps: int = 200) -> None:
    await server.create()
    await server.open()
    await server.train(0, steps)
    await server.ledger.settle()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "data")
    yield opened
    opened.close()


class Watched(MemoryStore):
    """A store in memory that counts the rows read, and whose snapshots may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_read = 0
        self.fails = False

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        rows = super().read(run, after_seq, limit)
        self.rows_read += len(rows)
        return rows

    def save_snapshot(self, run: str, snapshot: Snapshot) -> bool:
        if self.fails:
            raise StoreUnavailable("no space left", "disk_full")
        return super().save_snapshot(run, snapshot)

    def change_newest(self, change: Callable[[Snapshot], Snapshot]) -> None:
        newest = self.snapshot("long")
        assert newest is not None
        self._snapshots["long"][newest.seq] = change(newest)


async def test_a_run_in_memory_does_not_grow_with_its_length(store: Store) -> None:
    async with served(store) as server:
        await trained(server, 300)
        run = await server.run()
        whole = await server.check()
        assert len(whole.loss_progress) == 300
        assert run.state.floor > 200
        assert len(run.state.loss_progress) < 100
        assert len(list(run.state.records)) < 100
        # What is behind the newest snapshot is packed, save less than a segment.
        assert run.snapshot_seq - 16 < server.seen.rows <= run.snapshot_seq
        assert run.state.seq - run.snapshot_seq < 2 * SNAPSHOT_EVERY
        assert server.seen.failures == 0


async def test_a_start_reads_what_came_after_the_newest_snapshot() -> None:
    store = Watched()
    async with served(store) as server:
        await trained(server)
        await server.report(30, 2.0 + math.sin(30))  # a retry
    async with served(store) as server:
        store.rows_read = 0
        await server.ledger.warm_up()
        run = await server.run()
        assert run.state.seq > 400
        assert store.rows_read < SNAPSHOT_EVERY + 10
        await server.train(200, 230)
        await server.check()


async def test_every_checkpoint_can_be_resumed_from(store: Store) -> None:
    async with served(store) as server:
        await server.create()
        await server.open()
        saved = {}
        for begin in range(0, 200, 20):
            await server.train(begin, begin + 20)
            saved[begin + 20] = await server.save(begin + 20)
        for at in (180, 20, 100, 60):
            async with served(store) as other:
                await other.open(saved[at])
                whole = await other.check()
                assert (whole.begin, whole.frontier) == (at, at)
                # With the same losses it goes the same way; with others another.
                await other.train(at, at + 60, salt=float(at))
                await other.check()
            run = await server.run()
            await server.ledger.refresh(run)
            await server.check()


async def test_a_run_is_imported_as_what_is_kept_of_it(store: Store) -> None:
    writer = RunFileWriter("long", 7)
    async with served(MemoryStore()) as server:
        await server.create()
        await server.open()
        saved = {}
        for begin in range(0, 200, 20):
            await server.train(begin, begin + 20)
            saved[begin + 20] = await server.save(begin + 20)
        # Back behind what is kept, twice, the second time not as far.
        for at in (20, 100):
            await server.open(saved[at])
            await server.train(at, 100)
            saved[100] = await server.save(100)
            await server.train(100, 250)
        rows = server.store.read("long")
    file = writer.write(rows) + writer.end(writer.digest)
    async with served(store) as other:
        floors: list[int | None] = []

        def trim(run: LiveRun, floor: int | None) -> None:
            floors.append(floor)
            other.ledger.trim(run, floor)

        reader = RunFileReader(trim)
        reader.feed(file)
        read = reader.end()
        assert {None, 20, 100} == set(floors)
        assert read.run.state.floor > 150
        run = await other.ledger.find("long")

        def evaluate(state: core.RunState, there: str | None) -> tuple[list[core.Event], None]:
            request = core.ImportRequest(
                origin="lrpilot on a", exported_at_ns=7, request_id="import", author="me",
                reason="", digest_there=there,
            )  # fmt: skip
            return core.import_run(state, read.run.state, request), None

        await other.ledger.take_over(run, read.run, read.log, evaluate)
        whole = await other.check()
        assert (whole.seq, store.read("long")[:-1]) == (len(rows) + 1, rows)
        # It is a long run as any other.
        assert run.snapshot_seq == whole.seq
        await other.open(saved[60])
        await other.train(60, 160)
        await other.check()


async def test_what_a_saved_state_holds_is_the_same_at_any_progress(store: Store) -> None:
    async with served(store) as server:
        await trained(server, 150)
        whole = await server.check()
        run = await server.run()
        for at in (150, 140, 100, 33, 1, 0):
            saved = await server.ledger.look(run, partial(core.save_state, progress=at))
            assert saved == core.save_state(whole, at)


async def test_a_rank_far_behind_gets_the_values_that_the_others_got(store: Store) -> None:
    async with served(store) as server:
        await trained(server)
        whole = await server.check()
        for at in (2, 150, 77):
            assert await server.take(at) == core.get_values(
                whole, core.ValuesRequest(begin=at, count=1, in_use=at)
            )
        assert (await server.run()).state.floor <= 2
        # And in time it is trimmed again.
        await server.train(200, 260)
        assert (await server.run()).state.floor > 100
        await server.check()


async def test_old_reports_are_repeats_conflicts_and_late_ones_as_ever(store: Store) -> None:
    async with served(store) as server:
        await server.create()
        await server.open()
        await server.train(0, 12)
        await server.write(lambda state: core.waive(state, state.horizon + 8))
        await server.train((await server.run()).state.frontier, 150)
        seq = (await server.run()).state.seq
        await server.report(3, 2.0 + math.sin(3))
        assert (await server.run()).state.seq == seq
        with pytest.raises(core.LossConflict, match="progress 3 of attempt 1"):
            await server.report(3, 9.0)
        await server.report(21, 7.0)
        run = await server.run()
        assert (run.state.late_losses, run.late) == (1, {(seq + 1, 21)})
        await server.train(150, 220)
        await server.check()
    async with served(store) as server:
        run = await server.run()
        assert (run.state.late_losses, run.late) == (1, {(seq + 1, 21)})


async def test_of_late_losses_the_newest_are_known_as_such(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_history, "KEPT_LATE", 10)
    async with served(store) as server:
        await server.create()
        await server.open()
        await server.train(0, 1)
        late = []
        for _ in range(30):
            frontier = (await server.run()).state.frontier
            await server.write(lambda state: core.waive(state, state.horizon + 4))
            run = await server.run()
            for at in range(frontier, run.state.frontier):
                await server.report(at, 7.0)
                late.append((run.state.seq, at))
        assert len(late) > 2 * SNAPSHOT_EVERY
        await server.train(run.state.frontier, run.state.frontier + SNAPSHOT_EVERY)
        assert len(run.late) <= 10
        assert run.late == set(late[-10:])
        assert run.state.late_losses == len(late)
    async with served(store) as server:
        assert (await server.run()).late == set(late[-10:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda one: replace(one, data=one.data[:-9]),
        lambda one: replace(one, data=b"{}"),
        lambda one: replace(one, digest="0" * 64),
        lambda one: replace(one, data=zlib.compress(_of_format(zlib.decompress(one.data), 99))),
        lambda one: replace(one, data=zlib.compress(zlib.decompress(one.data)[:-1])),
    ],
    ids=["torn", "no snapshot", "another log", "a newer release", "cut off"],
)
async def test_a_snapshot_of_no_use_is_ignored(
    damage: Callable[[Snapshot], Snapshot], caplog: pytest.LogCaptureFixture
) -> None:
    store = Watched()
    async with served(store) as server:
        await trained(server)
    store.change_newest(damage)
    async with served(store) as server:
        await server.check()
        assert [one.levelname for one in caplog.records] == ["WARNING"]
        assert "is of no use, more of the log is read" in caplog.text
        # It is made anew, and the next start is quick again.
        await server.train(200, 225)
    caplog.clear()
    async with served(store) as server:
        await server.check()
        assert caplog.records == []


def _of_format(data: bytes, number: int) -> bytes:
    beside, _, state = data.partition(b"\n")
    return beside + b"\n" + json.dumps({**json.loads(state), "format": number}).encode()


async def test_a_store_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    store = Watched()
    store.fails = True
    async with served(store) as server:
        await trained(server)
        assert (await server.check()).frontier == 200
        assert server.seen.failures > 3
        assert [one.levelname for one in caplog.records] == ["WARNING"]
        assert "could not be kept" in caplog.text
        store.fails = False
        await server.train(200, 230)
        await server.ledger.settle()
        assert store.snapshot("long") is not None
    async with served(store) as server:
        await server.check()


async def test_a_long_log_without_a_snapshot_gets_one_once_it_is_read(store: Store) -> None:
    async with served(store) as server:
        server.ledger._history = History(store)
        await trained(server)
    assert store.snapshot("long") is None
    async with served(store) as server:
        await server.check()
        newest = store.snapshot("long")
        assert newest is not None
        assert newest.seq == (await server.run()).state.seq


async def test_a_log_that_goes_back_often_is_read_all_the_same() -> None:
    store = Watched()
    async with served(store) as server:
        await server.create()
        await server.open()
        for begin, end in ((0, 120), (100, 180), (20, 150), (140, 230), (5, 90)):
            if begin:
                await server.open(progress=begin)
            await server.train(begin, end, salt=float(end))
        await server.check()
    store._snapshots.clear()
    async with served(store) as server:
        await server.check()


async def test_a_finished_run_is_packed_and_read_from_its_snapshot() -> None:
    store = Watched()
    async with served(store) as server:
        await trained(server, 50)
        await server.write(lambda state: core.finish_run(state, "done"))
        await server.check()
        newest = store.snapshot("long")
        assert newest is not None
        assert newest.seq == (await server.run()).state.seq
    async with served(store) as server:
        store.rows_read = 0
        assert (await server.run()).state.finished
        assert store.rows_read == 1
        await server.check()
        # Once is enough.
        assert store.snapshot("long") is newest


async def test_a_run_of_the_same_name_has_nothing_of_the_one_before(store: Store) -> None:
    async with served(store) as server:
        await trained(server)
        await server.ledger.delete(await server.run(), lambda _: None)
        await server.create()
        await server.open()
        await server.train(0, 30)
        await server.check()


class Packing(MemoryStore):
    """A store that always finds something to pack, and tells who packs beside another."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        self.left = segments
        self.overlaps = 0
        self.packed: Callable[[], None] = lambda: None
        self._packs = threading.Lock()

    def compact(self, run: str, through_seq: int) -> int:
        if not self._packs.acquire(blocking=False):
            self.overlaps += 1
            return 0
        # Long enough for another to come, if any may.
        time.sleep(0.02)
        self.left -= 1
        self.packed()
        self._packs.release()
        return int(self.left > 0)


def done(events: list[core.Event], _: core.RunState) -> tuple[list[core.Event], None]:
    """What a request does that was evaluated before."""
    return events, None


async def test_one_log_is_packed_at_a_time() -> None:
    store = Packing(segments=20)
    committer = GroupCommitter(store)
    ledger = Ledger(store, committer, History(store, snapshot_every=1))
    for name in ("a", "b", "c", "d"):
        events = core.create_run(core.RunState(name), core.parse_spec({**SPEC, "name": name}), "r")
        await ledger.transact(await ledger.find(name), partial(done, events))
    await ledger.settle()
    await committer.close()
    assert (store.left <= 0, store.overlaps) == (True, 0)


async def test_the_end_of_a_server_waits_for_one_segment_at_most() -> None:
    store = Packing(segments=1_000_000)
    history = History(store)
    store.packed = lambda: history.stop() if store.left == 1_000_000 - 3 else None
    async with served(Watched()) as server:
        await server.create()
        run = await server.run()
        store._logs["long"] = server.store.read("long")
        assert history.keep("long", history.snapshot(run))
    assert store.left == 1_000_000 - 3


async def test_the_end_of_a_server_waits_for_one_page_of_a_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_history, "ROWS_PER_READ", 10)
    store = Watched()
    async with served(store) as server:
        await server.create()
        await server.open()
        await server.train(0, 12)
    history = History(store)
    whole = history.load("long")
    assert whole is not None
    history.stop()
    store.rows_read = 0
    with pytest.raises(StoreUnavailable, match="shutting down"):
        history.load("long")
    assert store.rows_read == 10


class TestReplicas:
    """Two servers on one database, of which one hears of nothing by itself."""

    @pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.needs_program(
        "postgres"
    ))])  # fmt: skip
    def stores(self, request: pytest.FixtureRequest, store: Store) -> Iterator[tuple[Store, Store]]:
        if request.param == "sqlite":
            yield store, store
            return
        address = request.getfixturevalue("postgres")
        opened = open_store(address), open_store(address)
        yield opened
        for one in opened:
            one.close()

    async def test_one_that_lags_behind_a_snapshot_catches_up(
        self, stores: tuple[Store, Store]
    ) -> None:
        async with served(stores[0]) as first, served(stores[1]) as second:
            await trained(first, 60)
            await second.check()
            await first.train(60, 200)
            # It knows less, and asks for what is packed by now; and then goes back far.
            await second.ledger.refresh(await second.run())
            await second.check()
            await first.open(progress=10)
            await first.train(10, 40)
            await second.report(40, 1.0)
            await second.check()
            await first.ledger.refresh(await first.run())
            await first.check()

    async def test_both_keep_snapshots_and_pack_at_once(self, stores: tuple[Store, Store]) -> None:
        async with served(stores[0]) as first, served(stores[1]) as second:
            await trained(first, 20)
            for at in range(20, 200, 2):
                await second.train(at, at + 1)
                await first.train(at + 1, at + 2)
            for one in (first, second):
                await one.ledger.refresh(await one.run())
                await one.check()
            assert first.seen.failures == second.seen.failures == 0
            assert first.seen.rows + second.seen.rows >= 300


def test_requests_go_on_while_a_snapshot_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of the run is held while its state is read, and not while that is written."""

    async def scene() -> None:
        writing, go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        keep = History.keep

        def slow(history: History, name: str, snapshot: Snapshot) -> bool:
            loop.call_soon_threadsafe(writing.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
            return keep(history, name, snapshot)

        monkeypatch.setattr(History, "keep", slow)
        async with served(store) as server:
            await server.create()
            await server.open()
            at = 0
            while not writing.is_set():
                await server.train(at, at + 1)
                at += 1
            await server.train(at, at + 30)
            go_on.set()
            await server.check()

    asyncio.run(scene())
