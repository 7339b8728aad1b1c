"""The greedy policy against Hugging Face's GreedyLR: golden vectors, its algorithm, by itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import Change, Divide, EndOwn, Multiply
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._observers import Observers
from lrpilot.core._plan import Plan, Revision
from lrpilot.core._spec import parse_policy, parse_spec
from lrpilot.core.policies import Greedy, GreedySpec, GreedyState, Observation
from tests.core.policies.checks import assert_one_changes_nothing, refusal
from tests.core.policies.stand import Stand, StandView

Golden = Callable[[str], list[dict[str, Any]]]

RENAMED = {"mode": "objective", "window_size": "window"}
SILENT = {"verbose"}


def greedy(groups: int = 1, **fields: Any) -> Greedy:
    spec = parse_policy({"kind": "greedy", **fields})
    assert isinstance(spec, GreedySpec)
    return Greedy(spec, groups)


def applied(change: Change, rates: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the LR of each group after a change on a constant base."""
    if isinstance(change, EndOwn):
        return list(base)
    after = []
    for index, x in enumerate(rates):
        if isinstance(change, Multiply):
            new = max(x * change.factor, change.min_lr[index])
            after.append(new if x - new > change.eps else x)
        else:
            assert isinstance(change, Divide)
            new = min(x / change.divisor, change.max_lr[index])
            after.append(new if new - x > change.eps else x)
    return after


class Run:
    """The policy on a constant base, with what it proposes put into effect on the next step."""

    def __init__(self, policy: Greedy, base: Sequence[float], peak: Sequence[float]) -> None:
        self.rates = list(base)
        self._base, self._peak = tuple(base), tuple(peak)
        self._stand = Stand(policy, view=self._view)
        self._progress = 0

    def _view(self, _n: int) -> StandView:
        return StandView(base=self._base, adjusted=tuple(self.rates), peak=self._peak)

    def step(self, loss: float) -> list[float]:
        """Return the LR of each group after this loss."""
        for change in self._stand.see(Observation(self._progress, loss)):
            before = self.rates
            self.rates = applied(change, before, self._base)
            # What moves nothing is not proposed.
            assert self.rates != before
        self._progress += 1
        return self.rates

    @property
    def state(self) -> GreedyState:
        state = self._stand.state
        assert isinstance(state, GreedyState)
        return state


def policy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Hugging Face's arguments under the names that they have in a spec."""
    fields = {RENAMED.get(k, k): value for k, value in config.items() if k not in SILENT}
    return {"nonfinite": "count", **fields}


def test_golden_series(golden: Golden) -> None:
    rows = [row for row in golden("greedy") if "losses" in row]
    assert len(rows) == 16
    compared = smoothed = 0
    for row in rows:
        # It goes on where it stopped, as ours does.
        assert {event["type"] for event in row["events"]} <= {"resume"}
        fields, base = policy_fields(row["config"]), row["init_lrs"]
        run = Run(greedy(len(base), **fields), base, [row["config"]["max_lr"]] * len(base))
        for index, loss in enumerate(row["losses"]):
            where = (row["id"], index)
            rates = run.step(float(loss))
            assert [rate.hex() for rate in rates] == row["lr_hex"][index], where
            assert run.state.best.hex() == float(row["best"][index]).hex(), where
            assert run.state.good == row["num_good_epochs"][index], where
            assert run.state.bad == row["num_bad_epochs"][index], where
            assert run.state.cooldown == row["cooldown_counter"][index], where
            assert run.state.warmup == row["warmup_counter"][index], where
            assert run.state.until_reset == row["reset_start"][index], where
            if row["smooth_sum_hex"][index] is not None:
                assert run.state.total.hex() == float.fromhex(row["smooth_sum_hex"][index]).hex()
                smoothed += 1
            compared += 1
    assert compared == sum(len(row["losses"]) for row in rows) > 2000
    assert smoothed > 200


def test_golden_series_in_a_whole_run(golden: Golden) -> None:
    compared = 0
    for row in golden("greedy"):
        # In a run the base is the ceiling, where the real class may be told a higher one.
        if "losses" not in row or min(row["init_lrs"]) < row["config"]["max_lr"]:
            continue
        spec = parse_spec(
            {
                "name": "greedy",
                "total": 10_000,
                "learning_rate": {"peak": 1.0},
                "groups": [
                    {"name": f"group {index}", "peak": rate}
                    for index, rate in enumerate(row["init_lrs"])
                ],
                "policies": [{"kind": "greedy", **policy_fields(row["config"])}],
                "feedback": {"delay": 1},
            }
        )
        plan, observers = Plan([Revision(0, 0, spec)], []), Observers()
        for n, loss in enumerate(row["losses"]):
            observers, _ = observers.observe(plan, Observation(n, float(loss)), 1)
            rates = plan.values(n + 1)[0]
            assert [rate.hex() for rate in rates] == row["lr_hex"][n], (row["id"], n)
            compared += 1
    assert compared > 500


