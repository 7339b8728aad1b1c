"""Two servers over one store, without the wire between, and everything that can go wrong.

`World` speaks to the services as their gRPC handlers do, and holds every answer against the
reference: one value for each attempt and progress, and that value the one that the losses give.
"""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lrpilot import core
from lrpilot.client._held import Held
from lrpilot.core._plan import ORDER_OF_OPERATORS
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._ledger import Ledger
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._packing import PackedLog
from lrpilot.server._run_service import RunService
from lrpilot.server._store import (
    Append,
    AppendResult,
    Heard,
    LogRow,
    Segment,
    Snapshot,
    Store,
    StoreUnavailable,
)
from lrpilot.server._trainer_service import MAX_DIRECTIVES, TrainerService
from lrpilot.v1 import runs_pb2, trainer_pb2
from tests.rules.reference import Decided, Hex, Link, Name, Permit, Reference, Version
from tests.trimmed import check_trimmed, trimmed

T = TypeVar("T")

RUN = "run"
REPORTER = 0
FAR = 128
"""Steps beyond the horizon from which on a request is refused instead of waiting."""

Fault = Literal["none", "lost request", "lost answer"]


class BrokenPromise(AssertionError):
    """The system did what it promised not to do."""


def promise(kept: bool, text: str) -> None:
    if not kept:
        raise BrokenPromise(text)


def make_spec(delay: int, *, peak: float = 0.1, patience: int = 1, **fields: Any) -> dict[str, Any]:
    """A spec whose LR and WD differ at every progress, with a policy that fires soon.

    `fields` take the place of its own; None: without that field.
    """
    spec = {
        "name": RUN,
        "total": 1000,
        "learning_rate": {
            "init": 0.01,
            "peak": peak,
            "min": 0.001,
            "warmup": 7,
            "decay": {"style": "cosine"},
        },
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
        "groups": [{"name": "all"}, {"name": "small", "peak": peak / 3}],
        "policies": [{"kind": "plateau", "patience": patience, "factor": 0.5}],
        "feedback": {"delay": delay, "timeout": "1ms"},
        "bounds": {"min_lr": 0.0005, "max_lr": 0.25},
        **fields,
    }
    return {name: value for name, value in spec.items() if value is not None}


