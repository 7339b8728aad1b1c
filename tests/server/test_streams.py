"""What is told over HTTP as it changes: of one run and of all, and how that ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot.server import _ledger, _postgres
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import News
from lrpilot.server._touched import Touched
from lrpilot.server.web import Web, _api, _streams
from lrpilot.server.web._streams import EventStream, Streams
from tests.http_client import Http, Stream, serving

if TYPE_CHECKING:
    from tests.server.conftest import Program, Replica, Until

ALL = "/api/stream"
ONE = "/api/runs/small/stream"


@pytest.fixture
async def web(server: Replica) -> AsyncIterator[Web]:
    """What the server answers over HTTP."""
    async with serving(server) as served:
        yield served


@pytest.fixture
def http(web: Web) -> Http:
    """A client of the server."""
    return Http(web.address)


async def shown(stream: Stream, holds: Callable[[Any], bool]) -> tuple[Any, int]:
    """Return the first run that is shown so, and how many were shown until then."""
    count = 0
    while True:
        event = await stream.next()
        assert event is not None
        count += 1
        name, run = event
        assert name == "run"
        if holds(run):
            return run, count


async def listed(stream: Stream, name: str, holds: Callable[[Any], bool] = bool) -> Any:
    """Return the row of a run once it is listed so."""
    while True:
        event = await stream.next()
        assert event is not None
        assert event[0] == "runs"
        for row in event[1]["runs"]:
            if row["name"] == name and holds(row):
                return row


class TestOneRun:
    async def test_as_it_is_and_as_it_changes(self, server: Replica, http: Http) -> None:
        job = await server.start_job(**server.feedback())
        async with http.stream(ONE) as stream:
            run, count = await shown(stream, bool)
            assert count == 1
            expected = await http.read("/api/runs/small")
            del expected["spec_document"]
            assert run == expected
            await job.report((0, 2.0))
            run, _ = await shown(stream, lambda run: run["losses"] == 1)
            assert (run["loss"], run["frontier"]) == (2.0, 1)
            await job.report((1, 2.0))
            run, _ = await shown(stream, lambda run: bool(run["adjustments"]))
            assert run["adjustments"][0]["summary"] == "LR x 0.5"

    async def test_many_changes_are_told_at_once(self, server: Replica, http: Http) -> None:
        job = await server.start_job(**server.feedback())
        async with http.stream(ONE) as stream:
            await shown(stream, bool)
            for n in range(100):
                await job.report((n, 1.0 / (n + 1)))
            run, count = await shown(stream, lambda run: run["losses"] == 100)
            assert run["loss"] == 0.01
            assert count < 50

    async def test_a_run_that_is_deleted(self, server: Replica, http: Http) -> None:
        await server.start_job()
        async with http.stream(ONE) as stream:
            await shown(stream, bool)
            await server.call("DeleteRun", run="small", force=True)
            assert await stream.next() == ("gone", {"name": "small"})
            assert await stream.next() is None

    async def test_one_that_is_read_again_goes_on(
        self, server: Replica, http: Http, until: Until
    ) -> None:
        await server.start_job()
        async with http.stream(ONE) as stream:
            await shown(stream, bool)
            live = server.live()
            # As where another replica deleted it, and makes it again.
            live.reset()
            live.wake()
            await until(lambda: live.state.exists)
            await server.open()
            await shown(stream, lambda run: run["attempt"] == 2)

    async def test_how_ranks_keep_up_is_told_although_nothing_is_logged(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_api, "LOOK_S", 0.05)
        job = await server.start_job(**server.feedback())
        await job.values(0)
        async with http.stream(ONE) as stream:
            first, _ = await shown(stream, bool)
            waiting = asyncio.create_task(job.values(2, blocked=True, wait_ms=30_000))
            run, _ = await shown(stream, lambda run: (run["ranks"] or {}).get("waiting") == 1)
            assert run["seq"] == first["seq"]
            await job.report((0, 1.0))
            await waiting

    async def test_silence_is_told(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_api, "LOOK_S", 0.05)
        monkeypatch.setattr(_api, "QUIET_S", 0.05)
        await server.attach()
        for path in (ONE, ALL):
            async with http.stream(path) as stream:
                text = b""
                while text.count(b": nothing new\n\n") < 2:
                    text += await asyncio.wait_for(stream._reader.read(1000), 60)

    async def test_who_views_a_run_does_not_make_it_live(self, server: Replica, http: Http) -> None:
        await server.start_job()
        await server.restart()
        async with serving(server) as web, Http(web.address).stream(ONE) as stream:
            await shown(stream, bool)
            live = server.live()
            assert live.viewed_s is not None
            assert live.seen_s is None
            assert server.ledger.live() == []


class TestAllRuns:
    async def test_what_changes_and_nothing_else(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(20):
            await server.attach(f"other-{number}")
        job = await server.start_job(**server.feedback())
        asked: list[str] = []
        listed_one = server.server.runs.listed

        async def counted(name: str) -> Any:
            asked.append(name)
            return await listed_one(name)

        monkeypatch.setattr(server.server.runs, "listed", counted)
        async with http.stream(ALL) as stream:
            await job.report((0, 2.0))
            row = await listed(stream, "small", lambda row: row["losses"] == 1)
            (expected,) = [
                one for one in (await http.read("/api/runs"))["runs"] if one["name"] == "small"
            ]
            del expected["spark"]
            assert row == expected
            asked.clear()
            await job.report((1, 2.0))
            await listed(stream, "small", lambda row: row["losses"] == 2)
            assert set(asked) == {"small"}

    async def test_one_that_comes_and_one_that_goes(self, server: Replica, http: Http) -> None:
        await server.attach("b")
        async with http.stream(ALL) as stream:
            await server.attach("a")
            row = await listed(stream, "a")
            assert row["state"] == "created"
            await server.call("DeleteRun", run="b", force=True)
            assert await stream.next() == ("runs", {"runs": [], "deleted": ["b"]})

    async def test_very_many_come_in_parts(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_api, "ROWS", 3)
        names = {f"run-{number}" for number in range(10)}
        async with http.stream(ALL) as stream:
            for name in names:
                await server.attach(name)
            found: set[str] = set()
            while found != names:
                event = await stream.next()
                assert event is not None
                assert 0 < len(event[1]["runs"]) <= 3
                found |= {row["name"] for row in event[1]["runs"]}

    async def test_nothing_is_kept_while_nobody_looks(
        self, server: Replica, http: Http, until: Until
    ) -> None:
        await server.attach("a")
        touched = server.ledger.touched
        assert not touched._last
        async with http.stream(ALL) as stream:
            await server.attach("b")
            await listed(stream, "b")
            assert list(touched._last) == ["b"]
        await until(lambda: not touched._last)


class TestTouched:
    async def test_each_follower_is_told_once_of_each_run(self) -> None:
        touched = Touched()
        touched.touch("before")
        with touched.followed() as one:
            touched.touch("a")
            with touched.followed() as other:
                assert await other.wait(0.001) is False
                for name in ("b", "a", "b"):
                    touched.touch(name)
                assert await one.wait(60)
                assert one.take() == ["b", "a"]
                assert other.take() == ["b", "a"]
                assert await one.wait(0.001) is False
                touched.touch("c")
                assert one.take() == ["c"]
                assert one.take() == []
            assert other.take() == ["c"]
        with touched.followed() as later:
            assert later.take() == []

    async def test_who_waits_is_woken(self) -> None:
        touched = Touched()
        with touched.followed() as follower:
            waiting = asyncio.create_task(follower.wait(60))
            await asyncio.sleep(0)
            touched.touch("a")
            assert await asyncio.wait_for(waiting, 60)


class TestEnd:
    async def test_of_the_server(self, server: Replica, web: Web, http: Http) -> None:
        await server.attach()
        async with http.stream(ONE) as one, http.stream(ALL) as every:
            await shown(one, bool)
            web.drain()
            assert await one.next() is None
            assert await every.next() is None
        answer = await http.get(ALL)
        assert (answer.status, answer.error["reason"]) == (503, "Draining")

    async def test_of_the_program(self, program: Program) -> None:
        await program.start_job()
        http = Http(program.http)
        async with http.stream(ONE) as one, http.stream(ALL) as every:
            await shown(one, bool)
            program.process.send_signal(signal.SIGTERM)
            assert await one.next() is None
            assert await every.next() is None
            assert await asyncio.to_thread(program.ended) == 0
        assert "Traceback" not in program.log()
        assert "ERROR" not in program.log()
        assert program.log().rstrip().endswith("stopped")

    async def test_of_those_who_look(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_streams, "MAX_STREAMS", 2)
        await server.attach()
        async with http.stream(ONE) as one, http.stream(ALL):
            await shown(one, bool)
            for path in (ONE, ALL):
                answer = await http.get(path)
                assert (answer.status, answer.error["reason"]) == (503, "TooManyStreams")
                assert int(answer.headers["retry-after"]) > 0
            # Everything else goes on.
            assert (await http.read("/api/runs/small"))["name"] == "small"
        await begins(http, ONE)

    async def test_of_one_whose_connection_breaks(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_streams, "MAX_STREAMS", 1)
        await server.attach()
        host, _, port = http.address.rpartition(":")
        with socket.create_connection((host, int(port)), 60) as connection:
            connection.sendall(f"GET {ONE} HTTP/1.1\r\nHost: {http.address}\r\n\r\n".encode())
            assert await asyncio.to_thread(connection.recv, 12) == b"HTTP/1.1 200"
            assert (await http.get(ONE)).status == 503
            # No farewell: what is unread makes it a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await begins(http, ONE)

    async def test_where_the_store_fails_meanwhile(
        self,
        server: Replica,
        http: Http,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def broken(_: Any) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(server.server.runs, "listed", broken)
        async with http.stream(ALL) as stream:
            await server.attach()
            assert await stream.next() is None
        assert "a stream ends early" in caplog.text
        assert "ZeroDivisionError" in caplog.text


async def begins(http: Http, path: str) -> None:
    """Return once there is room for a stream."""
    while (answer := await http.ask("HEAD", path)).status != 200:
        assert answer.status == 503


async def test_a_slow_reader_gets_fewer_events_and_newer_ones() -> None:
    made = 0

    async def events() -> Any:
        nonlocal made
        while True:
            made += 1
            yield b"data: x\n\n"

    taken: list[Any] = []
    reads = asyncio.Event()
    goes = asyncio.Event()

    async def send(message: Any) -> None:
        taken.append(message)
        if len(taken) == 2:
            reads.set()
            await asyncio.Event().wait()

    async def receive() -> Any:
        await goes.wait()
        return {"type": "http.disconnect"}

    streams = Streams()
    scope = {"type": "http", "method": "GET", "path": ALL}
    answer = EventStream(streams, events())
    task = asyncio.create_task(answer(scope, receive, send))
    await asyncio.wait_for(reads.wait(), 60)
    assert (made, streams.open) == (1, 1)
    goes.set()
    await asyncio.wait_for(task, 60)
    assert streams.open == 0


@pytest.mark.needs_program("postgres")
class TestReplicas:
    """What another server on the same store does."""

    @pytest.fixture
    async def replicas(
        self, server: Replica, postgres: str
    ) -> AsyncIterator[Callable[[], Awaitable[Replica]]]:
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

    async def test_is_told_here(self, replicas: Callable[[], Awaitable[Replica]]) -> None:
        a, b = await replicas(), await replicas()
        async with serving(b) as web, Http(web.address).stream(ALL) as every:
            job = await a.start_job(**a.feedback())
            # This one never asked for it.
            await listed(every, "small", lambda row: row["attempt"] == 1)
            await job.report((0, 1.0))
            await listed(every, "small", lambda row: row["losses"] == 1)
            async with Http(web.address).stream(ONE) as one:
                await shown(one, lambda run: run["losses"] == 1)
                await job.report((1, 0.5))
                await shown(one, lambda run: run["losses"] == 2)
                await a.call("DeleteRun", run="small", force=True)
                assert await one.next() == ("gone", {"name": "small"})

    async def test_of_which_word_was_lost(
        self, replicas: Callable[[], Awaitable[Replica]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[Callable[[News], None]] = []
        monkeypatch.setattr(_postgres.Postgres, "follow", lambda self, heard: told.append(heard))
        a, b = await replicas(), await replicas()
        async with serving(b) as web, Http(web.address).stream(ALL) as stream:
            await a.attach("a")
            # As when its connection is back.
            told[1](News(None, None))
            assert (await listed(stream, "a"))["state"] == "created"

    async def test_a_run_that_is_viewed_is_looked_after_without_word(
        self, replicas: Callable[[], Awaitable[Replica]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_postgres.Postgres, "follow", lambda self, heard: None)
        monkeypatch.setattr(_ledger, "POLL_S", 0.05)
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback())
        async with serving(b) as web, Http(web.address).stream(ONE) as stream:
            await shown(stream, bool)
            await job.report((0, 1.0))
            await shown(stream, lambda run: run["losses"] == 1)
