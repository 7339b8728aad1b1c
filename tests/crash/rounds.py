"""One round: a job trains, operators meddle, one thing goes wrong; then everybody is heard.

Everything random follows from the seed: the job, its losses, what operators do, the fault and where
the training stands when it begins. What the machine makes of it is not repeated to the microsecond.
"""

import json
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lrpilot import core
from lrpilot.server._store import LogRow
from tests.crash.checker import check
from tests.crash.cluster import PROCESSES, Cluster, ServerEnded, StoreKind
from tests.crash.faults import FAULTS, Fault, Scene, Seen, _Meddled
from tests.crash.history import HistoryWriter, Record, read_history
from tests.crash.operators import ACTIONS, Operator
from tests.crash.trainer import TrainerPlan, train

DEADLINE_S = 240.0
"""A job that has not come to its end by then is stuck."""

STUCK_S = 30.0
"""So is one in which no rank has made a step for so long."""

SHARES = {"skipped": 0.1, "no loss": 0.3, "late": 0.1, "validation": 0.1}
"""How often a step is one of them, in a job that has such steps; see `TrainerPlan.odds`."""

LINGER_S = 5.0
"""How long ranks of an older start of the job may take to notice that they are superseded."""

INSPECT_S = 0.5
"""How long ranks take to write where they hang."""


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What a round does."""

    seed: int
    store: StoreKind
    fault: str
    spec: dict[str, Any]
    world_size: int
    leads: bool
    """Whether in leader mode."""
    has_group: bool
    """Whether the ranks have a process group; else they share a key, or are one."""
    reporters: int
    """How many of the ranks report."""
    shares: bool
    """Whether the ranks share what the server answers."""
    increment: int
    end: int
    pause_s: float
    odds: dict[str, float]
    fault_at: int
    """Progress at which the fault begins."""
    fault_s: float
    """How long it lasts."""
    save_at: int
    interrupt_at: int | None
    """Progress at which the job is started anew for no reason of the fault's."""
    leaves_zombies: bool
    """Whether the ranks of an older start of the job go on."""
    keeps_losses: bool
    """Whether a later start of the job meets the same losses."""
    operations: tuple[tuple[int, str], ...]
    """Progress and what an operator then does."""

    @classmethod
    def of(cls, seed: int, store: StoreKind, fault: str) -> "RoundPlan":
        """Return the plan that follows from a seed."""
        dice = random.Random(f"{seed}/{store}/{fault}")
        leads = dice.random() < 0.3
        world_size = dice.randint(1 if leads else 2, 4)
        increment = dice.choice([1, 1, 1, 2, 7])
        steps = dice.randint(60, 120)
        end = steps * increment

        def somewhere(begin: float, share: float) -> int:
            return int(dice.uniform(begin, share) * steps) * increment

        return cls(
            seed=seed,
            store=store,
            fault=fault,
            spec=_spec(dice, f"crash-{seed}", increment),
            world_size=world_size,
            leads=leads,
            has_group=world_size > 1 and (leads or dice.random() < 0.4),
            reporters=1 if leads else dice.choice([1, 1, 1, world_size]),
            shares=dice.random() < 0.2,
            increment=increment,
            end=end,
            pause_s=dice.uniform(0.004, 0.012),
            odds={name: dice.choice([0.0, share]) for name, share in SHARES.items()},
            fault_at=somewhere(0.15, 0.7),
            fault_s=dice.uniform(0.1, 0.7),
            save_at=somewhere(0.1, 0.4),
            interrupt_at=somewhere(0.4, 0.9) if dice.random() < 0.4 else None,
            leaves_zombies=dice.random() < 0.5,
            keeps_losses=dice.random() < 0.5,
            operations=tuple(
                sorted(
                    (somewhere(0.0, 0.9), dice.choice(ACTIONS))
                    for _ in range(dice.choice([0, 1, 3, 6]))
                )
            ),
        )

    @property
    def command(self) -> str:
        """What plays it again."""
        return (
            f"python -m tests.crash.torture --store {self.store} --kind '{self.fault}' "
            f"--seed {self.seed} --faults 1"
        )


SPIKE = {
    "kind": "spike",
    "mode": "act",
    "window": 16,
    "least": 8,
    "sigma": 2,
    "persistent": 1,
    "recovery": 3,
}
"""A ladder that short trainings climb."""


