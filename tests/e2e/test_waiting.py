"""Who waits, for what, and how each wait ends: by a report, a waiver, the server's return, or an
error that says what was missing."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.client._values import steps_ahead
from tests.e2e.harness import Expected, Runs, make_spec, wait_until
from tests.e2e.training import Optimizer, loss_at
from tests.rules.reference import Hex
from tests.server.conftest import Program
from tests.side_by_side import finish, in_thread

Connect = Callable[..., lrpilot.Pilot]

DELAY = 8


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks speak up at once, and find a server that is back soon.
    monkeypatch.setattr(_timing, "BLOCKED_WAIT_S", 0.1)
    monkeypatch.setattr(_timing, "BACKOFF_CAP_S", 0.1)


class Trainer:
    """One rank in this process."""

    def __init__(self, pilot: lrpilot.Pilot) -> None:
        self.pilot = pilot
        self.optimizer = Optimizer()
        self.scheduler = pilot.scheduler(self.optimizer)
        self.used: dict[int, Hex] = {0: self.optimizer.values}

    @property
    def ahead(self) -> int:
        """How many steps beyond this one it has the values of."""
        lease: Any = self.pilot._session._lease
        return steps_ahead(lease._known, self.scheduler.progress, 1)

    def step(self, increment: int = 1, *, reports: bool = True) -> None:
        """Use the values of this step and go on to the next."""
        here = self.scheduler.progress
        self.scheduler.step(increment, loss=loss_at(here) if reports else None)
        self.used[self.scheduler.progress] = self.optimizer.values

    def until(self, end: int, increment: int = 1) -> None:
        """Train to a progress."""
        while self.scheduler.progress < end:
            self.step(increment)


def job(
    connect: Connect, address: str, name: str, size: int, **fields: object
) -> tuple[Expected, list[Trainer]]:
    """Start ranks that share a key, and their reference."""
    spec = make_spec(name, **{"delay": DELAY, **fields})  # type: ignore[arg-type]
    options = {"spec": spec, "key": "start", "world_size": size}
    trainers = [Trainer(connect(address, name, rank=rank, **options)) for rank in range(size)]
    reference = Expected.of(spec)
    reference.open(0)
    return reference, trainers


class TestNoneWaitsInVain:
    """A stall would end in a waiver, and there is none."""

    @pytest.mark.parametrize("every", [1, 10])
    @pytest.mark.parametrize(("delay", "increment"), [(1, 1), (8, 1), (1, 13), (8, 13), (8, 40)])
    def test_sparse_reports_and_large_increments(
        self, shared: Program, connect: Connect, every: int, delay: int, increment: int
    ) -> None:
        name = f"sparse-{every}-{delay}-{increment}"
        unit = "iterations" if increment == 1 else "samples"
        reference, trainers = job(connect, shared.grpc, name, 2, delay=delay, unit=unit)
        steps = [increment * n for n in range(60)]
        for n, _ in enumerate(steps):
            for trainer in trainers:
                trainer.step(increment, reports=n % every == every - 1)
        reference.feed(
            {at: loss_at(at) if n % every == every - 1 else None for n, at in enumerate(steps)}
        )
        assert trainers[0].used == trainers[1].used
        assert len(trainers[0].used) == 61
        for at in steps:
            assert trainers[0].used[at] == reference.expected(at)
        with Runs(shared.grpc) as runs:
            run = runs.run(name)
        assert (run.waivers, run.late_losses) == (0, 0)

    @pytest.mark.parametrize("pausing", [0, 1])
    def test_a_pause(self, shared: Program, connect: Connect, pausing: int) -> None:
        """One rank evaluates for longer than `feedback.timeout` while the other uses its lease."""
        name = f"pause-{pausing}"
        feedback = {"delay": DELAY, "timeout": "1s"}
        _, trainers = job(connect, shared.grpc, name, 2, feedback=feedback)
        for trainer in trainers:
            trainer.until(20)
        for _ in range(DELAY - 1):
            trainers[1 - pausing].step()
        time.sleep(1.5)
        for trainer in trainers:
            trainer.until(40)
        assert trainers[0].used == trainers[1].used
        with Runs(shared.grpc) as runs:
            run = runs.run(name)
        assert (run.waivers, run.late_losses) == (0, 0)


class TestReporterGone:
    def test_the_others_get_on(
        self, shared: Program, connect: Connect, caplog: pytest.LogCaptureFixture
    ) -> None:
        """By waivers, after they said what they wait for; what it reported late acts no more."""
        feedback = {"delay": DELAY, "timeout": "1s"}
        reference, (reporter, other) = job(connect, shared.grpc, "gone", 2, feedback=feedback)
        reporter.until(20)
        other.until(44)
        # It knows as much as the log: losses below 20, and none from there on.
        reference.feed({n: loss_at(n) for n in range(20)})
        reference.waive(44)
        for n, values in other.used.items():
            assert values == reference.expected(n)
        said = re.compile(
            r"run gone: rank 1 has waited \d+ s for the values at progress 28 "
            rf"\(frontier 20, horizon 28, server {shared.grpc}\): no loss is final from "
            "progress 20 on, and rank 0 is the one to report"
        )
        assert any(said.fullmatch(text) for text in caplog.messages), caplog.messages
        with Runs(shared.grpc) as runs:
            run = runs.run("gone")
            assert (run.waivers, run.frontier) == (3, 44)

            # It was only slow: its losses are recorded, and seen by no policy.
            caplog.clear()
            reporter.until(44)
            reporter.pilot.close()
            assert "losses came after their step was final without one" in caplog.text
            run = runs.run("gone")
        assert (run.waivers, run.frontier, run.late_losses) == (3, 44, 24)
        assert reporter.used == other.used


class TestServerAway:
    @pytest.mark.parametrize("delay", [1, 8, 40])
    def test_longer_than_the_lease(
        self,
        servers: Callable[..., Program],
        connect: Connect,
        caplog: pytest.LogCaptureFixture,
        delay: int,
    ) -> None:
        """Ranks use their lease, wait, say so, and go on; nothing is lost."""
        server = servers()
        reference, trainers = job(connect, server.grpc, "away", 2, delay=delay)
        for n in range(1, 21):
            for trainer in trainers:
                trainer.until(n)
        # A rank asks again at a random point of the first quarter of the delay, save its first
        # step: it may stand still shortly before. A small delay is whole.
        least = delay - 1 - max(delay // 4 - 2, 0)
        for trainer in trainers:
            wait_until(lambda: trainer.ahead >= least, "the lease is full")  # noqa: B023 (called at once)
        server.end(signal.SIGKILL)
        missing = []
        for trainer in trainers:
            for _ in range(trainer.ahead):
                trainer.step()
            missing.append(trainer.scheduler.progress + 1)
        assert all(20 + least < at <= 20 + delay for at in missing)
        waiting = [in_thread(trainer.step) for trainer in trainers]
        said = [
            re.compile(
                rf"run away: rank {rank} has waited \d+ s for the values at progress {at} "
                rf"\(frontier \d+, horizon \d+, server {server.grpc}\): "
                r"the server has not answered for \d+ s"
            )
            for rank, at in enumerate(missing)
        ]
        wait_until(
            lambda: all(any(line.match(text) for text in caplog.messages) for line in said),
            "both ranks say what they wait for",
        )
        assert [got for _, got in waiting] == [[], []]

        server = servers(server.grpc)
        for thread, got in waiting:
            finish(thread)
            assert got == [None]
        for n in range(min(missing), 91):
            for trainer in trainers:
                trainer.until(n)
        for trainer in trainers:
            trainer.pilot.close()
        reference.feed({n: loss_at(n) for n in range(90)})
        assert trainers[0].used == trainers[1].used
        assert all(trainers[0].used[n] == reference.expected(n) for n in range(91))
        with Runs(server.grpc) as runs:
            run, log = runs.run("away"), runs.losses("away")
        assert (run.attempt, run.waivers, run.late_losses) == (1, 0, 0)
        assert {n: str(loss) for n, loss in log[1].items()} == {
            n: str(loss_at(n)) for n in range(90)
        }

    def test_longer_than_the_outage_timeout(
        self, servers: Callable[..., Program], connect: Connect
    ) -> None:
        """The error says all there is to know, and the training may still try again."""
        server = servers()
        spec = make_spec("dead", delay=DELAY)
        trainer = Trainer(connect(server.grpc, "dead", spec=spec, outage_timeout_s=0.4))
        trainer.until(10)
        wait_until(lambda: trainer.ahead == 7, "the lease is full")
        server.end(signal.SIGKILL)
        trainer.until(17)
        with pytest.raises(lrpilot.ServerUnavailable) as caught:
            trainer.step()
        text = str(caught.value)
        assert "run 'dead': rank 0 waits for the values at progress 18" in text
        assert "frontier 10, horizon 18" in text
        assert f"server at {server.grpc} did not answer for" in text
        assert (
            caught.value.facts.items()
            >= {
                "run": "dead",
                "address": server.grpc,
                "progress": "18",
                "frontier": "10",
                "horizon": "18",
            }.items()
        )
        assert trainer.scheduler.progress == 18

        server = servers(server.grpc)
        wait_until(lambda: self.applied(trainer), "the server is back")
        trainer.used[18] = trainer.optimizer.values
        trainer.until(40)
        trainer.pilot.close()
        reference = Expected.of(spec)
        reference.open(0)
        reference.feed({n: loss_at(n) for n in range(40)})
        assert all(trainer.used[n] == reference.expected(n) for n in range(41))

    def applied(self, trainer: Trainer) -> bool:
        try:
            trainer.scheduler.apply()
        except lrpilot.ServerUnavailable:
            return False
        return True
