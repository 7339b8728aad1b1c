"""`lrpilot run export` and `run import` against a server that answers what the test says."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console
from typer.testing import Result

from lrpilot.server.cli import _transfer
from lrpilot.v1 import runs_pb2

Cli = Callable[..., Result]

FILE = bytes(range(256)) * 4000
"""What stands for a file: only the server reads it. 1 MB, in parts of 256 KiB."""


@pytest.fixture
def run(server: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `lrpilot run …` against the scripted server, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def invoke(command: str, *args: str, **kwargs: Any) -> Result:
        return cli("run", command, *args, "--server", server.address, **kwargs)

    return invoke


def exports(server: Any, *, active: bool = False, fails: bool = False) -> None:
    def answer(_: Any) -> Any:
        yield runs_pb2.ExportRunResponse(total_events=1200, digest="ab" * 32, active=active)
        yield runs_pb2.ExportRunResponse(data=FILE[:9000], events=700)
        if fails:
            raise RuntimeError("the server fails in the middle")
        yield runs_pb2.ExportRunResponse(data=FILE[9000:], events=1200)

    server.answers["ExportRun"] = answer


def imports(server: Any, *, unchanged: bool = False) -> None:
    run = runs_pb2.Run(name="small", spec_document="name: small")
    server.answers["ImportRun"] = lambda _: runs_pb2.ImportRunResponse(
        run=run, events=1200, unchanged=unchanged
    )


def test_export_writes_one_file(run: Cli, server: Any, tmp_path: Path) -> None:
    exports(server)
    result = run("export", "small")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "exported small: 1,200 events, 1.0 MB, to small.jsonl.gz\n"
    assert (tmp_path / "small.jsonl.gz").read_bytes() == FILE
    assert [path.name for path in tmp_path.iterdir()] == ["small.jsonl.gz"]
    assert server.requests == [runs_pb2.ExportRunRequest(run="small")]
    assert 800 < server.deadlines_s[0] < 1000


def test_export_of_a_run_whose_ranks_are_active(run: Cli, server: Any) -> None:
    exports(server, active=True)
    result = run("export", "small", "--force", "-o", "there.gz")
    assert result.stdout.splitlines() == [
        "exported small: 1,200 events, 1.0 MB, to there.gz",
        "its ranks are active: what they do from now on is not in the file",
    ]
    assert server.requests == [runs_pb2.ExportRunRequest(run="small", force=True)]


def test_export_as_json(run: Cli, server: Any) -> None:
    exports(server)
    result = run("export", "small", "--json")
    assert json.loads(result.stdout) == {
        "run": "small",
        "file": "small.jsonl.gz",
        "bytes": len(FILE),
        "events": 1200,
        "digest": "ab" * 32,
        "active": False,
    }


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_export_to_standard_output(run: Cli, server: Any, json_option: tuple[str, ...]) -> None:
    exports(server)
    result = run("export", "small", "-o", "-", *json_option)
    assert (result.exit_code, result.stdout_bytes) == (0, FILE)
    assert "small" in result.stderr


def test_export_to_a_terminal_is_refused(
    run: Cli, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transfer, "is_terminal", lambda: True)
    result = run("export", "small", "-o", "-")
    assert result.exit_code == 2
    assert "nothing for a terminal" in result.stderr
    assert server.requests == []


def test_an_export_that_fails_leaves_the_file_as_it_was(
    run: Cli, server: Any, tmp_path: Path
) -> None:
    exports(server, fails=True)
    (tmp_path / "small.jsonl.gz").write_text("an older one")
    result = run("export", "small")
    assert result.exit_code == 1
    assert (tmp_path / "small.jsonl.gz").read_text() == "an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["small.jsonl.gz"]


def test_a_device_stays_what_it_is(run: Cli, server: Any, tmp_path: Path) -> None:
    """As root nothing else keeps a file from taking the place of /dev/null."""
    exports(server)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(pipe.read_bytes)
        assert run("export", "small", "-o", str(pipe)).exit_code == 0
        assert got.result(30.0) == FILE
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_one(run: Cli, server: Any, tmp_path: Path) -> None:
    exports(server)
    (tmp_path / "there").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("there")
    assert run("export", "small", "-o", str(link)).exit_code == 0
    assert link.is_symlink()
    assert (tmp_path / "there").read_bytes() == FILE


def test_a_refused_export(run: Cli, server: Any, tmp_path: Path) -> None:
    server.refuse("ExportRun", grpc.StatusCode.FAILED_PRECONDITION, "RunLive", "run small is live")
    result = run("export", "small")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: run small is live",
        "hint: repeat the command with --force",
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_a_folder_that_is_not_there(run: Cli, server: Any) -> None:
    result = run("export", "small", "-o", "nowhere/small.gz")
    assert result.exit_code == 2
    assert result.stderr == "error: nowhere/small.gz: No such file or directory\n"
    assert server.requests == []


def test_import_sends_the_file(run: Cli, server: Any, tmp_path: Path) -> None:
    imports(server)
    (tmp_path / "small.gz").write_bytes(FILE)
    result = run("import", "small.gz", "--reason", "a move", "--author", "me")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "imported small: 1,200 events; its job goes on from its checkpoint\n"
    run("import", "-", input=FILE)
    first, second = server.requests
    for parts in (first, second):
        assert len(parts[0].request_id) == 32
        assert not any(part.request_id for part in parts[1:])
        assert b"".join(part.data for part in parts) == FILE
        assert max(part.ByteSize() for part in parts) < 1024 * 1024
    assert (first[0].reason, first[0].author) == ("a move", "me")
    assert (second[0].reason, "@" in second[0].author) == ("", True)
    assert first[0].request_id != second[0].request_id
    assert 800 < server.deadlines_s[0] < 1000


def test_import_of_what_is_there(run: Cli, server: Any, tmp_path: Path) -> None:
    imports(server, unchanged=True)
    (tmp_path / "small.gz").write_bytes(FILE)
    result = run("import", "small.gz")
    assert result.exit_code == 0
    assert result.stdout == ("unchanged: small: it is here already, with the file's 1,200 events\n")


def test_a_file_that_the_server_refuses(run: Cli, server: Any, tmp_path: Path) -> None:
    (tmp_path / "small.gz").write_bytes(FILE)
    server.refuse(
        "ImportRun",
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "the file is not the whole export of a run; nothing was imported",
        {"line 7": "got check 12; allowed: 34"},
    )
    result = run("import", "small.gz")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: the file is not the whole export of a run; nothing was imported",
        "  line 7: got check 12; allowed: 34",
    ]


def test_a_run_in_the_way(run: Cli, server: Any, tmp_path: Path) -> None:
    (tmp_path / "small.gz").write_bytes(FILE)
    server.refuse("ImportRun", grpc.StatusCode.ALREADY_EXISTS, "RunExists", "run small exists")
    result = run("import", "small.gz")
    assert (result.exit_code, result.stderr) == (1, "error: run small exists\n")


def test_a_file_that_is_not_there_or_cannot_be_read(
    run: Cli, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("import", "nowhere.gz")
    assert result.exit_code == 2
    assert result.stderr == "error: nowhere.gz: No such file or directory\n"
    (tmp_path / "folder").mkdir()
    assert run("import", "folder").exit_code == 2
    assert server.requests == []


@pytest.mark.parametrize("command", [("export", "small"), ("import", "small.gz")])
def test_nobody_answers(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "small.gz").write_bytes(FILE)
    name, argument = command
    where = str(tmp_path / argument) if name == "import" else argument
    result = cli("run", name, where, "--server", "127.0.0.1:1", "--timeout-s", "5")
    assert result.exit_code == 3


def test_a_bar_is_shown_on_a_terminal_alone(
    run: Cli, server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exports(server)
    imports(server)
    monkeypatch.setattr(
        _transfer, "Console", lambda **_: Console(file=sys.stderr, force_terminal=True, width=90)
    )
    assert "export small" in run("export", "small").stderr
    assert "import small.jsonl.gz" in run("import", "small.jsonl.gz").stderr
