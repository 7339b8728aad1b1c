"""Several servers on one PostgreSQL: equals, which hear of each other's writes at once."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lrpilot import core
from lrpilot.server import _app, _ledger, _postgres
from lrpilot.server._sql_store import open_store
from tests.e2e.harness import Rank, ask_to_end, hold_to_the_promise, make_spec, wait_until
from tests.postgres import PASSWORD, Cluster
from tests.server.test_postgresql import closed, name_of

if TYPE_CHECKING:
    from tests.server.conftest import Job, Program, Programs, Replica, Until

pytestmark = pytest.mark.needs_program("postgres")

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

FOREVER_S = 1e6

LISTENER = "query LIKE 'LISTEN%'"

Replicas = Callable[[], Awaitable["Replica"]]


@pytest.fixture
async def replicas(server: Replica, postgres: str) -> AsyncIterator[Replicas]:
    """Start servers on one database, each with connections of its own."""
    started: list[Replica] = []

    async def start() -> Replica:
        replica = type(server)(open_store(postgres))  # type: ignore[arg-type]
        await replica.start()
        started.append(replica)
        return replica

    yield start
    for replica in started:
        await replica.stop()
        await asyncio.to_thread(replica.store.close)


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave replicas to what they are told."""
    monkeypatch.setattr(_ledger, "POLL_S", FOREVER_S)


