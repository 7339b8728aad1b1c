"""Trainers are killed and start again from a checkpoint; who is left of them is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
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
from tests.e2e.training import Optimizer, loss_at
from tests.server.conftest import Program

Connect = Callable[..., lrpilot.Pilot]

DELAY = 8
SAVED_AT = 40
KILLED_AT = 90


def train(
    scheduler: lrpilot.Scheduler, optimizer: Optimizer, end: int, salt: str
) -> dict[int, tuple[str, ...]]:
    """Train to a progress; return what was used at each before it."""
    used = {}
    while scheduler.progress < end:
        used[scheduler.progress] = optimizer.values
        scheduler.step(loss=loss_at(scheduler.progress, salt))
    return used


def losses(begin: int, end: int, salt: str) -> dict[int, float | None]:
    return {n: loss_at(n, salt) for n in range(begin, end)}


class TestKilledTrainers:
    """In processes of their own; rank 0 reports, and rank 1 waits once it is gone."""

    @pytest.fixture
    def killed(
        self, servers: Callable[..., Program], ranks: Callable[..., list[Rank]], tmp_path: Path
    ) -> tuple[Program, Spec, list[Rank]]:
        """A job of two ranks past its checkpoint, of which one was killed."""
        spec = make_spec("resumed", delay=DELAY)
        server = servers()
        old = ranks(server.grpc, spec, 2, key="old", salt="old", save_at=SAVED_AT, pause_s=0.002)
        wait_until(lambda: all(rank.reached(KILLED_AT) for rank in old), "the job trains")
        assert (tmp_path / "state.json").exists()
        return server, spec, old

    def resume(
        self,
        server: Program,
        spec: Spec,
        ranks: Callable[..., list[Rank]],
        tmp_path: Path,
    ) -> list[Rank]:
        """Start the job again from its checkpoint, and let it go further than the first did."""
        state = str(tmp_path / "state.json")
        new = ranks(server.grpc, spec, 2, key="new", salt="new", state=state)
        wait_until(lambda: all(rank.reached(2 * KILLED_AT) for rank in new), "it goes on")
        return new

    def refused(self, rank: Rank, name: str = "AttemptSuperseded") -> None:
        """A survivor ends by the error, which it also gets for whatever else it tries."""
        assert rank.wait() == 1
        assert rank.outcome() == [name] * 4
        assert f"lrpilot.client._errors.{name}: " in rank.log
        assert {used.attempt for used in rank.used()} == {1}

    def finish(
        self,
        server: Program,
        spec: Spec,
        old: list[Rank],
        new: list[Rank],
        tmp_path: Path,
    ) -> list[Any]:
        """Check what the start of the job that went on has used; return the log."""
        ask_to_end(tmp_path, "new")
        for rank in new:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        values = one_value([*old, *new])
        end = max(progress for _, progress in values) + 1
        for rank in new:
            assert [(used.attempt, used.progress) for used in rank.used()] == [
                (2, n) for n in range(SAVED_AT, end)
            ]
        # Below the horizon of the resume point the values repeat, bit for bit.
        for n in range(SAVED_AT, SAVED_AT + DELAY):
            assert values[2, n] == values[1, n]
        # Further on nothing is left of the losses that the first start saw from there on.
        first = Expected.of(spec)
        first.open(0)
        first.feed(losses(0, max(n for a, n in values if a == 1), "old"))
        second = Expected.of(spec)
        second.open(0)
        second.feed(losses(0, SAVED_AT, "old") | losses(SAVED_AT, end, "new"))
        for (attempt, n), got in values.items():
            assert got == (first if attempt == 1 else second).expected(n), (attempt, n)
        assert any(values[2, n] != values.get((1, n)) for n in range(SAVED_AT, KILLED_AT))
        with Runs(server.grpc) as runs:
            run, log = runs.run("resumed"), list(runs.events("resumed"))
        assert (run.attempt, run.begin, run.waivers, run.late_losses) == (2, SAVED_AT, 0, 0)
        return log

    @pytest.mark.parametrize("survivor", ["waits", "reports"])
    def test_the_run_goes_back(
        self,
        killed: tuple[Program, Spec, list[Rank]],
        ranks: Callable[..., list[Rank]],
        tmp_path: Path,
        survivor: str,
    ) -> None:
        server, spec, old = killed
        if survivor == "waits":
            old[0].send(signal.SIGKILL)
        else:
            # The reporter hangs, is given up by its launcher, and comes back.
            old[1].send(signal.SIGKILL)
            old[0].send(signal.SIGSTOP)
        new = self.resume(server, spec, ranks, tmp_path)
        old[0].send(signal.SIGCONT)
        self.refused(old[1 if survivor == "waits" else 0])
        log = self.finish(server, spec, old, new, tmp_path)
        assert [event.kind for event in log].count("opened") == 2
        assert not any("the server restored the run" in rank.log for rank in new)

    @pytest.mark.parametrize("survivor", ["waits", "hangs"])
    def test_the_data_folder_is_lost(
        self,
        killed: tuple[Program, Spec, list[Rank]],
        servers: Callable[..., Program],
        ranks: Callable[..., list[Rank]],
        tmp_path: Path,
        survivor: str,
    ) -> None:
        server, spec, old = killed
        if survivor == "waits":
            old[0].send(signal.SIGKILL)
        else:
            old[1].send(signal.SIGKILL)
            old[0].send(signal.SIGSTOP)
        server.end(signal.SIGKILL)
        shutil.rmtree(tmp_path / "data")
        server = servers(server.grpc)
        if survivor == "waits":
            # It finds the server before the job is started again.
            self.refused(old[1], "RunNotFound")
        new = self.resume(server, spec, ranks, tmp_path)
        if survivor == "hangs":
            old[0].send(signal.SIGCONT)
            self.refused(old[0])
        log = self.finish(server, spec, old, new, tmp_path)
        assert [event.kind for event in log].count("opened") == 1
        # What came before the checkpoint is in its state alone.
        assert min(item.progress for event in log for item in event.losses) == SAVED_AT
        assert any("the server restored the run from the state" in rank.log for rank in new)


class TestResumePoint:
    """In this process: with which state a run may go on."""

    def start(
        self, pilot: lrpilot.Pilot, state: dict[str, Any] | None = None
    ) -> tuple[lrpilot.Scheduler, Optimizer]:
        optimizer = Optimizer()
        return pilot.scheduler(optimizer, state), optimizer

    def test_a_run_that_has_losses_needs_one(self, shared: Program, connect: Connect) -> None:
        spec = make_spec("needs-one", delay=DELAY)
        scheduler, optimizer = self.start(first := connect(shared.grpc, "needs-one", spec=spec))
        used = train(scheduler, optimizer, 30, "old")
        first.close()
        with pytest.raises(lrpilot.ResumePointRequired, match="resume_at"):
            self.start(connect(shared.grpc, "needs-one", spec=spec))

        # With resume_at the same as with a state.
        second = connect(shared.grpc, "needs-one", spec=spec, resume_at=12)
        scheduler, optimizer = self.start(second)
        assert (scheduler.progress, second.attempt) == (12, 2)
        again = train(scheduler, optimizer, 40, "new")
        assert {n: again[n] for n in range(12, 20)} == {n: used[n] for n in range(12, 20)}
        reference = Expected.of(spec)
        reference.open(0)
        reference.feed(losses(0, 12, "old") | losses(12, 40, "new"))
        assert again == {n: reference.expected(n) for n in range(12, 40)}

    def test_the_state_of_another_run(self, shared: Program, connect: Connect) -> None:
        scheduler, optimizer = self.start(connect(shared.grpc, "other", spec=make_spec("other")))
        train(scheduler, optimizer, 5, "")
        state = scheduler.state_dict()
        mine = connect(shared.grpc, "mine", spec=make_spec("mine"))
        with pytest.raises(lrpilot.InvalidState, match="'other', not to run 'mine'"):
            self.start(mine, state)
        # Also where only the part of the server is another run's.
        with pytest.raises(lrpilot.InvalidState, match="'other', not to run 'mine'"):
            self.start(mine, state | {"run": "mine"})
        assert self.start(mine)[0].progress == 0

    def test_the_state_of_another_log(
        self, servers: Callable[..., Program], connect: Connect, tmp_path: Path
    ) -> None:
        """Two servers have run the same spec; the losses differ."""
        spec = make_spec("twice", delay=DELAY)
        states = []
        for salt in ("one", "two"):
            server = servers()
            pilot = connect(server.grpc, "twice", spec=spec)
            scheduler, optimizer = self.start(pilot)
            train(scheduler, optimizer, 20, salt)
            states.append(scheduler.state_dict())
            train(scheduler, optimizer, 25, salt)
            pilot.close()
            if salt == "one":
                server.end(signal.SIGKILL)
                shutil.rmtree(tmp_path / "data")
        with pytest.raises(lrpilot.StateMismatch) as caught:
            self.start(connect(server.grpc, "twice", spec=spec), states[0])
        digests = {caught.value.facts[name] for name in ("saved_digest", "log_digest")}
        assert len(digests) == 2
        for digest in digests:
            assert digest in str(caught.value)
        scheduler, _ = self.start(connect(server.grpc, "twice", spec=spec), states[1])
        assert scheduler.progress == 20

    @pytest.mark.parametrize("lost", [False, True])
    def test_a_state_taken_while_the_server_was_away(
        self,
        servers: Callable[..., Program],
        connect: Connect,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
        lost: bool,
    ) -> None:
        """It holds the progress: enough for a server that has the log."""
        monkeypatch.setattr(_timing, "SAVE_PATIENCE_S", 0.3)
        spec = make_spec("away", delay=DELAY)
        server = servers()
        pilot = connect(server.grpc, "away", spec=spec)
        scheduler, optimizer = self.start(pilot)
        used = train(scheduler, optimizer, 20, "old")
        scheduler.state_dict()
        server.end(signal.SIGKILL)
        scheduler.step(loss=loss_at(20, "old"))
        state = scheduler.state_dict()
        assert (state["progress"], state["state"]) == (21, "")
        assert "saved WITHOUT the server's part" in caplog.text
        if lost:
            pilot._end(0.0)
            shutil.rmtree(tmp_path / "data")
        server = servers(server.grpc)
        pilot.close()

        state = json.loads(json.dumps(state))
        new, optimizer = self.start(connect(server.grpc, "away", spec=spec), state)
        assert new.progress == 21
        used |= train(new, optimizer, 50, "new")
        reference = Expected.of(spec)
        reference.open(0)
        if lost:
            # The server takes it for a run that begins there: the losses before are forgotten.
            reference.open(21)
            reference.feed(losses(21, 50, "new"))
            assert all(used[n] == reference.expected(n) for n in range(21, 50))
        else:
            reference.feed(losses(0, 21, "old") | losses(21, 50, "new"))
            assert all(used[n] == reference.expected(n) for n in used)
