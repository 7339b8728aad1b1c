"""Leader mode over real process groups: the server is killed, stopped or cut off, and the training
goes on with values that are the same on every rank, and that the log holds in the end."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import lrpilot.client as lrpilot
from lrpilot import core
from lrpilot.v1 import runs_pb2 as pb
from tests.e2e.harness import (
    LEADER_TIMING,
    Expected,
    Rank,
    Runs,
    Spec,
    Used,
    ask_to_end,
    make_spec,
    one_value,
    wait_until,
)
from tests.e2e.relay import Relay
from tests.e2e.training import loss_at
from tests.rules.reference import Hex
from tests.server.conftest import Program

OFF: dict[str, Any] = {"policies": [{"kind": "plateau", "mode": "off"}]}


@dataclass
class Job:
    """Ranks in leader mode, and the server that they train on."""

    spec: Spec
    server: Program
    relay: Relay
    ranks: list[Rank]
    folder: Path
    key: str

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def where(self) -> tuple[int, bool, int]:
        """Return where rank 0 is, whether it goes on alone, and how far it could."""
        progress, is_alone, reach = self.ranks[0].last("where") or (0, False, 0)
        return progress, is_alone, reach

    def reach(self, progress: int) -> None:
        """Wait until every rank is there."""
        wait_until(lambda: all(rank.reached(progress) for rank in self.ranks), f"at {progress}")

    def go_on(self, steps: int) -> None:
        """Wait until every rank has made that many steps more."""
        self.reach(self.where()[0] + steps)

    def start(self) -> None:
        """Wait until the job trains, and could go on alone for long."""
        self.reach(30)
        wait_until(lambda: self.where()[2] > self.where()[0] + 5000, "values are offered")

    def alone(self) -> int:
        """Wait until rank 0 goes on alone; return where it is."""
        wait_until(lambda: self.where()[1], "it goes on alone")
        return self.where()[0]

    def together(self) -> int:
        """Wait until the server fixes values again; return where rank 0 is."""
        wait_until(lambda: not self.where()[1], "the server is back")
        return self.where()[0]

    def finish(self) -> None:
        """Let the job come to its end."""
        ask_to_end(self.folder, self.key)
        for rank in self.ranks:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        steps = [[item.progress for item in rank.used()] for rank in self.ranks]
        assert steps == [steps[0]] * len(self.ranks)

    def payloads(self) -> list[bytes]:
        """Return the log of the run, whose server still runs."""
        path = (self.folder / "data" / "lrpilot.db").as_uri()
        with closing(sqlite3.connect(f"{path}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT payload FROM events JOIN runs ON runs.id = run_id WHERE name = ? "
                "ORDER BY seq",
                (self.name,),
            ).fetchall()
        return [payload for (payload,) in rows]

    def check(self) -> core.RunState:
        """Hold what was used against the log, and against the promise; return the state."""
        one_value(self.ranks)
        return check_log(self.name, self.spec, self.payloads(), self.ranks[0].used())


def hex_values(values: tuple[tuple[float, ...], tuple[float, ...] | None]) -> Hex:
    rates, decays = values
    return tuple(number.hex() for number in (*rates, *(decays or ())))


def check_log(name: str, spec: Spec, payloads: list[bytes], used: list[Used]) -> core.RunState:
    """Check that the log holds what was used, and that the rest follows from its losses."""
    state = core.fold(name, payloads)
    ours = [item for item in used if item.attempt == state.attempt]
    assert ours
    for item in ours:
        recorded = state.records.at(item.progress)
        assert recorded is not None
        assert hex_values(recorded) == item.values
    if state.attempt == 1 and not any(item.kind == "operator" for item in state.plan.adjustments):
        reference = Expected.of(spec)
        reference.open(0)
        absent = {at for at, _ in state.late}
        losses = {
            at: None if at in absent else loss_at(at)
            for at in (item.progress for item in ours[:-1])
        }
        if state.spec.has_feedback:
            reference.feed(losses)
        for item in ours:
            if not any(item.progress in range(part.begin, part.end) for part in state.declared):
                assert reference.expected(item.progress) == item.values
    return state


Start = Callable[..., Job]


@pytest.fixture
def start(
    servers: Callable[..., Program], ranks: Callable[..., list[Rank]], tmp_path: Path
) -> Iterator[Start]:
    """Start a server, a relay, and a job; further options are those of its program."""
    relays: list[Relay] = []

    def begin(
        spec: Spec,
        world_size: int = 2,
        *,
        key: str = "start",
        reporter: int = 0,
        patience_s: float = 1.0,
        **options: Any,
    ) -> Job:
        server = servers()
        relays.append(Relay(server.grpc))
        job = ranks(
            server.grpc,
            spec,
            world_size,
            key=key,
            program="leader_program",
            leader_address=relays[-1].address,
            rendezvous=(tmp_path / f"rendezvous-{key}").as_uri(),
            reporter=reporter,
            timing={**LEADER_TIMING, "LEADER_PATIENCE_S": patience_s},
            pause_s=0.01,
            **options,
        )
        return Job(spec, server, relays[-1], job, tmp_path, key)

    yield begin
    for relay in relays:
        relay.close()


@pytest.mark.parametrize(
    ("delay", "world_size", "reporter", "feedback"),
    [(8, 3, 0, True), (1, 2, 0, True), (8, 2, 1, True), (8, 2, 0, False)],
)
def test_the_server_is_killed(
    start: Start,
    servers: Callable[..., Program],
    delay: int,
    world_size: int,
    reporter: int,
    feedback: bool,
) -> None:
    """The job makes many more steps than its lease holds, and the log has them in the end."""
    spec = make_spec("killed", delay=delay, **({} if feedback else OFF))
    job = start(spec, world_size, reporter=reporter)
    job.start()
    job.server.end(signal.SIGKILL)
    job.alone()
    job.go_on(100)
    assert job.where()[1]
    back = servers(job.server.grpc)
    job.together()
    job.go_on(50)
    job.finish()
    state = job.check()
    assert state.declared
    assert sum(item.steps for item in state.declared) >= 100
    assert state.attempt == 1
    if feedback:
        assert state.waivers >= 1
        # Whoever reports, no loss is lost: it is seen, or it came too late to be.
        with Runs(back.grpc) as runs:
            logged = [item.progress for event in runs.events("killed") for item in event.losses]
        assert sorted(set(logged)) == list(range(len(job.ranks[0].used())))
    # Every rank hears of the same changes, at the same steps.
    heard = [rank.lines("changes") for rank in job.ranks]
    assert heard == [heard[0]] * world_size


def test_the_server_is_stopped(start: Start) -> None:
    """It holds its connections, and answers nothing."""
    job = start(make_spec("stopped", delay=8))
    job.start()
    job.server.process.send_signal(signal.SIGSTOP)
    job.alone()
    job.go_on(100)
    job.server.process.send_signal(signal.SIGCONT)
    job.together()
    job.go_on(50)
    job.finish()
    assert job.check().declared


def halve(job: Job) -> Any:
    """Halve the LR as an operator does; return the answer."""
    with Runs(job.server.grpc) as runs:
        return runs.change(
            pb.AdjustRunRequest(
                run=job.name, scale_lr=0.5, reason="test", author="test", request_id="halve"
            )
        )


def check_halved(job: Job, state: core.RunState) -> int:
    """Check where the LR is halved; return that progress."""
    (change,) = (item for item in state.plan.adjustments if item.kind == "operator")
    base = Expected.of(job.spec)
    base.open(0)
    for item in job.ranks[0].used():
        rate, decay = (float.fromhex(number) for number in base.expected(item.progress))
        halved = 0.5 * rate if item.progress >= change.effective else rate
        assert item.values == (halved.hex(), decay.hex())
    return change.effective


def test_a_change_made_while_the_leader_is_cut_off_shows_after_the_declared_end(
    start: Start,
) -> None:
    job = start(make_spec("changed", delay=8, **OFF))
    job.start()
    job.relay.cut()
    first = job.alone()
    answer = halve(job)
    assert answer.pending
    job.go_on(100)
    job.relay.restore()
    job.together()
    job.go_on(50)
    job.finish()
    state = job.check()
    effective = check_halved(job, state)
    assert effective == state.declared[-1].end
    assert effective > first + 100 > answer.adjustment.effective
    # It is told where it shows, on every rank.
    for rank in job.ranks:
        assert [progress for _, progress in rank.lines("changes")] == [effective]


def test_values_that_the_server_fixed_and_nobody_got_are_undone(start: Start) -> None:
    """Answers are lost, of values and of declarations, and an operator's change lies between."""
    job = start(make_spec("mute", delay=8, **OFF), patience_s=6.0)
    job.start()
    # While rank 0 stands still the change lands right behind what it has got; what it asks for
    # then is fixed with it, and never gets there.
    job.ranks[0].send(signal.SIGSTOP)
    time.sleep(1.0)
    halve(job)
    job.relay.mute()
    job.ranks[0].send(signal.SIGCONT)
    job.alone()
    job.go_on(100)
    job.relay.restore()
    job.together()
    job.go_on(50)
    job.finish()
    state = job.check()
    effective = check_halved(job, state)
    used = {item.progress: item.values for item in job.ranks[0].used()}
    undone = [
        progress
        for payload in job.payloads()
        if isinstance(event := core.decode(payload), core.Recorded)
        for progress, rate in zip(
            count(event.begin, event.stride), event.learning_rates, strict=False
        )
        if progress in used and used[progress][0] != rate.hex()
    ]
    assert undone
    assert max(undone) < effective


