"""Every rule of the design at once: random runs of a job that meets every mishap.

Two servers share one store and each lags behind the other; answers and requests are lost,
messages come twice, attempts are superseded and go on all the same, jobs resume further back and
differ, operators change the spec and the plan and ask for rollbacks, optimizers refuse updates,
reporters fall silent. `World` holds every answer against the
promise.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lrpilot.server._sql_store import SqlStore
from lrpilot.server._store import Store
from tests.rules.world import FAR, Saved, World, make_spec, promise

LOSSES = st.sampled_from([1.0, 1.0, 1.0, 1.5, 0.5, 0.25, float("nan"), float("inf"), -0.0, 0.0])
REPLICAS = st.integers(0, 1)
FAULTS = st.sampled_from(["none", "none", "none", "lost request", "lost answer"])
STRIDES = st.sampled_from([1, 1, 2, 3, 10])


class Job(RuleBasedStateMachine):
    """One run, its ranks, its servers."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World
        self.saved: list[Saved] = []

    def store(self) -> Store | None:
        """The store to use; None: one in memory."""
        return None

    @initialize(
        delay=st.sampled_from([1, 2, 3, 8]),
        patience=st.integers(0, 2),
        leads=st.booleans(),
        hands_back=st.booleans(),
    )
    def start(self, delay: int, patience: int, leads: bool, hands_back: bool) -> None:
        self.world = World(
            make_spec(delay, patience=patience), self.store(), leads=leads, hands_back=hands_back
        )
        self.world.open(0)

    @rule(
        back=st.integers(0, 20),
        ahead=st.integers(0, 12),
        stride=STRIDES,
        count=st.integers(1, 6),
        replica=REPLICAS,
        fault=FAULTS,
        again=st.booleans(),
    )
    def ask(
        self, back: int, ahead: int, stride: int, count: int, replica: int, fault: Any, again: bool
    ) -> None:
        world = self.world
        begin = max(world.current.begin, world.reference.horizon - back + ahead)
        world.ask(begin, stride=stride, count=count, replica=replica, fault=fault)
        if again:
            world.ask(begin, stride=stride, count=count, replica=1 - replica)

    @precondition(lambda self: not self.world.leads)
    @rule(ahead=st.integers(0, 25), stride=STRIDES, replica=REPLICAS, fault=FAULTS)
    def be_blocked(self, ahead: int, stride: int, replica: int, fault: Any) -> None:
        world = self.world
        begin = world.reference.horizon + ahead
        if ahead < FAR * stride:
            world.ask(begin, stride=stride, replica=replica, fault=fault, blocked=True)

    @precondition(lambda self: self.world.leads)
    @rule(ahead=st.integers(-3, 3), stride=STRIDES, replica=REPLICAS, fault=FAULTS)
    def be_offered(self, ahead: int, stride: int, replica: int, fault: Any) -> None:
        """The holder gets values to go on with while the servers are away."""
        world = self.world
        begin = max(world.current.begin, world.arrived + ahead)
        world.offer(begin, stride=stride, replica=replica, fault=fault)

    @precondition(lambda self: self.world.leads)
    @rule(
        steps=st.integers(1, 12),
        stride=STRIDES,
        losses=st.integers(0, 6),
        change=st.sampled_from(["none", "multiply", "hold", "revise", "ask"]),
        again=st.booleans(),
        replica=REPLICAS,
        fault=FAULTS,
    )
    def go_alone(
        self,
        steps: int,
        stride: int,
        losses: int,
        change: str,
        again: bool,
        replica: int,
        fault: Any,
    ) -> None:
        """The servers are away for the holder alone, which goes on and then declares what it used.

        Meanwhile the reporter gets through, and so do operators.
        """
        world = self.world
        offer = world.offered or world.offer(stride=stride, replica=replica)

        def meanwhile() -> None:
            at = world.reference.frontier
            if losses:
                world.report(*((at + n, 1.0, at + n + 1) for n in range(losses)), replica=replica)
            if change == "revise":
                world.revise(make_spec(world.delay, patience=losses % 3), replica=1 - replica)
            elif change == "ask":
                world.ask_ranks("evaluate", replica=1 - replica)
            elif change != "none":
                world.adjust(change, 0.7, replica=1 - replica)

        used = world.go_alone(steps, offer=offer, replica=replica, fault=fault, reported=meanwhile)
        if used and again:
            world.declare(used, offer, replica=1 - replica)

    @rule(
        losses=st.lists(st.none() | LOSSES, min_size=1, max_size=6),
        skips=st.sampled_from([0, 0, 0, 1, 9]),
        increment=st.sampled_from([1, 1, 1, 2, 10]),
        replica=REPLICAS,
        fault=FAULTS,
        twice=st.booleans(),
    )
    def report(
        self,
        losses: list[float | None],
        skips: int,
        increment: int,
        replica: int,
        fault: Any,
        twice: bool,
    ) -> None:
        world = self.world
        at = world.reference.frontier + skips
        reports = []
        for loss in losses:
            reports.append((at, loss, at + increment))
            at += increment
        world.report(*reports, replica=replica, fault=fault)
        if twice:
            world.report(*reports, replica=1 - replica)

    @precondition(lambda self: self.world.reference.frontier > self.world.current.begin)
    @rule(data=st.data(), loss=LOSSES, replica=REPLICAS)
    def report_what_is_final(self, data: st.DataObject, loss: float, replica: int) -> None:
        world, reference = self.world, self.world.reference
        at = data.draw(st.integers(world.current.begin, reference.frontier - 1))
        known = reference.losses.get(at, reference.late.get(at))
        call = (at, loss, at + 1)
        if known is None or known.hex() == loss.hex():
            world.report(call, replica=replica)
        else:
            got = world.refusal(lambda: world.report(call, replica=replica))
            promise(got == "LossConflict", f"another loss at {at}: {got}")

    @precondition(lambda self: self.world.current.begin > 0)
    @rule(loss=LOSSES, replica=REPLICAS)
    def report_below_the_resume_point(self, loss: float, replica: int) -> None:
        world = self.world
        at = world.current.begin - 1
        got = world.refusal(lambda: world.report((at, loss, at + 1), replica=replica))
        promise(got == "BelowResumePoint", f"a loss below the resume point: {got}")

    @precondition(lambda self: len(self.world.attempts) > 1)
    @rule(data=st.data(), replica=REPLICAS, loss=LOSSES, stride=STRIDES)
    def zombie(self, data: st.DataObject, replica: int, loss: float, stride: int) -> None:
        """A rank of an old attempt goes on. A server that lags may repeat what is recorded."""
        world = self.world
        attempt = data.draw(st.sampled_from(world.attempts[:-1]))
        at = attempt.begin + data.draw(st.integers(0, 30))
        fresh = world.is_fresh(replica)
        got = world.refusal(lambda: world.ask(at, attempt=attempt, replica=replica, stride=stride))
        promise(got == "AttemptSuperseded" or not fresh, f"a zombie's question: {got}")
        before = dict(world.reference.losses)
        frontier = world.reference.frontier
        got = world.refusal(
            lambda: world.report((at, loss, at + 1), attempt=attempt, replica=1 - replica)
        )
        world.reference.losses, world.reference.frontier = before, frontier
        promise(got == "AttemptSuperseded", f"a zombie's loss: {got}")

    @rule(data=st.data(), replica=REPLICAS)
    def save(self, data: st.DataObject, replica: int) -> None:
        world = self.world
        progress = data.draw(st.integers(world.current.begin, world.reference.frontier))
        self.saved.append(world.save(progress, replica=replica))

    @rule(data=st.data(), replica=REPLICAS, fault=FAULTS)
    def resume_at(self, data: st.DataObject, replica: int, fault: Any) -> None:
        world = self.world
        low, high = world.reference.origin, world.reference.frontier + 3
        world.open(data.draw(st.integers(low, high)), replica=replica, fault=fault)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), replica=REPLICAS, fault=FAULTS)
    def resume_from_a_checkpoint(self, data: st.DataObject, replica: int, fault: Any) -> None:
        self.world.open(state=data.draw(st.sampled_from(self.saved)), replica=replica, fault=fault)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), replica=REPLICAS, attach=st.booleans())
    def lose_the_store(self, data: st.DataObject, replica: int, attach: bool) -> None:
        state = data.draw(st.sampled_from(self.saved))
        self.world.lose_the_store(state, replica=replica, attach=attach)
        self.saved = [state]

    @rule(data=st.data(), replica=REPLICAS, fault=FAULTS)
    def move_elsewhere(self, data: st.DataObject, replica: int, fault: Any) -> None:
        self.world.move(replica=replica)
        self.resume_at(data, replica, fault)

    @rule(
        peak=st.sampled_from([0.1, 0.2]),
        patience=st.integers(0, 2),
        replica=REPLICAS,
        fault=FAULTS,
    )
    def revise(self, peak: float, patience: int, replica: int, fault: Any) -> None:
        world = self.world
        spec = make_spec(world.delay, peak=peak, patience=patience)
        world.revise(spec, replica=replica, fault=fault)

    @rule(
        losses=st.lists(LOSSES, min_size=1, max_size=2),
        ahead=st.sampled_from([0, 0, 0, 2]),
        replica=REPLICAS,
        fault=FAULTS,
        again=st.booleans(),
    )
    def skip(self, losses: list[float], ahead: int, replica: int, fault: Any, again: bool) -> None:
        """The optimizer refuses some updates at the same progress."""
        world = self.world
        at = world.reference.frontier + ahead
        for loss in losses:
            tries = world.reference.tries(at)
            world.skip(at, loss, replica=replica, fault=fault)
            if again:
                world.skip(at, loss, tries, replica=1 - replica)

    @rule(
        change=st.sampled_from(
            [
                ("multiply", 0.7),
                ("multiply", 2.0),
                ("set", 0.05),
                ("set", 0.2),
                ("scale weight decay", 0.5),
                ("hold", 0.0),
                ("release", 0.0),
            ]
        ),
        replica=REPLICAS,
        fault=FAULTS,
        dry=st.booleans(),
    )
    def adjust(self, change: tuple[str, float], replica: int, fault: Any, dry: bool) -> None:
        self.world.adjust(*change, replica=replica, fault=fault, dry=dry)

    @rule(data=st.data(), replica=REPLICAS, fault=FAULTS)
    def undo(self, data: st.DataObject, replica: int, fault: Any) -> None:
        reference = self.world.reference
        links = (*reference.decided().cuts, *reference.made)
        names = [item.name for item in links if item.action not in ("undo", "directive")]
        if names:
            target = data.draw(st.sampled_from(names))
            self.world.adjust("undo", target=target, replica=replica, fault=fault)

    @precondition(lambda self: self.world.done)
    @rule(data=st.data(), replica=REPLICAS)
    def repeat_what_an_operator_did(self, data: st.DataObject, replica: int) -> None:
        self.world.repeat(data.draw(st.sampled_from(self.world.done)), replica=replica)

    @precondition(lambda self: self.world.reference.frontier > 0)
    @rule(
        kind=st.sampled_from(["evaluate", "rollback", "rollback"]),
        factor=st.sampled_from([0.5, 0.9]),
        replica=REPLICAS,
        fault=FAULTS,
    )
    def ask_ranks(self, kind: str, factor: float, replica: int, fault: Any) -> None:
        self.world.ask_ranks(kind, before=1, factor=factor, replica=replica, fault=fault)

    @rule(data=st.data(), replica=REPLICAS, fault=FAULTS)
    def roll_back(self, data: st.DataObject, replica: int, fault: Any) -> None:
        """A rank of the attempt in use meets a rollback and opens the attempt that it asks for."""
        world, reference = self.world, self.world.reference
        asked = [item for item in reference.made if item.asked == "rollback"]
        if asked:
            begin = data.draw(st.integers(reference.origin, reference.frontier + 2))
            directive = data.draw(st.sampled_from(asked))
            world.open(begin, directive=directive, replica=replica, fault=fault)

    @rule(replica=REPLICAS)
    def kill_a_server(self, replica: int) -> None:
        self.world.restart(replica)

    @invariant()
    def the_log_tells_all(self) -> None:
        if hasattr(self, "world"):
            self.world.check_log()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        try:
            # Nobody reports any more, and the ranks get on all the same.
            for _ in range(3):
                if world.leads:
                    world.offer(count=2)
                    world.go_alone(2)
                else:
                    world.ask(world.reference.horizon, blocked=True)
            world.check()
        finally:
            world.close()


TestInMemory = pytest.mark.timeout(900)(Job.TestCase)
TestInMemory.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class JobOnSqlite(Job):
    """The same on a database file."""

    def store(self) -> Store | None:
        self.folder = tempfile.TemporaryDirectory(prefix="lrpilot-rules-")
        return SqlStore.in_folder(Path(self.folder.name), "lrpilot.db")

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "world"):
                self.world.store.close()
                self.folder.cleanup()


TestOnSqlite = JobOnSqlite.TestCase
TestOnSqlite.settings = settings(TestInMemory.settings, max_examples=10, stateful_step_count=30)
