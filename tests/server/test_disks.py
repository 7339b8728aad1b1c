"""Real disks that fail under a real server, while real clients train through it.

A small file system in memory is filled; system calls of the server are made to fail. What must
hold: nothing is acknowledged meanwhile, health and metrics say why, everything comes back without
hands, and nothing differs afterwards.
"""

from __future__ import annotations

import random
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import Rank, Runs, ask_to_end, hold_to_the_promise, make_spec, wait_until

if TYPE_CHECKING:
    from tests.server.conftest import Program, Programs

pytestmark = pytest.mark.needs_namespaces

DEADLINE_S = 60.0
"""Every wait here ends by then."""

DISK_BYTES = 6 << 20

WORLD_SIZE = 3
STEPS = 200


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, self.folder], check=True)

    def fill(self) -> None:
        """Leave no byte of it."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    assert error.strerror == "No space left on device"  # noqa: PT017

    def make_room(self) -> None:
        """Undo `fill`."""
        (self.folder / "ballast").unlink()

    def protect(self) -> None:
        """Let nobody write to it; nobody may have a file of it open for that."""
        self._mount("-o", "remount,ro")

    def remove(self) -> None:
        """Leave nothing of it behind."""
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


@contextmanager
def failing(program: Program, calls: str, error: str) -> Iterator[None]:
    """Let system calls of a server fail, instead of being carried out."""
    pid = program.process.pid
    command = ["strace", "-f", "-qq", "-p", str(pid), "-o", "/dev/null"]
    command += ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"]
    with subprocess.Popen(command) as tracer:
        try:
            wait_until(lambda: tracer.poll() is not None or is_traced(pid), "the server is traced")
            assert tracer.poll() is None
            yield
        finally:
            # Asked to end, it may wait for ever for a thread that ends too; the kernel does not.
            tracer.kill()
            tracer.wait(DEADLINE_S)


def is_traced(pid: int) -> bool:
    """Return whether every thread of a process is traced."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        states = [task.joinpath("status").read_text() for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        # A thread has ended meanwhile.
        return False
    return all("TracerPid:\t0\n" not in state for state in states)


