"""The ranks of a node share what the server answers, and get on without it."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _node
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]
    Job = Callable[..., "Ranks"]

PROGRAM = Path(__file__).with_name("node_program.py")
DEADLINE_S = 60.0


class Ranks:
    """Real processes, on one node for all they know."""

    def __init__(
        self, folder: Path, trainer: FakeTrainer, count: int, local: int, **options: Any
    ) -> None:
        self.root, self.told = folder / "shm", folder / "told"
        for made in (self.root, self.told):
            made.mkdir(exist_ok=True)
        self._folder, self._environment = folder, {**os.environ, "LOCAL_WORLD_SIZE": str(local)}
        self._options = {
            "address": trainer.address,
            "root": str(self.root),
            "told": str(self.told),
            "ranks": count,
            **options,
        }
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, *ranks: int, **options: Any) -> Ranks:
        for rank in ranks:
            given = {"rank": rank, **self._options, **options}
            with (self._folder / f"{rank}.err").open("w") as errors:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, str(PROGRAM), json.dumps(given)],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=self._environment,
                )
        return self

    def said(self, *ranks: int) -> list[dict[str, Any]]:
        """Wait for the end of these ranks, or of all, and return what they said."""
        said = []
        for rank in ranks or tuple(self.processes):
            out, _ = self.processes[rank].communicate(timeout=DEADLINE_S)
            errors = (self._folder / f"{rank}.err").read_text()
            assert self.processes[rank].returncode == 0, errors
            said.append(json.loads(out))
        return said

    def asking(self, progress: int, *ranks: int) -> int:
        """Wait until one of the ranks asks the server on its training thread; return it."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            for rank in ranks or range(4):
                with suppress(FileNotFoundError):
                    if (self.told / f"{rank}-asks").read_text() == str(progress):
                        return rank
            time.sleep(0.002)
        raise AssertionError(f"nobody asks for {progress}")

    def wait(self, *names: str) -> None:
        """Wait until the ranks have told all of this."""
        end_s = time.monotonic() + DEADLINE_S
        while not all((self.told / name).exists() for name in names):
            assert time.monotonic() < end_s
            time.sleep(0.002)

    def arrived(self, *ranks: int) -> None:
        """Wait until these ranks stand before the step that they tell of."""
        self.wait(*(f"{rank}-arrives" for rank in ranks))

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def dispose(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def job(tmp_path: Path, trainer: FakeTrainer) -> Iterator[Job]:
    """Start four ranks on one node."""
    started: list[Ranks] = []

    def start(*, local: int = 4, late: int = 0, **options: Any) -> Ranks:
        ranks = Ranks(tmp_path, trainer, 4, local, **options)
        started.append(ranks)
        return ranks.start(*range(4 - late))

    yield start
    for item in started:
        item.dispose()


def rates(trainer: FakeTrainer, steps: int, stride: int = 1) -> list[str]:
    return [trainer.rate(at).hex() for at in range(0, steps * stride, stride)]


def asked(trainer: FakeTrainer) -> Counter[tuple[int, bool]]:
    """Return how often each block was asked for, ahead or by a blocked training thread."""
    return Counter((call.begin, call.blocked) for call in trainer.calls["GetValues"])


def warnings(said: dict[str, Any]) -> list[str]:
    return [text for text in said["messages"] if "shares no values" in text]


# Four real processes.


def test_one_rank_of_a_node_asks_for_each_block(trainer: FakeTrainer, job: Job) -> None:
    trainer.delay = 32
    trainer.directives.append(
        pb.Directive(
            id="look", kind=pb.DIRECTIVE_KIND_EVALUATE, progress=150, reason="for the test"
        )
    )
    ranks = job(steps=300, step_s=0.002, together=True)
    for said in ranks.said():
        assert said["rates"] == rates(trainer, 300)
        # It rides in the file, to every rank at the same step.
        assert said["met"] == [["look", 150]]
        assert warnings(said) == []
    # What lies beyond the end is never fixed: a rank that leaves lets the next one ask for it.
    assert {count for (at, _), count in asked(trainer).items() if at < 300} == {1}
    assert list(ranks.root.iterdir()) == []


def test_without_sharing_each_rank_asks(trainer: FakeTrainer, job: Job) -> None:
    """What the test above would see if nothing were shared."""
    trainer.delay = 32
    for said in job(local=1, steps=300, step_s=0.002, together=True).said():
        assert said["rates"] == rates(trainer, 300)
    calls = asked(trainer)
    assert calls[0, True] == 4
    assert sum(count > 1 for count in calls.values()) > 10


def test_in_lockstep_one_rank_of_a_node_waits_at_the_server(trainer: FakeTrainer, job: Job) -> None:
    trainer.delay = 1
    for said in job(steps=50).said():
        assert said["rates"] == rates(trainer, 50)
    calls = asked(trainer)
    # The reporter asks once more for itself before it says that it has nothing to report.
    assert set(calls) == {(at, True) for at in range(50)}
    assert calls.total() <= 2 * 50


def test_a_rank_on_another_stride_asks_for_itself(trainer: FakeTrainer, job: Job) -> None:
    trainer.unit, trainer.delay, trainer.feedback = "samples", 256, False
    ranks = job(late=1, steps=120, stride=8).start(3, steps=120, stride=5)
    others = ranks.said(0, 1, 2)
    assert [said["rates"] for said in others] == [rates(trainer, 120, 8)] * 3
    (other,) = ranks.said(3)
    assert other["rates"] == rates(trainer, 120, 5)
    assert {call.stride for call in trainer.calls["GetValues"]} == {1, 5, 8}


def test_a_rank_far_behind_gets_on(trainer: FakeTrainer, job: Job) -> None:
    """The others are through when it starts, and what it needs was pruned long ago."""
    trainer.feedback, trainer.delay = False, 4
    ranks = job(late=1, steps=300, tell=299)
    ranks.arrived(0, 1, 2)
    ranks.start(3)
    for said in ranks.said():
        assert said["rates"] == rates(trainer, 300)
        assert warnings(said) == []


QUICK = {"BLOCKED_WAIT_S": 0.3, "ANSWER_S": 0.5, "BACKOFF_CAP_S": 0.05}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_while_it_asks_holds_nobody_up(
    trainer: FakeTrainer, job: Job, number: signal.Signals
) -> None:
    trainer.move(8)
    # A rank that is killed asks for as long as the server lets it wait.
    ranks = job(steps=12, timing={**QUICK, "BLOCKED_WAIT_S": 30.0 if number == 9 else 0.3})
    first = ranks.asking(8)
    ranks.signal(first, number)
    others = [rank for rank in range(4) if rank != first]
    if number == signal.SIGKILL:
        ranks.processes[first].wait(DEADLINE_S)
    ranks.asking(8, *others)
    trainer.move(100)
    assert [said["rates"] for said in ranks.said(*others)] == [rates(trainer, 12)] * 3
    if number == signal.SIGSTOP:
        ranks.signal(first, signal.SIGCONT)
        assert [said["rates"] for said in ranks.said(first)] == [rates(trainer, 12)]


def test_one_rank_of_a_node_knocks_at_a_server_that_is_away(trainer: FakeTrainer, job: Job) -> None:
    """It keeps the lock while it tries; the others would ask themselves after five seconds."""
    trainer.move(8)
    ranks = job(steps=12, tell=8, timing={"BLOCKED_WAIT_S": 0.2, "BACKOFF_CAP_S": 0.1})
    ranks.arrived(0, 1, 2, 3)
    first = ranks.asking(8)
    trainer.stop()
    tried = len(list(ranks.told.glob(f"{first}-tried-*")))
    ranks.wait(f"{first}-tried-{tried + 6}")
    trainer.start()
    trainer.move(100)
    said = ranks.said()
    assert [item["rates"] for item in said] == [rates(trainer, 12)] * 4
    tries = sorted(item["tries"].count(8) for item in said)
    assert tries[:3] == [0, 0, 0]
    assert tries[3] > 5


def test_a_disk_that_is_full_is_said_once_and_costs_calls_alone(
    trainer: FakeTrainer, job: Job
) -> None:
    for said in job(steps=50, no_space=True).said():
        assert said["rates"] == rates(trainer, 50)
        (line,) = warnings(said)
        assert "asks the server itself" in line
        assert "File too large" in line


def test_a_damaged_file_is_said_once_and_costs_calls_alone(trainer: FakeTrainer, job: Job) -> None:
    trainer.move(8)
    ranks = job(late=1, steps=12, tell=8, timing={"BLOCKED_WAIT_S": 0.2})
    ranks.arrived(0, 1, 2)
    (folder,) = ranks.root.iterdir()
    damaged = [path for path in folder.iterdir() if _node._VALUES.fullmatch(path.name)]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    assert damaged
    ranks.start(3).arrived(3)
    trainer.move(100)
    *others, late = ranks.said()
    assert [said["rates"] for said in (*others, late)] == [rates(trainer, 12)] * 4
    assert [warnings(said) for said in others] == [[]] * 3
    (line,) = warnings(late)
    assert "is damaged" in line


# In this process.


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders are made; this process is one of two ranks on its node."""
    monkeypatch.setattr(_node, "ROOT", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def two(connect: Connect, **options: Any) -> list[lrpilot.Pilot]:
    return [connect(rank=rank, world_size=2, key="start", **options) for rank in range(2)]


def node_of(pilot: lrpilot.Pilot) -> _node.Node:
    lease: Any = pilot._session._lease
    node: _node.Node = lease._node
    return node


def test_the_folder_is_its_owners_alone_and_ends_with_the_last_rank(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    one, other = two(connect)
    assert one.values(0) == other.values(0) == ((trainer.rate(0), trainer.decay(0)),)
    assert asked(trainer)[0, True] == 1
    (folder,) = root.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    # Nothing in the name tells the token.
    assert trainer.token(1).hex() not in folder.name
    one.close()
    assert folder.exists()
    other.close()
    assert list(root.iterdir()) == []


def go_back(pilot: lrpilot.Pilot, directive: lrpilot.Directive) -> None:
    pilot.roll_back(directive, 3)


def test_a_rollback_leaves_the_folder_of_the_old_attempt(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    trainer.directives.append(
        pb.Directive(id="back", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=6, before=4)
    )
    pilots = two(connect)
    for at in range(6):
        assert pilots[0].values(at) == pilots[1].values(at)
    (old,) = root.iterdir()
    for pilot in pilots:
        pilot.on_directive("rollback", functools.partial(go_back, pilot))
        pilot.values(6)
        assert pilot.attempt == 2
    (new,) = root.iterdir()
    assert new != old
    assert pilots[0].values(3) == pilots[1].values(3) == ((trainer.rate(3), trainer.decay(3)),)
    assert len({node_of(pilot).folder for pilot in pilots}) == 1


def test_who_wants_reasons_reads_no_file_without_them(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    one, other = two(connect)
    one.values(0)
    other._session.open(None)
    lease: Any = other._session._lease
    lease.explain = True
    other.values(0)
    assert [call.explain for call in trainer.calls["GetValues"] if call.blocked] == [False, True]
    # From then on whoever asks asks for them, too.
    trainer.move(20)
    one.values(9)
    assert trainer.calls["GetValues"][-1].explain
    count = len([call for call in trainer.calls["GetValues"] if call.blocked])
    assert other.values(9) == one.values(9)
    assert len([call for call in trainer.calls["GetValues"] if call.blocked]) == count


def test_files_are_bounded(
    trainer: FakeTrainer, connect: Connect, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_node, "KEPT_FILES", 5)
    trainer.feedback, trainer.delay = False, 2
    one, other = two(connect)
    for at in range(100):
        assert one.values(at) == other.values(at)
    (folder,) = root.iterdir()
    assert len([path for path in folder.iterdir() if _node._VALUES.fullmatch(path.name)]) <= 6


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """Let this process be of a user who may do nothing, where root would be asked for nothing."""
    user = os.geteuid()

    def become() -> None:
        if user == 0:
            os.seteuid(65534)

    yield become
    os.seteuid(user)


@pytest.mark.parametrize("what", ["missing", "file", "not permitted", "foreign", "open", "link"])
def test_without_a_folder_each_rank_asks_for_itself(
    trainer: FakeTrainer,
    connect: Connect,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    nobody: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    place = root / "shm"
    monkeypatch.setattr(_node, "ROOT", place)
    named = hashlib.blake2b(trainer.token(1) + b"small", digest_size=16).hexdigest()
    made = place / f"lrpilot-{named}"
    if what == "file":
        place.write_text("")
    elif what != "missing":
        place.mkdir()
    if what == "not permitted":
        place.chmod(0o555)
        nobody()
    elif what == "foreign":
        made.mkdir(0o700)
        monkeypatch.setattr(os, "geteuid", lambda: made.stat().st_uid + 1)
    elif what == "open":
        made.mkdir()
        made.chmod(0o755)
    elif what == "link":
        (root / "elsewhere").mkdir(0o700)
        made.symlink_to(root / "elsewhere")
    pilots = two(connect)
    for at in range(5):
        for pilot in pilots:
            assert pilot.values(at) == ((trainer.rate(at), trainer.decay(at)),)
    assert asked(trainer)[0, True] == 2
    lines = [text for text in caplog.messages if "shares no values" in text]
    assert len(lines) == 2
    said = {
        "missing": "No such file or directory",
        "file": "Not a directory",
        "not permitted": "Permission denied",
        "foreign": "belongs to user",
        "open": "mode 755: others may reach it",
        "link": "Not a directory",
    }
    assert all(said[what] in line for line in lines)


@pytest.mark.parametrize("what", ["another name", "foreign", "open", "link", "folder", "cut"])
def test_a_file_that_is_not_what_was_written_is_not_read(
    trainer: FakeTrainer,
    connect: Connect,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    one, other = two(connect)
    one.values(0)
    (folder,) = root.iterdir()
    (path,) = (path for path in folder.iterdir() if _node._VALUES.fullmatch(path.name))
    other._session.open(None)
    if what == "another name":
        path = path.rename(folder / "0-1-9")
    elif what == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    elif what == "open":
        path.chmod(0o640)
    elif what == "link":
        path.symlink_to(path.rename(root / "elsewhere"))
    elif what == "folder":
        path.unlink()
        path.mkdir(0o700)
    else:
        path.write_bytes(path.read_bytes()[:20])
    assert other.values(0) == ((trainer.rate(0), trainer.decay(0)),)
    assert asked(trainer)[0, True] == 2
    (line,) = [text for text in caplog.messages if "shares no values" in text]
    assert "rank 1 shares no values" in line
    if what == "folder":
        path.rmdir()


def test_a_folder_that_vanishes_costs_calls_alone(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    pilots = two(connect)
    pilots[0].values(0)
    (folder,) = root.iterdir()
    shutil.rmtree(folder)
    for at in range(5):
        for pilot in pilots:
            assert pilot.values(at) == ((trainer.rate(at), trainer.decay(at)),)


def test_what_killed_jobs_left_is_removed_after_a_day(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    def leave(name: str, age_s: float) -> Path:
        folder = root / name
        folder.mkdir(0o700)
        (folder / "0-1-8").write_text("")
        then_s = time.time() - age_s
        os.utime(folder, (then_s, then_s))
        return folder

    old, asleep = leave("lrpilot-old", 90_000), leave("lrpilot-asleep", 90_000)
    others = leave("lrpilot-new", 3_600), leave("of somebody else", 90_000)
    held = os.open(asleep, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    try:
        connect(rank=0, world_size=2, key="start").values(0)
    finally:
        os.close(held)
    assert not old.exists()
    assert asleep.exists()
    assert all(folder.exists() for folder in others)


def test_a_forked_child_leaves_the_folder_alone(
    trainer: FakeTrainer, connect: Connect, root: Path
) -> None:
    pilot = connect(rank=0, world_size=2, key="start")
    pilot.values(0)
    (folder,) = root.iterdir()
    child = os.fork()
    if child == 0:
        pilot.close()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert folder.exists()
    pilot.close()
    assert not folder.exists()


def test_the_ranks_of_a_node_draw_alike_and_two_nodes_do_not(
    connect: Connect, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = []
    for place in ("one", "one", "two"):
        (root / place).mkdir(exist_ok=True)
        monkeypatch.setattr(_node, "ROOT", root / place)
        pilot = connect(rank=0, world_size=2, key="start")
        pilot.values(0)
        nodes.append(node_of(pilot))
    one, alike, other = [[node.draw(end) for end in range(1000)] for node in nodes]
    assert one == alike
    assert not set(one) & set(other)
    # Ten even parts get about a hundred each.
    counts = Counter(int(drawn * 10) for drawn in one)
    assert set(counts) == set(range(10))
    assert 60 < min(counts.values()) <= max(counts.values()) < 140


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "1"}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"MPI_LOCALNRANKS": "2"}, 2),
        ({"MV2_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x16)"}, 8),
        ({"SLURM_TASKS_PER_NODE": "1(x16),4"}, 4),
        ({"SLURM_TASKS_PER_NODE": "1(x16)"}, 1),
        # One task of Slurm starts torchrun, which starts the ranks.
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": ""}, 1),
        ({"LOCAL_WORLD_SIZE": "many"}, 1),
    ],
)
def test_launchers_say_how_many_ranks_a_node_has(environment: dict[str, str], count: int) -> None:
    assert _node.ranks_here(environment) == count


@pytest.mark.parametrize(("ranks", "local"), [(1, "8"), (8, "1"), (8, None)])
def test_a_rank_alone_on_its_node_makes_no_folder(
    connect: Connect, root: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, local: str | None
) -> None:
    if local is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    connect(rank=0, world_size=ranks, key="start").values(0)
    assert list(root.iterdir()) == []