def test_golden_arguments_that_are_refused(golden: Golden) -> None:
    (row,) = (row for row in golden("greedy") if "losses" not in row)
    assert row["raises"] == "ValueError"
    groups = [{"name": str(index)} for index, _ in enumerate(row["init_lrs"])]
    document = {
        "name": "greedy",
        "total": 10,
        "learning_rate": {"peak": 1.0},
        "groups": groups,
        "policies": [{"kind": "greedy", **row["config"], "max_lr": [1.0, 1.0]}],
    }
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(document)
    assert {found.field: found.allowed for found in refused.value.violations} == {
        f"policies.0.{name}": "one number, or a list of 1: one for each group"
        for name in ("min_lr", "max_lr")
    }


# ---------------------------------------------------------------------------------------------
# Any series, against the algorithm written down once more.


@dataclass
class Reference:
    """GreedyLR as its paper and its documentation describe it, with the LR inside."""

    config: dict[str, Any]
    first: list[float]
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rates, self.wait = list(self.first), self.config["reset_start"]
        self.clear()
        self.pause_down = self.pause_up = 0

    def clear(self) -> None:
        self.best = math.inf if self.config["mode"] == "min" else -math.inf
        self.streak = 0  # Above 0: good reports in a row; below: bad ones.
        self.kept: list[float] = []
        self.sum = 0.0

    def step(self, a: float) -> list[float]:
        c = self.config
        if c["smooth"]:
            self.kept.append(a)
            self.sum += a
            if len(self.kept) > c["window_size"]:
                self.sum -= self.kept.pop(0)
            a = self.sum / len(self.kept)
        if self.pause_down or self.pause_up:
            self.streak = 0
            if self.pause_down:
                self.pause_down -= 1
            else:
                self.pause_up -= 1
            return self.rates
        sign = -1.0 if c["mode"] == "min" else 1.0
        if c["threshold_mode"] == "rel":
            bar = self.best * (1.0 + sign * c["threshold"])
        else:
            bar = self.best + sign * c["threshold"]
        if sign * a > sign * bar:
            self.best, self.streak = a, max(self.streak, 0) + 1
        else:
            self.streak = min(self.streak, 0) - 1
        if self.streak > c["patience"]:
            higher = [min(x / c["factor"], c["max_lr"]) for x in self.rates]
            self.rates = [
                y if y - x > c["eps"] else x for x, y in zip(self.rates, higher, strict=True)
            ]
            self.streak, self.pause_up, self.wait = 0, c["warmup"], c["reset_start"]
        elif -self.streak > c["patience"]:
            lower = [max(x * c["factor"], c["min_lr"]) for x in self.rates]
            self.rates = [
                y if x - y > c["eps"] else x for x, y in zip(self.rates, lower, strict=True)
            ]
            if all(x <= c["min_lr"] for x in self.rates):
                self.wait -= 1
                if self.wait <= 0:
                    self.rates, self.wait = list(self.first), c["reset_start"]
                    self.clear()
            self.streak, self.pause_down = 0, c["cooldown"]
        return self.rates


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], list[float]]:
    rate = st.one_of(st.floats(0.0, 1.0), st.sampled_from([1e-3, 3e-4, 1e-5, 0.0]))
    config = {
        "mode": draw(st.sampled_from(["min", "max"])),
        "factor": draw(st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.999])),
        "patience": draw(st.integers(0, 3)),
        "threshold": draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0])),
        "threshold_mode": draw(st.sampled_from(["rel", "abs"])),
        "cooldown": draw(st.integers(0, 3)),
        "warmup": draw(st.integers(0, 3)),
        "smooth": draw(st.booleans()),
        "window_size": draw(st.integers(1, 5)),
        "min_lr": draw(rate),
        "max_lr": draw(rate),
        "eps": draw(st.sampled_from([0.0, 1e-12, 1e-8, 1e-3])),
        "reset_start": draw(st.integers(1, 4)),
    }
    return config, draw(st.lists(rate, min_size=1, max_size=3))


CLEAN = st.one_of(
    st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5, -1.0, 0.0, -0.0]), st.floats(-10.0, 10.0)
)
ANY = st.one_of(CLEAN, st.sampled_from([math.nan, math.inf, -math.inf]))