def http(program: Program, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{program.http}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def is_ready(program: Program) -> bool:
    return http(program, "/ready")[0] == 200


def failures(program: Program, reason: str) -> float:
    """Return how often the store failed for a reason."""
    return metric(program, f'lrpilot_store_failures_total{{reason="{reason}"}}')


def metric(program: Program, series: str) -> float:
    text = http(program, "/metrics")[1]
    (value,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(series)]
    return float(value)


class Job:
    """Ranks that train through one server after another, at one address and on one disk."""

    def __init__(self, programs: Programs, disk: Disk, ranks: list[Rank], folder: Path) -> None:
        self._programs, self._disk = programs, disk
        self.data = disk.folder
        self.server = programs(data=self.data).wait_ready()
        self.salt = str(random.SystemRandom().randrange(2**32))
        print(f"salt {self.salt}")  # noqa: T201 (shown when the test fails)
        self.spec = make_spec("on-a-disk", delay=8)
        self._folder = folder
        self.ranks = ranks
        for number in range(WORLD_SIZE):
            ranks.append(
                Rank(
                    folder,
                    self.server.grpc,
                    self.spec,
                    number,
                    world_size=WORLD_SIZE,
                    key="start",
                    salt=self.salt,
                    pause_s=0.002,
                    end_after=STEPS,
                )
            )
        self.goes_on()

    def goes_on(self) -> None:
        """Wait until every rank is well past what it had a lease on."""
        aims = [used[1] + 20 if (used := rank.last("used")) else 20 for rank in self.ranks]
        for rank, aim in zip(self.ranks, aims, strict=True):
            wait_until(partial(rank.reached, aim), f"rank {rank.rank} goes on")

    def stands_still(self, reason: str, words: str) -> None:
        """Check that the server says why it takes nothing, and takes nothing."""
        wait_until(lambda: not is_ready(self.server), "the server is not ready")
        code, text = http(self.server, "/ready")
        assert code == 503
        assert text.startswith(f"not ready: {words}")
        assert str(self.data / "lrpilot.db") in text
        assert http(self.server, "/live")[0] == 200
        assert metric(self.server, "lrpilot_store_writable ") == 0
        with Runs(self.server.grpc) as runs:
            # Who looks is answered.
            before = runs.run(self.spec["name"])
            acknowledged = len(self.ranks[0].acknowledged())
            times = failures(self.server, reason)
            wait_until(lambda: failures(self.server, reason) > times + 2, "further tries fail")
            after = runs.run(self.spec["name"])
        assert after.frontier == before.frontier
        assert len(self.ranks[0].acknowledged()) == acknowledged
        assert all(rank.process.poll() is None for rank in self.ranks)
        assert not is_ready(self.server)

    def comes_back(self) -> None:
        """Check that all goes on without hands."""
        wait_until(lambda: is_ready(self.server), "the server is ready")
        assert metric(self.server, "lrpilot_store_writable ") == 1
        self.goes_on()

    def restart(self) -> None:
        """Kill the server, and start another one in its place."""
        self.server.end(signal.SIGKILL)
        self.server = self._programs("--listen", self.server.grpc, data=self.data).wait_ready()

    def finish(self) -> None:
        """Let the job end, and hold it against the promise."""
        ask_to_end(self._folder, "start")
        for rank in self.ranks:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        hold_to_the_promise(self.spec, self.salt, [self.server.grpc], self.ranks, STEPS)
        assert self.server.end(signal.SIGTERM) == 0
        assert "Traceback" not in self.server.log()


@pytest.fixture
def job(programs: Programs, disk: Disk, ranks: list[Rank], tmp_path: Path) -> Job:
    return Job(programs, disk, ranks, tmp_path)


def test_a_disk_that_is_full_again_and_again(job: Job, disk: Disk) -> None:
    for _ in range(2):
        disk.fill()
        job.stands_still("disk_full", "disk full: ")
        assert metric(job.server, "lrpilot_store_free_bytes{") == 0
        disk.make_room()
        job.comes_back()
        assert metric(job.server, "lrpilot_store_free_bytes{") > 0
    assert job.server.log().count("not ready: disk full: ") == 2
    assert job.server.log().count("ready again") == 2
    job.finish()


def test_a_server_that_is_killed_while_the_disk_is_full(
    job: Job, disk: Disk, programs: Programs
) -> None:
    disk.fill()
    job.stands_still("disk_full", "disk full: ")
    address = job.server.grpc
    job.server.end(signal.SIGKILL)
    refused = programs("--listen", address, data=job.data)
    assert refused.ended() == 1
    assert "No space left on device" in refused.log() or "disk full" in refused.log()
    disk.make_room()
    job.restart()
    job.comes_back()
    job.finish()


@pytest.mark.needs_program("strace")
@pytest.mark.parametrize(
    ("calls", "error"),
    [("fsync,fdatasync", "EIO"), ("pwrite64", "EIO"), ("pwrite64", "EROFS")],
)
def test_system_calls_that_fail(job: Job, calls: str, error: str) -> None:
    for _ in range(2):
        with failing(job.server, calls, error):
            job.stands_still("io_error", "I/O error: ")
        job.comes_back()
    job.finish()


@pytest.mark.needs_program("strace")
def test_a_server_that_is_killed_after_an_fsync_that_failed(job: Job) -> None:
    """What it could not make durable stands in the kernel's memory, as if it were."""
    for _ in range(2):
        with failing(job.server, "fsync,fdatasync", "EIO"):
            job.stands_still("io_error", "I/O error: ")
            job.server.process.send_signal(signal.SIGKILL)
        job.restart()
        job.comes_back()
    job.finish()


class TestStart:
    def refused(self, program: Program) -> str:
        """Return what a program that must not start says."""
        assert program.ended() == 1
        log = program.log()
        assert log.startswith("error: ")
        assert len(log.splitlines()) == 1
        return log

    def test_on_a_full_disk(self, programs: Programs, disk: Disk) -> None:
        disk.fill()
        assert "No space left on device" in self.refused(programs(data=disk.folder))

    def test_on_a_database_whose_disk_is_full(self, programs: Programs, disk: Disk) -> None:
        assert programs(data=disk.folder).wait_ready().end(signal.SIGTERM) == 0
        disk.fill()
        text = self.refused(programs(data=disk.folder))
        assert "disk full: " in text or "No space left on device" in text

    def test_on_a_read_only_disk(self, programs: Programs, disk: Disk) -> None:
        assert programs(data=disk.folder).wait_ready().end(signal.SIGTERM) == 0
        disk.protect()
        text = self.refused(programs(data=disk.folder))
        assert "Read-only file system" in text
        assert str(disk.folder) in text