def test_a_superseded_leader_ends_every_rank(
    start: Start, connect: Callable[..., lrpilot.Pilot]
) -> None:
    job = start(make_spec("taken", delay=8), 3)
    job.start()
    job.relay.cut()
    job.alone()
    job.go_on(50)
    connect(job.server.grpc, "taken", resume_at=20).values(20)
    job.relay.restore()
    for rank in job.ranks:
        assert rank.wait() != 0
        assert set(rank.outcome()) == {"AttemptSuperseded"}
    one_value(job.ranks)
    state = core.fold("taken", job.payloads())
    assert (state.attempt, state.begin, state.declared) == (2, 20, [])


def test_a_job_resumes_from_a_state_saved_after_an_outage(
    start: Start, ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    job = start(make_spec("resumed", delay=8))
    job.start()
    job.relay.cut()
    job.alone()
    job.go_on(100)
    job.relay.restore()
    job.together()
    (tmp_path / "save-start").touch()
    wait_until((tmp_path / "state.json").exists, "the state is saved")
    job.go_on(50)
    job.finish()
    before = job.check()
    again = ranks(
        job.server.grpc,
        job.spec,
        2,
        key="again",
        program="leader_program",
        leader_address=job.relay.address,
        rendezvous=(tmp_path / "rendezvous-again").as_uri(),
        reporter=0,
        timing=LEADER_TIMING,
        pause_s=0.01,
        state=str(tmp_path / "state.json"),
    )
    resumed = Job(job.spec, job.server, job.relay, again, tmp_path, "again")
    wait_until(lambda: resumed.where()[2] > 5000, "values are offered")
    resumed.relay.cut()
    resumed.alone()
    resumed.go_on(50)
    resumed.relay.restore()
    resumed.together()
    resumed.go_on(20)
    resumed.finish()
    state = resumed.check()
    assert (state.attempt, before.attempt) == (2, 1)
    # What was fixed, or used alone, below the horizon of the state comes again bit for bit.
    first = {item.progress: item.values for item in job.ranks[0].used()}
    begin = resumed.ranks[0].used()[0].progress
    for item in resumed.ranks[0].used()[:8]:
        assert first[item.progress] == item.values
    assert begin > before.declared[-1].end - 8


def test_steps_of_several_samples(start: Start) -> None:
    job = start(make_spec("samples", delay=100, unit="samples"), increment=13)
    job.reach(30 * 13)
    wait_until(lambda: job.where()[2] > job.where()[0] + 5000, "values are offered")
    job.relay.cut()
    job.alone()
    job.go_on(100 * 13)
    job.relay.restore()
    job.together()
    job.go_on(50 * 13)
    job.finish()
    one_value(job.ranks)
    state = core.fold("samples", job.payloads())
    for item in job.ranks[0].used():
        recorded = state.records.at(item.progress)
        assert recorded is not None
        assert hex_values(recorded) == item.values
    assert sum(part.steps for part in state.declared) >= 100