@settings(max_examples=300, deadline=None)
@given(configurations(), st.lists(ANY, min_size=1, max_size=60))
def test_any_series_is_answered_as_by_the_reference(
    configuration: tuple[dict[str, Any], list[float]], losses: list[float]
) -> None:
    config, base = configuration
    reference = Reference(config, base)
    policy = greedy(len(base), **policy_fields(config))
    run = Run(policy, base, [config["max_lr"]] * len(base))
    for loss in losses:
        wanted = reference.step(loss)
        assert [rate.hex() for rate in run.step(loss)] == [rate.hex() for rate in wanted]
        assert run.state.best.hex() == reference.best.hex()
        assert (run.state.good or -run.state.bad) == reference.streak
        assert (run.state.cooldown, run.state.warmup, run.state.until_reset) == (
            reference.pause_down,
            reference.pause_up,
            reference.wait,
        )


# ---------------------------------------------------------------------------------------------
# The policy by itself.


def proposals(policy: Greedy, losses: Sequence[float | None], view: StandView) -> list[Any]:
    return Stand(policy, view=lambda _n: view).run(losses)


HALFWAY = StandView(adjusted=(5e-4,))


def test_it_fires_at_exactly_the_stated_step_with_the_stated_change() -> None:
    policy = greedy(factor=0.5, patience=2, threshold_mode="abs", threshold=0.25, min_lr=1e-6)
    found = proposals(policy, [5.0, 4.0, 3.0, 3.0, 3.0, 2.75], HALFWAY)
    assert found == [
        (
            2,
            Divide(
                0.5,
                "loss 3: better for 3 reports in a row (patience 2)",
                max_lr=(1e-3,),
                eps=1e-8,
            ),
        ),
        (
            5,
            Multiply(
                0.5,
                "loss 2.75: none below 3 - 0.25 for 3 reports (patience 2)",
                min_lr=(1e-6,),
                eps=1e-8,
            ),
        ),
    ]


def test_it_does_not_fire_while_good_and_bad_reports_take_turns() -> None:
    losses = [value for n in range(100) for value in (100.0 - n, 200.0)]
    assert proposals(greedy(patience=1), losses, HALFWAY) == []


@pytest.mark.parametrize(
    ("max_lr", "ceilings"),
    [
        (None, (1e-3, 2e-3)),
        (1.5e-3, (1e-3, 1.5e-3)),
        ([9e-4, 1.0], (9e-4, 2e-3)),
    ],
)
def test_no_raise_goes_above_the_base_peak(max_lr: Any, ceilings: tuple[float, ...]) -> None:
    view = StandView(base=(5e-4, 5e-4), adjusted=(5e-4, 5e-4), peak=(1e-3, 2e-3))
    fields = {} if max_lr is None else {"max_lr": max_lr}
    ((_, change),) = proposals(greedy(2, patience=0, **fields), [1.0], view)
    assert change.max_lr == ceilings


def test_a_raise_at_the_peak_is_not_proposed_but_starts_the_counters_afresh() -> None:
    stand = Stand(greedy(patience=1, warmup=3))
    assert stand.run([2.0, 1.0]) == []
    assert (stand.state.good, stand.state.warmup) == (0, 3)


def test_reports_after_a_move_are_passed_over() -> None:
    stand = Stand(greedy(patience=0, warmup=2, cooldown=3), view=lambda _n: HALFWAY)
    found = stand.run([1.0, 0.1, 0.1, 2.0, 0.0, 0.0, 0.0, 1.5])
    # The raise on the first, two passed over, the cut, three passed over, the next cut.
    assert [(n, change.action) for n, change in found] == [
        (0, "divide"), (3, "multiply"), (7, "multiply"),
    ]  # fmt: skip
    assert stand.state.best == 1.0


def test_it_never_starts_afresh_by_itself() -> None:
    at_floor = StandView(base=(1e-3,), adjusted=(1e-5,))
    stand = Stand(greedy(patience=0), view=lambda _n: at_floor)
    assert stand.run([1.0] + [2.0] * 1000)[1:] == []
    assert stand.state.until_reset == 0


def test_a_fresh_start_ends_what_it_did_and_forgets() -> None:
    at_floor = StandView(base=(1e-3,), adjusted=(1e-5,))
    policy = greedy(patience=0, reset_start=3, cooldown=1, smooth=True, window=4)
    stand = Stand(policy, view=lambda _n: at_floor)
    stand.run([1.0])
    found = stand.run([2.0] * 5, begin=1)
    reason = "every group at min_lr on 3 cuts (reset_start 3): back to the base"
    assert found == [(5, EndOwn(reason))]
    assert stand.state == GreedyState(math.inf, 0, 0, 1, 0, 3, (), 0.0)