class FaultyStore:
    """A store whose next append can fail, before it is durable or after."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fault: Fault = "none"

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        if self.fault == "lost request":
            self.fault = "none"
            raise StoreUnavailable("told to fail")
        results = self._store.append(batch)
        if self.fault == "lost answer" and results == [None]:
            self.fault = "none"
            raise StoreUnavailable("told to fail after the commit")
        return results

    def adopt(self, run: str, log: PackedLog) -> None:
        if self.fault == "lost request":
            self.fault = "none"
            raise StoreUnavailable("told to fail")
        self._store.adopt(run, log)
        if self.fault == "lost answer":
            self.fault = "none"
            raise StoreUnavailable("told to fail after the commit")

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        return self._store.read(run, after_seq, limit)

    def head(self, run: str) -> tuple[int, str] | None:
        return self._store.head(run)

    def heads(self, runs: Sequence[str]) -> dict[str, tuple[int, str]]:
        return self._store.heads(runs)

    def runs(self, after_name: str = "", limit: int | None = None) -> list[str]:
        return self._store.runs(after_name, limit)

    def delete(self, run: str, after: str | None = None) -> bool:
        return self._store.delete(run, after)

    def recent(self, since_ns: int) -> list[str]:
        return self._store.recent(since_ns)

    def save_snapshot(self, run: str, snapshot: Snapshot) -> bool:
        return self._store.save_snapshot(run, snapshot)

    def snapshot(
        self, run: str, floor: int | None = None, before_seq: int | None = None
    ) -> Snapshot | None:
        return self._store.snapshot(run, floor, before_seq)

    def compact(self, run: str, through_seq: int) -> int:
        return self._store.compact(run, through_seq)

    def segments(self, run: str, after_seq: int = 0) -> list[Segment]:
        return self._store.segments(run, after_seq)

    def segment(self, run: str, segment: Segment) -> bytes | None:
        return self._store.segment(run, segment)

    def save_overview(self, run: str, segment: Segment) -> bool:
        return self._store.save_overview(run, segment)

    def size(self) -> int:
        return self._store.size()

    @property
    def folder(self) -> Path | None:
        return self._store.folder

    def check(self) -> None:
        self._store.check()

    def probe(self) -> None:
        self._store.probe()

    def follow(self, heard: Heard) -> bool:
        return self._store.follow(heard)

    def close(self) -> None:
        self._store.close()


class Replica:
    """One server over the shared store."""

    def __init__(self, store: Store) -> None:
        self.store = FaultyStore(store)
        self.committer = GroupCommitter(self.store)
        # Snapshots so often, and so little kept, that every case meets history it has to read.
        history = History(self.store, snapshot_every=6, kept_steps=2, kept_delays=0)
        self.ledger = Ledger(self.store, self.committer, history)
        self.trainers = TrainerService(self.ledger)
        self.people = RunService(self.ledger)


@dataclass(frozen=True)
class Attempt:
    """What the ranks of one attempt hold."""

    number: int
    begin: int
    token: bytes
    holder: bytes = b""
    """Leader mode: what the one who gets the values holds."""
    log: bytes = b""
    """What names the log of the run."""

    @property
    def message(self) -> trainer_pb2.Attempt:
        return trainer_pb2.Attempt(number=self.number, token=self.token)

    @property
    def incarnation(self) -> str:
        return f"process of attempt {self.number}"


@dataclass(frozen=True)
class Saved:
    """A state in a checkpoint, and what the promise says of it."""

    blob: bytes
    progress: int
    decided: Decided
    versions: tuple[Version, ...]
    attempt: int
    given: Mapping[str, Any] | None
    """The last spec that a trainer gave."""
    handed: Mapping[int, Hex]
    """Values that had left by then, from `progress` on, by progress."""
    made: tuple[Link, ...]
    count: int
    """What operators and rollbacks had done, and how many things in all."""
    rewinds: int
    """How often the losses had become others by then."""


@dataclass(frozen=True)
class Offered:
    """Values for the holder to go on with alone."""

    values: Mapping[int, Hex]
    stride: int
    number: int
    """What a declaration gives back."""
    permit: Permit


@dataclass(frozen=True)
class Copy:
    """A copy of the database, and what the promise says of the run then."""

    rows: list[LogRow]
    reference: Reference
    attempts: list[Attempt]
    done: list["Done"]


@dataclass(frozen=True)
class Done:
    """What an operator asked for, and the first answer."""

    request: runs_pb2.AdjustRunRequest | runs_pb2.ApproveAdviceRequest
    effective: int
    adjustment: str
    """Id; empty: nothing was to be done."""


class World:
    """The system and the promise, side by side."""

    def __init__(
        self,
        spec: dict[str, Any],
        store: Store | None = None,
        *,
        wait_ms: int = 30_000,
        leads: bool = False,
        hands_back: bool = False,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.store = store or MemoryStore()
        self.spec = spec
        self.wait_ms = wait_ms
        """How long a blocked rank waits in one call, milliseconds."""
        self.leads = leads
        self.hands_back = hands_back
        """Whether ranks hand back what they have; a server that lags reads the log anew then."""
        """Whether attempts are opened in leader mode."""
        self.offered: Offered | None = None
        """The newest offer of the attempt in use."""
        self.reference_is_off = False
        """Whether what is computed comes out otherwise than elsewhere."""
        self.replicas = [self._in_loop(self._replica()) for _ in range(2)]
        self.reference = Reference(spec["feedback"]["delay"], [Version(0, 0, spec)])
        self.attempts: list[Attempt] = []
        self.handed: dict[tuple[int, int], Hex] = {}
        """Every value that ever left, by (attempt, progress)."""
        self.holds: dict[tuple[bytes, int], Held] = {}
        """What the ranks of each attempt have to hand back, by its token and the rank."""
        self.told: dict[bytes, int] = {}
        """The greatest frontier that they were told, by the token."""
        self.given: Mapping[str, Any] | None = None
        """The last spec that a trainer gave."""
        self.restoring = False
        """Whether the next opening finds nothing but its saved state."""
        self.met: dict[tuple[int, str], tuple[int, int]] = {}
        """(attempt, id) of each directive that ranks were told of, to its (kind, progress)."""
        self.done: list[Done] = []
        """What operators did."""
        self._ids = (f"request {number}" for number in itertools.count())
        request = runs_pb2.CreateRunRequest(
            spec_document=json.dumps(spec), request_id=self.next_id()
        )
        self.call(lambda one: one.people.create_run(request))

    def close(self) -> None:
        for replica in self.replicas:
            self._in_loop(replica.committer.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def call(self, call: Callable[[Replica], Awaitable[T]], replica: int = 0) -> T:
        """Make one call as it is."""
        return self._in_loop(call(self.replicas[replica]))

    def next_id(self) -> str:
        return next(self._ids)

    @property
    def current(self) -> Attempt:
        return self.attempts[-1]

    @property
    def delay(self) -> int:
        return self.reference.delay

    # What ranks and people do.

    def open(
        self,
        begin: int | None = None,
        *,
        state: Saved | None = None,
        replica: int = 0,
        fault: Fault = "none",
        key: str = "",
        directive: Link | None = None,
        reporters: Sequence[int] = (),
    ) -> Attempt:
        """Open an attempt at `begin`, or from a saved state; the request is repeated until done.

        `directive`: the rollback that it carries out. `reporters`: several, who are to report.
        """
        request = trainer_pb2.OpenAttemptRequest(
            run=RUN,
            request_id=self.next_id(),
            key=key,
            progress=begin,
            state=state.blob if state is not None else b"",
            rank=REPORTER,
            reporter=REPORTER,
            incarnation=f"process of attempt {self.reference.attempt + 1}",
            reporters=reporters,
            directive=self.id_of(directive.name) if directive is not None else "",
            met_in=self.current.message if directive is not None else None,
            leader=self.leads,
        )
        answer = self._until_done(lambda one: one.trainers.open_attempt(request), replica, fault)
        at = state.progress if state is not None else begin or 0
        promise(answer.begin == at, f"opened at {answer.begin}, not {at}")
        if state is not None and (self._is_elsewhere(state) or self.restoring):
            inherited = state.handed
        elif directive is not None:
            inherited = {}
        else:
            inherited = self._handed_in(self.reference.attempt, at)
        self.restoring = False
        if state is not None and self._is_elsewhere(state):
            self.reference.take_over(at, state.decided)
        elif directive is not None:
            self.reference.roll_back(at, directive)
        else:
            self.reference.open(at)
        promise(
            answer.attempt.number == self.reference.attempt,
            f"attempt {answer.attempt.number}, not {self.reference.attempt}",
        )
        promise(bool(answer.holder) == self.leads, f"the holder of the attempt: {answer.holder!r}")
        attempt = Attempt(
            answer.attempt.number, at, answer.attempt.token, answer.holder, answer.log
        )
        self.attempts.append(attempt)
        self.offered = None
        for progress in range(at, at + self.delay):
            if progress in inherited:
                self.handed[attempt.number, progress] = inherited[progress]
        return attempt

    def ask(
        self,
        begin: int,
        *,
        stride: int = 1,
        count: int = 1,
        attempt: Attempt | None = None,
        replica: int = 0,
        blocked: bool = False,
        fault: Fault = "none",
    ) -> dict[int, Hex] | None:
        """Ask for values; every one that comes back is held against the promise."""
        attempt = attempt or self.current
        request = trainer_pb2.GetValuesRequest(
            run=RUN,
            attempt=attempt.message,
            begin=begin,
            stride=stride,
            count=count,
            in_use=max(0, begin - 1),
            blocked=blocked,
            wait_ms=self.wait_ms if blocked else 0,
            holder=attempt.holder,
            held=self.held(attempt),
        )
        fresh = fault == "none" and self.is_fresh(replica)
        horizon = self.reference.horizon
        data = self._until_done(lambda one: one.trainers.get_values(request), replica, fault)
        answer = trainer_pb2.GetValuesResponse.FromString(data)
        self._hear(attempt, answer.frontier)
        if answer.HasField("block"):
            self._of(attempt).add(answer.block, 2)
        is_current = attempt == self.current
        if blocked and is_current and not attempt.holder:
            self.reference.waive(begin)
            promise(answer.HasField("block"), f"a blocked rank got nothing at {begin}")
        promise(
            not is_current or answer.horizon <= self.reference.horizon,
            f"horizon {answer.horizon} is ahead of {self.reference.horizon}",
        )
        if not answer.HasField("block"):
            promise(
                not (fresh and is_current) or begin >= horizon,
                f"values at {begin}, below the horizon {horizon}, did not come",
            )
            return None
        values = _values(answer.block)
        promise(begin in values, f"asked at {begin}, got {list(values)}")
        for progress, got in values.items():
            self._handed_out(attempt, progress, got, is_current=is_current)
        if is_current:
            self._directed(attempt, max(values), answer.directives)
        return values

    def ask_through(self, begin: int, end: int, *, replica: int = 0) -> None:
        """Ask for every value in [begin, end), however the blocks fall."""
        while begin < end:
            values = self.ask(begin, count=end - begin, replica=replica)
            promise(values is not None, f"no value at {begin}")
            begin = max(values or ()) + 1

    @property
    def arrived(self) -> int:
        """Greatest progress whose values the attempt in use has; just below its begin: none."""
        mine = [at for number, at in self.handed if number == self.current.number]
        return max([self.current.begin - 1, *mine])

    def offer(
        self,
        begin: int | None = None,
        *,
        stride: int = 1,
        count: int = 40,
        replica: int = 0,
        fault: Fault = "none",
    ) -> Offered:
        """Get values to go on with alone; each must be what the plan says, or what was recorded."""
        attempt = self.current
        request = trainer_pb2.OfferValuesRequest(
            run=RUN,
            attempt=attempt.message,
            holder=attempt.holder,
            begin=self.arrived + 1 if begin is None else begin,
            stride=stride,
            count=count,
            held=self.held(attempt),
        )
        answer = self._until_done(lambda one: one.trainers.offer_values(request), replica, fault)
        held = self._of(attempt)
        held.offer = max(held.offer, answer.offer)
        values = _values(answer.block)
        for at, got in values.items():
            wanted = self.handed.get((attempt.number, at)) or self.reference.expected(at)
            promise(
                got == wanted or self.reference_is_off,
                f"offered at {at}: {got}, and it is {wanted}",
            )
        permit = self.reference.offer(max(values) + 1)
        promise(answer.permitted == permit.end, f"permitted {answer.permitted}, not {permit.end}")
        self.offered = Offered(values, stride, answer.offer, permit)
        return self.offered

    def go_alone(
        self,
        steps: int,
        *,
        offer: Offered | None = None,
        replica: int = 0,
        fault: Fault = "none",
        reported: Callable[[], object] = lambda: None,
    ) -> dict[int, Hex]:
        """Use values of an offer that have not arrived, and declare them; return them.

        `reported`: what happens to the run between the last of them and their declaration.
        """
        offer = offer or self.offered
        assert offer is not None
        used = {at: got for at, got in offer.values.items() if at > self.arrived}
        used = dict(list(used.items())[:steps])
        reported()
        if used:
            self.declare(used, offer, replica=replica, fault=fault)
        return used

    def declare(
        self,
        used: Mapping[int, Hex],
        offer: Offered,
        *,
        replica: int = 0,
        fault: Fault = "none",
    ) -> None:
        """Declare values that were used alone."""
        attempt, reference = self.current, self.reference
        self._of(attempt).drop(min(used))
        request = self.declaration(used, offer)
        before = reference.horizon
        answer = self._until_done(lambda one: one.trainers.declare_values(request), replica, fault)
        self._hear(attempt, answer.frontier)
        self._of(attempt).add(request.blocks[-1], 2)
        self._of(attempt).declared = max(used) + 1
        if max(used) > self.arrived:
            reference.declare(self.arrived + 1, max(used) + 1, offer.permit)
        self.handed.update({(attempt.number, at): got for at, got in used.items()})
        got = (answer.frontier, answer.horizon)
        wanted = (reference.frontier, reference.horizon)
        promise(got == wanted, f"declared up to {max(used)}: {got}, not {wanted}")
        promise(answer.horizon >= max(before, max(used) + 1), "the horizon moved back")

    def declaration(
        self, used: Mapping[int, Hex], offer: Offered
    ) -> trainer_pb2.DeclareValuesRequest:
        """The request that declares values, each in a block of its own."""
        blocks = []
        for at, numbers in used.items():
            rates, decays = (
                [float.fromhex(x) for x in part] for part in (numbers[:2], numbers[2:])
            )
            blocks.append(
                trainer_pb2.Block(begin=at, stride=1, learning_rates=rates, weight_decays=decays)
            )
        return trainer_pb2.DeclareValuesRequest(
            run=RUN,
            attempt=self.current.message,
            holder=self.current.holder,
            blocks=blocks,
            offer=offer.number,
            held=self.held(self.current),
        )

    def report(
        self,
        *reports: tuple[int, float | None, int],
        attempt: Attempt | None = None,
        replica: int = 0,
        fault: Fault = "none",
    ) -> list[str]:
        """Report (progress, loss, moves to); repeat until done; return what became of each."""
        attempt = attempt or self.current
        request = trainer_pb2.ReportLossesRequest(
            run=RUN,
            attempt=attempt.message,
            rank=REPORTER,
            incarnation=attempt.incarnation,
            reports=[
                _report(at, loss, to, tries=self.reference.tries(at)) for at, loss, to in reports
            ],
            held=self.held(attempt),
        )
        before = self.reference.frontier
        answer = self._until_done(lambda one: one.trainers.report_losses(request), replica, fault)
        self.reported(attempt, max(to for *_, to in reports), answer.frontier)
        outcomes = _outcomes(answer)
        expected = [self.reference.report(*item) for item in reports]
        if fault == "lost answer":
            # The repeat finds what the first call recorded.
            expected = ["REPEATED" if item == "RECORDED" else item for item in expected]
        promise(outcomes == expected, f"{reports} at frontier {before}: {outcomes}, not {expected}")
        return outcomes

    def skip(
        self,
        at: int,
        loss: float | None,
        tries: int | None = None,
        *,
        replica: int = 0,
        fault: Fault = "none",
    ) -> str:
        """Report that the optimizer refused the update at `at`; return what became of it."""
        tries = self.reference.tries(at) if tries is None else tries
        request = trainer_pb2.ReportLossesRequest(
            run=RUN,
            attempt=self.current.message,
            rank=REPORTER,
            incarnation=self.current.incarnation,
            reports=[_report(at, loss, at, tries=tries, skipped=True)],
        )
        answer = self._until_done(lambda one: one.trainers.report_losses(request), replica, fault)
        (outcome,) = _outcomes(answer)
        expected = self.reference.skip(at, loss, tries)
        if fault == "lost answer" and expected == "RECORDED":
            expected = "REPEATED"
        promise(outcome == expected, f"a skip at {at}, try {tries}: {outcome}, not {expected}")
        return outcome

    def adjust(
        self,
        action: str,
        amount: float = 0.0,
        *,
        target: Name | None = None,
        replica: int = 0,
        fault: Fault = "none",
        dry: bool = False,
    ) -> bool:
        """Change the plan as an operator; `dry`: look first. Return whether anything was done."""
        request = runs_pb2.AdjustRunRequest(run=RUN, reason="why", author="somebody")
        match action:
            case "multiply":
                request.scale_lr = amount
            case "set":
                request.set_lr = amount
            case "scale weight decay":
                request.scale_weight_decay = amount
            case "undo" if target is not None:
                request.undo = self.id_of(target)
            case _:
                setattr(request, action, True)
        at = self.reference.horizon
        before = self.reference.expected(at)
        changed, answer = self._change(
            request,
            lambda: self.reference.adjust(action, amount, target),
            replica=replica,
            fault=fault,
            dry=dry,
        )
        if changed and fault != "lost answer":
            after = self.reference.expected(at)
            told = answer.adjustment
            got = _hex((*told.before, *told.weight_decay_before))
            promise(got == before, f"{action} at {at}: before it {got}, not {before}")
            got = _hex((*told.after, *told.weight_decay_after))
            promise(got == after, f"{action} at {at}: after it {got}, not {after}")
        return changed

    def ask_ranks(
        self,
        kind: str,
        *,
        before: int = 0,
        factor: float = 0.0,
        replica: int = 0,
        fault: Fault = "none",
    ) -> Link:
        """Ask the trainers for something as an operator."""
        request = runs_pb2.AdjustRunRequest(
            run=RUN,
            directive=runs_pb2.DirectiveRequest(kind=kind, before=before, factor=factor),
            reason="why",
            author="somebody",
        )

        def ask() -> bool:
            self.reference.ask(kind, factor)
            return True

        self._change(request, ask, replica=replica, fault=fault, dry=False)
        return next(
            item for item in self.reference.made if item.name == ("made", self.reference.count)
        )

    def _change(
        self,
        request: runs_pb2.AdjustRunRequest,
        expect: Callable[[], bool],
        *,
        replica: int,
        fault: Fault,
        dry: bool,
    ) -> tuple[bool, runs_pb2.AdjustRunResponse]:
        """Carry out what an operator asks for; compare it with what it must do."""
        shown = None
        if dry:
            head = self.store.head(RUN)
            request.dry_run = True
            shown = self.call(lambda one: one.people.adjust_run(request), replica)
            request.dry_run = False
            promise(self.store.head(RUN) == head, "a look changed the run")
        request.request_id = self.next_id()
        answer = self._until_done(lambda one: one.people.adjust_run(request), replica, fault)
        effective, changed = self.reference.horizon, expect()
        promise(answer.unchanged != changed, f"{request}: unchanged is {answer.unchanged}")
        promise(answer.effective == effective, f"lands at {answer.effective}, not at {effective}")
        if shown is not None and fault != "lost answer":
            same = (shown.effective, shown.unchanged, shown.adjustment, list(shown.preview))
            got = (answer.effective, answer.unchanged, answer.adjustment, list(answer.preview))
            promise(same == got, f"what was shown, {shown}, is not what was done, {answer}")
        if changed:
            self.done.append(Done(request, effective, answer.adjustment.id))
        return changed, answer

    def approve(self, advice: core.Adjustment, *, replica: int = 0, fault: Fault = "none") -> None:
        """Turn an advice of a plateau policy into a change."""
        request = runs_pb2.ApproveAdviceRequest(
            run=RUN, advice=advice.id, author="somebody", request_id=self.next_id()
        )
        answer = self._until_done(lambda one: one.people.approve_advice(request), replica, fault)
        effective = self.reference.horizon
        promise(answer.effective == effective, f"lands at {answer.effective}, not at {effective}")
        self.reference.approve(answer.adjustment.factor)
        self.done.append(Done(request, effective, answer.adjustment.id))

    def repeat(self, done: Done, *, replica: int = 0) -> None:
        """Ask once more for what was done: the first answer comes, and nothing else."""
        head = self.store.head(RUN)
        request = done.request
        answer: runs_pb2.AdjustRunResponse | runs_pb2.ApproveAdviceResponse
        if isinstance(request, runs_pb2.AdjustRunRequest):
            adjust = request
            answer = self.call(lambda one: one.people.adjust_run(adjust), replica)
        else:
            approve = request
            answer = self.call(lambda one: one.people.approve_advice(approve), replica)
        got = (answer.effective, answer.adjustment.id)
        promise(got == (done.effective, done.adjustment), f"{done}, and once more {got}")
        promise(self.store.head(RUN) == head, "a repeat changed the run")

    def id_of(self, name: Name) -> str:
        """Return the id under which the run knows a change."""
        state = core.fold(RUN, (row.payload for row in self.store.read(RUN)))
        kind, number = name
        if kind == "loss":
            return next(
                item.id
                for item in state.plan.adjustments
                if item.order == 0 and item.decided_at == number
            )
        names = [item.name for item in self.reference.made]
        return _by_operators(state)[names.index(name)].id

    def revise(self, spec: dict[str, Any], *, replica: int = 0, fault: Fault = "none") -> int:
        """Give the run another spec as an operator."""
        request = runs_pb2.ReviseRunRequest(
            run=RUN, spec_document=json.dumps(spec), request_id=self.next_id()
        )
        answer = self._until_done(lambda one: one.people.revise_run(request), replica, fault)
        is_new = spec != self.reference.versions[-1].spec
        effective = self.reference.revise(spec) if is_new else self.reference.horizon
        promise(answer.unchanged != is_new, f"unchanged: {answer.unchanged}")
        promise(answer.effective == effective, f"lands at {answer.effective}, not at {effective}")
        return effective

    def save(self, progress: int, *, replica: int = 0) -> Saved:
        """Save the state for a checkpoint at `progress`."""
        request = trainer_pb2.SaveStateRequest(
            run=RUN,
            attempt=self.current.message,
            progress=progress,
            wait_ms=0,
            held=self.held(self.current),
        )
        answer = self._until_done(lambda one: one.trainers.save_state(request), replica, "none")
        reference = self.reference
        return Saved(
            answer.state,
            progress,
            reference.decided(progress),
            tuple(reference.versions),
            reference.attempt,
            self.given,
            self._handed_in(reference.attempt, progress),
            reference.made,
            reference.count,
            len(reference.rewinds),
        )

    def ask_anew(self, begin: int, count: int) -> None:
        """Ask for values that may be others than any that left before."""
        self.handed = {key: got for key, got in self.handed.items() if key[1] < begin}
        self.ask(begin, count=count)

    # What ranks hand back.

    def held(self, attempt: Attempt, rank: int = REPORTER) -> trainer_pb2.Held:
        """What a rank of an attempt has, as it says so."""
        if not self.hands_back:
            return trainer_pb2.Held()
        return self._of(attempt, rank).message(self.told.get(attempt.token, 0))

    def reported(self, attempt: Attempt, until: int, frontier: int, rank: int = REPORTER) -> None:
        """Take note of what was acknowledged to a rank."""
        self._hear(attempt, frontier)
        held = self._of(attempt, rank)
        held.reported = max(held.reported, until)

    def _of(self, attempt: Attempt, rank: int = REPORTER) -> Held:
        held = self.holds.setdefault((attempt.token, rank), Held(rank))
        held.log = attempt.log
        return held

    def _hear(self, attempt: Attempt, frontier: int) -> None:
        self.told[attempt.token] = max(frontier, self.told.get(attempt.token, 0))

    # What happens to servers.

    def back_up(self) -> Copy:
        """Copy the database."""
        return Copy(self.store.read(RUN), deepcopy(self.reference), [*self.attempts], [*self.done])

    def put_back(self, copy: Copy) -> None:
        """Put an older copy of the database in its place, and start the servers on it."""
        self.store.delete(RUN)
        self.store.append([Append(RUN, tuple(copy.rows), create=True)])
        for index in range(len(self.replicas)):
            self.restart(index)
        self.reference, self.done = deepcopy(copy.reference), [*copy.done]
        self.attempts = [*copy.attempts]

    def adopt(self, state: Saved, lost: Copy, made: tuple[Link, ...] | None = None) -> Attempt:
        """Open from a state of the part of the log that was lost; `made`: what operators did."""
        reference = deepcopy(lost.reference)
        reference.attempt = max(reference.attempt, self.reference.attempt)
        reference.losses, reference.late, reference.skips = {}, {}, {}
        reference.before, reference.origin = state.decided, state.progress
        if made is not None:
            reference.made = made
            reference.count = self.reference.count
        self.reference = reference
        self.restoring = True
        return self.open(state=state)

    def restart(self, replica: int) -> None:
        """Kill a server and start another one in its place."""
        self._in_loop(self.replicas[replica].committer.close())
        self.replicas[replica] = self._in_loop(self._replica())

    def lose_the_store(self, state: Saved, *, replica: int = 0, attach: bool = True) -> Attempt:
        """Lose everything, and open from a saved state; `attach`: a trainer gave its spec first."""
        self.store.delete(RUN)
        for index in range(len(self.replicas)):
            self.restart(index)
        versions = list(state.versions)
        self.reference = Reference(self.delay, versions, attempt=state.attempt)
        self.reference.before, self.reference.origin = state.decided, state.progress
        self.reference.made, self.reference.count = state.made, state.count
        # What the lost log had gone through by then is in the state.
        self.reference.rewinds = [state.progress] * state.rewinds
        self.done = []
        # Attempts that the lost log knew are no more; their numbers may come again.
        self.handed = {
            (number, progress): values
            for (number, progress), values in self.handed.items()
            if number <= state.attempt
        }
        self.met = {}
        self.attempts = [item for item in self.attempts if item.number <= state.attempt]
        self.restoring = True
        self.given = state.given
        if attach:
            self.given = state.given or state.versions[-1].spec
            request = trainer_pb2.AttachRunRequest(
                run=RUN,
                spec_document=json.dumps(self.given),
                request_id=self.next_id(),
            )
            self.call(lambda one: one.trainers.attach_run(request), replica)
        return self.open(state=state, replica=replica)

    def move(self, *, replica: int = 0) -> None:
        """Export the run, lose everything, and import it."""
        before = self.store.read(RUN)

        async def exported(one: Replica) -> bytes:
            request = runs_pb2.ExportRunRequest(run=RUN, force=True)
            return b"".join([part.data async for part in one.people.export_run(request)])

        file = self.call(exported, replica)
        self.store.delete(RUN)
        for index in range(len(self.replicas)):
            self.restart(index)

        async def parts() -> AsyncIterator[runs_pb2.ImportRunRequest]:
            yield runs_pb2.ImportRunRequest(data=file, request_id=self.next_id())

        self.call(lambda one: one.people.import_run(parts()), replica)
        promise(self.store.read(RUN)[:-1] == before, "the log that was imported is another one")

    # What must hold at any time.

    def check_log(self) -> core.RunState:
        """Fold the log anew: nothing acknowledged is missing, nothing else is there."""
        state = core.fold(RUN, (row.payload for row in self.store.read(RUN)))
        reference = self.reference
        seen = list(zip(state.loss_progress, state.loss_values, strict=True))
        kept = {
            (at, extra.tries if extra is not None and extra.is_skipped else None): _bits(loss)
            for at, loss, extra in ((*pair, state.extras.get(i)) for i, pair in enumerate(seen))
        }
        wanted: dict[tuple[int, int | None], str] = {
            (at, None): loss.hex() for at, loss in reference.losses.items()
        }
        wanted.update({key: _bits(loss) for key, loss in reference.skips.items()})
        promise(kept == wanted, f"losses in the log {kept}, acknowledged {wanted}")
        promise(len(seen) == len(kept), f"a loss was observed twice: {seen}")
        late = {at: loss.hex() for (at, _), loss in state.late.items()}
        promise(late == {at: x.hex() for at, x in reference.late.items()}, f"late losses {late}")
        promise(
            (state.frontier, state.horizon) == (reference.frontier, reference.horizon),
            f"frontier and horizon {state.frontier}, {state.horizon}",
        )
        made = [(item.effective, item.change.action) for item in _by_operators(state)]
        expected = [(item.effective, item.action) for item in reference.made]
        promise(made == expected, f"operators did {made} in the log, and asked for {expected}")
        return state

    def check(self) -> None:
        """Check the log, and that every way to fold it gives the same bytes."""
        whole = self.check_log().snapshot()
        rows = self.store.read(RUN)
        for cut in (*range(0, len(rows), len(rows) // 8 + 1), len(rows)):
            part = core.fold(RUN, (row.payload for row in rows[:cut])).snapshot()
            resumed = core.restore_snapshot(part)
            for row in rows[cut:]:
                resumed.apply(core.decode(row.payload), row.payload)
            promise(resumed.snapshot() == whole, "a fold from a snapshot gives other bytes")
        payloads = [row.payload for row in rows]
        for cut in {len(rows) // 3, len(rows) // 2, len(rows)}:
            try:
                check_trimmed(RUN, payloads, cut, (2 * self.reference.frontier) // 3)
            except AssertionError as error:
                raise BrokenPromise(f"trimmed after {cut} events: {error}") from error
        for replica in self.replicas:
            run = self._in_loop(replica.ledger.run(RUN))
            self._in_loop(replica.ledger.refresh(run))
            expected = trimmed(core.restore_snapshot(whole), run.state.floor).snapshot()
            promise(run.state.snapshot() == expected, "a replica that caught up holds other bytes")

    def is_fresh(self, replica: int) -> bool:
        """Whether a server knows all of the log."""
        run = self.replicas[replica].ledger._runs.get(RUN)
        return run is not None and self.store.head(RUN) == (run.state.seq, run.state.digest)

    def refusal(self, call: Callable[[], object]) -> str:
        """Return the name of the error that a call is refused with."""
        try:
            call()
        except core.LrpilotError as error:
            return type(error).__name__
        return "not refused"

    def _handed_out(self, attempt: Attempt, progress: int, got: Hex, *, is_current: bool) -> None:
        key = (attempt.number, progress)
        known = self.handed.get(key)
        if known is None:
            promise(is_current, f"attempt {attempt.number} is superseded, and got {progress} anew")
            promise(
                attempt.begin <= progress < self.reference.horizon,
                f"{progress} is not fixed (horizon {self.reference.horizon})",
            )
            expected = self.reference.expected(progress)
            promise(
                got == expected or self.reference_is_off,
                f"at {progress}: {got}, and the losses give {expected}",
            )
            self.handed[key] = got
        promise(self.handed[key] == got, f"two values for {key}: {known} and {got}")

    def _directed(self, attempt: Attempt, last: int, got: Iterable[trainer_pb2.Directive]) -> None:
        """Hold the directives of an answer whose values reach `last` against the promise."""
        told = {item.id: (item.kind, item.progress) for item in got}
        asked = self.reference.directives(attempt.begin, last)[-MAX_DIRECTIVES:]
        wanted = [(_kind(item.asked), item.effective) for item in asked]
        promise(
            list(told.values()) == wanted,
            f"with values up to {last} came {told}, and {wanted} are asked for",
        )
        for name, directive in told.items():
            known = self.met.setdefault((attempt.number, name), directive)
            promise(known == directive, f"directive {name} is {known} and {directive}")

    def _handed_in(self, attempt: int, begin: int) -> dict[int, Hex]:
        """The values from `begin` on that left in an attempt."""
        return {
            progress: values
            for (number, progress), values in self.handed.items()
            if number == attempt and progress >= begin
        }

    def _is_elsewhere(self, state: Saved) -> bool:
        """Whether the run has gone another way since a state was saved."""
        return state.progress < self.reference.origin or any(
            first < state.progress for first in self.reference.rewinds[state.rewinds :]
        )

    async def _replica(self) -> Replica:
        return Replica(self.store)

    def _in_loop(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(_awaited(work))

    def _until_done(self, call: Callable[[Replica], Awaitable[T]], replica: int, fault: Fault) -> T:
        """Make a call whose first try meets a fault; repeat it as a client does, elsewhere."""
        self.replicas[replica].store.fault = fault
        try:
            return self.call(call, replica)
        except StoreUnavailable:
            return self.call(call, 1 - replica)
        finally:
            self.replicas[replica].store.fault = "none"


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def _kind(name: str) -> int:
    return trainer_pb2.DirectiveKind.Value(f"DIRECTIVE_KIND_{name.upper()}")


def _report(
    at: int, loss: float | None, to: int, *, tries: int, skipped: bool = False
) -> trainer_pb2.LossReport:
    report = trainer_pb2.LossReport(progress=at, loss=loss, moves_to=to, skipped=skipped)
    setattr(report, "try", tries)
    return report


def _outcomes(answer: trainer_pb2.ReportLossesResponse) -> list[str]:
    return [
        trainer_pb2.ReportOutcome.Name(item).removeprefix("REPORT_OUTCOME_")
        for item in answer.outcomes
    ]


def _by_operators(state: core.RunState) -> list[core.Adjustment]:
    """What operators and rollbacks did, in the order in which it applies."""
    return [item for item in state.plan.adjustments if item.order >= ORDER_OF_OPERATORS]


def _bits(loss: float | None) -> str:
    return "none" if loss is None else loss.hex()


def _hex(numbers: Iterable[float]) -> Hex:
    return tuple(float(x).hex() for x in numbers)


def _values(block: trainer_pb2.Block) -> dict[int, Hex]:
    groups = 2
    steps = len(block.learning_rates) // groups
    values = {}
    for step in range(steps):
        part = slice(step * groups, (step + 1) * groups)
        numbers = (*block.learning_rates[part], *block.weight_decays[part])
        values[block.begin + step * block.stride] = _hex(numbers)
    return values


def plateau_losses(count: int) -> list[float]:
    """Losses of which none is better than the first."""
    return [1.0 + math.sin(n) ** 2 for n in range(count)]
