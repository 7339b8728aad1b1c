"""The server is killed at random moments; nothing differs, nothing is lost, nobody restarts."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import (
    Expected,
    Nursery,
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

WORLD_SIZE = 4
STEPS = 600
"""Fewest steps of a job: enough for the policy to decide again and again."""


@dataclass
class Scene:
    """Four ranks on one server after another, all on one address and one folder."""

    spec: Spec
    first: Program
    next: Nursery
    job: list[Rank]
    moments: random.Random
    salt: str
    servers: Callable[..., Program]
    folder: Path

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    def all_reached(self, progress: int) -> None:
        """Wait until every rank trains."""
        wait_until(lambda: all(rank.reached(progress) for rank in self.job), "all ranks train")

    def one_goes_on(self) -> None:
        """Wait until some rank, picked at random, uses the values of another step."""
        rank = self.moments.choice(self.job)
        size = rank.size()
        wait_until(lambda: rank.size() > size, f"rank {rank.rank} goes on")

    def finish(self) -> None:
        """Let the job come to its end on a last server, and hold it against the promise."""
        last = self.servers(self.first.grpc)
        ask_to_end(self.folder, "start")
        for rank in self.job:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        # One value for each progress, on every rank, and no gap.
        values = one_value(self.job)
        for rank in self.job:
            used = [(used.attempt, used.progress) for used in rank.used()]
            assert used == [(1, n) for n in range(len(used))]
        steps = len(self.job[0].used())
        assert steps >= STEPS
        with Runs(last.grpc) as runs:
            run, log = runs.run(self.name), runs.losses(self.name)
        assert (run.attempt, run.waivers, run.late_losses) == (1, 0, 0)
        # Every acknowledged loss is in the log, and every loss was acknowledged in the end.
        logged = {n: "none" if loss is None else loss.hex() for n, loss in log[1].items()}
        acknowledged = self.job[0].acknowledged()
        assert acknowledged.items() <= logged.items()
        assert logged == {n: loss_at(n, self.salt).hex() for n in range(steps)}
        assert acknowledged == logged
        # The values are what the losses in the log say.
        reference = Expected.of(self.spec)
        reference.open(0)
        if self.spec["policies"][0].get("mode") != "off":
            reference.feed(log[1])
            assert len(reference.decided().cuts) > 5
            assert len(values) == steps
        assert values == {(1, n): reference.expected(n) for n in range(len(values))}
        assert last.end(signal.SIGTERM) == 0

    def lost(self) -> list[Counter[str]]:
        """Return for each rank how many calls of each method found no answer."""
        lost = [Counter(method for method, _ in rank.lost()) for rank in self.job]
        print(f"calls lost: {lost}")  # noqa: T201 (shown when the test fails)
        return lost


Stage = Callable[..., Scene]


@pytest.fixture
def stage(
    servers: Callable[..., Program],
    nursery: Callable[[str], Nursery],
    ranks: Callable[..., list[Rank]],
    tmp_path: Path,
) -> Stage:
    """Start a server and a job; the arguments are fields of the spec."""

    def start(name: str, **fields: Any) -> Scene:
        seed = random.SystemRandom().randrange(2**32)
        print(f"seed {seed}")  # noqa: T201 (shown when the test fails)
        spec = make_spec(name, delay=8, **fields)
        first = servers()
        starter = nursery(first.grpc)
        job = ranks(
            first.grpc,
            spec,
            WORLD_SIZE,
            key="start",
            salt=str(seed),
            pause_s=0.002,
            end_after=STEPS,
        )
        return Scene(spec, first, starter, job, random.Random(seed), str(seed), servers, tmp_path)

    return start


def test_fifty_kills(stage: Stage) -> None:
    kills = 50
    scene = stage("killed")
    scene.all_reached(20)
    scene.first.end(signal.SIGKILL)
    for kill in range(1, kills):
        scene.next.start()
        if kill % 8 == 0:
            # While it starts: it opens the database, and reads the log.
            time.sleep(scene.moments.uniform(0.0, 0.2))
        else:
            scene.next.wait_ready()
            scene.one_goes_on()
            time.sleep(scene.moments.uniform(0.0, 0.1))
        scene.next.end(signal.SIGKILL)
    scene.finish()
    # The kills met calls under way, and some of them a report between its commit and its answer.
    lost = scene.lost()
    assert all(counter["GetValues"] >= kills // 2 for counter in lost)
    assert lost[0]["ReportLosses"] >= kills // 2
    assert scene.job[0].repeated() >= 1


def test_kills_while_the_job_starts(stage: Stage) -> None:
    """Ranks attach to the run, open the attempt and join it, each at its own time."""
    scene = stage("starting")
    wait_until(lambda: any(rank.process.poll() is None for rank in scene.job), "ranks start")
    time.sleep(scene.moments.uniform(0.2, 0.8))
    scene.first.end(signal.SIGKILL)
    for _ in range(6):
        scene.next.start()
        scene.next.wait_ready()
        time.sleep(scene.moments.uniform(0.0, 0.05))
        scene.next.end(signal.SIGKILL)
    scene.finish()


def test_kills_without_feedback(stage: Stage) -> None:
    """Nothing waits for losses; the horizon moves by the blocks that the log holds."""
    scene = stage("open-loop", policies=[{"kind": "plateau", "mode": "off"}])
    scene.all_reached(20)
    scene.first.end(signal.SIGKILL)
    for _ in range(6):
        scene.next.start()
        scene.next.wait_ready()
        scene.one_goes_on()
        time.sleep(scene.moments.uniform(0.0, 0.1))
        scene.next.end(signal.SIGKILL)
    scene.finish()


def test_graceful_restarts(stage: Stage) -> None:
    """A server that is told to end answers what is under way, and the next one takes over."""
    scene = stage("graceful")
    scene.all_reached(20)
    assert scene.first.end(signal.SIGTERM) == 0
    for _ in range(6):
        scene.next.start()
        scene.next.wait_ready()
        scene.one_goes_on()
        time.sleep(scene.moments.uniform(0.0, 0.1))
        scene.next.end(signal.SIGTERM)
    scene.finish()