@pytest.fixture
def no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas be told nothing."""
    monkeypatch.setattr(_postgres.Postgres, "follow", lambda self, heard: None)


def through(job: Job, replica: Replica) -> Job:
    """Return the same rank as it calls another replica."""
    return type(job)(replica, job.run, job.opened, job.rank, job.incarnation)


async def waits(job: Job, begin: int) -> asyncio.Task[Any]:
    """Ask for values that are not fixed, as a blocked rank does, and return once that waits."""
    replica: Any = job.client
    asking = asyncio.create_task(job.values(begin, wait_ms=30_000, blocked=True))
    while True:
        await asyncio.sleep(0.01)
        live = replica.ledger._runs.get(job.run)
        if live is not None and live.ranks_waiting:
            return asking
        assert not asking.done(), asking


async def halve(replica: Replica, request_id: str) -> None:
    """Halve the LR, as a person does."""
    await replica.call(
        "AdjustRun",
        run="small",
        scale_lr=0.5,
        reason="try",
        author="oncall",
        request_id=request_id,
    )


def verify(replica: Replica, name: str = "small") -> list[str]:
    """Check that the log is one chain without gaps; return the kinds of its events."""
    state = core.RunState(name)
    kinds = []
    for row in replica.store.read(name):
        event = core.decode(row.payload)
        state.apply(event, row.payload)
        assert (state.seq, state.digest) == (row.seq, row.digest)
        kinds.append(event.kind)
    return kinds


class TestEquals:
    async def test_both_open_one_attempt(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        await a.attach(**a.feedback())
        jobs = await asyncio.gather(
            *(
                one.open(key="start", rank=rank, incarnation=f"process-{rank}")
                for rank in range(8)
                for one in ((a, b)[rank % 2],)
            )
        )
        assert len({job.opened.attempt.token for job in jobs}) == 1
        assert {job.opened.attempt.number for job in jobs} == {1}
        assert verify(a).count("opened") == 1
        # Neither thinks that it alone has the attempt.
        for job, other in zip(jobs, [b, a] * 4, strict=True):
            assert await through(job, other).rates(0) == [LR, LR]

    async def test_one_run_is_made_though_all_make_it(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        answers = await asyncio.gather(*(one.attach() for one in (a, b) * 4))
        assert [answer.created for answer in answers].count(True) == 1
        assert verify(a) == ["created"]

    async def test_both_append_at_once(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(total=100_000, **a.feedback(delay=4))
        other = through(job, b)

        async def report() -> None:
            for n in range(40):
                await (job, other)[n % 2].report((n, 1.0 / (n + 1)))

        async def adjust(one: Replica) -> None:
            for _ in range(10):
                await halve(one, one.fresh("adjust"))

        seen: dict[int, float] = {}

        async def ask(one: Job) -> None:
            n = 0
            while n < 40:
                for at, rate in enumerate(await one.rates(n, wait_ms=30_000), n):
                    assert seen.setdefault(at, rate) == rate
                    n = at + 1

        await asyncio.gather(report(), adjust(a), adjust(b), ask(job), ask(other))
        kinds = verify(a)
        assert kinds.count("reported") == 40
        assert kinds.count("adjusted") == 20
        for begin in range(0, 40, 7):
            assert await job.rates(begin) == await other.rates(begin)

    async def test_one_that_lags_serves_less_and_nothing_else(
        self, replicas: Replicas, no_word: None, no_polling: None
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        other = through(job, b)
        assert await other.rates(0) == await job.rates(0) == [LR, LR]
        await job.report((0, 2.0), (1, 2.0))
        assert await job.rates(2) == [LR, LR / 2]
        assert await other.rates(0) == [LR, LR]
        assert not (await other.values(2)).HasField("block")
        # What it would append does not fit any more: it reads, and evaluates the whole anew.
        await other.report((2, 1.0))
        assert await other.rates(2) == [LR, LR / 2]
        assert await other.rates(4) == [LR / 2]
        verify(a)


class TestWord:
    async def test_a_loss_at_one_replica_releases_the_rank_that_waits_at_another(
        self, replicas: Replicas, no_polling: None
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        for n in range(20):
            reporting, waiting = ((a, b), (b, a))[n % 2]
            asking = await waits(through(job, waiting), n + 1)
            await through(job, reporting).report((n, 1.0))
            answer = await asking
            assert answer.block.begin == n + 1
            assert answer.horizon == n + 2

    async def test_what_people_do_at_one_is_seen_at_another(
        self, replicas: Replicas, no_polling: None, until: Until
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        asking = await waits(through(job, b), 1)
        await halve(a, "half")
        await until(lambda: b.live().state.answers.get("half"))
        await a.call("DeleteRun", run="small", force=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    async def test_without_word_a_look_finds_it(
        self, replicas: Replicas, no_word: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_ledger, "POLL_S", 0.05)
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        for n in range(3):
            asking = await waits(through(job, b), n + 1)
            await job.report((n, 1.0))
            assert (await asking).block.begin == n + 1

    async def test_without_a_listener_a_look_finds_it_and_then_word_comes_again(
        self,
        replicas: Replicas,
        postgres: str,
        postgres_cluster: Cluster,
        monkeypatch: pytest.MonkeyPatch,
        until: Until,
    ) -> None:
        monkeypatch.setattr(_ledger, "POLL_S", 0.1)
        monkeypatch.setattr(_postgres, "RELISTEN_S", 2.0)
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        database = name_of(postgres)

        def listeners() -> int:
            return len(postgres_cluster.backends(database, LISTENER))

        await until(lambda: listeners() == 2)
        asking = await waits(through(job, b), 1)
        assert postgres_cluster.terminate(database, LISTENER) == 2
        await until(lambda: listeners() == 0)
        await job.report((0, 1.0))
        assert (await asking).block.begin == 1
        await until(lambda: listeners() == 2)
        monkeypatch.setattr(_ledger, "POLL_S", FOREVER_S)
        await asyncio.sleep(0.2)  # The last look begins.
        asking = await waits(through(job, b), 2)
        await job.report((1, 1.0))
        assert (await asking).block.begin == 2

    async def test_what_was_missed_is_read_when_word_comes_again(
        self,
        replicas: Replicas,
        no_polling: None,
        postgres: str,
        postgres_cluster: Cluster,
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        asking = await waits(through(job, b), 1)
        # In its pause nobody listens.
        assert postgres_cluster.terminate(name_of(postgres), LISTENER) == 2
        await job.report((0, 1.0))
        assert (await asking).block.begin == 1


class TestOutage:
    async def test_what_a_rank_waits_while_the_database_is_away_leads_to_no_waiver(
        self,
        replicas: Replicas,
        postgres: str,
        postgres_cluster: Cluster,
        monkeypatch: pytest.MonkeyPatch,
        until: Until,
    ) -> None:
        monkeypatch.setattr(_ledger, "POLL_S", 0.05)
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=1))
        asking = await waits(through(job, b), 1)
        live = b.live()
        with closed(postgres_cluster, name_of(postgres)):
            # As long as the timeout; and no reporter could have been heard meanwhile.
            live._blocked_before_s = 60.0
            await until(lambda: live.blocked_s() < 30.0)
            assert not asking.done()
        await until(lambda: a.server.is_ready)
        await job.report((0, 1.0))
        assert (await asking).block.begin == 1
        assert "waived" not in verify(a)


class TestReadiness:
    def status(self, program: Program, path: str) -> int:
        """Return the status of an answer over HTTP."""
        try:
            with urllib.request.urlopen(f"http://{program.http}{path}", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    async def test_it_goes_with_the_database_and_comes_back_with_it(
        self, programs: Programs, postgres: str, postgres_cluster: Cluster, until: Until
    ) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        async with (
            programs("--store", postgres).wait_ready().connected() as program,
            grpc.aio.insecure_channel(program.grpc) as channel,
        ):
            stub: Any = health_pb2_grpc.HealthStub(channel)

            async def health(name: str) -> Any:
                return (
                    await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
                ).status

            async def http(path: str) -> int:
                return await asyncio.to_thread(self.status, program, path)

            async def is_ready() -> bool:
                return await http("/ready") == 200

            async def is_not_ready() -> bool:
                return not await is_ready()

            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert (await watch.read()).status == serving
            job = await program.start_job(**program.feedback())
            assert await job.rates(0) == [LR, LR]
            for _ in range(2):
                with closed(postgres_cluster, name_of(postgres)):
                    refusal = await program.call_refused(
                        "ReportLosses", **job.report_fields((0, 1.0))
                    )
                    assert refusal.code == "UNAVAILABLE"
                    assert "not currently accepting connections" in refusal.text
                    await until(is_not_ready)
                    assert (await watch.read()).status == not_serving
                    for name in ("", "lrpilot.v1.TrainerService"):
                        assert await health(name) == not_serving
                    assert await http("/live") == 200
                    assert await health("live") == serving
                    # What was handed out before is handed out.
                    assert await job.rates(0) == [LR, LR]
                await until(is_ready)
                assert (await watch.read()).status == serving
                assert await health("lrpilot.v1.TrainerService") == serving
                assert await http("/metrics") == 200
            assert (await job.report((0, 1.0))).frontier == 1
            assert await asyncio.to_thread(program.end, signal.SIGTERM) == 0
        log = program.log()
        assert PASSWORD not in log
        assert "Traceback" not in log
        assert log.count("not ready: ") == log.count("ready again") == 2

    async def test_a_database_that_is_silent(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch, until: Until
    ) -> None:
        monkeypatch.setattr(_postgres, "ANSWER_S", 0.5)
        monkeypatch.setattr(_postgres, "CONNECT_S", 2)
        monkeypatch.setattr(_app, "CHECK_S", 0.1)
        cluster = Cluster(durable=False)
        try:
            store = open_store(cluster.start().address(cluster.create()))
            replica = type(server)(store)  # type: ignore[arg-type]
            await replica.start()
            job = await replica.start_job(**replica.feedback(delay=1))
            cluster.send(signal.SIGSTOP)
            refusal = await replica.call_refused("ReportLosses", **job.report_fields((0, 1.0)))
            assert refusal.code == "UNAVAILABLE"
            assert "did not answer within" in refusal.text
            await until(lambda: not replica.server.is_ready)
            cluster.send(signal.SIGCONT)
            await until(lambda: replica.server.is_ready)
            await job.report((0, 1.0))
            assert await job.rates(0) == [LR, LR]
            await replica.stop()
            await asyncio.to_thread(store.close)
        finally:
            cluster.dispose()


class TestStart:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"password": "wrong-one"}, "password authentication failed"),
            ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ],
    )
    def test_a_server_that_cannot_start_says_why(
        self, programs: Programs, postgres_cluster: Cluster, change: dict[str, str], text: str
    ) -> None:
        address = postgres_cluster.address(**{"database": "postgres"} | change)
        program = programs("--store", address)
        assert program.ended() == 1
        log = program.log()
        assert log.startswith("error: postgresql://127.0.0.1:")
        assert text in log
        assert "Traceback" not in log
        assert "wrong-one" not in log

    def test_a_configuration_file_with_a_store_that_is_no_text(
        self, programs: Programs, tmp_path: Path
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({"store": {"url": "postgresql://me:wrong-one@host/x"}}))
        program = programs("--config", str(config))
        assert program.ended() == 2
        assert "store" in program.log()
        assert "wrong-one" not in program.log()


class TestRealJobs:
    WORLD_SIZE = 3
    STEPS = 300

    def test_the_primary_dies_again_and_again_while_ranks_train(
        self, programs: Programs, ranks: list[Rank], tmp_path: Path
    ) -> None:
        cluster = Cluster(durable=True).start()
        try:
            store = cluster.address(cluster.create())
            servers = [programs("--store", store).wait_ready() for _ in range(2)]
            addresses = [one.grpc for one in servers]
            salt = str(random.SystemRandom().randrange(2**32))
            print(f"salt {salt}")  # noqa: T201 (shown when the test fails)
            spec = make_spec("failover", delay=8)
            for number in range(self.WORLD_SIZE):
                # The reporter has the first server alone, another rank the second.
                reached = [addresses[0], addresses[1], ",".join(addresses)][number]
                ranks.append(
                    Rank(
                        tmp_path,
                        reached,
                        spec,
                        number,
                        world_size=self.WORLD_SIZE,
                        key="start",
                        salt=salt,
                        pause_s=0.002,
                        end_after=self.STEPS,
                    )
                )
            wait_until(lambda: all(rank.reached(20) for rank in ranks), "all ranks train")
            for death in range(4):
                aims = [rank.used()[-1].progress + 20 for rank in ranks]
                if death == 3:
                    cluster.send(signal.SIGSTOP)
                    time.sleep(1.0)
                    cluster.send(signal.SIGCONT)
                else:
                    cluster.kill()
                    cluster.start()
                for rank, aim in zip(ranks, aims, strict=True):
                    wait_until(partial(rank.reached, aim), f"rank {rank.rank} goes on")
            ask_to_end(tmp_path, "start")
            for rank in ranks:
                assert rank.wait() == 0, rank.log
                assert rank.outcome() == []
            hold_to_the_promise(spec, salt, [one.grpc for one in servers], ranks, self.STEPS)
        finally:
            for program in servers:
                program.dispose()
            cluster.dispose()
        for program in servers:
            assert PASSWORD not in program.log()
