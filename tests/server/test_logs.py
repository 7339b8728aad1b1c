"""The server's log: JSON or for people, a line for each thing that happened to a run, each once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.server import _journal
from lrpilot.server.cli._logs import HumanFormatter, JsonFormatter, LogFormat, write_logs

if TYPE_CHECKING:
    from tests.server.conftest import Job, Program, Programs, Replica, Until

NAN = math.nan
FOREVER = 100_000_000
DEADLINE_S = 60.0


def lines_of(program: Program) -> list[dict[str, Any]]:
    """Return the lines of a program's log, each of which is one JSON object."""
    lines: list[dict[str, Any]] = [json.loads(text) for text in program.log().splitlines()]
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"], line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
        age = datetime.now(timezone.utc) - datetime.fromisoformat(
            line["time"].replace("Z", "+00:00")
        )
        assert -1 < age.total_seconds() < 3600
        assert line["level"] in {"debug", "info", "warning", "error", "critical"}
    return lines


def adjustments_in(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "mode" in line]


async def stop(program: Program) -> None:
    assert await asyncio.to_thread(program.end, signal.SIGTERM) == 0


async def shown(program: Program, run: str = "small") -> list[Any]:
    """Return the adjustments and the advice of a run."""
    return list((await program.call("GetRun", run=run)).run.adjustments)


async def operate(program: Any, **action: Any) -> Any:
    return await program.call(
        "AdjustRun",
        run="small",
        author="oncall",
        reason="it looks\nunstable",
        request_id=program.fresh("adjust"),
        **action,
    )


