"""Jobs that know their place and their start from their environment: srun, and pods of a JobSet.

No Slurm and no Kubernetes run here: the tests set what these set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import DEADLINE_S, ROOT, Expected, Runs, make_spec, wait_until
from tests.e2e.training import loss_at
from tests.server.conftest import Program

Servers = Callable[..., Program]
Start = Callable[..., "list[subprocess.Popen[bytes]]"]

STEPS, SAVE_AT, RANKS = 60, 16, 3


def slurm(rank: int, start: int) -> dict[str, str]:
    """What srun sets in each task; a requeued job begins again with step 0."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": str(start),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(RANKS),
    }


def kubernetes(rank: int, start: int) -> dict[str, str]:
    """What a pod of a JobSet has, its labels by way of the downward API."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "JOBSET_UID": "8c5d7a2e",
        "RESTART_ATTEMPT": str(start),
    }


KEYS: dict[Callable[[int, int], dict[str, str]], str] = {
    slurm: "{SLURM_JOB_ID}.{SLURM_STEP_ID}.{SLURM_RESTART_COUNT}",
    kubernetes: "{JOBSET_UID}.{RESTART_ATTEMPT}",
}
"""Keys as docs/elastic.md gives them."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the ranks of a job."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        plan: Mapping[str, Any], environment: Callable[[int, int], dict[str, str]], number: int
    ) -> list[subprocess.Popen[bytes]]:
        for rank in range(RANKS):
            with (tmp_path / f"rank{rank}-{number}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.e2e.launcher_program", json.dumps(plan)],
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**os.environ, **environment(rank, number)},
                    )
                )
        return started[-RANKS:]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(DEADLINE_S)


def used_in(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("used-*"):
        lines = path.read_text().splitlines(keepends=True)
        found += [json.loads(line) for line in lines if line.endswith("\n")]
    return found


@pytest.mark.parametrize("launcher", [slurm, kubernetes])
def test_a_requeued_job_goes_on_and_what_is_left_of_it_is_refused(
    tmp_path: Path,
    servers: Servers,
    start: Start,
    launcher: Callable[[int, int], dict[str, str]],
) -> None:
    server = servers()
    spec = make_spec("requeued", delay=4)
    plan = {
        "address": server.grpc,
        "spec": spec,
        "folder": str(tmp_path),
        "key": KEYS[launcher],
        "steps": STEPS,
        "save_at": SAVE_AT,
        "resumes": False,
    }
    first = start(plan | {"steps": 1_000_000}, launcher, 0)
    wait_until(
        lambda: len({item["rank"] for item in used_in(tmp_path) if item["progress"] >= 24}) == 3,
        "all ranks at 24",
    )
    # Two die with their node; the third hangs on a node that nobody hears from.
    zombie = first[2]
    zombie.send_signal(signal.SIGSTOP)
    for process in first[:2]:
        process.kill()
        process.wait(DEADLINE_S)
    second = start(plan | {"resumes": True}, launcher, 1)
    for rank, process in enumerate(second):
        log = (tmp_path / f"rank{rank}-1.log").read_text
        assert process.wait(DEADLINE_S) == 0, log()
    zombie.send_signal(signal.SIGCONT)
    assert zombie.wait(DEADLINE_S) == 1
    assert (tmp_path / f"ended-{zombie.pid}").read_text() == "AttemptSuperseded"

    expected = Expected.of(spec)
    expected.open(0)
    expected.feed({n: loss_at(n) for n in range(STEPS + 100)})
    used = used_in(tmp_path)
    for item in used:
        assert tuple(item["values"]) == expected.expected(item["progress"]), item
    ranks = {(item["attempt"], item["rank"]) for item in used}
    assert ranks == {(attempt, rank) for attempt in (1, 2) for rank in range(RANKS)}
    with Runs(server.grpc) as runs:
        opened = [event.attempt for event in runs.events("requeued") if event.kind == "opened"]
    assert opened == [1, 2]


def test_a_rank_whose_key_is_of_the_start_before_is_refused(
    tmp_path: Path, servers: Servers, start: Start
) -> None:
    """A job id alone is no key: the requeued job would join what is over."""
    plan = {
        "address": servers().grpc,
        "spec": make_spec("requeued", delay=4),
        "folder": str(tmp_path),
        "key": "{SLURM_JOB_ID}",
        "steps": STEPS,
        "save_at": SAVE_AT,
        "resumes": False,
    }
    for process in start(plan, slurm, 0):
        assert process.wait(DEADLINE_S) == 0
    for process in start(plan | {"resumes": True}, slurm, 1):
        assert process.wait(DEADLINE_S) == 1
    logs = [(tmp_path / f"rank{rank}-1.log").read_text() for rank in range(RANKS)]
    assert all("JoinRefused" in log for log in logs)
