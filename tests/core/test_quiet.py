"""Who observes when: the table of docs/policies.md, and what it means in whole runs."""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from lrpilot import core
from lrpilot.core._observers import Watch
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import POLICIES, Plateau, Quiet
from tests.core.test_operators import act
from tests.core.test_requests import PLATEAU, Log

PATIENT = {**PLATEAU, "patience": 99}

OWN: dict[str, dict[str, Any]] = {
    "nonfinite": {}, "spike": {}, "divergence": {"window": 2}, "warmup-guard": {"window": 2},
    "plateau": {"patience": 99}, "greedy": {"patience": 99},
    "decay-on-plateau": {"window": 1, "patience": 99}, "slow-convergence": {}, "overfit": {},
    "batch-size": {},
}  # fmt: skip
"""Fields with which each kind moves with what it observes, and decides nothing."""


BY_DEFINITION = {
    ("decay-on-plateau", "warmup"),
    ("slow-convergence", "warmup"),
    ("warmup-guard", "stable phase"),
}
"""What a policy is told, but reads nothing of."""


@pytest.fixture(scope="module")
def table() -> dict[str, set[str]]:
    """Return, by the first column, the columns in which docs/policies.md has a cross."""
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    section = text.split("## Who is quiet when\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    (_, *columns), _, *rows = lines
    return {
        kind: {column for column, cell in zip(columns, cells, strict=True) if cell == "x"}
        for kind, *cells in rows
    }


def test_the_table_names_every_policy_and_every_reason(table: dict[str, set[str]]) -> None:
    assert list(table) == [*POLICIES, "when` of a stage"]
    assert set().union(*table.values()) == set(get_args(Quiet))


def test_the_table_says_what_the_policies_say(table: dict[str, set[str]]) -> None:
    for kind in POLICIES:
        assert parse_policy({"kind": kind}).quiet == table[kind], kind
    told = parse_policy({"kind": "plateau", "in_stable_phase": True})
    assert told.quiet == table["plateau"] - {"stable phase"}
    when = {"name": "one", "when": {"below": 1.0}, "latest": 9, "learning_rate": {"peak": 1.0}}
    spec = core.parse_spec({"name": "a", "total": 10, "stages": [when]})
    assert Watch(spec.stages[0], "one", None).quiet == table["when` of a stage"]


def test_every_kind_is_tried() -> None:
    assert set(OWN) == set(POLICIES)


def situation(reason: str, policies: Sequence[dict[str, Any]]) -> Log:
    """Return a run whose losses from 20 up to 41 have one reason to be quiet, and no other."""
    rates: dict[str, Any] = {"peak": 1.0}
    given: dict[str, Any] = {"policies": list(policies), "feedback": {"delay": 4}}
    if reason == "stage change":
        stages = [
            {"name": "one", "until": 20, "learning_rate": rates},
            {"name": "two", "learning_rate": {**rates, "warmup": 30}},
        ]
        given |= {"learning_rate": None, "stages": stages}
    elif reason == "warmup":
        given |= {"learning_rate": {**rates, "warmup": 60}}
    elif reason == "stable phase":
        decay = {"style": "wsd", "anneal": 100, "anneal_style": "linear"}
        given |= {"learning_rate": {**rates, "decay": decay}}
    log = Log(**given)
    log.open()
    say(log, 0, 16)
    if reason == "hold":
        act(log, core.HoldValues())
    elif reason == "dip":
        curve = core.change_from_mapping(
            {"action": "curve", "points": [[0, 0.5], [30, 1.0]], "reason": "tried"}
        )
        log.write([core.Adjusted(core.change_to_mapping(curve), log.state.horizon, "me", "x")])
    say(log, 16, 20)
    return log


def say(log: Log, begin: int, end: int) -> None:
    """Report a step with everything in it that any policy reads, and no two alike."""
    for at in range(begin, end):
        report = core.Report(
            at, 9.0 + 0.1 * (-0.9) ** at, 1.0, at + 1, validation={"val_loss": 9.0 - at / 100},
            batch=64 if at < 20 else 64 + at,
        )  # fmt: skip
        log.write(core.report_losses(log.state, [report], rank=0, incarnation="one")[0])


@pytest.mark.parametrize("reason", get_args(Quiet))
@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_what_is_quiet_in_the_table_does_not_move_in_a_run(
    kind: str, reason: str, table: dict[str, set[str]]
) -> None:
    log = situation(reason, [{"kind": kind, **OWN[kind], "mode": "advise"}, PATIENT])
    assert reason in log.state.plan.quiet(24)
    at_20 = fresh(log, reason)
    say(log, 20, 40)
    watch = log.state.observers.watches[0]
    moved = watch.state != at_20
    if kind == "nonfinite":
        # It moves with what is not finite alone.
        assert reason in log.state.plan.quiet(40)
        broken = core.Report(40, math.nan, 1.0, 41)
        log.write(core.report_losses(log.state, [broken], rank=0, incarnation="one")[0])
        moved = log.state.observers.watches[0].state != at_20
    if (kind, reason) in BY_DEFINITION:
        assert not moved
        return
    assert moved is (reason not in table[kind])


def fresh(log: Log, reason: str) -> Any:
    """Return the state that the first policy has at 20; in a new stage it starts afresh."""
    watch = log.state.observers.watches[0]
    if reason != "stage change":
        return watch.state
    kind = type(watch.spec).model_fields["kind"].default
    return POLICIES[kind].build(watch.spec, 1).initial()


# In whole runs.


def test_a_plateau_does_not_count_while_a_spike_is_cut_held_and_warmed_back() -> None:
    spike = {"kind": "spike", "mode": "act", "least": 4, "persistent": 2, "recovery": 2,
             "hold": 3, "rewarm": 4}  # fmt: skip
    plateau = {**PLATEAU, "patience": 99}
    log = Log(policies=[spike, plateau], feedback={"delay": 1})
    log.open()
    log.report(0, [2.0, 2.1, 2.0, 2.1, 2.0])
    assert bad(log) == 4
    log.report(5, [9.0] * 5)
    # A note on the third outlier, at 7; two losses later the first cut.
    curve = next(i for i in log.state.plan.adjustments if i.change.action == "curve")
    assert (curve.decided_at, curve.effective) == (9, 10)
    assert bad(log) == 9
    log.report(10, [2.0] * 7)
    # The dip lasts from 10 up to 17 = 10 + 3 + 4.
    assert [log.state.plan.quiet(at) for at in (9, 10, 16, 17)] == [set(), {"dip"}, {"dip"}, set()]
    assert bad(log) == 9
    log.report(17, [2.0])
    assert bad(log) == 10


def bad(log: Log) -> int:
    (state,) = [
        watch.state
        for watch in log.state.observers.watches
        if "cooldown" in {item.name for item in fields(watch.state)}
    ]
    count: int = state.bad
    return count


def test_a_plateau_does_not_count_under_a_hold() -> None:
    log = Log(policies=[PATIENT], feedback={"delay": 2})
    log.open()
    log.report(0, [1.0] * 5)
    act(log, core.HoldValues())
    log.report(5, [1.0] * 5)
    # The hold shows at 7: the losses at 5 and 6 are still of the schedule.
    assert bad(log) == 6
    act(log, core.ReleaseValues())
    log.report(10, [1.0] * 3)
    assert bad(log) == 7


def test_a_plateau_does_not_count_in_the_stable_phase_unless_told_to() -> None:
    decay = {"style": "wsd", "anneal": 10, "anneal_style": "linear", "end": 30}
    rate = {"peak": 1.0, "warmup": 5, "decay": decay}
    for told, expected in ((False, 5 + 9), (True, 39)):
        log = Log(policies=[{**PATIENT, "in_stable_phase": told}], learning_rate=rate)
        log.open()
        log.report(0, [1.0] * 40)
        # Warmup lasts up to 5, the stable phase from 6 up to 20.
        assert bad(log) == expected + (10 if not told else 0)


# The least interval between changes.


def test_what_comes_too_soon_is_held_back_and_decided_again_when_the_interval_is_over() -> None:
    first, second = {**PLATEAU, "factor": 0.5}, {**PLATEAU, "patience": 2, "factor": 0.25}
    log = Log(policies=[first, {**second, "cooldown": 5}], feedback={"delay": 2, "interval": 10})
    log.open()
    log.report(0, [1.0] * 4)
    # The first cuts at 1 + 2; the second would at 3 + 2, and is quiet up to 11 = 3 + 10 - 2.
    made = [*log.state.plan.adjustments, *log.state.advice]
    assert [(item.order, item.effective, item.mode) for item in made] == [
        (0, 3, "act"), (0, 5, "held back"), (1, 5, "held back"),
    ]  # fmt: skip
    assert [watch.muted_until for watch in log.state.observers.watches[:2]] == [11, 11]
    log.report(4, [1.0] * 7)
    assert len(log.state.plan.adjustments) == 1
    log.report(11, [1.0])
    assert [(item.order, item.effective) for item in log.state.plan.adjustments] == [
        (0, 3), (0, 13),
    ]  # fmt: skip
    assert log.rates(0, 14) == [1.0] * 3 + [0.5] * 10 + [0.25]


def test_what_no_longer_holds_when_the_interval_is_over_is_not_decided() -> None:
    log = Log(policies=[PLATEAU], feedback={"delay": 2, "interval": 10})
    log.open()
    log.report(0, [1.0] * 11 + [0.5, 0.25, 0.125])
    assert len(log.state.plan.adjustments) == 1
    log.report(14, [1.0])
    assert [item.effective for item in log.state.plan.adjustments] == [3, 16]


@pytest.mark.parametrize(
    ("policy", "reports", "expected"),
    [
        ({"kind": "batch-size", "reference": 1}, [{"batch": 1}, {"batch": 4}], 2.0),
        ({"kind": "decay-on-plateau", "window": 1, "patience": 0, "anneal": 1}, [{}, {}], 0.0),
    ],
)
def test_what_a_policy_decides_once_is_not_lost_when_it_is_held_back(
    policy: dict[str, Any], reports: list[dict[str, Any]], expected: float
) -> None:
    log = Log(policies=[policy], feedback={"delay": 1, "interval": 10})
    log.open()
    act(log, core.ScaleLearningRate(0.5))
    for at in range(14):
        report = core.Report(at, 1.0, 1.0, at + 1, **reports[min(at, 1)])
        log.write(core.report_losses(log.state, [report], rank=0, incarnation="one")[0])
    assert [item.mode for item in log.state.advice] == ["held back"]
    # The operator's change at 1 is ten steps old at 11.
    assert log.rates(10, 11) == [0.5]
    assert log.rates(12, 13) == [0.5 * expected]


def test_only_what_changes_lr_or_wd_is_held_back() -> None:
    guard = {"kind": "nonfinite", "mode": "act", "streak": 1, "hold": 3}
    log = Log(policies=[guard], feedback={"delay": 2, "interval": 50})
    log.open()
    act(log, core.ScaleLearningRate(0.5))
    log.report(0, [1.0, math.nan])
    assert [item.change.action for item in log.state.advice] == ["hold"]
    assert [item.change.action for item in log.state.plan.directives(0, 9)] == ["directive"]
    # It was heard all the same, and asks again once what it would have held is over.
    log.report(2, [math.nan] * 5)
    assert [item.decided_at for item in log.state.plan.directives(0, 99)] == [1, 6]


def test_an_interval_looks_at_nothing_that_shows_later() -> None:
    log = Log(policies=[PLATEAU], feedback={"delay": 4, "interval": 10})
    log.open()
    log.report(0, [1.0] * 30)
    act(log, core.ScaleLearningRate(0.5))
    before = [item.effective for item in log.state.plan.adjustments if item.kind == "plateau"]
    # In an attempt that goes back, the operator's change at 34 is still to come.
    log.open(0)
    log.report(0, [1.0] * 30)
    after = [item.effective for item in log.state.plan.adjustments if item.kind == "plateau"]
    assert after == before != []


def test_a_policy_that_cannot_take_a_loss_passes_it_over_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observe = Plateau.observe

    def fails_at_3(policy: Plateau, state: Any, observation: Any, view: Any) -> Any:
        if observation.progress == 3:
            raise OverflowError("too large")
        return observe(policy, state, observation, view)

    monkeypatch.setattr(Plateau, "observe", fails_at_3)
    log = Log(policies=[{**PLATEAU, "patience": 1}])
    log.open()
    log.report(0, [1.0, 0.5, 0.5, 0.5, 0.5])
    note, cut = log.state.plan.adjustments
    assert (note.decided_at, note.change.action) == (3, "note")
    assert "cannot take what was reported at 3" in note.reason
    assert (cut.decided_at, cut.change.action) == (4, "multiply")
