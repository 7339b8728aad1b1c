"""The database is put back from an older copy under a job that trains."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import (
    Expected,
    Rank,
    Runs,
    Spec,
    ask_to_end,
    make_spec,
    one_value,
    wait_until,
)
from tests.e2e.training import loss_at
from tests.server.conftest import Program

Servers = Callable[..., Program]
Ranks = Callable[..., list[Rank]]

OLDER, COPIED_AT, NEWER = 20, 40, 90
"""Progress of two checkpoints, and from which on the database is copied between them."""


def copy_database(data: Path, to: Path) -> None:
    """Copy a database that may be in use, as `sqlite3 lrpilot.db '.backup …'` does."""
    source, copy = sqlite3.connect(data / "lrpilot.db"), sqlite3.connect(to)
    with closing(source), closing(copy):
        source.backup(copy)


def put_back(data: Path, copy: Path) -> None:
    """Put a copy in the place of a database that nobody uses."""
    for file in data.glob("lrpilot.db*"):
        file.unlink()
    copy.replace(data / "lrpilot.db")


def expected(spec: Spec, begin: int, end: int, salt: str) -> Expected:
    """Return what the losses up to `end` give, those of another start from `begin` on."""
    values = Expected.of(spec)
    values.open(0)
    values.feed({n: loss_at(n, "old" if n < begin else salt) for n in range(end)})
    return values


@pytest.mark.parametrize(
    ("checkpoint", "options", "environment"),
    [
        (OLDER, {}, {}),
        (NEWER, {}, {"LOCAL_WORLD_SIZE": "2"}),
        (NEWER, {"reporter": [0, 1]}, {}),
    ],
    ids=["older", "newer, shared on the node", "newer, two reporters"],
)
def test_ranks_are_refused_and_restart_from_a_checkpoint(
    servers: Servers,
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: int,
    options: dict[str, Any],
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = make_spec("restored")
    server = servers()
    given = {"key": "old", "salt": "old", "saves": [OLDER, NEWER], "pause_s": 0.002, **options}
    old = ranks(server.grpc, spec, 2, **given)
    wait_until(lambda: all(rank.reached(COPIED_AT) for rank in old), "the job trains")
    copy_database(tmp_path / "data", tmp_path / "copy.db")
    wait_until(lambda: all(rank.reached(NEWER + 10) for rank in old), "it goes on")
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    put_back(tmp_path / "data", tmp_path / "copy.db")
    again = servers(server.grpc)

    for rank in old:
        assert rank.wait() == 1
        assert rank.outcome() == ["LogForgotten"] * 4
    assert "has forgotten" in again.log()
    assert "ERROR" in again.log()
    with Runs(server.grpc) as runs:
        assert "older copy" in runs.run("restored").forgotten

    state = str(tmp_path / f"state-{checkpoint}.json")
    new = ranks(server.grpc, spec, 2, key="new", salt="new", state=state, **options)
    wait_until(lambda: all(rank.reached(2 * NEWER) for rank in new), "it trains again")
    ask_to_end(tmp_path, "new")
    for rank in new:
        assert rank.wait() == 0, rank.log
        assert rank.outcome() == []
        assert rank.used()[0].progress == checkpoint
    values = one_value([*old, *new])
    assert {attempt for attempt, _ in values} == {1, 2}
    end = max(n for _, n in values) + 1
    first = expected(spec, end, end, "old")
    second = expected(spec, checkpoint, end, "new")
    for (attempt, n), got in values.items():
        assert got == (first if attempt == 1 else second).expected(n), (attempt, n)
    with Runs(server.grpc) as runs:
        run, kinds = runs.run("restored"), [item.kind for item in runs.events("restored")]
    assert (run.forgotten, run.attempt, run.begin) == ("", 2, checkpoint)
    assert kinds.count("forgot") == 1
    assert ("is taken over from that state" in again.log()) == (checkpoint == NEWER)


def test_a_copy_that_holds_all_is_not_noticed(
    servers: Servers, ranks: Ranks, tmp_path: Path
) -> None:
    spec = make_spec("restored")
    server = servers()
    job = ranks(server.grpc, spec, 2, key="old", salt="old", pause_s=0.002)
    wait_until(lambda: all(rank.reached(COPIED_AT) for rank in job), "the job trains")
    assert server.end(signal.SIGTERM) == 0
    copy_database(tmp_path / "data", tmp_path / "copy.db")
    put_back(tmp_path / "data", tmp_path / "copy.db")
    servers(server.grpc)
    wait_until(lambda: all(rank.reached(2 * NEWER) for rank in job), "it goes on")
    ask_to_end(tmp_path, "old")
    for rank in job:
        assert rank.wait() == 0, rank.log
        assert rank.outcome() == []
    values = one_value(job)
    end = max(n for _, n in values) + 1
    whole = expected(spec, end, end, "old")
    assert {n: got for (_, n), got in values.items()} == {n: whole.expected(n) for n in range(end)}
