"""Directed rounds: an order of calls that random rounds would seldom find, made to happen.

Each speaks to the real servers over the wire, call by call, writes the histories that every round
writes, and states the values that must come out as numbers that were worked out by hand. The specs
have a constant LR of `LR` and halve it, so that those numbers are exact. `ROUNDS` has all of them;
`play` plays one on fresh servers, with a planted bug where one is asked for.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc

from lrpilot import core
from lrpilot.v1 import runs_pb2, trainer_pb2
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from lrpilot.v1.trainer_pb2_grpc import TrainerServiceStub
from tests.crash.checker import Violation, check
from tests.crash.cluster import (
    PRELOADED,
    PROCESSES,
    Cluster,
    PostgresCluster,
    SqliteCluster,
    StoreKind,
)
from tests.crash.history import HistoryWriter, RecordedChannel, read_history
from tests.crash.power import PowerLoss
from tests.crash.relay import Network

RUN = "directed"

LR = 1e-3
"""The LR where nothing was decided."""

CALL_S = 30.0

WAIT_MS = 20_000

WAIVER_S = 1.0
"""Feedback timeout of rounds in which ranks wait in vain; else it is longer than any round."""


class Bench:
    """Servers, and the processes that speak to them, of one round."""

    def __init__(self, cluster: Cluster, folder: Path, stack: ExitStack) -> None:
        self.cluster = cluster
        self._folder, self._stack = folder, stack
        self._histories: dict[str, HistoryWriter] = {}
        self.numbers = count()

    def process(self, who: str, server: int = 0, *, rank: int = 0) -> "Process":
        """Return a process as it speaks to one of the servers."""
        if who not in self._histories:
            writer = HistoryWriter(self._folder / f"{who}.jsonl", who)
            self._histories[who] = self._stack.enter_context(writer)
        address = self.cluster.servers[server].relay.address
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        channel = RecordedChannel(
            grpc.insecure_channel(address, options=options), address, self._histories[who]
        )
        self._stack.callback(channel.close)
        return Process(self, who, rank, channel, self._histories[who])

    def check(self) -> list[Violation]:
        """Return what the checker says of the round."""
        histories = [read_history(path) for path in sorted(self._folder.glob("*.jsonl"))]
        return check(histories, {RUN: self.cluster.log(RUN)})

    def kinds(self) -> list[str]:
        """Return the kinds of the events in the log."""
        return [core.decode(row.payload).kind for row in self.cluster.log(RUN)]


@dataclass
class Process:
    """One process at one server; `attempt` is that of its last opening."""

    bench: Bench
    who: str
    rank: int
    channel: Any
    history: HistoryWriter
    attempt: Any = None
    holder: bytes = b""
    steps: dict[int, Any] = field(default_factory=dict)
    """Progress to (LR, WD) that it got."""

    def __post_init__(self) -> None:
        self.trainer: Any = TrainerServiceStub(self.channel)
        self.runs: Any = RunServiceStub(self.channel)

    def at(self, server: int) -> "Process":
        """Return the same process as it speaks to another server."""
        other = self.bench.process(self.who, server, rank=self.rank)
        other.attempt, other.holder, other.steps = self.attempt, self.holder, self.steps
        return other

    def attach(self, *, delay: int = 4, timeout_s: float = 60.0, **fields: Any) -> None:
        """Create the run: a plateau halves the LR at each loss that is no better."""
        document = {
            "name": RUN,
            "total": 1000,
            "learning_rate": {"peak": LR},
            "policies": [{"kind": "plateau", "patience": 0, "factor": 0.5}],
            "feedback": {"delay": delay, "timeout": f"{timeout_s}s"},
        } | fields
        request = trainer_pb2.AttachRunRequest(
            run=RUN, spec_document=json.dumps(document), request_id=self.fresh("attach")
        )
        self.trainer.AttachRun(request, timeout=CALL_S, wait_for_ready=True)

    def open(self, progress: int | None = None, **fields: Any) -> "Process":
        """Open an attempt, or join one."""
        self.take(self.opening(progress, **fields)())
        return self

    def opening(self, progress: int | None = None, **fields: Any) -> Callable[[], Any]:
        """Return what sends one request to open, again and again where it is called so."""
        request = trainer_pb2.OpenAttemptRequest(
            run=RUN,
            request_id=self.fresh("open"),
            rank=self.rank,
            incarnation=self.who,
            progress=progress,
            **fields,
        )
        return lambda: self.trainer.OpenAttempt(request, timeout=CALL_S, wait_for_ready=True)

    def take(self, answer: Any) -> None:
        """Be part of the attempt that was opened."""
        self.attempt, self.holder = answer.attempt, answer.holder

    def values(self, begin: int, *, at_least: int = 0) -> list[float]:
        """Return all LRs from a progress on that are fixed; blocked while they are too few."""
        got: list[float] = []
        while True:
            request = trainer_pb2.GetValuesRequest(
                run=RUN,
                attempt=self.attempt,
                begin=begin + len(got),
                stride=1,
                count=128,
                wait_ms=WAIT_MS if len(got) < at_least else 0,
                blocked=len(got) < at_least,
                holder=self.holder,
            )
            answer = self.trainer.GetValues(request, timeout=CALL_S, wait_for_ready=True)
            if not answer.block.learning_rates:
                self.steps.update(enumerate(got, begin))
                return got
            got += answer.block.learning_rates

    def use(self, begin: int, end: int) -> None:
        """Step from a progress to another on what it got."""
        for at in range(begin, end):
            self.history.used(RUN, self.attempt.number, at, [self.steps[at]], None)

    def report(self, begin: int, *losses: float | None, **fields: Any) -> list[str]:
        """Report losses from a progress on; return what became of each."""
        return self.reporting(begin, *losses, **fields)()

    def reporting(
        self, begin: int, *losses: float | None, **fields: Any
    ) -> Callable[[], list[str]]:
        """Return what sends one report; `fields`: what else it says of each step."""
        request = trainer_pb2.ReportLossesRequest(
            run=RUN, attempt=self.attempt, rank=self.rank, incarnation=self.who
        )
        for at, loss in enumerate(losses, begin):
            request.reports.add(**{"progress": at, "loss": loss, "moves_to": at + 1} | fields)

        def send() -> list[str]:
            answer = self.trainer.ReportLosses(request, timeout=CALL_S, wait_for_ready=True)
            names = (trainer_pb2.ReportOutcome.Name(item) for item in answer.outcomes)
            return [name.removeprefix("REPORT_OUTCOME_") for name in names]

        return send

    def adjusting(self, **action: Any) -> Callable[[], int]:
        """Return what sends one request of an operator; it returns where the change shows."""
        request = runs_pb2.AdjustRunRequest(
            run=RUN, request_id=self.fresh("adjust"), author="oncall", reason="try", **action
        )
        return lambda: int(
            self.runs.AdjustRun(request, timeout=CALL_S, wait_for_ready=True).effective
        )

    def save(self, progress: int) -> bytes:
        """Return a saved state."""
        request = trainer_pb2.SaveStateRequest(
            run=RUN, attempt=self.attempt, progress=progress, wait_ms=10_000
        )
        return bytes(self.trainer.SaveState(request, timeout=CALL_S, wait_for_ready=True).state)

    def loses(self, send: Callable[[], object]) -> None:
        """Send something that is carried out, and whose answer is lost."""
        address = self.channel._server
        servers = self.bench.cluster.servers
        (relay,) = (item.relay for item in servers if item.relay.address == address)
        relay.lose_answers(1)
        try:
            send()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        else:
            raise AssertionError("the answer was not lost")
        finally:
            relay.heal()

    def fresh(self, what: str) -> str:
        """Return an id that was not used yet."""
        return f"{what}-{next(self.bench.numbers)}"


def refused(send: Callable[[], object]) -> str:
    """Return the name of the status that a call is refused with; empty: it is not."""
    try:
        send()
    except grpc.RpcError as error:
        return str(error.code().name)
    return ""


@dataclass(frozen=True)
class Round:
    """One directed round."""

    name: str
    body: Callable[[Bench], None]
    store: StoreKind
    replicas: int


ROUNDS: dict[str, Round] = {}


def _round(
    store: StoreKind = "sqlite", replicas: int = 1
) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def add(body: Callable[[Bench], None]) -> Callable[[Bench], None]:
        name = body.__name__.replace("_", " ")
        ROUNDS[name] = Round(name, body, store, replicas)
        return body

    return add


def play(name: str, *, bug: str = "") -> tuple[list[Violation], str]:
    """Play a round on fresh servers.

    Returns what the checker found, and the assertion or call of the round itself that failed.
    """
    chosen = ROUNDS[name]
    with ExitStack() as stack:
        # PostgreSQL runs as another user, who may not enter the folders of pytest.
        folder = Path(tempfile.mkdtemp(prefix="lrpilot-directed-"))
        stack.callback(shutil.rmtree, folder)
        folder.chmod(0o755)
        histories, disk = folder / "histories", folder / "disk"
        histories.mkdir()
        disk.mkdir()
        PROCESSES.set_forkserver_preload(PRELOADED)
        network = Network()
        stack.callback(network.close)
        cluster: Cluster
        if chosen.store == "sqlite":
            cluster = SqliteCluster(network, folder, disk, bug)
        else:
            cluster = PostgresCluster(network, folder, disk, chosen.replicas, bug)
        stack.callback(cluster.close)
        cluster.start()
        bench = Bench(cluster, histories, stack)
        failure = ""
        try:
            chosen.body(bench)
        except (AssertionError, grpc.RpcError) as error:
            failure = f"{type(error).__name__}: {error}"
        return bench.check(), failure


# The rounds.


@_round()
def killed_after_an_answer(bench: Bench) -> None:
    """What was acknowledged is there though the server is killed at once."""
    rank = bench.process("r0.0")
    rank.attach()
    rank.open()
    assert rank.values(0) == [LR] * 4
    rank.use(0, 3)
    assert rank.report(0, 1.0, 1.0) == ["RECORDED"] * 2
    (server,) = bench.cluster.servers
    server.end()
    server.start()
    assert rank.values(0) == [LR] * 5 + [LR / 2]


@_round()
def power_lost_after_an_answer(bench: Bench) -> None:
    """What was acknowledged is there though the machine lost its power."""
    rank = bench.process("r0.0")
    rank.attach()
    rank.open()
    (server,) = bench.cluster.servers
    assert isinstance(bench.cluster, SqliteCluster)
    power = PowerLoss(server.pid, bench.cluster.disk / "data")
    try:
        assert rank.values(0) == [LR] * 4
        rank.use(0, 3)
        assert rank.report(0, 1.0, 1.0) == ["RECORDED"] * 2
        server.end()
        power.cut()
    finally:
        power.close()
    server.start()
    assert rank.values(0) == [LR] * 5 + [LR / 2]


@_round()
def steps_without_a_loss(bench: Bench) -> None:
    """What is said of a step that has no loss is as durable as a loss."""
    rank = bench.process("r0.0")
    rank.attach()
    rank.open()
    validation = {"val": 0.5}
    assert rank.report(0, 1.0) == ["RECORDED"]
    assert rank.report(1, None, validation_losses=validation) == ["RECORDED"]
    assert rank.report(2, None, skipped=True, moves_to=2) == ["RECORDED"]
    rank.loses(rank.reporting(2, None, validation_losses=validation, **{"try": 1}))
    assert rank.report(2, None, validation_losses=validation, **{"try": 1}) == ["REPEATED"]
    assert bench.kinds().count("reported") == 4
    # The plateau decides at 3, the first loss after the one at 0.
    assert rank.report(3, 1.0) == ["RECORDED"]
    assert rank.values(0) == [LR] * 7 + [LR / 2]
    rank.use(0, 2)
    # The update at 2 was skipped.
    rank.use(2, 3)
    rank.use(2, 8)


@_round()
def the_same_losses_again_after_an_operator(bench: Bench) -> None:
    """A resume with the same losses finds the change of an operator where it was."""
    rank, operator = bench.process("r0.0"), bench.process("o.0")
    rank.attach()
    rank.open()
    assert rank.values(0) == [LR] * 4
    # The plateau decides at 1 and, once that has acted, at 5.
    rank.report(0, *[1.0] * 6)
    adjust = operator.adjusting(scale_lr=0.5)
    operator.loses(adjust)
    assert adjust() == 10
    rank.report(6, 1.0, 1.0)
    expected = [LR] * 5 + [LR / 2] * 4 + [LR / 4] + [LR / 8] * 2
    assert rank.values(0) == expected
    rank.use(0, 9)
    again = bench.process("r0.1").open(4)
    assert again.values(4) == expected[4:8]
    assert again.report(4, *[1.0] * 4) == ["RECORDED"] * 4
    assert again.values(4) == expected[4:]
    again.use(4, 12)


@_round()
def other_losses_after_a_resume(bench: Bench) -> None:
    """A resume forgets what the losses behind it decided."""
    rank = bench.process("r0.0")
    rank.attach()
    rank.open()
    rank.report(0, 1.0, 1.0, 1.0, 1.0)
    assert rank.values(0) == [LR] * 5 + [LR / 2] * 3
    rank.use(0, 5)
    again = bench.process("r0.1").open(1)
    assert again.values(1) == [LR] * 4
    # Better each time: nothing is decided.
    assert again.report(1, 0.9, 0.8, 0.7, 0.6) == ["RECORDED"] * 4
    assert again.values(1) == [LR] * 8
    again.use(1, 9)


@_round()
def a_late_loss_after_a_waiver(bench: Bench) -> None:
    """A loss that comes after ranks went on without it decides nothing."""
    rank, other = bench.process("r0.0"), bench.process("r1.0", rank=1)
    rank.attach(timeout_s=WAIVER_S)
    rank.open(key="start")
    other.open(key="start")
    rank.report(0, 1.0)
    assert other.values(0) == [LR] * 5
    other.use(0, 5)
    # Nobody reports: after the timeout the losses at 1 to 4 are final as absent.
    assert other.values(5, at_least=4) == [LR] * 4
    assert bench.kinds().count("waived") == 1
    assert rank.report(1, 2.0, 2.0, 2.0, 2.0) == ["LATE"] * 4
    assert rank.report(1, 2.0) == ["LATE"]
    # The first one that counts is the one at 5.
    assert rank.report(5, 2.0, 2.0) == ["RECORDED"] * 2
    assert other.values(9) == [LR / 2] * 2
    rank.values(0)
    rank.use(0, 7)


@_round()
def a_rewind_below_a_revision(bench: Bench) -> None:
    """An attempt that opens before a revision meets it where it was made."""
    rank, operator = bench.process("r0.0"), bench.process("o.0")
    rank.attach()
    rank.open()
    rank.report(0, 1.0)
    spec = {
        "name": RUN,
        "total": 1000,
        "learning_rate": {"peak": 2 * LR},
        "policies": [{"kind": "plateau", "patience": 0, "factor": 0.5}],
        "feedback": {"delay": 4, "timeout": "60s"},
    }
    revise = runs_pb2.ReviseRunRequest(
        run=RUN, spec_document=json.dumps(spec), request_id="revise", author="oncall", reason="try"
    )
    assert operator.runs.ReviseRun(revise, timeout=CALL_S).effective == 5
    rank.report(1, 0.9, 0.8, 0.7, 0.6)
    assert rank.values(0) == [LR] * 5 + [2 * LR] * 4
    rank.use(0, 9)
    again = bench.process("r0.1").open(2)
    assert again.values(2) == [LR] * 3 + [2 * LR]
    # No better than the one at 1, which counts still.
    again.report(2, 5.0)
    assert again.values(2) == [LR] * 3 + [2 * LR] + [LR]
    again.use(2, 7)


@_round("postgresql", 2)
def two_replicas_open_at_once(bench: Bench) -> None:
    """Ranks that open at two replicas at once are in one attempt; starts are in one each."""
    bench.process("r0.0").attach()
    ranks = [bench.process(f"r{rank}.0", rank % 2, rank=rank) for rank in range(4)]
    together([rank.opening(key="start") for rank in ranks], [rank.take for rank in ranks])
    assert {(rank.attempt.number, rank.attempt.token) for rank in ranks} == {
        (1, ranks[0].attempt.token)
    }
    for rank in ranks:
        assert rank.values(0) == [LR] * 4
        rank.use(0, 4)
    starts = [bench.process(f"r0.{number}", number % 2) for number in range(1, 5)]
    together([start.opening(0) for start in starts], [start.take for start in starts])
    assert sorted(start.attempt.number for start in starts) == [2, 3, 4, 5]
    (last,) = (start for start in starts if start.attempt.number == 5)
    for server in (0, 1):
        assert last.at(server).values(0) == [LR] * 4


@_round("postgresql", 2)
def a_reporter_goes_over_to_another_replica(bench: Bench) -> None:
    """A replica is killed before its answer comes; the same report finds the other one."""
    rank = bench.process("r0.0", 0)
    rank.attach()
    rank.open()
    assert rank.values(0) == [LR] * 4
    for round_ in range(3):
        begin = 2 * round_
        send = rank.reporting(begin, 1.0, 1.0)
        rank.loses(send)
        bench.cluster.servers[0].end()
        assert rank.at(1).report(begin, 1.0, 1.0) == ["REPEATED"] * 2
        bench.cluster.servers[0].start()
        assert rank.at(0).report(begin, 1.0, 1.0) == ["REPEATED"] * 2
    assert bench.kinds().count("reported") == 3
    # Decided at 1 and at 5.
    expected = [LR] * 5 + [LR / 2] * 4 + [LR / 4]
    for server in (0, 1):
        assert rank.at(server).values(0, at_least=10) == expected
    rank.use(0, 10)


@_round("postgresql", 2)
def a_zombie_speaks(bench: Bench) -> None:
    """A rank of a superseded attempt gets nothing fixed, at whichever replica."""
    zombie = bench.process("r0.0", 0)
    zombie.attach()
    zombie.open()
    zombie.report(0, 1.0)
    assert zombie.values(0) == [LR] * 5
    zombie.use(0, 3)
    rank = bench.process("r0.1", 1).open(0)
    assert rank.values(0) == [LR] * 4
    said = []
    for server in (0, 1):
        said.append(refused(zombie.at(server).reporting(1, 1.0, 1.0)))
        said.append(refused(lambda server=server: zombie.at(server).values(5)))  # type: ignore[misc]
    rank.report(0, 1.0, 0.9)
    assert rank.values(0) == [LR] * 6
    for server in (0, 1):
        said.append(refused(zombie.at(server).reporting(1, 1.0, 1.0)))
        said.append(refused(lambda server=server: zombie.at(server).values(5)))  # type: ignore[misc]
    assert said == ["FAILED_PRECONDITION"] * 8
    assert rank.values(0) == [LR] * 6
    rank.use(0, 6)


@_round("postgresql", 2)
def the_answer_to_an_opening_is_lost(bench: Bench) -> None:
    """Who asks again is in the attempt that the first request opened."""
    rank = bench.process("r0.0", 0)
    rank.attach()
    opening = rank.opening()
    rank.loses(opening)
    answer = opening()
    assert answer.attempt.number == 1
    assert not answer.joined
    rank.take(answer)
    assert bench.kinds().count("opened") == 1
    assert rank.at(1).values(0) == [LR] * 4
    rank.use(0, 4)


@_round("postgresql", 2)
def a_report_is_sent_again_to_the_other_replica(bench: Bench) -> None:
    """The loss whose answer was lost is in the log once."""
    rank = bench.process("r0.0", 0)
    rank.attach()
    rank.open()
    rank.loses(rank.reporting(0, 1.0, 2.0))
    assert rank.at(1).report(0, 1.0, 2.0) == ["REPEATED"] * 2
    assert rank.at(0).report(1, 2.0, 0.5) == ["REPEATED", "RECORDED"]
    assert bench.kinds().count("reported") == 2
    assert rank.at(1).values(0, at_least=7) == [LR] * 5 + [LR / 2] * 2
    rank.use(0, 7)


@_round("postgresql", 2)
def a_change_lands_at_the_horizon_while_values_are_fetched(bench: Bench) -> None:
    """A change at one replica shows from the horizon on at the other, in no value below."""
    rank = bench.process("r0.0", 0)
    rank.attach(policies=[{"kind": "plateau", "patience": 900, "factor": 0.5}])
    rank.open()
    fetching = rank.at(1)
    operator = bench.process("o.0", 0)
    expected = LR
    for round_ in range(10):
        horizon = 4 + round_
        adjust = operator.adjusting(scale_lr=0.5)
        got: list[list[float]] = []
        effective: list[int] = []
        together(
            [adjust, lambda at=horizon - 4: fetching.values(at)],  # type: ignore[misc]
            [effective.append, got.append],
        )
        assert effective == [horizon]
        assert got[0][-1] == expected
        rank.report(round_, 1.0)
        expected /= 2
        assert fetching.values(horizon, at_least=1) == [expected]
    assert rank.values(0) == [LR] * 4 + [LR / 2**power for power in range(1, 11)]
    rank.use(0, 14)


@_round("postgresql", 2)
def the_answer_to_a_declaration_is_lost(bench: Bench) -> None:
    """What a holder used alone is a fact once, and what was decided meanwhile waits behind it."""
    holder, operator = bench.process("r0.0", 0), bench.process("o.0", 1)
    holder.attach()
    holder.open(leader=True)
    assert holder.values(0) == [LR] * 4
    offered = holder.trainer.OfferValues(
        trainer_pb2.OfferValuesRequest(
            run=RUN, attempt=holder.attempt, holder=holder.holder, begin=4, stride=1, count=8
        ),
        timeout=CALL_S,
    )
    assert list(offered.block.learning_rates) == [LR] * 8
    assert operator.adjusting(scale_lr=0.5)() == 4
    holder.steps.update(enumerate(offered.block.learning_rates, 4))
    holder.use(0, 10)
    request = trainer_pb2.DeclareValuesRequest(
        run=RUN, attempt=holder.attempt, holder=holder.holder, offer=offered.offer
    )
    block = request.blocks.add(begin=4, stride=1)
    block.learning_rates.extend(offered.block.learning_rates[:6])

    def declare(process: Process) -> Callable[[], Any]:
        return lambda: process.trainer.DeclareValues(request, timeout=CALL_S, wait_for_ready=True)

    holder.loses(declare(holder))
    answer = declare(holder.at(1))()
    assert answer.horizon == 10
    assert bench.kinds().count("declared") == 1
    holder.report(6, 1.0)
    assert holder.at(1).values(10, at_least=1) == [LR / 2]
    holder.use(10, 11)


def together(sends: Sequence[Callable[[], Any]], takes: Sequence[Callable[[Any], object]]) -> None:
    """Send several requests at the same time, and take their answers."""
    ready = threading.Barrier(len(sends))

    def send(one: Callable[[], Any]) -> Any:
        ready.wait(CALL_S)
        return one()

    with ThreadPoolExecutor(len(sends)) as pool:
        for take, answer in zip(takes, list(pool.map(send, sends)), strict=True):
            take(answer)
