"""Every kind of adjustment on two ranks, a stage change, an advice and a rollback: one trace."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lrpilot import core
from lrpilot.server._changes import read_action
from lrpilot.server._messages import adjustment_messages
from lrpilot.server._sql_store import open_store
from lrpilot.v1 import runs_pb2 as pb
from tests.e2e.harness import (
    Nursery,
    Rank,
    Runs,
    Spec,
    Used,
    one_value,
    wait_until,
    without_ids,
)
from tests.e2e.live_script import DELAY, EVALUATED, SPEC, STOPS, goes_back, said
from tests.server.conftest import Program

AUTHOR = "oncall@node-7"

ACTIONS = {
    "multiply", "divide", "set", "curve", "hold", "decay", "stretch warmup", "next stage",
    "scale weight decay", "undo", "directive", "note",
}  # fmt: skip
"""Everything that an adjustment can do."""

KILLS = {
    (1, 48): "while the reporter stands",
    (1, 110): "before the operator is answered",
    (1, 174): "while all go on",
    (2, 204): "while all go on",
    (2, 268): "before the operator is answered",
    (2, 390): "while all go on",
}
"""Stops at which the server is killed, and when."""


def spec_of(name: str) -> Spec:
    return {"name": name, **SPEC}


def hex_values(values: tuple[tuple[float, ...], tuple[float, ...] | None]) -> tuple[str, ...]:
    """Return LR and WD of each group in turn, as the ranks write them."""
    rates, decays = values
    assert decays is not None
    return tuple(value.hex() for pair in zip(rates, decays, strict=True) for value in pair)


def told(adjustments: list[Any]) -> list[tuple[Any, ...]]:
    """Return what people are told of adjustments, in order, as far as timing has no part in it.

    Reports behind the loss that asked for a rollback may be dropped where the server is away: it
    forgets them, and whatever they would have decided.
    """
    asked_at = max(
        (item.decided_at for item in adjustments if item.forgotten and item.action == "directive"),
        default=0,
    )
    return [
        (
            item.decided_at, item.effective, item.source, item.mode, item.action,
            without_ids(item.summary), without_ids(item.reason), item.author, item.forgotten,
            list(item.before), list(item.after),
            list(item.weight_decay_before), list(item.weight_decay_after),
        )
        for item in adjustments
        if not (item.forgotten and item.decided_at > asked_at)
    ]  # fmt: skip


# The same without a server, ranks, network, or anything that takes time.


@dataclass
class Replay:
    """The script, acted out on the core alone."""

    state: core.RunState
    used: list[Used] = field(default_factory=list)
    met: list[list[Any]] = field(default_factory=list)
    """Attempt, progress and kind of each directive where it is met."""
    _seen: set[str] = field(default_factory=set)
    _made: dict[str, str] = field(default_factory=dict)
    """What operators did to the id of the adjustment."""
    _evaluated: dict[str, float] = field(default_factory=dict)
    _stopped: bool = False

    def run(self) -> Replay:
        spec = core.parse_spec(spec_of(self.state.name))
        self._apply([core.Created(spec.to_mapping(), True, False, "create")])
        self._open(0)
        n = 0
        while True:
            n = self._meet(n)
            at = (self.state.attempt, n)
            for name, value in STOPS.get(at, ()):
                self._act(name, value)
            if self._stopped:
                self._use(n)
                return self
            for tries, step in enumerate(said(*at)):
                self._use(n)
                self._report(n, tries, **step)
            n += 1

    def _apply(self, events: list[core.Event]) -> None:
        for event in events:
            self.state.apply(event)

    def _open(self, progress: int, directive: str = "") -> None:
        request = core.OpenRequest(
            request_id=f"open {directive}",
            progress=progress,
            incarnation="rank 0",
            token="0" * 32,
            directive=directive,
            met_in=(self.state.attempt, self.state.token) if directive else None,
        )
        self._apply(core.open_attempt(self.state, request))

    def _use(self, n: int) -> None:
        self.used.append(Used(self.state.attempt, n, hex_values(self.state.values(n))))

    def _meet(self, n: int) -> int:
        """Return where training goes on once the directives that are due at `n` were met."""
        attempt = self.state.attempt
        for item in self.state.plan.directives(self.state.begin, n):
            if item.id in self._seen:
                continue
            self._seen.add(item.id)
            change = item.change
            assert isinstance(change, core.Direct)
            self.met.append([attempt, n, change.directive])
            if change.directive == "rollback" and goes_back(attempt):
                assert change.before is not None
                self._open(change.before - 2, item.id)
                return change.before - 2
            if change.directive == "evaluate":
                self._evaluated = {"val_loss": EVALUATED}
            self._stopped = self._stopped or change.directive == "stop"
        return n

    def _act(self, name: str, value: Any) -> None:
        signed = {"author": AUTHOR, "request_id": uuid.uuid4().hex}
        if name == "approve":
            (advice,) = [item for item in self.state.advice if item.kind == value]
            events = core.approve_advice(self.state, advice.id, reason=f"for {name}", **signed)
        else:
            value = self._made[value] if name == "undo" else value
            action = read_action(pb.AdjustRunRequest(**{name: value}))
            events = core.adjust_run(self.state, action, reason=f"for {name}", **signed)
        self._apply(events)
        self._made[name] = self.state.made.get(signed["request_id"], "")

    def _report(
        self,
        n: int,
        tries: int,
        *,
        loss: float | None,
        weight: float = 1.0,
        skipped: bool = False,
        val_losses: dict[str, float] | None = None,
        grad_norm: float | None = None,
        batch: int | None = None,
    ) -> None:
        validation = {} if skipped else {**self._evaluated, **(val_losses or {})}
        report = core.Report(
            n,
            loss,
            weight,
            n if skipped else n + 1,
            skipped=skipped,
            tries=tries,
            validation=validation,
            gradient_norm=grad_norm,
            batch=batch,
        )
        self._evaluated = self._evaluated if skipped else {}
        events, _ = core.report_losses(self.state, [report], rank=0, incarnation="rank 0")
        self._apply(events)


@pytest.fixture(scope="module")
def replay() -> Replay:
    """What must happen."""
    return Replay(core.RunState("live")).run()


# The live run.


@dataclass
class Live:
    """Two ranks on a server, and operators who act while the reporter stands."""

    name: str
    folder: Path
    server: Nursery
    address: str
    job: list[Rank]
    made: dict[str, str] = field(default_factory=dict)
    """What operators did to the id of the adjustment."""
    kills: int = 0

    def drive(self, *, kill: bool) -> None:
        wait_until(lambda: self.job[0].reached(0), "the run begins")
        for at, actions in STOPS.items():
            how = KILLS.get(at, "") if kill else ""
            self._wait_at(*at)
            for name, value in actions:
                self._act(name, value, is_killed=how == "before the operator is answered")
            if how == "while the reporter stands":
                self._kill()
            (self.folder / f"go-{at[0]}-{at[1]}").touch()
            if how == "while the reporter stands":
                # It ends where the values end that were handed out, and its reports go nowhere.
                self._wait_for_use(*at, DELAY - 1)
                self._restart()
            elif how == "while all go on":
                self._wait_for_use(*at, DELAY // 2)
                self._kill()
                self._restart()

    def _wait_for_use(self, attempt: int, n: int, further: int) -> None:
        """Wait until rank 0 uses the values so much further."""

        def is_used() -> bool:
            return any(
                used.attempt == attempt and used.progress >= n + further
                for used in self.job[0].used()
            )

        wait_until(is_used, f"rank 0 goes on from {n}")

    def _wait_at(self, attempt: int, n: int) -> None:
        """Wait until the reporter stands at a progress, all below it is final."""

        def stands() -> bool:
            assert all(rank.process.poll() is None for rank in self.job), self.logs()
            run = runs.run(self.name)
            return bool((run.attempt, run.frontier) == (attempt, n))

        with Runs(self.address) as runs:
            wait_until(stands, f"attempt {attempt} stands at {n}")

    def _act(self, name: str, value: Any, *, is_killed: bool) -> None:
        with Runs(self.address) as runs:
            run = runs.run(self.name)
            assert run.horizon == run.frontier + DELAY
            request = self._request(run, name, value)
            preview = runs.change(self._request(run, name, value, dry_run=True))
            if is_killed:
                # The answer is lost, and the operator asks again.
                runs.change(request)
                self._kill()
                self._restart()
        with Runs(self.address) as runs:
            done = runs.change(request)
            again = runs.change(request)
        assert done.effective == again.effective == preview.effective == run.horizon
        assert done.adjustment == again.adjustment
        for item in ("before", "after", "weight_decay_before", "weight_decay_after"):
            assert getattr(done.adjustment, item) == getattr(preview.adjustment, item)
        self.made[name] = done.adjustment.id

    def _request(self, run: Any, name: str, value: Any, *, dry_run: bool = False) -> Any:
        """Return the request of an action on the run as it was seen."""
        signed = {
            "run": self.name,
            "reason": f"for {name}",
            "author": AUTHOR,
            "etag": run.etag,
            "dry_run": dry_run,
            "request_id": "" if dry_run else f"{run.frontier} {name}",
        }
        if name == "approve":
            (advice,) = [
                item.id
                for item in run.adjustments
                if item.status == "advice" and value in item.source
            ]
            return pb.ApproveAdviceRequest(advice=advice, **signed)
        value = self.made[value] if name == "undo" else value
        return pb.AdjustRunRequest(**{name: value}, **signed)

    def _kill(self) -> None:
        self.server.end(signal.SIGKILL)
        self.kills += 1

    def _restart(self) -> None:
        self.server.start()
        self.server.wait_ready()

    def logs(self) -> str:
        return "\n".join(rank.log for rank in self.job)


@pytest.fixture
def live(
    servers: Callable[..., Program],
    nursery: Callable[[str], Nursery],
    ranks: Callable[..., list[Rank]],
    tmp_path: Path,
) -> Live:
    """The run, on its way."""
    first = servers()
    address: str = first.grpc
    server = nursery(address)
    assert first.end(signal.SIGTERM) == 0
    server.start()
    server.wait_ready()
    job = ranks(address, spec_of("live"), 2, program="live_program", key="start")
    return Live("live", tmp_path, server, address, job)


@pytest.mark.parametrize("kill", [False, True], ids=["left alone", "killed again and again"])
def test_everything_at_once_is_the_same_on_both_ranks_and_as_the_script_says(
    live: Live, replay: Replay, kill: bool
) -> None:
    live.drive(kill=kill)
    for rank in live.job:
        assert rank.wait() == 0, live.logs()
    assert live.kills >= len(KILLS) if kill else live.kills == 0
    with Runs(live.address) as runs:
        run = runs.run(live.name)
    live.server.end(signal.SIGTERM)

    # The same values at the same steps, on both ranks, to the bit.
    first, second = (rank.used() for rank in live.job)
    assert first == second == replay.used
    assert one_value(live.job)
    assert [rank.lines("met") for rank in live.job] == [replay.met, replay.met]
    kinds = [kind for _, _, kind in replay.met]
    assert kinds == ["evaluate", "rollback", "rollback", "skip", "stop"]

    # What people are told.
    assert told(run.adjustments) == told(adjustment_messages(replay.state))
    acted = {item.action for item in run.adjustments if item.mode == "act" and not item.forgotten}
    assert acted == ACTIONS
    deciders = {item.source.split("(")[-1].rstrip(")") for item in run.adjustments}
    policies = {policy["kind"] for stage in SPEC["stages"] for policy in stage["policies"]}
    assert deciders >= policies | {"when", "operator", "rollback"}
    statuses = {
        item.summary.split()[2]: item.status for item in run.adjustments
        if item.action == "directive" and not item.forgotten
    }  # fmt: skip
    assert statuses == {"evaluate": "done", "rollback": "failed", "skip": "done", "stop": "done"}
    assert "approved" in {item.status for item in run.adjustments}
    assert (run.attempt, run.rollbacks, run.stage, run.total) == (2, 1, "third", 640)
    assert (run.waivers, run.late_losses) == (0, 0)
    assert (run.skipped, run.nonfinite_losses) == (
        replay.state.observers.skipped, replay.state.observers.nonfinite,
    )  # fmt: skip

    # The log alone says all of it.
    store = open_store(live.folder / "data")
    rows = store.read(live.name)
    store.close()
    assert run.digest == rows[run.seq - 1].digest
    check_log(live.name, [row.payload for row in rows], first)


def check_log(name: str, payloads: list[bytes], used: list[Used]) -> None:
    """Hold what was used against what the log has recorded, and what its plan comes to."""
    state = core.RunState(name)

    def check_attempt() -> None:
        for item in used:
            if item.attempt == state.attempt:
                recorded = state.records.at(item.progress)
                assert recorded is not None
                assert hex_values(recorded) == item.values
                assert hex_values(state.plan.values(item.progress)) == item.values

    for payload in payloads:
        event = core.decode(payload)
        if isinstance(event, core.Opened):
            check_attempt()
        state.apply(event, payload)
    check_attempt()
    assert state.snapshot() == core.fold(name, payloads).snapshot()
    assert state.snapshot() == core.restore_snapshot(state.snapshot()).snapshot()
    assert state.attempt == 2
