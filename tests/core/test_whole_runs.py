"""Whole runs with everything in them: whatever happens, what is promised holds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.core import Report
from lrpilot.core._changes import Direct, NextStage, StretchWarmup
from lrpilot.core._plan import Plan
from tests.core.test_requests import Log
from tests.trimmed import check_trimmed, marks_every

NAN, INFINITY = math.nan, math.inf

POLICIES: list[dict[str, Any]] = [
    {"kind": "nonfinite", "streak": 2, "hold": 3, "limit": 2},
    {"kind": "spike", "least": 3, "persistent": 1, "recovery": 2, "window": 8, "hold": 2,
     "rewarm": 3, "limit": 1},
    {"kind": "divergence", "window": 2, "patience": 1, "recovery": 1, "stuck_after": 6},
    {"kind": "warmup-guard", "window": 2, "patience": 1, "swings": 2},
    {"kind": "plateau", "patience": 1, "cooldown": 1, "min_lr": [1e-3, 0.0], "eps": 0.0,
     "in_stable_phase": True},
    {"kind": "plateau", "patience": 0, "metric": "val_loss", "window": 2, "factor": 0.75},
    {"kind": "greedy", "patience": 1, "factor": 0.8, "reset_start": 2, "smooth": True, "window": 3},
    {"kind": "decay-on-plateau", "window": 1, "patience": 2, "anneal": "50%"},
    {"kind": "slow-convergence", "after": 3, "again": 4, "factor": 1.5},
    {"kind": "overfit", "patience": 1, "window": 1, "factor": 3.0},
    {"kind": "batch-size", "scale": "linear"},
]  # fmt: skip
"""Every policy, so that few losses make it act."""

WSD: dict[str, Any] = {
    "peak": 0.1, "min": 0.01, "warmup": 12,
    "decay": {"style": "wsd", "anneal": 30, "anneal_style": "minus_sqrt"},
}  # fmt: skip

COMMON: dict[str, Any] = {
    "total": 120,
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
    "groups": [{"name": "a"}, {"name": "b", "peak": 0.4, "min": 0.05}],
    "policies": [{**policy, "mode": "act"} for policy in POLICIES],
    "feedback": {"delay": 3},
    "bounds": {"min_lr": 0.02, "max_lr": 0.3},
}
STAGES: list[dict[str, Any]] = [
    {"name": "one", "when": {"plateau": {"window": 2, "patience": 1}}, "earliest": 14,
     "latest": 40, "learning_rate": WSD},
    {"name": "two", "when": {"below": 0.5}, "latest": 70,
     "learning_rate": {"peak": 0.2, "init": "current", "warmup": 6}, "weight_decay": 0.2,
     "groups": [{"name": "b", "peak": 0.25}]},
    {"name": "three", "learning_rate": {"peak": 0.1, "init": "current", "warmup": 3,
                                       "decay": {"style": "cosine"}},
     "groups": [{"name": "b", "peak": 0.3}],
     "policies": [{"kind": "plateau", "patience": 2}, {"kind": "batch-size"}]},
]  # fmt: skip

SPECS: dict[str, dict[str, Any]] = {
    "one stage": {**COMMON, "learning_rate": WSD},
    "stages": {**COMMON, "learning_rate": None, "stages": STAGES},
    "an interval": {**COMMON, "learning_rate": WSD, "feedback": {"delay": 3, "interval": 7}},
    "advice": {
        **COMMON,
        "learning_rate": {"peak": 0.1},
        "policies": [
            {**policy, "mode": "act" if policy["kind"] == "greedy" else "advise"}
            for policy in POLICIES
        ],
    },
}

LOSSES = st.one_of(
    st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    st.floats(0.1, 10.0),
    st.sampled_from([NAN, INFINITY, -INFINITY, 0.0, -0.0, -1.0, 5e-324, 1e308, -1e308, 1e30]),
    st.none(),
)


@st.composite
def reports(draw: st.DrawFn, at: int, losses: st.SearchStrategy[float | None] = LOSSES) -> Any:
    """Draw what is said of one step: skipped tries, and the one that counts."""
    said = []
    tries = draw(st.sampled_from([0] * 8 + [1, 2]))
    for attempt in range(tries):
        said.append(Report(at, draw(losses), 1.0, at, skipped=True, tries=attempt))
    more: dict[str, Any] = {}
    if draw(st.integers(0, 2)) == 0 and (loss := draw(losses)) is not None:
        more["validation"] = {"val_loss": loss}
    if draw(st.integers(0, 5)) == 0:
        more["batch"] = draw(st.sampled_from([1, 32, 64, 2**40]))
    if draw(st.integers(0, 5)) == 0:
        more["gradient_norm"] = draw(st.sampled_from([1.0, NAN, INFINITY, 0.0]))
    return [*said, Report(at, draw(losses), 1.0, at + 1, tries=tries, **more)]


@st.composite
def series(
    draw: st.DrawFn, length: int, losses: st.SearchStrategy[float | None] = LOSSES
) -> list[list[Report]]:
    """Draw what is said of each step from 0 on."""
    return [draw(reports(at, losses)) for at in range(length)]


ACTIONS: st.SearchStrategy[core.Action] = st.one_of(
    st.builds(core.ScaleLearningRate, st.sampled_from([0.5, 0.1, 1.5, 30.0, 1e100, 1.0, 0.0, NAN])),
    st.builds(core.SetLearningRate, st.sampled_from([0.05, 1e-9, 5.0, INFINITY])),
    st.builds(core.ScaleDecay, st.sampled_from([0.0, 0.5, 2.0, 1e100])),
    st.builds(core.DecayNow, st.sampled_from([1, 9, "10%", "100%", 0]),
              st.sampled_from(["linear", "minus_sqrt"])),
    st.builds(core.EnterNextStage),
    st.builds(core.SetTotal, st.sampled_from([10, 100, 150])),
    st.builds(core.HoldValues),
    st.builds(core.ReleaseValues),
    st.builds(core.Ask, st.sampled_from(["rollback", "skip", "stop"]), st.integers(0, 20)),
)  # fmt: skip


class Life(Log):
    """A run to which anything may happen."""

    def said(self, said: Sequence[Report]) -> None:
        events, _ = core.report_losses(self.state, said, rank=0, incarnation="one")
        self.write(events)

    def operator(self, action: core.Action, name: str) -> bool:
        """Carry out an action; return whether it was not refused, which leaves no trace."""
        before = self.state.snapshot()
        given = {"reason": "tried", "author": "me", "request_id": name}
        try:
            events = core.adjust_run(self.state, action, **given)
        except (core.InvalidFields, core.AdjustmentRefused):
            assert self.state.snapshot() == before
            return False
        plan = core.planned(self.state, events)
        assert self.state.snapshot() == before
        self.write(events)
        for at in range(0, 130, 7):
            assert plan.values(at) == self.state.plan.values(at)
        return True

    def live(self, data: st.DataObject, step: int) -> None:
        """Let one thing happen."""
        state = self.state
        what = data.draw(st.sampled_from(
            ["reports"] * 6 + ["take", "operator", "operator", "undo", "approve", "resume",
                               "roll back", "waive", "restart", "lose"]
        ), "what")  # fmt: skip
        event(what)
        if what == "reports":
            for at in range(state.frontier, state.frontier + data.draw(st.integers(1, 8))):
                self.said(data.draw(reports(at)))
        elif what == "take":
            self.take(data.draw(st.integers(state.begin, state.horizon - 1), "at"))
        elif what == "operator":
            self.operator(data.draw(ACTIONS), f"act {step}")
        elif what == "undo" and state.plan.adjustments:
            item = data.draw(st.sampled_from(state.plan.adjustments))
            self.operator(core.TakeBack(item.id), f"undo {step}")
        elif what == "approve" and state.advice:
            item = data.draw(st.sampled_from(state.advice))
            given = {"reason": "", "author": "me", "request_id": f"approve {step}"}
            try:
                self.write(core.approve_advice(state, item.id, **given))
            except (core.AdviceExpired, core.AdjustmentRefused):
                event("no approval")
        elif what in ("resume", "roll back"):
            asked = [
                item for item in state.plan.adjustments
                if isinstance(item.change, Direct) and item.change.directive == "rollback"
            ]  # fmt: skip
            begin = data.draw(st.integers(state.origin, state.frontier), "to")
            if what == "roll back" and asked:
                met_in = (state.attempt, state.token)
                self.open(begin, directive=asked[-1].id, met_in=met_in)
            else:
                self.open(begin)
        elif what == "waive":
            self.write(core.waive(state, state.horizon + data.draw(st.integers(0, 9))))
        elif what == "restart":
            self.state = core.restore_snapshot(state.snapshot())
        elif what == "lose":
            at = data.draw(st.integers(max(state.begin, state.origin), state.frontier), "saved at")
            data_saved = core.save_state(state, at)
            self.state, self.rows = core.RunState("run"), []
            self.open(saved=core.read_state(data_saved, "run"), request_id=f"found {step}")


def check(log: Log) -> None:
    """Assert what holds of every run at any time."""
    state, plan = log.state, log.state.plan
    assert core.fold("run", log.rows).snapshot() == state.snapshot()
    assert core.restore_snapshot(state.snapshot()).snapshot() == state.snapshot()
    bounds = state.spec.bounds
    low, high = (0.0, 1e100) if bounds is None else (bounds.min_lr, bounds.max_lr or 1e100)
    moved = (NextStage, StretchWarmup)
    stages = [item for item in plan.adjustments if isinstance(item.change, moved)]
    base = Plan(plan.revisions, stages)
    lowest, highest = [low] * 2, [high] * 2
    for at in range(140):
        rates, decays = plan.values(at)
        for group, (lr, bare) in enumerate(zip(rates, base.values(at)[0], strict=True)):
            lowest[group], highest[group] = min(lowest[group], bare), max(highest[group], bare)
            # Where a warmup ends, rounding may leave the LR a bit off its peak.
            assert lowest[group] * (1.0 - 1e-15) <= lr <= highest[group] * (1.0 + 1e-15)
            assert math.isfinite(lr)
        assert decays is not None
        assert all(0.0 <= decay < INFINITY for decay in decays)
        # What was handed out is what the plan says of it.
        recorded = state.records.at(at)
        assert recorded is None or recorded == (rates, decays)
    names = [item.id for item in (*plan.adjustments, *state.advice)]
    assert len(names) == len(set(names))
    assert all(item.decided_at < state.frontier or item.order >= 3000 for item in plan.adjustments)


SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow,
                                                           HealthCheck.data_too_large],
)  # fmt: skip


@SLOW
@given(st.sampled_from(sorted(SPECS)), st.data())
def test_whatever_happens_the_promises_hold(name: str, data: st.DataObject) -> None:
    log = Life(**SPECS[name])
    log.open()
    for step in range(data.draw(st.integers(4, 14), "steps")):
        log.live(data, step)
    check(log)
    log.said([Report(log.state.frontier, 1.0, 1.0, log.state.frontier + 20)])
    check(log)
    # From any state on the way the rest of the log leads to the same.
    for cut in data.draw(st.lists(st.integers(1, len(log.rows)), max_size=3), "cuts"):
        state = core.restore_snapshot(core.fold("run", log.rows[:cut]).snapshot())
        for row in log.rows[cut:]:
            state.apply(core.decode(row), row)
        assert state.snapshot() == log.state.snapshot()
    trim_anywhere(log, data)


def trim_anywhere(log: Log, data: st.DataObject) -> None:
    """Assert that the run, trimmed anywhere on the way, does what the whole one does."""
    cut = data.draw(st.integers(1, len(log.rows)), "trimmed after")
    progress = data.draw(st.integers(1, max(1, log.state.progress)), "trimmed at")
    with marks_every(data.draw(st.integers(1, 8), "marks")):
        asked = check_trimmed("run", log.rows, cut, progress)
    event(f"asks for history: {asked > 0}")


def outcome(state: core.RunState, until: int = 130) -> list[Any]:
    """Return what does not depend on how it was told: values, decisions, and the observers."""
    items = [*state.plan.adjustments, *state.advice]
    items = [replace(item, seq=0) for item in items if item.order < 3000]
    items.sort(key=lambda item: (item.decided_at, item.order, item.part))
    # The ids of what is taken back are those of a log.
    changes = [
        {**core.change_to_mapping(item.change), "ids": ()} | {"effective": item.effective}
        for item in items
    ]
    return [
        [state.plan.values(at) for at in range(until)],
        repr(changes),
        repr([(item.mode, item.before, item.after, item.source) for item in items]),
        repr(state.observers.to_mapping()),
    ]


def told(name: str, said: Sequence[Sequence[Report]], actions: dict[int, core.Action]) -> Life:
    """Return a run that heard of every step by itself, with an operator between some."""
    log = Life(**SPECS[name])
    log.open()
    for at, step in enumerate(said):
        if at in actions:
            log.operator(actions[at], f"act {at}")
        for report in step:
            log.said([report])
    return log


@st.composite
def lives(draw: st.DrawFn) -> tuple[str, list[list[Report]], dict[int, core.Action]]:
    """Draw a spec, what is said of each step, and what an operator does before some."""
    said = draw(series(draw(st.integers(5, 45))))
    actions = draw(st.dictionaries(st.integers(0, len(said) - 1), ACTIONS, max_size=3))
    return draw(st.sampled_from(sorted(SPECS))), said, actions


@SLOW
@given(lives(), st.data())
def test_batches_change_nothing(
    life: tuple[str, list[list[Report]], dict[int, core.Action]], data: st.DataObject
) -> None:
    name, said, actions = life
    one = told(name, said, actions)
    other = Life(**SPECS[name])
    other.open()
    batch: list[Report] = []
    for at, step in enumerate(said):
        if at in actions:
            other.said(batch)
            batch = []
            other.operator(actions[at], f"act {at}")
        batch += step
        if data.draw(st.booleans()):
            other.said(batch)
            batch = []
    other.said(batch)
    assert outcome(one.state) == outcome(other.state)


@SLOW
@given(lives(), st.data())
def test_an_attempt_that_hears_the_same_losses_again_gets_the_same_values(
    life: tuple[str, list[list[Report]], dict[int, core.Action]], data: st.DataObject
) -> None:
    name, said, actions = life
    # Another total is another spec: an attempt that comes by once more has it from where it held.
    actions = {at: it for at, it in actions.items() if not isinstance(it, core.SetTotal)}
    log = told(name, said, actions)
    before = outcome(log.state)
    state = core.read_state(core.save_state(log.state, len(said)), "run")
    for begin in data.draw(st.lists(st.integers(0, len(said)), min_size=1, max_size=3), "from"):
        log.open(begin)
        for step in said[begin:]:
            log.said(step)
        assert outcome(log.state) == before
    log.open(saved=state, digest_at_saved=state.digest)
    assert outcome(log.state) == before
    check(log)


@pytest.mark.parametrize("broken", [NAN, INFINITY, -INFINITY])
@SLOW
@given(st.data())
def test_one_loss_that_is_not_finite_changes_no_later_decision(
    broken: float, data: st.DataObject
) -> None:
    finite = st.one_of(st.sampled_from([1.0, 2.0, 0.5, 1e308]), st.floats(0.1, 10.0))
    said = data.draw(series(data.draw(st.integers(5, 40)), finite))
    at = data.draw(st.integers(0, len(said) - 1), "at")
    name = data.draw(st.sampled_from(["one stage", "stages", "an interval"]))

    def with_loss(loss: float | None) -> list[Any]:
        *skipped, last = said[at]
        return outcome(told(name, [
            *said[:at], [*skipped, replace(last, loss=loss)], *said[at + 1 :]
        ], {}).state)[:3]  # fmt: skip

    assert with_loss(broken) == with_loss(None)


@SLOW
@given(st.sampled_from(sorted(SPECS)), st.data())
def test_the_simulator_does_what_a_run_does(name: str, data: st.DataObject) -> None:
    said = data.draw(series(data.draw(st.integers(1, 40))))
    log = Life(**SPECS[name])
    log.open()
    flat = [report for step in said for report in step]
    steps = list(core.simulate(log.spec, flat))
    assert len(steps) == len(flat) + 1
    for step, report in zip(steps, flat, strict=False):
        assert step.progress == report.progress
        assert (step.learning_rates, step.weight_decays) == log.state.values(report.progress)
        assert step.base_learning_rates == log.state.plan.base(report.progress)
        assert step.stage == log.state.plan.stage(report.progress).name
        seq = log.state.seq
        log.said([report])
        assert list(step.decided) == log.state.decided_since(seq)
    last = steps[-1]
    assert (last.progress, last.loss, last.decided) == (len(said), None, ())
    assert (last.learning_rates, last.weight_decays) == log.state.values(len(said))