def _spec(dice: random.Random, name: str, increment: int) -> dict[str, Any]:
    total = 10_000
    policies = dice.choice(
        [
            [{"kind": "plateau", "patience": 2, "factor": 0.9}],
            [{"kind": "plateau", "patience": 1, "factor": 0.5}],
            [{"kind": "plateau", "patience": 3, "factor": 0.9, "window": 2, "cooldown": 2}],
            [
                SPIKE,
                {"kind": "plateau", "patience": 2, "factor": 0.9, "mode": "advise"},
            ],
            [
                {"kind": "nonfinite", "mode": "act", "streak": 1, "hold": 5},
                {"kind": "greedy", "patience": 1},
            ],
            [],
        ]
    )
    spec: dict[str, Any] = {
        "name": name,
        "total": total,
        "learning_rate": {
            "init": 1e-4,
            "peak": 1e-2,
            "warmup": 5_000,
            "decay": {"style": dice.choice(["cosine", "linear", "constant"])},
        },
        "policies": policies,
        "feedback": {
            "delay": increment * dice.choice([1, 2, 4, 8, 16]),
            "timeout": dice.choice(["60s", "60s", "200ms"]),
        },
    }
    if dice.random() < 0.8:
        spec["weight_decay"] = {"start": 0.01, "end": 0.1, "style": "cosine", "over": total}
    if dice.random() < 0.3:
        spec["groups"] = [{"name": "matrices"}, {"name": "rest", "peak": 2e-2}]
    return spec


@dataclass
class RoundResult:
    """What came of a round."""

    seed: int
    store: StoreKind
    fault: str
    target: str = ""
    hit: bool = False
    """Whether the fault really happened."""
    recovered: bool = False
    """Whether the job came to its end."""
    stall_s: float = 0.0
    """The longest wait of a training thread."""
    seconds: float = 0.0
    steps: int = 0
    """Steps that ranks made, all together."""
    starts: int = 0
    """How often the job was started."""
    events: dict[str, int] = field(default_factory=dict)
    """Kinds of events to how many the log holds: what the round met."""
    violations: list[str] = field(default_factory=list)
    command: str = ""
    """What plays the round again."""
    folder: str = ""
    """Where the evidence is kept of a round that failed."""


def play(plan: RoundPlan, cluster: Cluster, folder: Path) -> RoundResult:
    """Play one round on a cluster that runs; the evidence is left in a folder."""
    begun_s = time.monotonic()
    folder.mkdir(parents=True)
    result = RoundResult(plan.seed, plan.store, plan.fault, command=plan.command)
    job = _Job(plan, cluster, folder)
    try:
        job.run()
    except ServerEnded as error:
        job.problems.append(f"server ended: {error}")
    finally:
        job.dispose()
    result.recovered = not job.problems
    _judge(plan, cluster, folder, job, result)
    result.seconds = time.monotonic() - begun_s
    (folder / "result.json").write_text(json.dumps(vars(result), indent=1))
    return result


def _judge(
    plan: RoundPlan, cluster: Cluster, folder: Path, job: "_Job", result: RoundResult
) -> None:
    run = plan.spec["name"]
    try:
        cluster.mend()
    except ServerEnded as error:
        job.problems.append(f"server ended: {error}")
    log = cluster.log(run)
    histories = [read_history(path) for path in sorted(folder.glob("*.jsonl"))]
    records = [record for history in histories for record in history]
    errors = [record["details"] for record in records if record["what"] == "error"]
    begun = [record for record in records if record["what"] == "fault"]
    seen = Seen(log, errors, sum(1 for record in begun if record["target"] == "report") // 2)
    result.target = job.fault.target
    result.hit = job.has_begun and job.fault.hit(seen)
    result.stall_s = max(
        (item["seconds"] for item in records if item["what"] == "stall"), default=0
    )
    result.steps = sum(record["what"] == "used" for record in records)
    result.starts = len(job.starts)
    result.events = dict(Counter(core.decode(row.payload).kind for row in log))
    _write_log(folder / "log.json", log)
    result.violations = job.problems + _checked(histories, run, log)


def _checked(histories: list[list[Record]], run: str, log: Sequence[LogRow]) -> list[str]:
    try:
        return [str(violation) for violation in check(histories, {run: log})]
    except Exception:
        return [f"laboratory: the checker failed:\n{traceback.format_exc()}"]


def _write_log(path: Path, log: Sequence[LogRow]) -> None:
    """Keep the log of a run for people; the payloads are JSON."""
    path.write_text("".join(f"{row.seq} {row.digest} {row.payload.decode()}\n" for row in log))


class _Rank:
    """One rank of one start of the job."""

    def __init__(self, plan: TrainerPlan, links: list[Any]) -> None:
        self.plan, self.name = plan, plan.who
        self.heard, said = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=train, args=(plan, said, links))
        self.process.start()
        for end in (said, *links):
            end.close()
        self.at = -1
        """Greatest progress that it has used."""
        self.ended: tuple[str, str] | None = None
        """Name and text of the error that ended it; empty names: none. None: it has not ended."""
        self.was_killed = False

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def kill(self) -> None:
        """End it at once."""
        self.was_killed = True
        self.process.kill()

    def hear(self) -> None:
        """Take what it says."""
        try:
            word = self.heard.recv()
        except (EOFError, ConnectionResetError):
            self.ended = ("killed", "") if self.was_killed else ("died", self._last_words())
            return
        if word[0] == "at":
            self.at = word[1]
        else:
            self.ended = (word[1], word[2])

    def _last_words(self) -> str:
        self.process.join(DEADLINE_S)
        return f"exit code {self.process.exitcode}: {self.plan.log.read_text()[-2000:]}"

    def dispose(self) -> None:
        """Leave no process of it behind."""
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join(DEADLINE_S)
        self.process.close()
        self.heard.close()