def test_a_fresh_start_on_the_base_is_not_proposed() -> None:
    at_floor = StandView(base=(1e-5,), adjusted=(1e-5,), peak=(1e-5,))
    stand = Stand(greedy(patience=0, reset_start=1), view=lambda _n: at_floor)
    assert stand.run([1.0, 2.0]) == []
    assert stand.state == stand.policy.initial()


def test_a_raise_puts_the_fresh_start_off() -> None:
    at_floor = StandView(base=(1e-3,), adjusted=(1e-5,))
    stand = Stand(greedy(patience=0, reset_start=3), view=lambda _n: at_floor)
    stand.run([3.0, 4.0, 4.0])
    assert stand.state.until_reset == 1
    stand.run([2.0], begin=3)
    assert stand.state.until_reset == 3


def test_it_reads_the_metric_that_it_is_told() -> None:
    stand = Stand(greedy(patience=0, metric="val_loss"), view=lambda _n: HALFWAY)
    assert stand.run([3.0, 2.0, 1.0]) == []
    (change,) = stand.see(Observation(3, 9.0, {"val_loss": 2.0}))
    assert change.reason == "val_loss 2: better for 1 report in a row (patience 0)"


@settings(max_examples=200, deadline=None)
@given(
    configurations(),
    st.lists(CLEAN, max_size=40),
    st.integers(0, 40),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_one_loss_that_is_no_number_changes_no_later_decision(
    configuration: tuple[dict[str, Any], list[float]],
    losses: list[float],
    where: int,
    broken: float,
) -> None:
    config, base = configuration
    fields = {**policy_fields(config), "nonfinite": "skip"}
    view = StandView(base=tuple(base), adjusted=tuple(base), peak=(1.0,) * len(base))
    policy = greedy(len(base), **fields)
    assert_one_changes_nothing(lambda: Stand(policy, 2, lambda _n: view), losses, where, broken)


def test_a_sum_that_overflowed_is_added_up_afresh() -> None:
    stand = Stand(greedy(smooth=True, window=2, patience=100))
    stand.run([1e308, 1e308])
    assert stand.state.total == math.inf
    stand.run([2e307], begin=2)
    assert stand.state.total == 1e308 + 2e307


# ---------------------------------------------------------------------------------------------
# Fields and state.


def test_the_defaults() -> None:
    assert parse_policy({"kind": "greedy"}).model_dump() == {
        "kind": "greedy",
        "mode": "act",
        "objective": "min",
        "factor": 0.95,
        "patience": 2,
        "threshold": 1e-4,
        "threshold_mode": "rel",
        "cooldown": 0,
        "warmup": 0,
        "smooth": False,
        "window": 50,
        "min_lr": 1e-5,
        "max_lr": None,
        "eps": 1e-8,
        "reset_start": 0,
        "metric": "loss",
        "nonfinite": "skip",
    }


def test_it_is_quiet_while_the_lr_or_the_loss_is_not_its_own() -> None:
    assert parse_policy({"kind": "greedy"}).quiet == {"hold", "dip", "stage change"}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("factor", 1.0, "a finite number above 0 below 1"),
        ("patience", -1, "a whole number from 0 to 2**53"),
        ("warmup", 1.5, "a whole number from 0 to 2**53"),
        ("smooth", 1, "true or false"),
        ("window", 0, "a whole number from 1 to 2**53"),
        ("max_lr", "1", "a finite number from 0 to 1e+100, or a list with one for each group"),
        ("reset_start", True, "a whole number from 0 to 2**53"),
        ("nonfinite", "drop", "one of skip, count"),
    ],
)
def test_a_broken_field_is_refused(name: str, value: Any, allowed: str) -> None:
    assert refusal("greedy", **{name: value}) == (name, repr(value), allowed)


GOOD: dict[str, Any] = {
    "best": 1.0, "good": 0, "bad": 1, "cooldown": 0, "warmup": 0, "until_reset": 0,
    "values": [1.0, "nan"], "total": "inf",
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = greedy(smooth=True, window=3)
    state = GreedyState(-math.inf, 1, 0, 2, 3, 4, (-0.0, math.inf, 0.1), math.inf)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state
    assert policy.decode(GOOD).values[0] == 1.0


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD),
        {**GOOD, "good": -1},
        {**GOOD, "values": [[1.0]]},
        {**GOOD, "values": 1.0},
        {**GOOD, "total": "x"},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a greedy policy"):
        greedy().decode(damaged)
