"""Real torchrun: workers die, nodes leave and come back, and no value differs.

`Expected` says what the losses lead to, whatever the attempts were.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import DEADLINE_S, ROOT, Expected, Runs, make_spec, wait_until
from tests.e2e.training import loss_at
from tests.server.conftest import Program

Servers = Callable[..., Program]

JOB_S = 180.0
"""Longest time for a job to come to its end."""


class Job:
    """The agents of torchrun on some nodes, all of this machine, and what their workers wrote."""

    def __init__(self, folder: Path, address: str, *, steps: int, workers: int, most: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.spec = make_spec("elastic", delay=4)
        self.steps = steps
        self._workers = workers
        self._plan = json.dumps(
            {
                "address": address,
                "spec": self.spec,
                "folder": str(folder),
                "steps": steps,
                "save_every": 8,
                "most": most,
                "collective_s": 6,
            }
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._agents: list[subprocess.Popen[bytes]] = []

    def start_node(self, nodes: str) -> subprocess.Popen[bytes]:
        """Start one agent with its workers; `nodes` is torchrun's least:most."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nnodes={nodes}", f"--nproc-per-node={self._workers}", "--max-restarts=5"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._port}"]
        command += ["--rdzv-conf=last_call_timeout=1,keep_alive_interval=1", "--monitor-interval=1"]
        command += ["-m", "tests.e2e.elastic_program", self._plan]
        # By default torchrun lends its own store to the workers, where gloo finds the addresses
        # of the start before.
        own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own_store}
        with (self.folder / f"node{len(self._agents)}.log").open("w") as log:
            self._agents.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            )
        return self._agents[-1]

    def is_met(self) -> bool:
        """Return whether a node listens for the others."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def used(self) -> list[dict[str, Any]]:
        """Return every step that any worker has made."""
        found = []
        for path in self.folder.glob("used-*"):
            lines = path.read_text().splitlines(keepends=True)
            # A kill may have cut the last one short.
            found += [json.loads(line) for line in lines if line.endswith("\n")]
        return found

    def workers(self, attempt: int) -> dict[int, int]:
        """Return rank to process id in an attempt."""
        return {item["rank"]: item["pid"] for item in self.used() if item["attempt"] == attempt}

    def wait_for(self, attempt: int, progress: int, size: int) -> None:
        """Wait until every rank of an attempt has come to a progress."""

        def is_there() -> bool:
            ranks = {
                item["rank"]
                for item in self.used()
                if item["attempt"] == attempt and item["progress"] >= progress
            }
            return len(ranks) == size

        try:
            wait_until(is_there, f"attempt {attempt} at {progress} on {size} ranks")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """Leave nothing of it behind."""
        for agent in self._agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait(DEADLINE_S)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start jobs that are gone when the test ends."""
    made: list[Job] = []

    def make(address: str, **options: Any) -> Job:
        made.append(Job(tmp_path / "job", address, **options))
        return made[-1]

    yield make
    for job in made:
        for item in job.used():
            # Workers are sessions of their own.
            try:
                os.kill(item["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.end()


def check_values(job: Job) -> None:
    """Every rank of every attempt used at each progress what the losses say."""
    expected = Expected.of(job.spec)
    expected.open(0)
    expected.feed({n: loss_at(n) for n in range(job.steps)})
    for item in job.used():
        assert tuple(item["values"]) == expected.expected(item["progress"]), item


def check_log(job: Job, address: str, attempts: int) -> None:
    """Each start opened one attempt, and the losses of every step are there once."""
    with Runs(address) as runs:
        opened = [item.attempt for item in runs.events("elastic") if item.kind == "opened"]
        losses = runs.losses("elastic")
    assert opened == list(range(1, attempts + 1))
    final: dict[int, float | None] = {}
    for attempt in sorted(losses):
        begin = min(item["progress"] for item in job.used() if item["attempt"] == attempt)
        final = {n: loss for n, loss in final.items() if n < begin} | losses[attempt]
    assert final == {n: loss_at(n) for n in range(job.steps)}


@pytest.mark.timeout(300)
def test_a_killed_worker_makes_torchrun_start_all_anew(
    servers: Servers, jobs: Callable[..., Job]
) -> None:
    """First one that only follows, then the one that opens and reports."""
    server = servers()
    job = jobs(server.grpc, steps=40, workers=3, most=3)
    agent = job.start_node("1")
    job.wait_for(attempt=1, progress=10, size=3)
    os.kill(job.workers(1)[2], signal.SIGKILL)
    job.wait_for(attempt=2, progress=20, size=3)
    os.kill(job.workers(2)[0], signal.SIGKILL)
    assert agent.wait(JOB_S) == 0, job.logs()
    check_values(job)
    check_log(job, server.grpc, 3)


@pytest.mark.timeout(300)
def test_a_node_leaves_as_a_zombie_and_another_one_joins(
    servers: Servers, jobs: Callable[..., Job]
) -> None:
    """The world shrinks and grows; what is left of the old one is refused."""
    server = servers()
    job = jobs(server.grpc, steps=60, workers=2, most=4)
    first = job.start_node("1:2")
    # The node that comes first is where the others meet.
    wait_until(job.is_met, "the first node listens")
    second = job.start_node("1:2")
    job.wait_for(attempt=1, progress=10, size=4)
    frozen = [pid for pid in job.workers(1).values() if is_of(pid, second.pid)]
    assert len(frozen) == 2
    (job.folder / "zombies").write_text(json.dumps(frozen))
    for pid in (second.pid, *frozen):
        os.kill(pid, signal.SIGSTOP)
    job.wait_for(attempt=2, progress=20, size=2)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    wait_until(
        lambda: all((job.folder / f"zombie-{pid}").exists() for pid in frozen), "zombies ended"
    )
    assert {(job.folder / f"zombie-{pid}").read_text() for pid in frozen} == {"AttemptSuperseded"}
    os.killpg(second.pid, signal.SIGKILL)
    job.start_node("1:2")
    job.wait_for(attempt=3, progress=59, size=4)
    assert first.wait(JOB_S) == 0, job.logs()
    check_values(job)
    check_log(job, server.grpc, 3)
    assert {(item["attempt"], item["size"]) for item in job.used()} == {(1, 4), (2, 2), (3, 4)}


def is_of(pid: int, agent: int) -> bool:
    """Return whether a process is a child of an agent."""
    status = Path(f"/proc/{pid}/stat").read_text()
    return int(status.rsplit(")", 1)[1].split()[1]) == agent