class _Job:
    """The job of a round, from its first start to its end, and what happens to it."""

    def __init__(self, plan: RoundPlan, cluster: Cluster, folder: Path) -> None:
        self._plan, self._cluster, self._folder = plan, cluster, folder
        self.problems: list[str] = []
        """What broke the promise, as far as this can be seen without the checker."""
        self._dice = random.Random(f"{plan.seed}/job")
        self.starts: list[list[_Rank]] = []
        scene = Scene(
            random=random.Random(f"{plan.seed}/fault"),
            cluster=cluster,
            folder=folder,
            trainers=lambda: [rank for rank in self.starts[-1] if rank.ended is None],
        )
        self.fault: Fault = FAULTS[plan.fault](scene)
        self.has_begun = False
        self._history = HistoryWriter(folder / "laboratory.jsonl", "laboratory")
        self._operator = Operator(folder, "op", cluster.address, plan.spec, plan.seed)
        self._operations = list(plan.operations)
        self._interrupt_at = plan.interrupt_at
        self._state = folder / "state.json"
        self._has_resumed = False
        """Whether a start of the job has resumed from a state."""
        self._moved_s = 0.0
        """When a rank has last said something."""
        self._fault_thread: threading.Thread | None = None
        self._fault_ends, self._fault_ended = PROCESSES.Pipe(duplex=False)
        self._is_over = False
        """Whether the fault has ended."""

    def run(self) -> None:
        """Play the round. Raises ServerEnded."""
        self.fault.prepare()
        self._meddling = (
            self.fault.meddling(self._plan.fault_at) if isinstance(self.fault, _Meddled) else None
        )
        self._start()
        self._moved_s = time.monotonic()
        deadline_s = self._moved_s + DEADLINE_S
        while not self._is_done():
            left_s = min(deadline_s, self._moved_s + STUCK_S) - time.monotonic()
            if left_s <= 0:
                self._stuck()
                break
            self._hear(left_s)
        if self._fault_thread is not None:
            self._fault_thread.join(DEADLINE_S)
        self._await_zombies()
        self._operator.close()
        self.problems += [f"stuck: {text}" for text in self._operator.unanswered]
        self.fault.clear()

    def dispose(self) -> None:
        """Leave nothing of it behind."""
        for rank in self._ranks():
            rank.dispose()
        self._history.close()
        self._fault_ends.close()
        self._fault_ended.close()

    def _ranks(self) -> Iterator[_Rank]:
        return (rank for start in self.starts for rank in start)

    # Starts.

    def _start(self) -> None:
        plan, number = self._plan, len(self.starts)
        resumes: dict[str, Any] = {}
        if number:
            reached = max(rank.at for rank in self._ranks())
            if self._state.exists() and self._dice.random() < 0.7:
                # A copy: the file of this start may be overwritten by a rank of the one before.
                state = self._folder / f"state-{number}.json"
                state.write_bytes(self._state.read_bytes())
                resumes = {"state": state}
                self._has_resumed = True
            else:
                # What lies before a state is not known once the run has gone on from it.
                most = 0 if self._has_resumed else max(reached, 0) // plan.increment
                resumes = {"resume_at": self._dice.randint(0, most) * plan.increment}
        servers = self._cluster.servers
        salt = str(plan.seed) if plan.keeps_losses else f"{plan.seed}/{number}"
        links: list[list[Any]] = [[] for _ in range(plan.world_size)]
        if plan.has_group:
            pairs = [PROCESSES.Pipe() for _ in range(1, plan.world_size)]
            links = [[pair[0] for pair in pairs], *([pair[1]] for pair in pairs)]
        ranks = []
        for rank in range(plan.world_size):
            known = self._dice.sample(servers, max(len(servers) - 1, 1))
            ranks.append(
                _Rank(
                    TrainerPlan(
                        who=f"r{rank}.{number}",
                        folder=self._folder,
                        address=",".join(server.relay.address for server in known),
                        spec=plan.spec,
                        rank=rank,
                        world_size=plan.world_size,
                        key=None if plan.leads or plan.has_group else f"start-{number}",
                        leads=plan.leads,
                        reporters=tuple(range(plan.reporters)),
                        salt=salt,
                        end=plan.end,
                        increment=plan.increment,
                        pause_s=plan.pause_s,
                        save_at=plan.save_at,
                        save_to=self._state,
                        shares=plan.shares,
                        odds=plan.odds,
                        meddling=self._meddling if rank == 0 else None,
                        **resumes,
                    ),
                    links[rank],
                )
            )
        self.starts.append(ranks)

    def _start_anew(self) -> None:
        """Start the job again, as a launcher does once a rank has died."""
        for rank in self.starts[-1]:
            if rank.ended is None and not self._plan.leaves_zombies:
                rank.kill()
        self._start()

    # What happens.

    def _hear(self, timeout_s: float) -> None:
        listened = {rank.heard: rank for rank in self._ranks() if rank.ended is None}
        ends = [] if self._is_over else [self._fault_ends]
        for heard in wait([*listened, *ends], max(timeout_s, 0.0)):
            if heard is self._fault_ends:
                self._is_over = True
                continue
            rank = listened[heard]  # type: ignore[index]
            rank.hear()
            self._moved_s = time.monotonic()
            if rank in self.starts[-1]:
                self._follow(rank)
            elif rank.ended is not None:
                self._look_at_zombie(rank)

    def _follow(self, rank: _Rank) -> None:
        """Do what is due now that a rank of the current start has said something."""
        at = rank.at
        if self._fault_thread is None and at >= self._plan.fault_at:
            self._fault_thread = threading.Thread(target=self._strike, daemon=True)
            self._fault_thread.start()
        while self._operations and at >= self._operations[0][0]:
            self._operator.ask(self._operations.pop(0)[1], at)
        if rank.ended is not None and rank.ended[0]:
            name, text = rank.ended
            if name in {"killed", "PeerGone"}:
                self._start_anew()
            else:
                self.problems.append(f"client failed: {rank.name}: {name}: {text}")
        elif self._interrupt_at is not None and at >= self._interrupt_at:
            self._interrupt_at = None
            self._start_anew()

    def _look_at_zombie(self, rank: _Rank) -> None:
        assert rank.ended is not None
        name, text = rank.ended
        if name not in {"", "killed", "PeerGone", "AttemptSuperseded"}:
            self.problems.append(f"client failed: {rank.name}: {name}: {text}")

    def _strike(self) -> None:
        """Let the fault happen; on a thread of its own."""
        name = self._plan.fault
        try:
            with self._told(name):
                self.fault.begin()
                self.has_begun = True
                time.sleep(self._plan.fault_s)
                self.fault.end()
        except Exception as error:
            self.problems.append(f"laboratory: the fault {name!r} failed: {error!r}")
        self._fault_ended.send("over")

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        self._history.fault(name, self.fault.target, "begin")
        yield
        self._history.fault(name, self.fault.target, "end")

    # The end.

    def _is_done(self) -> bool:
        return bool(self.problems) or (
            all(rank.ended is not None for rank in self.starts[-1])
            and (self._fault_thread is None or self._is_over)
        )

    def _await_zombies(self) -> None:
        end_s = time.monotonic() + LINGER_S
        while any(rank.ended is None for rank in self._ranks()) and time.monotonic() < end_s:
            self._hear(end_s - time.monotonic())

    def _stuck(self) -> None:
        """Say who hangs, and let them write where."""
        for rank in self.starts[-1]:
            if rank.ended is None:
                self.problems.append(f"stuck: {rank.name} at progress {rank.at}; see its log")
                os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(INSPECT_S)
