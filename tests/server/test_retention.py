"""Finished runs whose time is over, on a clock that jumps."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot.server import _retention
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._retention import Clock, Retention
from lrpilot.server._store import LogRow, StoreUnavailable

if TYPE_CHECKING:
    from tests.server.conftest import Job, Replica

DAY_S = 86400.0
KEEP_S = 30 * DAY_S


class FakeClock:
    """A wall clock that may be set, and one that only goes on."""

    def __init__(self) -> None:
        self.wall_ns = time.time_ns()
        self.monotonic_s = 100.0

    def set_forward(self, seconds: float) -> None:
        """Set the wall clock; nothing passes."""
        self.wall_ns += round(seconds * 1e9)

    def pass_s(self, seconds: float) -> None:
        """Let time pass."""
        self.set_forward(seconds)
        self.monotonic_s += seconds

    @property
    def given(self) -> Clock:
        return Clock(lambda: self.wall_ns, lambda: self.monotonic_s)


@pytest.fixture
def clock() -> FakeClock:
    """A clock that agrees with that of the server for now."""
    return FakeClock()


def retention(server: Replica, clock: FakeClock) -> Retention:
    return Retention(server.store, server.ledger, KEEP_S, server.metrics, clock.given)


async def finished(server: Replica, name: str = "small") -> Job:
    job = await server.start_job(name)
    await server.call("FinishRun", run=name, request_id=f"finish {name}", force=True)
    return job


async def look_for_an_hour(kept: Retention, clock: FakeClock) -> None:
    for _ in range(7):
        await kept.look()
        clock.pass_s(_retention.LOOK_S)


def expired(server: Replica) -> float:
    value = server.metrics._expired_runs._value.get()
    assert isinstance(value, float)
    return value


async def test_a_finished_run_is_deleted_when_its_time_is_over(
    server: Replica, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    await finished(server)
    await server.start_job("goes-on")
    last = server.store.read("small")[-1]
    kept = retention(server, clock)
    clock.pass_s(KEEP_S - DAY_S)
    await look_for_an_hour(kept, clock)
    clock.pass_s(DAY_S)
    for _ in range(6):
        await kept.look()
        clock.pass_s(_retention.LOOK_S)
    assert server.store.runs() == ["goes-on", "small"]
    assert expired(server) == 0
    with caplog.at_level(logging.WARNING, "lrpilot.server"):
        await kept.look()
    assert server.store.runs() == ["goes-on"]
    assert expired(server) == 1
    [(said, fields)] = [(one.getMessage(), vars(one)["fields"]) for one in caplog.records]
    assert fields == {"run": "small", "seq": last.seq}
    assert "deleted for its age" in said
    assert f"(seq {last.seq}, digest {last.digest})" in said
    assert "kept for 30 days" in said
    assert (await server.call_refused("GetRun", run="small")).reason == "RunNotFound"
    # The name is free.
    await server.start_job()


async def test_a_clock_set_forward_deletes_nothing(server: Replica, clock: FakeClock) -> None:
    await finished(server)
    kept = retention(server, clock)
    clock.set_forward(10 * 365 * DAY_S)
    await look_for_an_hour(kept, clock)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["small"]


async def test_a_clock_that_was_wrong_at_the_start_is_put_right(
    server: Replica, clock: FakeClock
) -> None:
    await finished(server)
    clock.set_forward(10 * 365 * DAY_S)
    kept = retention(server, clock)
    for _ in range(5):
        await kept.look()
        clock.pass_s(_retention.LOOK_S)
    clock.set_forward(-10 * 365 * DAY_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["small"]
    # Being due begins anew.
    clock.pass_s(KEEP_S)
    for _ in range(6):
        await kept.look()
        clock.pass_s(_retention.LOOK_S)
    assert server.store.runs() == ["small"]
    await kept.look()
    assert server.store.runs() == []


async def test_a_run_that_finished_in_the_future(
    server: Replica, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    later_ns = time.time_ns() + round(1000 * DAY_S * 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)
    await finished(server)
    monkeypatch.undo()
    kept = retention(server, clock)
    clock.pass_s(KEEP_S + DAY_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["small"]


async def test_what_comes_after_the_end_counts_as_its_age(
    server: Replica, clock: FakeClock
) -> None:
    """A run that was imported finished is kept from the import on."""
    await finished(server)
    parts = [part async for part in server.stream("ExportRun", run="small")]
    other = type(server)(MemoryStore())
    await other.start()
    message: Any = type(server).request("ImportRun")
    file = b"".join(part.data for part in parts)
    await other.send("ImportRun", [message(request_id="import", data=file)])
    kept = retention(other, clock)
    await look_for_an_hour(kept, clock)
    assert other.store.runs() == ["small"]
    clock.pass_s(KEEP_S)
    await look_for_an_hour(kept, clock)
    assert other.store.runs() == []
    await other.stop()


async def test_runs_that_are_not_finished_are_kept(server: Replica, clock: FakeClock) -> None:
    await server.start_job("opened")
    await server.attach("created")
    kept = retention(server, clock)
    clock.pass_s(2 * KEEP_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["created", "opened"]


async def test_a_run_of_the_same_name_is_another_one(
    server: Replica, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another replica deletes it at the last moment, and somebody makes it anew."""
    await finished(server)
    replica = type(server)(server.store)
    await replica.start()
    kept = retention(server, clock)
    clock.pass_s(KEEP_S + DAY_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == []
    await finished(server)
    clock.pass_s(KEEP_S + DAY_S)
    for _ in range(6):
        await kept.look()
        clock.pass_s(_retention.LOOK_S)
    delete = server.committer.delete

    async def later(run: str, after: str | None = None) -> bool:
        monkeypatch.undo()
        await replica.call("DeleteRun", run=run)
        await finished(replica)
        return await delete(run, after)

    monkeypatch.setattr(server.committer, "delete", later)
    await kept.look()
    assert server.store.runs() == ["small"]
    assert expired(server) == 1
    await replica.stop()


async def test_two_replicas_delete_it_once(server: Replica, clock: FakeClock) -> None:
    await finished(server)
    replica = type(server)(server.store)
    await replica.start()
    both = [retention(server, clock), retention(replica, clock)]
    clock.pass_s(KEEP_S + DAY_S)
    for _ in range(8):
        for kept in both:
            await kept.look()
        clock.pass_s(_retention.LOOK_S)
    assert server.store.runs() == []
    assert expired(server) + expired(replica) == 1
    await replica.stop()


async def test_a_run_that_cannot_be_read_is_kept_and_holds_no_other_up(
    server: Replica, clock: FakeClock
) -> None:
    await finished(server, "broken")
    await finished(server, "small")
    await server.restart()
    # Otherwise its log need not be read so far back.
    server.store._snapshots.clear()
    rows = server.store._logs["broken"]
    rows[1] = type(rows[1])(2, rows[1].payload + b" ", rows[1].digest, 0)
    kept = retention(server, clock)
    clock.pass_s(KEEP_S + DAY_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["broken"]


async def test_a_last_event_that_cannot_be_read_holds_no_other_run_up(
    server: Replica,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of a kind that a newer release wrote, and one that is damaged."""
    for name, payload in (("newer", b'{"kind":"unheard of"}'), ("broken", b"\x00")):
        await finished(server, name)
        log = server.store._logs[name]
        log[-1] = dataclasses.replace(log[-1], payload=payload)
    await finished(server, "small")
    kept = retention(server, clock)
    clock.pass_s(KEEP_S + DAY_S)
    await look_for_an_hour(kept, clock)
    assert server.store.runs() == ["broken", "newer"]
    assert sorted(
        (vars(one)["fields"]["run"], one.getMessage()) for one in caplog.records if one.exc_info
    ) == [
        ("broken", "is kept: its last event cannot be read"),
        ("newer", "is kept: its last event cannot be read"),
    ]

    def away(*_: object) -> list[LogRow]:
        raise StoreUnavailable("away")

    monkeypatch.setattr(server.store, "read", away)
    with pytest.raises(StoreUnavailable, match="away"):
        await kept.look()


async def test_an_outage_of_the_store_is_no_end(
    server: Replica, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await finished(server)
    kept = retention(server, clock)
    clock.pass_s(KEEP_S + DAY_S)
    looked = 0

    async def passed(seconds: float) -> None:
        nonlocal looked
        looked += 1
        clock.pass_s(seconds)
        if looked == 9:
            raise _End

    def recent(_: int) -> list[str]:
        if looked == 1:
            raise StoreUnavailable("away")
        if looked == 2:
            raise RuntimeError("what nobody thought of")
        return []

    monkeypatch.setattr(server.store, "recent", recent)
    monkeypatch.setattr(asyncio, "sleep", passed)
    with pytest.raises(_End):
        await kept.run()
    monkeypatch.undo()
    assert server.store.runs() == []


class _End(Exception):
    pass