class TestTheProgram:
    async def test_each_line_is_an_object_that_says_what_happened(self, programs: Programs) -> None:
        async with programs("--log-format", "json").wait_ready().connected() as program:
            job = await program.start_job(**program.feedback(delay=2, timeout="100ms"))
            await job.report((0, 1.0), (1, 1.0))
            await job.values(4, blocked=True, wait_ms=30_000)
            await operate(program, scale_lr=0.5)
            decided = await shown(program)
            await program.call("FinishRun", run="small", request_id="f", force=True)
            await stop(program)
        lines = lines_of(program)
        told = adjustments_in(lines)
        assert [line["adjustment"] for line in told] == [item.id for item in decided]
        for line, item in zip(told, decided, strict=True):
            assert (line["run"], line["attempt"], line["progress"]) == ("small", 1, item.decided_at)
            assert (line["seq"], line["effective"]) == (item.seq, item.effective)
            assert (line["source"], line["reason"]) == (item.source, item.reason)
            assert (line["mode"], line["action"]) == (item.mode, item.action)
            assert (line["lr_before"], line["lr_after"]) == (list(item.before), list(item.after))
            assert line.get("author", "") == item.author
            assert item.reason in line["message"]
        assert [line["source"] for line in told] == ["policies.0 (plateau)", "operator"]
        of_run = [(line["level"], line["message"].split(":")[0]) for line in lines if "run" in line]
        assert of_run == [
            ("info", "created by a trainer, for 1000 iterations"),
            ("info", "attempt 1 opened at progress 0"),
            ("info", "policies.0 (plateau) (act) decided at progress 1, effective at 3"),
            (
                "warning",
                "ranks waited 0.1 s for values from progress 4 on while no loss came",
            ),
            ("info", "operator oncall (act) decided at progress 4, effective at 6"),
            ("info", "finished at progress 4 of 1000"),
        ]
        assert [line["message"] for line in lines if "run" not in line] == [
            "draining: calls under way have 10 s to end",
            "stopped",
        ]

    async def test_nothing_is_told_again_by_a_server_that_starts(self, programs: Programs) -> None:
        async with programs("--log-format", "json").wait_ready().connected() as first:
            job = await first.start_job(**first.feedback())
            await job.report(*((at, 1.0) for at in range(6)))
            told = adjustments_in(lines_of(first))
            assert len(told) > 1
            await stop(first)
        async with programs("--log-format", "json").wait_ready().connected() as second:
            assert len(await shown(second)) == len(told)
            await stop(second)
        assert [line["message"] for line in lines_of(second) if "run" in line] == []

    @pytest.mark.needs_program("postgres")
    async def test_each_decision_is_told_by_the_replica_that_wrote_it(
        self, programs: Programs, postgres: str, tmp_path: Path, until: Until
    ) -> None:
        def start(name: str) -> Program:
            options = ("--log-format", "json", "--log-level", "debug", "--store", postgres)
            return programs(*options, data=tmp_path / name)

        first, second = start("a"), start("b")
        async with first.wait_ready().connected(), second.wait_ready().connected():
            job = await first.start_job(**first.feedback(delay=1))
            other = type(job)(second, job.run, job.opened, job.rank, job.incarnation)
            for at in range(8):
                await (job, other)[at % 2].report((at, 1.0))
            known = await shown(second)

            async def has_read_it_all() -> bool:
                return len(await shown(first)) == len(known)

            await until(has_read_it_all)
            await stop(first)
            await stop(second)
        told = [adjustments_in(lines_of(program)) for program in (first, second)]
        assert all(told)
        everything = [line["adjustment"] for lines in told for line in lines]
        assert sorted(everything) == sorted(item.id for item in known)
        for number, lines in enumerate(told):
            assert {line["progress"] % 2 for line in lines} == {number}

    async def test_an_exception_is_a_part_of_its_line(self, programs: Programs) -> None:
        async with programs("--log-format", "json").wait_ready().connected() as program:
            await program.start_job()
            database = next(program.data.glob("*.db"))
            await stop(program)
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("UPDATE events SET payload = x'00' WHERE seq = 1")
                connection.commit()
        async with programs("--log-format", "json").wait_ready().connected() as program:
            refusal = await program.call_refused("GetRun", run="small")
            assert refusal.code == "INTERNAL"
            await stop(program)
        (line,) = [line for line in lines_of(program) if line["message"] == "GetRun failed"]
        assert (line["level"], line["run"], line["method"]) == ("error", "small", "GetRun")
        assert line["peer"].startswith("ipv4:127.0.0.1:")
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert line["error"] == "JSONDecodeError"
        assert "JSONDecodeError: " in line["exception"].splitlines()[-1]

    def test_a_start_that_fails_is_one_object_too(self, programs: Programs, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("no folder")
        program = programs("--log-format", "json")
        assert program.ended() == 1
        (line,) = lines_of(program)
        assert line["level"] == "critical"
        assert line["message"].startswith("cannot start: ")

    def test_colours_are_for_terminals_alone(self, tmp_path: Path) -> None:
        def log(stderr: int, **environment: str) -> None:
            command = [sys.executable, "-m", "lrpilot.server.cli", "serve", "--store", "memory://"]
            command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
            clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
            with subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=clean | {"TERM": "xterm-256color", "COLUMNS": "20"} | environment,
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline().startswith(b"lrpilot ready")
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0

        line = rb"[\d-]{10} [\d:,]{12} %b lrpilot.server: stopped\r?\n"
        for environment, level in (
            ({}, rb"\x1b\[32mINFO\x1b\[0m"),
            ({"NO_COLOR": "1"}, rb"INFO"),
        ):
            master, slave = pty.openpty()
            with os.fdopen(master, "rb", buffering=0) as terminal:
                log(slave, **environment)
                os.close(slave)
                text = b""
                # It ends with an error once nobody has the other end any more.
                with contextlib.suppress(OSError):
                    while part := terminal.read(65536):
                        text += part
            assert re.search(line % level + rb"\Z", text), text
        with (tmp_path / "log").open("wb") as file:
            log(file.fileno())
        text = (tmp_path / "log").read_bytes()
        assert re.search(line % rb"INFO" + rb"\Z", text), text
        assert b"\x1b" not in text


class TestLines:
    """One record, one line."""

    @pytest.fixture(autouse=True)
    def as_before(self) -> Iterator[None]:
        root = logging.getLogger()
        handlers, level, hook = root.handlers[:], root.level, threading.excepthook
        yield
        logging.captureWarnings(False)
        root.handlers[:], threading.excepthook = handlers, hook
        root.setLevel(level)

    def test_libraries_write_the_same_form(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_logs("INFO", LogFormat.JSON)
        names = ["grpc._cython.cygrpc", "uvicorn.error", "sqlalchemy.pool", "asyncio"]
        for name in names:
            logging.getLogger(name).warning("a %s\nb", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        thread = threading.Thread(target={}.__getitem__, args=("key",), name="worker")
        thread.start()
        thread.join(DEADLINE_S)
        lines = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
        assert [(line["logger"], line["message"]) for line in lines[:4]] == [
            (name, "a 1\nb") for name in names
        ]
        assert lines[4]["logger"] == "py.warnings"
        assert "DeprecationWarning: old" in lines[4]["message"]
        assert (lines[5]["message"], lines[5]["error"]) == ("thread worker failed", "KeyError")
        assert lines[5]["exception"].endswith("KeyError: 'key'")
        assert len(lines) == 6

    @pytest.mark.parametrize(
        ("value", "written"),
        [(NAN, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), ([1.5, NAN], [1.5, "nan"]), (0, 0)],
    )
    def test_numbers_that_json_does_not_know_are_strings(self, value: Any, written: Any) -> None:
        record = logging.makeLogRecord({"msg": "m", **_journal.about("small", loss=value)})
        line = json.loads(JsonFormatter().format(record))
        assert (line["run"], line["loss"]) == ("small", written)

    @pytest.mark.parametrize(
        ("fields", "front"),
        [
            ({}, ""),
            ({"run": "a"}, "run a: "),
            ({"run": "a", "attempt": 2}, "run a (attempt 2): "),
            ({"run": "a", "attempt": 2, "progress": 0}, "run a (attempt 2, progress 0): "),
        ],
    )
    def test_people_read_the_run_in_front(self, fields: dict[str, Any], front: str) -> None:
        record = logging.makeLogRecord(
            {
                "msg": "said\n\x1b[2J%s",
                "args": ("\t",),
                "name": "a.b",
                "levelname": "INFO",
                "fields": fields,
            }
        )
        (text,) = HumanFormatter(is_coloured=False).format(record).splitlines()
        assert text.endswith(f"INFO a.b: {front}said\\n\\x1b[2J\\t")


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (level, message, fields) of the lines about runs so far, and forget them."""
    lines = [
        (record.levelname, record.getMessage(), vars(record)["fields"])
        for record in caplog.records
        if "run" in getattr(record, "fields", ())
    ]
    caplog.clear()
    return lines


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lrpilot.server")
    return caplog


class TestWhatIsTold:
    async def test_reports_alone_say_nothing(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        job = await server.start_job()
        told(log)
        for at in range(50):
            await job.report((at, 1.0))
            await job.values(at, in_use=at)
        assert told(log) == []

    async def test_a_policy_that_decides_each_step_has_a_line_a_decision(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        job = await server.start_job(**server.feedback(delay=1))
        told(log)
        for at in range(40):
            await job.report((at, 1.0))
        lines = told(log)
        decided = (await job.shown()).adjustments
        assert len(decided) > 10
        assert [fields["adjustment"] for _, _, fields in lines] == [item.id for item in decided]

    async def test_a_row_of_losses_that_are_not_finite_has_one_line(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        job = await server.start_job()
        told(log)
        await job.report((0, 1.0), (1, NAN), (2, NAN))
        for at in range(3, 60):
            await job.report((at, (NAN, math.inf)[at % 2]))
        ((level, message, fields),) = told(log)
        assert level == "WARNING"
        assert message.startswith("losses from progress 1 on are not finite, 2 in all so far")
        assert (fields["progress"], fields["nonfinite_losses"]) == (1, 2)
        # It goes on with another server, which has read of it, and with another row.
        await server.restart()
        await job.report((60, NAN))
        assert told(log) == []
        await job.report((61, 1.0))
        await job.report((62, NAN), (63, 1.0), (64, NAN))
        ((_, message, _),) = told(log)
        assert message.startswith("losses from progress 62 on are not finite, 62 in all")

    async def test_a_stage_is_told_where_the_job_enters_it(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        stages = [
            {"name": "first", "learning_rate": {"peak": 1e-3}, "until": 4},
            {"name": "second", "learning_rate": {"peak": 5e-4}},
        ]
        job = await server.start_job(stages=stages, learning_rate=None, weight_decay=None)
        told(log)
        for at in range(8):
            await job.report((at, 1.0))
        ((_, message, fields),) = told(log)
        assert message == "stage second entered"
        assert fields == {
            "run": "small", "attempt": 1, "progress": 4, "stage": "second", "stage_before": "first",
        }  # fmt: skip
        # An attempt that begins before says so itself, and enters it once more.
        job = await server.open(progress=2)
        ((_, message, fields),) = told(log)
        assert message == "attempt 2 opened at progress 2, 6 back from 8"
        assert fields["stage"] == "first"
        await job.report((2, 1.0), (3, 1.0))
        assert [message for _, message, _ in told(log)] == ["stage second entered"]

    async def test_an_attempt_says_what_it_forgets(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        job = await server.start_job(**server.feedback(delay=2))
        await job.report(*((at, 1.0) for at in range(6)))
        decided = len((await job.shown()).adjustments)
        told(log)
        await server.open(progress=0)
        ((level, message, fields),) = told(log)
        assert (level, fields["attempt"], fields["progress"]) == ("INFO", 2, 0)
        assert fields["forgotten"] == decided > 0
        assert message == (
            f"attempt 2 opened at progress 0, 6 back from 6, {decided} decisions on losses from "
            "there on are forgotten"
        )

    async def test_advice_and_directives_stand_out(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        job = await server.start_job(**server.feedback(delay=2, mode="advise"))
        told(log)
        await job.report((0, 1.0), (1, 1.0))
        ((level, message, fields),) = told(log)
        assert (level, fields["mode"], fields["adjustment"]) == ("WARNING", "advise", "3-1-0")
        assert "policies.0 (plateau) (advise) decided at progress 1" in message
        await server.call(
            "ApproveAdvice", run="small", advice="3-1-0", author="oncall", request_id="a"
        )
        ((level, _, fields),) = told(log)
        assert (level, fields["mode"], fields["author"]) == ("INFO", "act", "oncall")
        asked = (await operate(server, directive={"kind": "rollback", "before": 1})).adjustment
        ((level, _, fields),) = told(log)
        assert (level, fields["adjustment"], fields["action"]) == ("WARNING", asked.id, "directive")
        rolled = await server.open(progress=0, directive=asked.id, met_in=job.opened.attempt)
        (_, opened, fields), (_, cut, of_cut) = told(log)
        assert f"rolled back as directive {asked.id} asked" in opened
        assert fields["adjustment"] == asked.id
        assert cut.startswith("rollback (act) decided at progress 0, effective at 0: LR x 0.5")
        assert of_cut["adjustment"] == (await rolled.shown()).adjustments[-1].id

    async def test_what_is_only_looked_at_or_repeated_is_told_once(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        await server.start_job(**server.feedback())
        told(log)
        fields = {"run": "small", "author": "oncall", "reason": "why", "scale_lr": 0.5}
        await server.call("AdjustRun", dry_run=True, **fields)
        assert told(log) == []
        for _ in range(3):
            await server.call("AdjustRun", request_id="same", **fields)
        assert len(told(log)) == 1

    async def test_another_spec_names_what_changed(
        self, server: Replica, log: pytest.LogCaptureFixture
    ) -> None:
        await server.start_job()
        told(log)
        await server.call(
            "ReviseRun",
            run="small",
            spec_document=server.document(total=2000),
            author="oncall",
            reason="more data",
            request_id="r",
        )
        ((_, message, fields),) = told(log)
        assert message == (
            "oncall gives a new spec from progress 32 on: total, learning_rate.decay.end: more data"
        )
        assert fields["changed"] == ["total", "learning_rate.decay.end"]
        assert fields["effective"] == 32
        await server.call("DeleteRun", run="small", force=True)
        ((level, message, _),) = told(log)
        assert (level, message.split(";")[0]) == ("WARNING", "deleted for good, as somebody asked")

    async def test_a_fault_in_telling_ends_no_request(
        self, server: Replica, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job: Job = await server.start_job()
        monkeypatch.setattr(_journal, "_tell_losses", lambda *_: 1 / 0)
        assert (await job.report((0, 1.0))).frontier == 1
        (failure,) = [record for record in log.records if record.exc_info]
        assert failure.getMessage() == "what was appended cannot be told"

    def test_a_state_that_is_empty_can_be_noted(self) -> None:
        assert _journal.note(core.RunState("small")).spec is None
