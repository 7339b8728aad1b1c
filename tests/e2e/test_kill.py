"""The server is killed at random moments; nothing differs, nothing is lost, nobody restarts."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.e2e.harness import (
    Expected,
    Nursery,
    Rank,
    Runs,
    make_spec,
    one_value,
    wait_until,
)
from tests.e2e.training import loss_at
from tests.server.conftest import Program

KILLS = 50
WORLD_SIZE = 4


def test_fifty_kills(
    servers: Callable[..., Program],
    nursery: Callable[[str], Nursery],
    ranks: Callable[..., list[Rank]],
    tmp_path: Path,
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 (shown when the test fails)
    moments = random.Random(seed)
    spec = make_spec("killed", delay=8)
    first = servers()
    address = first.grpc
    job = ranks(address, spec, WORLD_SIZE, key="start", salt=str(seed), pause_s=0.002)
    server = nursery(address)
    wait_until(lambda: all(rank.reached(20) for rank in job), "every rank trains")
    first.end(signal.SIGKILL)

    for kill in range(1, KILLS):
        server.start()
        if kill % 8 == 0:
            # While it starts: it opens the database, and reads the log.
            time.sleep(moments.uniform(0.0, 0.2))
        else:
            server.wait_ready()
            rank = moments.choice(job)
            size = rank.size()
            wait_until(lambda: rank.size() > size, f"ranks go on after kill {kill}")  # noqa: B023 (called at once)
            time.sleep(moments.uniform(0.0, 0.1))
        server.kill()

    last = servers(address)
    (tmp_path / "end-start").write_text("ask")
    for rank in job:
        assert rank.wait() == 0, rank.log
        assert rank.outcome() == []

    # One value for each progress, on every rank, and no gap.
    values = one_value(job)
    steps = len(values)
    for rank in job:
        assert [(used.attempt, used.progress) for used in rank.used()] == [
            (1, n) for n in range(steps)
        ]
    with Runs(last.grpc) as runs:
        run, log = runs.run("killed"), runs.losses("killed")
    assert (run.attempt, run.waivers, run.late_losses) == (1, 0, 0)
    # Every acknowledged loss is in the log, and every loss was acknowledged in the end.
    assert list(log) == [1]
    logged = {n: "none" if loss is None else loss.hex() for n, loss in log[1].items()}
    acknowledged = job[0].acknowledged()
    assert acknowledged.items() <= logged.items()
    assert logged == {n: loss_at(n, str(seed)).hex() for n in range(steps)}
    assert acknowledged == logged
    # The values are what the losses in the log say.
    reference = Expected.of(spec)
    reference.open(0)
    reference.feed(log[1])
    assert len(reference.decided().cuts) > 5
    assert values == {(1, n): reference.expected(n) for n in range(steps)}
    # The kills met calls under way, and some of them a report between its commit and its answer.
    lost = [Counter(method for method, _ in rank.lost()) for rank in job]
    print(f"{steps} steps, {job[0].repeated()} reports repeated, calls lost: {lost}")  # noqa: T201
    assert all(counter["GetValues"] >= KILLS // 2 for counter in lost)
    assert lost[0]["ReportLosses"] >= KILLS // 2
    assert job[0].repeated() >= 1
    assert last.end(signal.SIGTERM) == 0
