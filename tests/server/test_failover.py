"""The primary of a PostgreSQL dies, and its synchronous standby takes its place."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from lrpilot.server import _postgres
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import Append, LogRow, SeqTaken, StoreUnavailable
from tests.e2e.harness import Rank, ask_to_end, hold_to_the_promise, make_spec, wait_until
from tests.postgres import DEADLINE_S, PASSWORD, USER, Cluster

if TYPE_CHECKING:
    from tests.server.conftest import Programs

pytestmark = pytest.mark.needs_program("postgres")

NAME = "standby1"


def row(seq: int, mark: str = "") -> LogRow:
    return LogRow(seq, f"{mark}{seq}".encode(), f"digest-{mark}{seq}", seq)


class Pair:
    """A primary, and a standby without whose word it acknowledges nothing."""

    def __init__(self) -> None:
        self.primary = Cluster(durable=True).start()
        self.database = self.primary.create()
        self.standby = self.primary.standby(NAME).start()
        self.primary.confirm(NAME)

    def address(self) -> str:
        """Return the address of both, the one that is primary at first in front."""
        hosts = [f"host=127.0.0.1:{one.port}" for one in (self.primary, self.standby)]
        user = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"postgresql+psycopg://{user}@/{self.database}?{'&'.join(hosts)}"

    def dispose(self) -> None:
        """Leave nothing of them behind."""
        self.standby.dispose()
        self.primary.dispose()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.dispose()


@pytest.fixture
def opened() -> Iterator[Callable[[str], SqlStore]]:
    stores: list[SqlStore] = []

    def open_one(address: str) -> SqlStore:
        store = open_store(address)
        assert isinstance(store, SqlStore)
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


class TestRealJobs:
    STEPS = 200

    def test_nothing_is_lost_and_nobody_restarts(
        self, pair: Pair, programs: Programs, ranks: list[Rank], tmp_path: Path
    ) -> None:
        servers = [programs("--store", pair.address()).wait_ready() for _ in range(2)]
        addresses = [one.grpc for one in servers]
        salt = str(random.SystemRandom().randrange(2**32))
        print(f"salt {salt}")  # noqa: T201 (shown when the test fails)
        spec = make_spec("promoted", delay=8)
        for number in range(3):
            # The reporter has the first server alone, another rank the second.
            reached = [addresses[0], addresses[1], ",".join(addresses)][number]
            ranks.append(
                Rank(
                    tmp_path,
                    reached,
                    spec,
                    number,
                    world_size=3,
                    key="start",
                    salt=salt,
                    pause_s=0.002,
                    end_after=self.STEPS,
                )
            )
        wait_until(lambda: all(rank.reached(40) for rank in ranks), "all ranks train")
        pair.primary.kill()
        pair.standby.promote()
        for rank in ranks:
            aim = rank.used()[-1].progress + 40
            wait_until(partial(rank.reached, aim), f"rank {rank.rank} goes on")
        # The old primary is back as itself, and first in the address; nobody falls for it.
        pair.primary.start()
        pair.standby.terminate(pair.database)
        for rank in ranks:
            aim = rank.used()[-1].progress + 40
            wait_until(partial(rank.reached, aim), f"rank {rank.rank} goes on")
        ask_to_end(tmp_path, "start")
        for rank in ranks:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        hold_to_the_promise(spec, salt, addresses, ranks, self.STEPS)
        # The old one got nothing of it.
        with (
            pair.primary.connected(pair.database) as old,
            pair.standby.connected(pair.database) as new,
        ):
            lengths = [
                one.execute("SELECT max(seq) FROM events").fetchone()[0]  # type: ignore[index]
                for one in (old, new)
            ]
        assert lengths[0] < lengths[1]


class TestOldPrimary:
    def test_one_that_comes_back_is_not_used(
        self, pair: Pair, opened: Callable[[str], SqlStore]
    ) -> None:
        store = opened(pair.address())
        assert store.append([Append("a", (row(1),), True)]) == [None]
        pair.primary.kill()
        pair.standby.promote()
        wait_until(lambda: works(store), "the standby takes over")
        assert store.append([Append("a", (row(2, "new-"),))]) == [None]
        # Whoever set it up did not even have it wait for a standby.
        pair.primary.start()
        pair.primary.confirm("")
        pair.standby.kill()
        with pytest.raises(StoreUnavailable, match="on timeline 1, and timeline 2 was seen"):
            store.head("a")
        pair.standby.start()
        wait_until(lambda: works(store), "the new primary is back")
        assert store.head("a") == (2, "digest-new-2")

    def test_a_server_that_starts_is_not_taken_in_where_commits_need_a_standby(
        self,
        pair: Pair,
        opened: Callable[[str], SqlStore],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        store = opened(pair.address())
        assert store.append([Append("a", (row(1),), True)]) == [None]
        pair.primary.kill()
        pair.standby.promote()
        pair.primary.start()
        monkeypatch.setattr(_postgres, "ANSWER_S", 1.0)
        late = opened(pair.address())
        assert late.append([Append("a", (row(2),))]) == [None]
        with pair.standby.connected(pair.database) as new:
            assert new.execute("SELECT max(seq) FROM events").fetchone() == (2,)


def works(store: SqlStore) -> bool:
    try:
        store.probe()
    except StoreUnavailable:
        return False
    return True


class TestConfirmation:
    @pytest.fixture
    def cluster(self) -> Iterator[Cluster]:
        cluster = Cluster(durable=True)
        try:
            yield cluster.start()
        finally:
            cluster.dispose()

    def test_a_wait_for_the_standby_that_is_cancelled_is_no_acknowledgement(
        self,
        cluster: Cluster,
        opened: Callable[[str], SqlStore],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_postgres, "PAUSE_S", 0.0)
        database = cluster.create()
        store = opened(cluster.address(database))
        assert store.append([Append("a", (row(1),), True)]) == [None]
        cluster.confirm("nobody")
        waits = "wait_event = 'SyncRep'"
        with ThreadPoolExecutor(1) as pool:
            appending = pool.submit(store.append, [Append("a", (row(2),))])
            wait_until(lambda: cluster.backends(database, waits), "the commit waits")
            with cluster.connected() as admin:
                for pid in cluster.backends(database, waits):
                    admin.execute("SELECT pg_cancel_backend(%s)", [pid])
            with pytest.raises(StoreUnavailable, match="canceling wait for synchronous"):
                appending.result(DEADLINE_S)
        # It can be read there, and no standby has it: so it is not shown to anyone.
        with cluster.connected(database) as admin:
            assert admin.execute("SELECT max(seq) FROM events").fetchone() == (2,)
        monkeypatch.setattr(_postgres, "ANSWER_S", 0.5)
        with pytest.raises(StoreUnavailable, match="did not confirm a write"):
            store.head("a")
        cluster.confirm("")
        monkeypatch.setattr(_postgres, "ANSWER_S", 8.0)
        wait_until(lambda: works(store), "commits need nobody any more")
        (taken,) = store.append([Append("a", (row(2),))])
        assert isinstance(taken, SeqTaken)
        assert store.head("a") == (2, "digest-2")

    def test_a_read_only_database(
        self, cluster: Cluster, opened: Callable[[str], SqlStore]
    ) -> None:
        database = cluster.create()
        store = opened(cluster.address(database))
        assert store.append([Append("a", (row(1),), True)]) == [None]
        set_to = f"ALTER DATABASE {database} SET default_transaction_read_only = "
        with cluster.connected() as admin:
            admin.execute(set_to + "on")
        cluster.terminate(database)
        for use in (store.check, store.probe, lambda: store.append([Append("a", (row(2),))])):
            with pytest.raises(StoreUnavailable) as caught:
                use()
            assert caught.value.reason == "read_only"
            assert str(caught.value).startswith("read-only: ")
        with cluster.connected() as admin:
            admin.execute(set_to + "off")
        assert store.append([Append("a", (row(2),))]) == [None]

    def test_a_restart_under_load_loses_nothing(
        self, cluster: Cluster, opened: Callable[[str], SqlStore]
    ) -> None:
        address = cluster.address(cluster.create())
        stores = [opened(address) for _ in range(2)]
        ended = threading.Event()
        acknowledged = [0, 0]

        def write(number: int) -> None:
            store, run = stores[number], f"run-{number}"
            while not ended.is_set():
                seq = acknowledged[number] + 1
                try:
                    (result,) = store.append([Append(run, (row(seq),), seq == 1)])
                except StoreUnavailable:
                    ended.wait(0.02)
                else:
                    # Taken by itself, where the answer was lost.
                    assert result is None or result.last_seq == seq
                    acknowledged[number] = seq

        with ThreadPoolExecutor(2) as pool:
            writing = [pool.submit(write, number) for number in range(2)]
            for _ in range(3):
                aims = [count + 20 for count in acknowledged]
                wait_until(
                    lambda: all(a >= b for a, b in zip(acknowledged, aims, strict=True)),  # noqa: B023
                    "both write",
                )
                cluster.kill()
                cluster.start()
            ended.set()
            for one in writing:
                one.result(DEADLINE_S)
        for number, last in enumerate(acknowledged):
            for store in stores:
                log = [one.seq for one in store.read(f"run-{number}")]
                assert log == list(range(1, len(log) + 1))
                assert len(log) in {last, last + 1}
