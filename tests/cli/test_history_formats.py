"""`lrpilot run history` as a table: what stands in it, and that its three formats hold the same."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from lrpilot import core
from lrpilot.server import _history as _server_history
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._store import LogRow
from lrpilot.server.cli import _history, _history_table, _parquet
from lrpilot.server.cli._table import Row
from lrpilot.v1 import runs_pb2, trainer_pb2
from tests.server.conftest import Job, Replica

Cli = Callable[..., Result]
History = Callable[..., Awaitable[Result]]
Cell = Any
Table = list[dict[str, Cell]]

GROUPED: dict[str, Any] = {
    "learning_rate": {"peak": 1e-3, "warmup": 5, "decay": {"style": "cosine"}},
    "groups": [{"name": "decayed"}, {"name": "plain", "weight_decay_multiplier": 0.0}],
    "policies": [{"kind": "plateau", "patience": 0}],
    "feedback": {"delay": 2},
}


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    """A server over a store in memory."""
    server = Replica(MemoryStore())
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def history(replica: Replica, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """Run `lrpilot run history` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    async def run(*args: str) -> Result:
        return await asyncio.to_thread(cli, "run", "history", *args, "--server", replica.address)

    return run


@dataclass
class Used:
    """What ranks were handed: values by attempt and progress, step-major as they travel."""

    rates: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    decays: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    async def take(self, job: Job, begin: int, end: int, groups: int = 2) -> None:
        """Take the values in [begin, end), block after block."""
        at = begin
        while at < end:
            block = (await job.values(at, count=end - at)).block
            assert block.begin == at
            for step in range(len(block.learning_rates) // groups):
                part = slice(step * groups, (step + 1) * groups)
                key = (job.opened.attempt.number, at)
                self.rates[key] = list(block.learning_rates[part])
                self.decays[key] = list(block.weight_decays[part])
                at += 1


def report(at: int, loss: float | None = None, **fields: Any) -> trainer_pb2.LossReport:
    return trainer_pb2.LossReport(
        progress=at, loss=loss, moves_to=fields.pop("moves_to", at + 1), **fields
    )


async def trained(server: Replica) -> Used:
    """Train a run that has everything: two reporters, a rollback, NaN, groups and late losses."""
    used = Used()
    await server.attach("small", **GROUPED)
    job = await server.open(reporters=[0, 1], key="first")
    other = await server.open(reporters=[0, 1], key="first", rank=1)
    await used.take(job, 0, 2)
    first = [
        report(0, 2.5, weight=3.0, validation_losses={"val_loss": 2.75}, batch=64),
        report(1, math.nan, gradient_norm=math.inf),
    ]
    await job.report(reports=first)
    await other.report(reports=[report(0, 2.0 + 2**-40), report(1, 0.1 + 0.2)])
    for at in range(2, 8):
        await used.take(job, at, at + 2)
        if at == 5:
            skipped = report(at, math.nan, skipped=True, moves_to=at)
            await job.report(reports=[skipped, report(at, 2.0, **{"try": 1})])
        else:
            await job.report(reports=[report(at, 2.0 + at)])
        await other.report(reports=[report(at, 2.0)])
    # The second one passes a step without a loss, which comes late.
    await used.take(job, 8, 10)
    await job.report(reports=[report(8, 1.5), report(9, 1.5)])
    await other.report(reports=[report(8, moves_to=10)])
    await other.report(reports=[report(8, 1.25, moves_to=10)])
    signed = {"author": "me@here", "reason": 'a "spike", or\ntwo', "request_id": "ask"}
    asked = await server.call(
        "AdjustRun", run="small", directive={"kind": "rollback", "before": 6}, **signed
    )
    again = await server.open(progress=6, directive=asked.adjustment.id, met_in=job.opened.attempt)
    await used.take(again, 6, 8)
    await again.report(reports=[report(6, 1.0, validation_losses={"val/z": math.inf}), report(7)])
    await server.call("FinishRun", run="small", request_id="end", force=True)
    return used


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_csv(text: str) -> tuple[list[str], Table]:
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def bits(value: Cell) -> Cell:
    """Return a float as its bits, and what is none as it is."""
    return struct.pack(">d", value) if isinstance(value, float) else value


def same(one: Table, two: Table) -> None:
    """Compare two tables bit by bit; NaN is NaN."""
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert {name: bits(value) for name, value in left.items()} == {
            name: bits(value) for name, value in right.items()
        }


def parquet_rows(path: Path | io.BytesIO) -> tuple[pa.Schema, Table]:
    table = pq.read_table(path)
    at = table.schema.get_field_index("recorded_at")
    whole = table.set_column(at, "recorded_at", table["recorded_at"].cast(pa.int64()))
    return table.schema, whole.to_pylist()


def from_text(schema: pa.Schema, rows: Table, *, is_csv: bool) -> Table:
    """Return the rows of a format that knows fewer types, with those of Parquet."""

    def cell(kind: pa.DataType, value: Cell) -> Cell:
        if value is None or (is_csv and value == ""):
            return None
        if pa.types.is_timestamp(kind):
            seconds, _, rest = value.removesuffix("Z").partition(".")
            at = datetime.fromisoformat(seconds).replace(tzinfo=timezone.utc)
            return int(at.timestamp()) * 10**9 + int(rest)
        if pa.types.is_float64(kind):
            return float(value)
        if is_csv and pa.types.is_boolean(kind):
            return {"true": True, "false": False}[value]
        return int(value) if is_csv and pa.types.is_int64(kind) else value

    return [{item.name: cell(item.type, row[item.name]) for item in schema} for row in rows]


async def test_three_formats_hold_the_same_table(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    await trained(replica)
    for name in ("run.parquet", "run.csv", "run.jsonl"):
        result = await history("small", "-o", name)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    schema, rows = parquet_rows(tmp_path / "run.parquet")
    header, from_csv = read_csv((tmp_path / "run.csv").read_text())
    from_jsonl = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert header == schema.names
    assert all(list(row) == schema.names for row in from_jsonl)
    same(from_text(schema, from_csv, is_csv=True), rows)
    same(from_text(schema, from_jsonl, is_csv=False), rows)
    assert names(tmp_path) == ["run.csv", "run.jsonl", "run.parquet"]
    for form in ("csv", "jsonl"):
        for more in ((), ("-o", "-")):
            result = await history("small", "--format", form, *more)
            assert result.stdout_bytes == (tmp_path / f"run.{form}").read_bytes()


async def test_the_columns(replica: Replica, history: History, tmp_path: Path) -> None:
    await trained(replica)
    await history("small", "-o", "run.parquet")
    schema, _ = parquet_rows(tmp_path / "run.parquet")
    times, integer, number = pa.timestamp("ns", tz="UTC"), pa.int64(), pa.float64()
    assert [(item.name, item.type) for item in schema] == [
        ("seq", integer), ("recorded_at", times), ("kind", pa.string()), ("attempt", integer),
        ("progress", integer), ("forgotten", pa.bool_()), ("rank", integer), ("loss", number),
        ("weight", number), ("skipped", pa.bool_()), ("late", pa.bool_()),
        ("gradient_norm", number), ("batch", integer), ("validation.val/z", number),
        ("validation.val_loss", number), ("learning_rate.decayed", number),
        ("learning_rate.plain", number), ("weight_decay.decayed", number),
        ("weight_decay.plain", number), ("adjustment", pa.string()), ("action", pa.string()),
        ("source", pa.string()), ("mode", pa.string()), ("effective", integer),
        ("status", pa.string()), ("author", pa.string()), ("reason", pa.string()),
        ("summary", pa.string()),
    ]  # fmt: skip


async def test_each_loss_stands_beside_the_values_that_its_step_used(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    used = await trained(replica)
    await history("small", "-o", "run.parquet")
    _, rows = parquet_rows(tmp_path / "run.parquet")
    losses = [row for row in rows if row["kind"] == "loss"]
    in_log = [
        (row, event, item)
        for row in replica.store.read("small")
        if isinstance(event := core.decode(row.payload), core.Reported)
        for item in event.reports
    ]
    assert len(losses) == len(in_log) > 20
    for got, (row, event, item) in zip(losses, in_log, strict=True):
        assert (got["seq"], got["recorded_at"]) == (row.seq, row.recorded_at_ns)
        assert (got["attempt"], got["progress"]) == (event.attempt, item.progress)
        assert got["rank"] == (event.rank or 0)
        assert bits(got["loss"]) == bits(item.loss)
        assert bits(got["gradient_norm"]) == bits(item.gradient_norm)
        assert (got["skipped"], got["batch"]) == (item.skipped, item.batch)
        for name in ("val_loss", "val/z"):
            assert bits(got[f"validation.{name}"]) == bits(item.validation.get(name))
        key = (event.attempt, item.progress)
        rates = [got["learning_rate.decayed"], got["learning_rate.plain"]]
        decays = [got["weight_decay.decayed"], got["weight_decay.plain"]]
        assert list(map(bits, rates)) == list(map(bits, used.rates[key]))
        assert list(map(bits, decays)) == list(map(bits, used.decays[key]))
    # Else this would show little: the two attempts used other values for the same step.
    assert used.rates[1, 7] != used.rates[2, 7]
    assert {row["progress"] for row in losses if row["late"]} == {8}
    assert [row["progress"] for row in losses if row["skipped"]] == [5]
    assert {(row["attempt"], row["progress"]) for row in losses if row["forgotten"]} == {
        (1, 6), (1, 7), (1, 8), (1, 9),
    }  # fmt: skip
    weights = [row["weight"] for row in losses if row["progress"] == 0]
    assert weights == [3.0, 1.0]
    absent = [row for row in losses if row["loss"] is None]
    assert [(row["attempt"], row["progress"], row["weight"]) for row in absent] == [
        (1, 8, None), (2, 7, None),
    ]  # fmt: skip


async def test_decisions_and_other_events_have_rows_of_their_own(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    await trained(replica)
    await history("small", "-o", "run.parquet")
    _, rows = parquet_rows(tmp_path / "run.parquet")
    events = (await replica.call("ListEvents", run="small")).events
    decided = [(event.seq, item) for event in events for item in event.adjustments]
    got = [row for row in rows if row["kind"] == "adjustment"]
    assert len(got) == len(decided) >= 2
    for row, (seq, item) in zip(got, decided, strict=True):
        assert row["seq"] == seq
        assert (row["adjustment"], row["progress"]) == (item.id, item.decided_at)
        assert row["reason"] == item.reason
        assert [row["author"]] == ([item.author] if item.author else [None])
        for name in ("action", "source", "mode", "effective", "status", "summary", "forgotten"):
            assert row[name] == getattr(item, name)
    assert {row["forgotten"] for row in got} == {True, False}
    others = [row for row in rows if row["kind"] not in {"adjustment", "loss"}]
    shown = [event for event in events if event.kind not in {"reported", "recorded"}]
    assert [(row["seq"], row["kind"], row["summary"]) for row in others] == [
        (event.seq, event.kind, event.summary) for event in shown
    ]
    kinds = {row["kind"]: row for row in others}
    assert {"created", "opened", "joined", "adjusted", "finished"} <= kinds.keys()
    assert kinds["opened"]["progress"] == 6
    assert kinds["created"]["progress"] is kinds["finished"]["progress"] is None
    assert kinds["created"]["attempt"] is None
    assert (kinds["adjusted"]["author"], kinds["adjusted"]["reason"]) == (
        "me@here", 'a "spike", or\ntwo',
    )  # fmt: skip
    assert [row["seq"] for row in rows] == sorted(row["seq"] for row in rows)


async def test_a_run_without_a_name_for_its_group(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    job = await replica.start_job()
    await job.values(0, count=1)
    await job.report((0, 1.5))
    await history("small", "-o", "run.parquet")
    schema, rows = parquet_rows(tmp_path / "run.parquet")
    assert {"learning_rate", "weight_decay"} <= set(schema.names)
    (loss,) = (row for row in rows if row["kind"] == "loss")
    assert (loss["learning_rate"], loss["weight_decay"], loss["rank"]) == (1e-3, 0.1, 0)


async def test_a_run_that_never_trained(replica: Replica, history: History, tmp_path: Path) -> None:
    await replica.attach()
    for form in ("csv", "jsonl", "parquet"):
        result = await history("small", "-o", f"run.{form}")
        assert (result.exit_code, result.stderr) == (0, "")
    schema, rows = parquet_rows(tmp_path / "run.parquet")
    assert [row["kind"] for row in rows] == ["created"]
    header, from_csv = read_csv((tmp_path / "run.csv").read_text())
    assert header == schema.names
    same(from_text(schema, from_csv, is_csv=True), rows)


async def test_what_was_trimmed_from_the_fold_is_found_again(
    replica: Replica, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that begins far back inherits values that the fold has dropped by then."""
    monkeypatch.setattr("lrpilot.server._packing.SEGMENT_ROWS", 4)
    trim = partial(_server_history.trim, kept_steps=4, kept_delays=1)
    monkeypatch.setattr(_history_table, "trim", trim)
    used = Used()
    await replica.attach(
        learning_rate={"peak": 1e-3, "decay": {"style": "linear"}}, **replica.feedback(delay=2)
    )
    job = await replica.open()
    for at in range(40):
        await used.take(job, at, at + 1, groups=1)
        await job.report((at, float(at)))
    again = await replica.open(progress=5)
    for at in range(5, 12):
        await used.take(again, at, at + 1, groups=1)
        await again.report((at, -1.0))
    await history("small", "-o", "run.parquet")
    _, rows = parquet_rows(tmp_path / "run.parquet")
    losses = [row for row in rows if row["kind"] == "loss"]
    assert len(losses) == 47
    for row in losses:
        assert [row["learning_rate"]] == used.rates[row["attempt"], row["progress"]]
    assert used.rates[1, 6] == used.rates[2, 6]
    assert used.rates[1, 11] != used.rates[2, 11]


async def test_what_a_holder_declares_behind_its_reports_is_what_was_used(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    """Values that were recorded for it and never arrived are not."""
    await replica.attach(**replica.feedback(delay=4))
    job = await replica.open(leader=True)
    held = job.identity | {"holder": job.opened.holder}
    await job.values(0, holder=job.opened.holder)
    offered = await replica.call("OfferValues", **held, begin=2, stride=1, count=40)
    await job.report(*((at, 1.0) for at in range(8)))
    lost = (await job.values(4, holder=job.opened.holder)).block
    assert lost.learning_rates[1] == 5e-4
    used = trainer_pb2.Block(begin=4, stride=1, learning_rates=[1e-3] * 7, weight_decays=[0.1] * 7)
    await replica.call("DeclareValues", **held, blocks=[used], offer=offered.offer)
    await job.report((8, 1.0), (9, 1.0), (10, 1.0), (11, 1.0))
    await job.values(11, holder=job.opened.holder)
    await job.report((11, 1.0))
    await history("small", "-o", "run.parquet")
    _, rows = parquet_rows(tmp_path / "run.parquet")
    rates = [(row["progress"], row["learning_rate"]) for row in rows if row["kind"] == "loss"]
    assert [rate for at, rate in rates if at < 11] == [1e-3] * 11
    assert len(rates) == 12


async def test_many_rows_go_through_few_at_a_time(
    replica: Replica, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parquet, "ROWS_PER_GROUP", 500)
    monkeypatch.setattr("lrpilot.server._packing.SEGMENT_ROWS", 8)
    trim = partial(_server_history.trim, kept_steps=100)
    monkeypatch.setattr(_history_table, "trim", trim)
    kept, waiting = [], [0]

    class Watched(_history_table.HistoryTable):
        def add(self, run: LiveRun, row: LogRow, event: core.Event) -> None:
            super().add(run, row, event)
            kept.append(len(run.state.loss_progress))

        def rows(self, state: core.RunState) -> Iterator[Row]:
            for row in super().rows(state):
                waiting[-1] += 1
                yield row

    write_table = pq.ParquetWriter.write_table

    def written(writer: pq.ParquetWriter, table: pa.Table) -> None:
        write_table(writer, table)
        waiting.append(0)

    monkeypatch.setattr(_history_table, "HistoryTable", Watched)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", written)
    job = await replica.start_job("small", total=20_000)
    for at in range(0, 20_000, 100):
        await job.values(at, count=100, in_use=at)
        await job.report(*((step, 1 / (step + 1)) for step in range(at, at + 100)))
    assert (await history("small", "-o", "run.parquet")).exit_code == 0
    whole = pq.ParquetFile(tmp_path / "run.parquet").metadata
    groups = [whole.row_group(at).num_rows for at in range(whole.num_row_groups)]
    assert groups[:-1] == [500] * 40
    assert max(waiting) == 500
    # Of the fold a few delays, of 128 each, and what two trims lie apart.
    assert max(kept) < 2_000
    _, rows = parquet_rows(tmp_path / "run.parquet")
    losses = [row["loss"] for row in rows if row["kind"] == "loss"]
    assert losses == [1 / (step + 1) for step in range(20_000)]


async def test_parquet_is_nothing_for_a_terminal(
    replica: Replica, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    await replica.attach()
    monkeypatch.setattr(_history, "is_terminal", lambda: True)
    for more in ((), ("-o", "-")):
        result = await history("small", "--format", "parquet", *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "error: Parquet is nothing for a terminal: give a file, such as -o small.parquet\n"
        )
    assert (await history("small", "--format", "csv")).exit_code == 0
    monkeypatch.setattr(_history, "is_terminal", lambda: False)
    result = await history("small", "--format", "parquet")
    assert parquet_rows(io.BytesIO(result.stdout_bytes))[1][0]["kind"] == "created"


async def test_without_pyarrow(
    replica: Replica, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lrpilot.server.cli._parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = await history("small", "-o", "run.parquet")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: Parquet needs pyarrow: ")
    assert result.stderr.endswith("\nhint: pip install 'lrpilot[parquet]'\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize("form", ["text", "csv", "jsonl", "parquet"])
async def test_what_fails_leaves_the_file_as_it_was(
    replica: Replica, history: History, tmp_path: Path, form: str
) -> None:
    (tmp_path / "run").write_text("an older one")
    result = await history("no-such-run", "--format", form, "-o", "run")
    assert result.exit_code == 1
    assert "no-such-run" in result.stderr
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run").read_text() == "an older one"


def cut_off(whole: list[runs_pb2.ExportRunResponse]) -> list[runs_pb2.ExportRunResponse]:
    return whole[:-1]


def broken(whole: list[runs_pb2.ExportRunResponse]) -> list[runs_pb2.ExportRunResponse]:
    whole[1].data = whole[1].data[:40] + b"?" + whole[1].data[41:]
    return whole


@pytest.mark.parametrize("damage", [cut_off, broken])
async def test_a_log_that_does_not_arrive_whole(
    replica: Replica,
    server: Any,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[..., list[runs_pb2.ExportRunResponse]],
) -> None:
    monkeypatch.chdir(tmp_path)
    await trained(replica)
    parts = [part async for part in replica.stream("ExportRun", run="small", force=True)]
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse()
    server.answers["ExportRun"] = lambda _: iter(damage(parts))
    for form in ("csv", "parquet"):
        args = ("run", "history", "small", "-o", f"run.{form}", "--server", server.address)
        result = await asyncio.to_thread(cli, *args)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: the log of run 'small' cannot be read here\n  line")
        assert names(tmp_path) == []


def test_a_connection_that_breaks_in_the_middle(
    server: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def breaks(_: Any) -> Iterator[runs_pb2.ExportRunResponse]:
        yield runs_pb2.ExportRunResponse(total_events=100)
        yield runs_pb2.ExportRunResponse(data=b"x" * 100, events=10)
        raise RuntimeError("the server fails in the middle")

    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse()
    server.answers["ExportRun"] = breaks
    result = cli("run", "history", "small", "-o", "run.parquet", "--server", server.address)
    assert result.exit_code == 1
    assert names(tmp_path) == []
    # The log as a whole takes longer than an answer.
    asked, fetched = server.deadlines_s
    assert asked < 11
    assert fetched > 800


async def test_a_reader_that_leaves(replica: Replica) -> None:
    """As `head` does: the command ends quietly, whatever the format."""
    await trained(replica)
    for form in ("text", "csv", "jsonl", "parquet"):
        args = ["run", "history", "small", "--format", form, "--server", replica.address]
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "lrpilot.server.cli", *args],
            stdout=write_end,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        os.close(write_end)
        assert (done.returncode, done.stderr) == (141, b""), form


async def test_text_and_events_go_into_a_file_too(
    replica: Replica, history: History, tmp_path: Path
) -> None:
    await trained(replica)
    for name, *options in (("events", "--json"), ("text",), ("text.log", "--format", "text")):
        shown = await history("small", *options)
        assert (await history("small", *options, "-o", name)).stdout == ""
        assert (tmp_path / name).read_text() == shown.stdout
    events = (tmp_path / "events").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in events] == list(range(1, len(events) + 1))


async def test_a_format_for_events(replica: Replica, history: History) -> None:
    result = await history("small", "--json", "--format", "csv")
    assert result.exit_code == 2
    assert "--format and --json exclude each other" in result.stderr
    result = await history("small", "--json", "-o", "run.csv")
    assert result.exit_code == 2
    assert "run.csv is called like a table" in result.stderr
