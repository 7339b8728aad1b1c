"""A run as one file: exported, moved between stores, refused where a byte of it is another."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.server import _packing, _rpc, _run_file, _run_service, _segments
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._packing import PackedLog
from lrpilot.server._run_file import LogChanged, RunFileReader, RunFileWriter
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import LogRow, Store, StoreUnavailable
from lrpilot.v1 import runs_pb2 as pb

if TYPE_CHECKING:
    from tests.server.conftest import Client, Job, Program, Refusal, Replica, Until

WAIT_S = 30.0
"""Longest wait for one answer."""

PLATEAU = [{"kind": "plateau", "patience": 0}]


async def export(client: Client, name: str = "small", *, force: bool = True) -> bytes:
    """Return the file of a run."""
    parts = [part async for part in client.stream("ExportRun", run=name, force=force)]
    assert parts[0].data == b""
    assert parts[-1].events == parts[0].total_events
    assert all(len(part.data) <= 256 * 1024 for part in parts)
    return b"".join(part.data for part in parts)


def requests(
    file: bytes, request_id: str = "import", size: int = 50_000, **fields: Any
) -> Iterator[pb.ImportRunRequest]:
    yield pb.ImportRunRequest(request_id=request_id, author="me", **fields)
    for at in range(0, len(file), size):
        yield pb.ImportRunRequest(data=file[at : at + size])


async def take(client: Client, file: bytes, request_id: str = "import", **fields: Any) -> Any:
    return await client.send("ImportRun", requests(file, request_id, **fields))


async def refused(replica: Replica, file: bytes, request_id: str = "import") -> Refusal:
    """Import a file that must be refused, and leave nothing of it."""
    return await replica.refused_stream("ImportRun", requests(file, request_id))


async def trained(client: Client, steps: int = 6, name: str = "small") -> Job:
    """Return a job that took values for each of its steps and reported their losses."""
    job = await client.start_job(name, policies=PLATEAU, feedback={"delay": 2})
    for at in range(steps):
        await job.rates(at, count=1)
        await job.report((at, 1.0 + at % 2))
    return job


def lines(file: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(file).splitlines()]


def packed(*some: bytes) -> bytes:
    return gzip.compress(b"".join(some), mtime=0)


@pytest.fixture
async def other(server: Replica) -> AsyncIterator[Replica]:
    """Another server, over a store of its own."""
    replica = type(server)(MemoryStore())
    await replica.start()
    yield replica
    await replica.stop()


class TestFile:
    async def test_the_lines(self, server: Replica) -> None:
        await trained(server)
        rows = server.store.read("small")
        header, *events, trailer = lines(await export(server))
        assert list(header) == [
            "format", "lrpilot", "host", "run", "first_seq", "exported_at_ns", "check",
        ]  # fmt: skip
        assert (header["format"], header["run"], header["first_seq"]) == (1, "small", 1)
        assert [item["seq"] for item in events] == [row.seq for row in rows]
        assert [item["recorded_at_ns"] for item in events] == [row.recorded_at_ns for row in rows]
        assert [item["payload"] for item in events] == [json.loads(row.payload) for row in rows]
        assert (trailer["events"], trailer["last_seq"]) == (len(rows), rows[-1].seq)
        assert trailer["digest"] == rows[-1].digest

    async def test_a_log_of_many_reads(
        self, server: Replica, other: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_run_service, "EVENTS_PER_READ", 3)
        monkeypatch.setattr(_run_service, "PART_BYTES", 7)
        monkeypatch.setattr(_run_file, "_STEP_BYTES", 11)
        await trained(server)
        await take(other, await export(server), size=5)
        assert other.store.read("small")[:-1] == server.store.read("small")

    async def test_an_export_ends_where_the_log_did_when_it_began(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_run_service, "EVENTS_PER_READ", 2)
        job = await trained(server)
        before = server.store.read("small")
        parts = server.stream("ExportRun", run="small", force=True)
        first = await anext(parts)
        await job.report((6, 3.0), (7, 3.0))
        file = b"".join([part.data async for part in parts])
        assert (first.total_events, first.digest) == (before[-1].seq, before[-1].digest)
        assert lines(file)[-1]["digest"] == before[-1].digest

    async def test_a_run_that_is_deleted_meanwhile(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_run_service, "EVENTS_PER_READ", 1)
        await trained(server)
        history = server.ledger.history

        async def deleted(name: str, after: int, limit: int) -> list[LogRow]:
            if after == 3:
                server.store.delete(name)
            return await history(name, after, limit)

        monkeypatch.setattr(server.ledger, "history", deleted)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await export(server)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "was deleted while it was exported" in (caught.value.details() or "")

    async def test_unknown_and_live_runs(self, server: Replica) -> None:
        refusal = await server.refused_call(export(server, "nobody"))
        assert refusal.reason == "RunNotFound"
        job = await trained(server)
        refusal = await server.refused_call(export(server, force=False))
        assert (refusal.reason, refusal.code) == ("RunLive", "FAILED_PRECONDITION")
        assert "export it with --force" in refusal.text
        first = await anext(server.stream("ExportRun", run="small", force=True))
        assert first.active
        await server.call("FinishRun", run=job.run, request_id="f", force=True)
        first = await anext(server.stream("ExportRun", run="small"))
        assert not first.active


class TestImport:
    async def test_a_run_from_store_to_store(
        self, server: Replica, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """SQLite, PostgreSQL where there is one, memory, and SQLite again."""
        stores: list[Store] = [open_store(tmp_path / "one")]
        stores += [open_store(request.getfixturevalue("postgres"))]
        stores += [MemoryStore(), open_store(tmp_path / "two")]
        replicas = [type(server)(store) for store in stores]  # type: ignore[arg-type]
        for replica in replicas:
            await replica.start()
        first, *others = replicas
        job = await trained(first)
        state = await job.save(4)
        await first.call(
            "AdjustRun", run="small", scale_lr=0.5, reason="r", author="a", request_id="x"
        )
        before = first
        for replica in others:
            answer = await take(replica, await export(before))
            rows, there = replica.store.read("small"), before.store.read("small")
            assert rows[:-1] == there
            assert core.decode(rows[-1].payload).kind == "imported"
            assert (answer.events, answer.unchanged) == (len(there), False)
            assert answer.run.state == pb.RUN_STATE_RUNNING
            assert answer.run.imported_from.startswith("lrpilot ")
            before = replica
        # People see the same history, and jobs get the same values, first and last.
        histories = [
            (await replica.call("ListEvents", run="small", page_size=1000)).events
            for replica in (first, before)
        ]
        count = len(histories[0])
        assert list(histories[1])[:count] == list(histories[0])
        assert [event.kind for event in histories[1][count:]] == ["imported"] * 3
        shown = [(await replica.call("GetRun", run="small")).run for replica in (first, before)]
        for field in (
            "spec_document", "progress", "frontier", "horizon", "values", "loss", "losses",
            "smoothed_loss", "adjustments", "etag",
        ):  # fmt: skip
            assert getattr(shown[0], field) == getattr(shown[1], field), field
        taken = []
        for replica in (first, before):
            resumed = await replica.open(state=state)
            got = []
            for at in range(4, 12):
                got += [rate.hex() for rate in await resumed.rates(at, count=1)]
                await resumed.report((at, 3.0))
            taken.append(got)
        assert taken[0] == taken[1]
        assert len(set(taken[0])) > 1
        for replica in replicas:
            await replica.stop()
            replica.store.close()

    test_a_run_from_store_to_store = pytest.mark.needs_program("postgres")(
        test_a_run_from_store_to_store
    )

    @pytest.mark.parametrize(
        "kind",
        ["sqlite", pytest.param("postgres", marks=pytest.mark.needs_program("postgres"))],
    )
    async def test_a_long_log_holds_up_no_other_run(
        self,
        server: Replica,
        tmp_path: Path,
        request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
    ) -> None:
        events = 20_000
        log = log_of(OPENED, *(reported(at) for at in range(events - 2)), total=events)
        file = file_of(log)
        address = tmp_path / "data" if kind == "sqlite" else request.getfixturevalue(kind)
        store = open_store(address)
        assert isinstance(store, SqlStore)
        replica = type(server)(store)  # type: ignore[arg-type]
        await replica.start()
        job = await trained(replica, name="other")
        steps = itertools.count(6)
        loop = asyncio.get_running_loop()

        def report() -> None:
            """Return once a loss of the other run is acknowledged; not on the loop."""
            at = next(steps)
            reported = job.report((at, 1.0))
            asyncio.run_coroutine_threadsafe(reported, loop).result(WAIT_S)

        pack, adopt = _segments.pack, store.adopt
        packed_seqs: list[int] = []

        def slow_pack(rows: list[LogRow]) -> bytes:
            report()
            packed_seqs.append(rows[-1].seq)
            return pack(rows)

        def slow_adopt(run: str, log: PackedLog) -> None:
            report()
            statements: list[int] = []
            count = partial(count_rows, statements)
            sa.event.listen(store._engine, "before_cursor_execute", count)
            adopt(run, log)
            sa.event.remove(store._engine, "before_cursor_execute", count)
            # What others wait for, where one writes at a time: some statements, and few rows.
            assert len(statements) < 20
            assert sum(statements) <= len(packed_seqs) + _packing.SEGMENT_ROWS + 5

        monkeypatch.setattr(_packing, "pack", slow_pack)
        monkeypatch.setattr(store, "adopt", slow_adopt)
        answer = await take(replica, file)
        assert (answer.events, answer.unchanged) == (events, False)
        assert packed_seqs == [4096, 8192, 12288, 16384]
        assert next(steps) == 6 + 4 + 1
        assert store.read("small")[:-1] == log
        await replica.stop()
        store.close()

    async def test_ranks_of_an_imported_attempt(self, server: Replica, other: Replica) -> None:
        job = await trained(server)
        await take(other, await export(server))
        moved = type(job)(other, job.run, job.opened, job.rank, job.incarnation)
        for refusal in (await moved.refused_values(6), await moved.refused_report((6, 1.0))):
            assert (refusal.reason, refusal.code) == ("AttemptSuperseded", "FAILED_PRECONDITION")
            assert "imported here from lrpilot" in refusal.text
            assert refusal.facts["imported_from"].startswith("lrpilot ")
        # Where the run came from, the attempt goes on.
        assert await job.rates(6, count=1)

    async def test_what_people_see_of_it(self, server: Replica, other: Replica) -> None:
        await trained(server)
        answer = await take(other, await export(server), reason="a move")
        event = (await other.call("ListEvents", run="small", page_size=1000)).events[-1]
        assert (event.kind, event.author, event.reason) == ("imported", "me", "a move")
        assert event.summary.startswith("imported from lrpilot ")
        assert answer.run.seq == event.seq
        # It is nobody's, so that it needs no force.
        await other.call("DeleteRun", run="small")
        await take(other, await export(server), "again")

    async def test_a_finished_run(self, server: Replica, other: Replica) -> None:
        await trained(server)
        await server.call("FinishRun", run="small", request_id="f", force=True)
        answer = await take(other, await export(server))
        assert answer.run.state == pb.RUN_STATE_FINISHED

    async def test_a_run_that_is_here_already(self, server: Replica, other: Replica) -> None:
        job = await trained(server)
        file = await export(server)
        first = await take(other, file)
        for where, request_id in ((other, "import"), (other, "another call"), (server, "back")):
            before = where.logs()
            answer = await take(where, file, request_id)
            assert where.logs() == before
            assert answer.unchanged == (request_id != "import")
            assert answer.run == first.run or where is server
        # The run has gone on there: the file here has another end.
        await job.report((6, 1.0))
        refusal = await refused(other, await export(server), "more")
        assert (refusal.reason, refusal.code) == ("RunExists", "ALREADY_EXISTS")
        await other.call("DeleteRun", run="small")
        await other.attach()
        refusal = await refused(other, file, "in the way")
        assert refusal.reason == "RunExists"

    async def test_two_imports_at_once(self, server: Replica) -> None:
        await trained(server)
        file = await export(server)
        store = MemoryStore()
        replicas = [type(server)(store) for _ in range(2)]
        for replica in replicas:
            await replica.start()
        answers = await asyncio.gather(
            *(take(replica, file, f"{i}") for i, replica in enumerate(replicas * 2))
        )
        assert sorted(answer.unchanged for answer in answers) == [False, True, True, True]
        assert len(store.read("small")) == len(server.store.read("small")) + 1
        for replica in replicas:
            await replica.stop()

    async def test_a_name_that_appears_meanwhile(
        self, server: Replica, other: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await trained(server)
        file = await export(server)
        adopt = other.store.adopt
        taken = MemoryStore.append

        def later(run: str, log: PackedLog) -> None:
            monkeypatch.undo()
            spec = core.parse_spec(json.loads(other.document()))
            state = core.RunState(run)
            made = core.rows(state, core.create_run(state, spec, "other"))
            first = tuple(LogRow(*row, 0) for row in made)
            assert taken(other.store, [_run_append(run, first)]) == [None]
            adopt(run, log)

        monkeypatch.setattr(other.store, "adopt", later)
        refusal = await other.refused_call(take(other, file))
        assert refusal.reason == "RunExists"
        assert len(other.store.read("small")) == 1

    @pytest.mark.parametrize("request_id", ["import", "another call"])
    async def test_a_lost_answer(
        self,
        server: Replica,
        other: Replica,
        monkeypatch: pytest.MonkeyPatch,
        request_id: str,
    ) -> None:
        await trained(server)
        file = await export(server)
        adopt = other.store.adopt

        def lost(run: str, log: PackedLog) -> None:
            monkeypatch.undo()
            adopt(run, log)
            raise StoreUnavailable("the connection broke")

        monkeypatch.setattr(other.store, "adopt", lost)
        refusal = await other.refused_call(take(other, file))
        assert refusal.code == "UNAVAILABLE"
        rows = other.store.read("small")
        answer = await take(other, file, request_id)
        assert answer.unchanged == (request_id != "import")
        assert other.store.read("small") == rows

    async def test_a_client_that_dies_in_the_middle(
        self, server: Replica, other: Replica, until: Until
    ) -> None:
        await trained(server)
        file = await export(server)
        begun = asyncio.Event()

        async def half() -> AsyncIterator[pb.ImportRunRequest]:
            for part in list(requests(file, size=100))[:3]:
                yield part
            begun.set()
            await asyncio.Event().wait()

        call = asyncio.ensure_future(other.send("ImportRun", half()))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert other.logs() == {}
        # And it holds nobody up.
        await take(other, file)

    async def test_a_client_that_stops_in_the_middle(
        self, server: Replica, other: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_rpc, "PART_S", 0.2)
        await trained(server)
        file = await export(server)

        async def half() -> AsyncIterator[pb.ImportRunRequest]:
            for part in list(requests(file, size=100))[:3]:
                yield part
            await asyncio.Event().wait()

        refusal = await other.refused_call(other.send("ImportRun", half()))
        assert refusal.code == "DEADLINE_EXCEEDED"
        assert other.logs() == {}

    async def test_a_killed_server_has_nothing_of_it(
        self, server: Replica, programs: Callable[..., Program]
    ) -> None:
        await trained(server)
        file = await export(server)
        program = programs().wait_ready()

        async def half() -> AsyncIterator[pb.ImportRunRequest]:
            for part in list(requests(file, size=100))[:-1]:
                yield part
            program.end()
            await asyncio.Event().wait()

        async with program.connected():
            refusal = await program.refused_call(program.send("ImportRun", half()))
        assert refusal.code == "UNAVAILABLE"
        async with programs().wait_ready().connected() as again:
            assert (await again.refused_call(again.call("GetRun", run="small"))).reason == (
                "RunNotFound"
            )
            await take(again, file)

    async def test_an_import_is_signed_readably(self, server: Replica, other: Replica) -> None:
        await trained(server)
        file = await export(server)
        refusal = await other.refused_stream("ImportRun", requests(file, request_id=""))
        assert list(refusal.fields) == ["request_id"]
        refusal = await other.refused_stream("ImportRun", requests(file, reason="x" * 1001))
        assert list(refusal.fields) == ["reason"]

    async def test_calls_are_counted(self, server: Replica, other: Replica) -> None:
        await trained(server)
        await take(other, await export(server))
        await refused(other, b"", "nothing")
        counted = {
            (sample.labels["method"], sample.labels["code"])
            for replica in (server, other)
            for family in await asyncio.to_thread(lambda: list(replica.metrics.registry.collect()))  # noqa: B023
            for sample in family.samples
            if sample.name == "lrpilot_rpc_calls_total"
        }
        assert {
            ("ExportRun", "OK"), ("ImportRun", "OK"), ("ImportRun", "INVALID_ARGUMENT"),
        } <= counted  # fmt: skip


def _run_append(run: str, rows: tuple[LogRow, ...]) -> Any:
    from lrpilot.server._store import Append

    return Append(run, rows, create=True)


def reported(progress: int) -> core.Event:
    return core.Reported(1, "one", (core.Report(progress, 1 / (progress + 1), 1.0, progress + 1),))


def count_rows(counts: list[int], *call: Any) -> None:
    """Count the rows that a statement is given, as SQLAlchemy tells of it."""
    values = call[3]
    counts.append(len(values) if isinstance(values, list) else 1)


def log_of(*events: core.Event, name: str = "small", total: int = 9) -> list[LogRow]:
    """Return a log that a release could have written."""
    state = core.RunState(name)
    spec = {"name": "small", "total": total, "learning_rate": {"peak": 1e-3}}
    created = core.create_run(state, core.parse_spec(spec), "create")
    return [LogRow(*row, 7) for row in core.rows(state, [*created, *events])]


def file_of(rows: list[LogRow], run: str = "small") -> bytes:
    writer = RunFileWriter(run, 5)
    return writer.write(rows) + writer.end(writer.digest)


def checked(*bodies: bytes) -> bytes:
    """Return a file whose checks are right, whatever it says."""
    writer = RunFileWriter("small", 5)
    writer._checked = hashlib.sha256()
    return packed(*map(writer._line, bodies))


def kept(run: LiveRun, floor: int | None) -> None:
    """Drop nothing of a run."""


def read(file: bytes, size: int = 1 << 20) -> _run_file.ReadRun:
    reader = RunFileReader(kept)
    for at in range(0, len(file), size):
        reader.feed(file[at : at + size])
    return reader.end()


def rows_of(got: _run_file.ReadRun) -> list[LogRow]:
    return [row for part in got.log.parts() for row in part]


def fault(file: bytes) -> core.Violation:
    with pytest.raises(core.InvalidRequest, match="not the whole export of a run") as caught:
        read(file)
    (violation,) = caught.value.violations
    return violation


OPENED = core.Opened(1, "a" * 32, 0, "open", "", 0, "one")
REPORTED = core.Reported(1, "one", (core.Report(0, math.nan, 1.0, 1), core.Report(1, 0.1, 1.0, 2)))
ROWS = log_of(OPENED, REPORTED)
FILE = file_of(ROWS)
TEXT = gzip.decompress(FILE)
LINES = TEXT.splitlines(keepends=True)


class TestReader:
    def test_what_was_written_is_read(self) -> None:
        for size in (1, 7, 1 << 20):
            got = read(FILE, size)
            assert rows_of(got) == ROWS
            assert (
                got.run.state.snapshot() == core.fold("small", [r.payload for r in ROWS]).snapshot()
            )
            assert (got.exported_at_ns, got.run.updated_ns) == (5, 7)
        # Unpacked, looked at and packed again by other programs.
        assert rows_of(read(gzip.compress(TEXT, 1))) == ROWS

    def test_a_file_that_was_cut_off(self) -> None:
        for cut in range(len(FILE)):
            fault(FILE[:cut])

    def test_a_text_that_was_cut_off(self) -> None:
        for cut in range(len(TEXT)):
            assert fault(packed(TEXT[:cut])).field == f"line {TEXT[:cut].count(10) + 1}"

    @settings(deadline=None)
    @given(at=st.integers(0, len(TEXT) - 1), bit=st.integers(0, 7))
    def test_a_changed_bit_is_found_on_its_line(self, at: int, bit: int) -> None:
        changed = bytearray(TEXT)
        changed[at] ^= 1 << bit
        assert fault(packed(bytes(changed))).field == f"line {TEXT[:at].count(10) + 1}"

    @settings(deadline=None)
    @given(at=st.integers(10, len(FILE) - 1), bit=st.integers(0, 7))
    def test_a_changed_bit_of_the_packed_file(self, at: int, bit: int) -> None:
        # The first ten bytes hold the time and the system of whoever packed it.
        changed = bytearray(FILE)
        changed[at] ^= 1 << bit
        # A few bits mean nothing: those behind the last code, and a way back to the same bytes
        # elsewhere. Every byte of what was packed is there then.
        unpacked = b""
        with suppress(EOFError, OSError, zlib.error):
            unpacked = gzip.decompress(changed)
        if unpacked == TEXT:
            assert rows_of(read(bytes(changed))) == ROWS
        else:
            fault(bytes(changed))

    @settings(deadline=None)
    @given(order=st.permutations(range(len(LINES))))
    def test_lines_in_another_order(self, order: list[int]) -> None:
        some = packed(*(LINES[index] for index in order))
        if order == sorted(order):
            assert rows_of(read(some)) == ROWS
        else:
            fault(some)

    @settings(deadline=None)
    @given(index=st.integers(0, len(LINES) - 1), twice=st.booleans())
    def test_a_line_too_many_or_too_few(self, index: int, twice: bool) -> None:
        kept = [*LINES[:index], *([LINES[index]] * 2 if twice else []), *LINES[index + 1 :]]
        found = fault(packed(*kept))
        # The first line that stands where it should not, or the end that came too early.
        assert found.field == f"line {index + 1 + twice}"

    @pytest.mark.parametrize(
        ("file", "line", "said"),
        [
            (b"", 1, "the end of the file"),
            (b"seq,loss\n1,2\n", 1, "no gzip data"),
            (TEXT, 1, "no gzip data"),
            (packed(b"{}\n"), 1, "'{}'"),
            (packed(b"1\n" * 9), 1, "'1'"),
            (packed(b'{"run":"x"}\n'), 1, "run"),
            (checked(b'{"run":"small"'), 1, "run"),
            (checked(b"{"), 1, "'{'"),
            (FILE + b"x", 5 + 1, "more data behind the end"),
            (FILE + FILE, 5 + 1, "more data behind the end"),
            (packed(TEXT, b"\n"), 6, "a line behind the last one"),
            (packed(TEXT, b"x"), 6, "the end of the file"),
        ],
        ids=range(12),
    )
    def test_what_is_no_export(self, file: bytes, line: int, said: str) -> None:
        found = fault(file)
        assert found.field == f"line {line}"
        assert said in found.got

    def header(self, **changes: Any) -> bytes:
        content = {**json.loads(LINES[0]), **changes}
        del content["check"]
        return _run_file._plain(content)

    def test_another_format(self) -> None:
        found = fault(checked(self.header(format=2, lrpilot="9.0.0")))
        assert "format 2 of lrpilot '9.0.0'" in found.got
        assert "written by a newer release" in found.allowed

    @pytest.mark.parametrize(
        "changes",
        [
            {"first_seq": 5}, {"run": 7}, {"host": "h" * 101}, {"exported_at_ns": "now"},
            {"exported_at_ns": -1}, {"lrpilot": None},
        ],
    )  # fmt: skip
    def test_a_header_that_says_something_else(self, changes: dict[str, Any]) -> None:
        assert fault(checked(self.header(**changes))).field == "line 1"

    def event(self, seq: int, payload: bytes, at_ns: int = 7) -> bytes:
        return b'{"seq":%d,"recorded_at_ns":%d,"payload":%b' % (seq, at_ns, payload)

    def test_a_newer_kind_of_event(self) -> None:
        some = [self.event(row.seq, row.payload) for row in ROWS]
        found = fault(
            checked(
                self.header(lrpilot="9.0.0"), *some, self.event(4, b'{"kind":"dreamt","of":"x"}')
            )
        )
        assert found.field == "line 5"
        assert "'dreamt'" in found.got
        assert "written by lrpilot 9.0.0, perhaps a newer release" in found.allowed

    @pytest.mark.parametrize(
        "payload",
        [b"{}", b'{"kind":"finished"}', b'{"kind":"finished","request_id":"x","more":1}', b"{]}",
         b'{"kind":"created","spec":{},"by_trainer":true,"may_revise":true,"request_id":"x"}',
         b'{"kind":"declared","attempt":1,"blocks":[],"offer":3}'],
    )  # fmt: skip
    def test_what_is_no_event_here(self, payload: bytes) -> None:
        some = [self.event(row.seq, row.payload) for row in ROWS]
        assert fault(checked(self.header(), *some, self.event(4, payload))).field == "line 5"

    def test_a_log_that_does_not_begin(self) -> None:
        row = ROWS[2]
        found = fault(checked(self.header(), self.event(1, row.payload)))
        assert found.field == "line 2"
        found = fault(checked(self.header(), self.event(3, row.payload)))
        assert (found.got, found.allowed) == ("seq 3", "seq 1")
        found = fault(checked(self.header(), self.event(1, ROWS[0].payload, 2**63)))
        assert "recorded_at_ns" in found.got

    def test_a_log_of_another_run(self) -> None:
        found = fault(checked(self.header(run="other"), self.event(1, ROWS[0].payload)))
        assert (found.got, found.allowed) == ("the spec of run 'small'", "that of 'other'")

    def test_a_trailer_of_another_log(self) -> None:
        writer = RunFileWriter("small", 5)
        data = writer.write(ROWS)
        other = gzip.decompress(file_of(log_of(OPENED))).splitlines()[-1]
        body = other.rpartition(b',"check"')[0]
        last = writer._packer.compress(writer._line(body, digits=64)) + writer._packer.flush()
        found = fault(data + last)
        assert found.field == "line 5"
        assert ROWS[-1].digest in found.allowed

    def test_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_run_file, "MAX_LINE_BYTES", 5000)
        monkeypatch.setattr(_run_file, "_STEP_BYTES", 1000)
        assert "a longer line" in fault(packed(b"{" + b"x" * 6000)).got
        monkeypatch.setattr(_run_file, "MAX_BYTES", len(TEXT) - 1)
        assert "a longer file" in fault(FILE).got

    def test_little_is_unpacked_of_a_bomb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_run_file, "MAX_LINE_BYTES", 5000)
        reader = RunFileReader(kept)
        with pytest.raises(core.InvalidRequest, match="a longer line"):
            reader.feed(gzip.compress(bytes(50_000_000)))
        assert reader._bytes <= _run_file._STEP_BYTES

    def test_rows_of_another_log_are_not_written(self) -> None:
        for rows in ([], ROWS[1:], [ROWS[0], ROWS[2]]):
            with pytest.raises(LogChanged):
                RunFileWriter("small", 5).write(rows)
        writer = RunFileWriter("small", 5)
        writer.write(ROWS[:2])
        with pytest.raises(LogChanged):
            writer.end(ROWS[2].digest)
