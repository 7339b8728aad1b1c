"""The plateau policy against torch: golden vectors, the installed class, and by itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import Change, Multiply
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._observers import Observers
from lrpilot.core._plan import Adjustment, Plan, Revision
from lrpilot.core._spec import RunSpec, parse_policy, parse_spec
from lrpilot.core.policies import (
    POLICIES,
    Observation,
    Plateau,
    PlateauSpec,
    PlateauState,
    build_policy,
)
from tests.core.policies.stand import StandView

Golden = Callable[[str], list[dict[str, Any]]]

REFUSED = {
    # Torch refuses it as well.
    "plateau-ctor-factor1": "policies.0.factor",
    # Torch takes it, and would turn the LR's sign.
    "plateau-ctor-factor-neg": "policies.0.factor",
}
"""Golden rows of constructor arguments, and the field that we refuse them at."""

NOT_FLOAT64 = {
    # Between two cuts torch keeps that LR as float32; here it is float64 until it is written
    # into the optimizer. The counters do not depend on it.
    "plateau-tensor-lr-f32",
}


def policy_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return torch's arguments under the names that they have in a spec."""
    renamed = {"objective" if name == "mode" else name: value for name, value in config.items()}
    return {"kind": "plateau", "nonfinite": "count", **renamed}


def run_spec(config: Mapping[str, Any], rates: Sequence[float]) -> RunSpec:
    """Return a run with these constant LRs, in which a loss acts on the next step."""
    groups = [{"name": f"group {index}", "peak": rate} for index, rate in enumerate(rates)]
    return parse_spec(
        {
            "name": "torch",
            "total": 10_000,
            "learning_rate": {"peak": 1.0},
            "groups": groups,
            "policies": [policy_fields(config)],
            "feedback": {"delay": 1},
        }
    )


class Run:
    """The core fed with one loss after the other."""

    def __init__(self, spec: RunSpec) -> None:
        self.plan = Plan([Revision(0, 0, spec)], [])
        self.observers = Observers()
        self.progress = 0
        self.decided: list[Adjustment] = []

    def step(self, loss: float) -> list[str]:
        """Observe the loss at this progress and return the LR per group at the next one."""
        observation = Observation(self.progress, loss)
        self.observers, decided = self.observers.observe(self.plan, observation, 1)
        # The detectors that watch every run speak as well, and change nothing.
        self.decided += [item for item in decided if item.kind == "plateau"]
        self.progress += 1
        return [lr.hex() for lr in self.plan.values(self.progress)[0]]

    @property
    def state(self) -> PlateauState:
        (state,) = (
            watch.state for watch in self.observers.watches if isinstance(watch.state, PlateauState)
        )
        return state


def real_scheduler(config: Mapping[str, Any], rates: Sequence[float]) -> Any:
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **config)


def test_golden_series(golden: Golden) -> None:
    rows = golden("torch_plateau")
    assert len(rows) == 19
    assert {row["id"] for row in rows if "losses" not in row} == set(REFUSED)
    assert {row["id"] for row in rows if row.get("tensor_lr")} == NOT_FLOAT64
    compared = 0
    for row in rows:
        if row["id"] in REFUSED:
            continue
        assert row["events"] == []
        run = Run(run_spec(row["config"], row["init_lrs"]))
        for index, loss in enumerate(row["losses"]):
            rates = run.step(float(loss))
            where = (row["id"], index)
            if row["id"] not in NOT_FLOAT64:
                assert rates == row["lr_hex"][index], where
                compared += 1
            assert run.state.bad == row["num_bad_epochs"][index], where
            assert run.state.cooldown == row["cooldown_counter"][index], where
            assert run.state.best.hex() == float(row["best"][index]).hex(), where
    assert compared == sum(
        len(row["losses"]) for row in rows if row["id"] not in {*REFUSED, *NOT_FLOAT64}
    )


def test_golden_arguments_that_are_refused(golden: Golden) -> None:
    rows = {row["id"]: row for row in golden("torch_plateau")}
    for name, field in REFUSED.items():
        row = rows[name]
        with pytest.raises(InvalidSpec) as refused:
            run_spec(row["config"], row["init_lrs"])
        assert [violation.field for violation in refused.value.violations] == [field]


RATES = st.one_of(st.floats(0.0, 1.0), st.sampled_from([1e-3, 3e-4, 1e-7, 0.0]))

LOSSES = st.lists(
    st.one_of(
        st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5, -1.0, 0.0, -0.0]),
        st.sampled_from([math.nan, math.inf, -math.inf]),
        st.floats(-10.0, 10.0),
        st.floats(),
    ),
    min_size=1,
    max_size=60,
)


@st.composite
def torch_configurations(draw: st.DrawFn) -> tuple[dict[str, Any], list[float]]:
    rates = draw(st.lists(RATES, min_size=1, max_size=3))
    floors = st.lists(RATES, min_size=len(rates), max_size=len(rates))
    config = {
        "mode": draw(st.sampled_from(["min", "max"])),
        "factor": draw(
            st.one_of(
                st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
                st.sampled_from([0.1, 0.5, 0.95, 0.999]),
            )
        ),
        "patience": draw(st.integers(0, 4)),
        "threshold": draw(st.one_of(st.sampled_from([0.0, 1e-4, 0.1, 1.0]), st.floats(0.0, 2.0))),
        "threshold_mode": draw(st.sampled_from(["rel", "abs"])),
        "cooldown": draw(st.integers(0, 4)),
        "min_lr": draw(st.one_of(st.just(0), RATES, floors)),
        "eps": draw(st.one_of(st.sampled_from([0.0, 1e-8, 1e-5]), st.floats(0.0, 1e-3))),
    }
    return config, rates


@settings(max_examples=300, deadline=None)
@given(torch_configurations(), LOSSES)
def test_any_series_is_answered_as_by_the_real_class(
    configuration: tuple[dict[str, Any], list[float]], losses: list[float]
) -> None:
    config, rates = configuration
    real, run = real_scheduler(config, rates), Run(run_spec(config, rates))
    before = [rate.hex() for rate in rates]
    for loss in losses:
        real.step(loss)
        decided = len(run.decided)
        after = run.step(loss)
        assert after == [group["lr"].hex() for group in real.optimizer.param_groups]
        # What moves nothing is not decided.
        assert len(run.decided) - decided == (after != before)
        before = after
        assert run.state.bad == real.num_bad_epochs
        assert run.state.cooldown == real.cooldown_counter
        assert run.state.best.hex() == real.best.hex()


def test_long_series_are_answered_as_by_the_real_class() -> None:
    # Hundreds of cuts in a chain, down to where eps blocks them.
    config = {"factor": 0.99, "patience": 0, "threshold": 0.0, "min_lr": 1e-9}
    real, run = real_scheduler(config, [0.1]), Run(run_spec({**config, "eps": 1e-8}, [0.1]))
    for step in range(2000):
        loss = float(step)
        real.step(loss)
        assert run.step(loss) == [real.optimizer.param_groups[0]["lr"].hex()]
    assert len(run.decided) > 1000
    assert run.plan.values(run.progress)[0][0] * 0.01 <= 1e-8


# ---------------------------------------------------------------------------------------------
# The policy by itself.


def at(*rates: float) -> StandView:
    """Return what a policy sees where these are the LRs of the groups."""
    return StandView(at=1, base=rates, adjusted=rates)


class Unseen(StandView):
    """A view whose LR must not be read."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"base", "adjusted"}:
            raise AssertionError("read without a proposal")
        return super().__getattribute__(name)


def cuts(proposed: Sequence[Change]) -> list[Multiply]:
    """Return the proposals, which are nothing but cuts."""
    assert all(isinstance(change, Multiply) for change in proposed)
    return [change for change in proposed if isinstance(change, Multiply)]


def feed(
    policy: Plateau, losses: Sequence[float], state: PlateauState | None = None, *rates: float
) -> tuple[PlateauState, list[tuple[int, Multiply]]]:
    """Return the state after these losses, and what was proposed on which."""
    state = policy.initial() if state is None else state
    proposed: list[tuple[int, Multiply]] = []
    for index, loss in enumerate(losses):
        state, found = policy.observe(state, Observation(index, loss), at(*(rates or (1e-3,))))
        proposed += [(index, item) for item in cuts(found)]
    return state, proposed


def plateau(groups: int = 1, **fields: Any) -> Plateau:
    spec = parse_policy({"kind": "plateau", **fields})
    assert isinstance(spec, PlateauSpec)
    return Plateau(spec, groups)


def test_the_view_is_read_only_to_propose() -> None:
    policy = plateau(patience=2)
    state = policy.initial()
    for loss in (1.0, 1.0, 1.0):
        state, proposed = policy.observe(state, Observation(0, loss), Unseen())
        assert proposed == ()
    with pytest.raises(AssertionError, match="read without"):
        policy.observe(state, Observation(0, 1.0), Unseen())


def test_patience_is_borne_and_the_next_report_cuts() -> None:
    _, proposed = feed(plateau(patience=3, factor=0.25), [1.0] * 10)
    assert [index for index, _ in proposed] == [4, 8]
    assert proposed[0][1].factor == 0.25


@pytest.mark.parametrize(
    ("fields", "losses", "better"),
    [
        ({"threshold_mode": "rel", "threshold": 0.1}, [10.0, 9.0], False),  # strictly below
        ({"threshold_mode": "rel", "threshold": 0.1}, [10.0, 8.999], True),
        ({"threshold_mode": "abs", "threshold": 1.0}, [10.0, 9.0], False),
        ({"threshold_mode": "abs", "threshold": 1.0}, [10.0, 8.999], True),
        ({"objective": "max", "threshold": 0.5}, [10.0, 15.0], False),
        ({"objective": "max", "threshold": 0.5}, [10.0, 15.1], True),
        ({"objective": "max", "threshold_mode": "abs", "threshold": 1.0}, [10.0, 11.0], False),
        ({"objective": "max", "threshold_mode": "abs", "threshold": 1.0}, [10.0, 11.1], True),
        # With a negative best a relative threshold turns round, as in torch.
        ({"threshold": 0.1}, [-10.0, -9.5], True),
        ({"threshold": 0.0, "threshold_mode": "abs"}, [1.0, 1.0], False),
    ],
)
def test_what_counts_as_better(fields: dict[str, Any], losses: list[float], better: bool) -> None:
    state, _ = feed(plateau(patience=100, **fields), losses)
    assert state.best == losses[1 if better else 0]
    assert state.bad == (0 if better else 1)


def test_a_cooldown_bears_every_report_but_still_moves_the_best() -> None:
    policy = plateau(patience=0, cooldown=2)
    state, proposed = feed(policy, [2.0, 2.0, 3.0, 1.0])
    assert [index for index, _ in proposed] == [1]
    assert (state.best, state.bad, state.cooldown) == (1.0, 0, 0)
    _, proposed = feed(policy, [1.5], state)
    assert len(proposed) == 1


def test_a_cut_that_moves_nothing_is_not_proposed_but_starts_the_counters_afresh() -> None:
    policy = plateau(patience=0, cooldown=3, min_lr=1e-3)
    state, proposed = feed(policy, [1.0, 1.0])
    assert proposed == []
    assert (state.bad, state.cooldown) == (0, 3)


def test_whether_a_cut_moves_is_asked_of_the_adjusted_lr() -> None:
    def adjusted(rate: float) -> StandView:
        return StandView(at=1, base=(1.0,), adjusted=(rate,))

    policy = plateau(patience=0, min_lr=0.1)
    state, _ = feed(policy, [1.0])
    assert policy.observe(state, Observation(1, 1.0), adjusted(0.1))[1] == ()
    assert len(policy.observe(state, Observation(1, 1.0), adjusted(0.2))[1]) == 1


def test_a_cut_is_proposed_when_one_group_moves() -> None:
    policy = plateau(groups=2, patience=0, min_lr=[1e-3, 1e-4])
    _, proposed = feed(policy, [1.0, 1.0], None, 1e-3, 1e-3)
    assert [item.min_lr for _, item in proposed] == [(1e-3, 1e-4)]
    assert [item.max_lr for _, item in proposed] == [None]


def test_one_floor_holds_for_every_group() -> None:
    _, proposed = feed(plateau(groups=2, patience=0, min_lr=1e-5), [1.0, 1.0], None, 1e-3, 1e-3)
    assert proposed[0][1].min_lr == (1e-5, 1e-5)


@pytest.mark.parametrize("blocked", [True, False])
def test_a_change_of_eps_is_not_made(blocked: bool) -> None:
    change = 1.0 - 1.0 * 0.5
    eps = change if blocked else math.nextafter(change, 0.0)
    _, proposed = feed(plateau(patience=0, factor=0.5, eps=eps), [1.0, 1.0], None, 1.0)
    assert (proposed == []) is blocked


def test_a_report_is_the_mean_of_a_window_summed_in_order() -> None:
    losses = [0.1, 0.2, 0.3, 1e16, 1.0, -1e16]
    state, _ = feed(plateau(window=3, threshold_mode="abs", threshold=0.0), losses[:3])
    assert state == PlateauState(best=((0.1 + 0.2) + 0.3) / 3, bad=0, cooldown=0, total=0.0, seen=0)
    # In another order this sum would be 1.0.
    state, _ = feed(plateau(window=3, objective="min"), losses[3:])
    assert state.best == ((1e16 + 1.0) + -1e16) / 3 == 0.0


def test_reports_of_a_window_do_not_overlap() -> None:
    _, proposed = feed(plateau(window=5, patience=1), [1.0] * 20)
    assert [index for index, _ in proposed] == [14]


def test_a_window_under_way_is_state() -> None:
    state, _ = feed(plateau(window=4), [1.0, 2.0])
    assert (state.best, state.total, state.seen) == (math.inf, 3.0, 2)


def test_the_sign_of_a_zero_loss_is_kept() -> None:
    state, _ = feed(plateau(), [-0.0])
    assert math.copysign(1.0, state.best) == -1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_skipped_losses_leave_no_trace(loss: float) -> None:
    policy = plateau(window=2, patience=0)
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    broken = [item for finite in losses for item in (loss, finite)]
    state, proposed = feed(policy, losses)
    skipping, proposed_skipping = feed(policy, broken)
    assert skipping == state
    assert [item for _, item in proposed_skipping] == [item for _, item in proposed]


@pytest.mark.parametrize(("loss", "best", "bad"), [(math.nan, 1.0, 1), (-math.inf, -math.inf, 0)])
def test_counted_losses_are_reports_of_their_own(loss: float, best: float, bad: int) -> None:
    policy = plateau(window=2, nonfinite="count")
    state, _ = feed(policy, [1.0, 1.0, 5.0, loss])
    # The loss of the window under way is still there.
    assert (state.best, state.bad, state.total, state.seen) == (best, bad, 5.0, 1)


@pytest.mark.parametrize(
    ("fields", "losses", "reason"),
    [
        (
            {"patience": 2},
            [1.5, 1.5, 1.5, 1.5],
            "loss 1.5: none below 1.5 * (1 - 0.0001) for 3 reports (patience 2)",
        ),
        (
            {"patience": 0, "threshold_mode": "abs", "threshold": 0.25},
            [1.5, 1.3],
            "loss 1.3: none below 1.5 - 0.25 for 1 report (patience 0)",
        ),
        (
            {"patience": 1, "objective": "max"},
            [1.0, 0.5, 0.25],
            "loss 0.25: none above 1 * (1 + 0.0001) for 2 reports (patience 1)",
        ),
        (
            {"patience": 0, "window": 2, "threshold_mode": "abs", "objective": "max"},
            [1.0, 2.0, 1.0, 1.0],
            "mean of 2 losses 1: none above 1.5 + 0.0001 for 1 report (patience 0)",
        ),
        (
            {"patience": 0, "nonfinite": "count"},
            [1.0, math.nan],
            "loss nan: none below 1 * (1 - 0.0001) for 1 report (patience 0)",
        ),
    ],
)
def test_the_reason_has_the_numbers(
    fields: dict[str, Any], losses: list[float], reason: str
) -> None:
    _, proposed = feed(plateau(**fields), losses)
    assert [item.reason for _, item in proposed] == [reason]


def test_a_policy_holds_no_state() -> None:
    policy = plateau(patience=1, cooldown=1)
    losses = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    first = feed(policy, losses)
    assert feed(policy, losses) == first
    middle, _ = feed(policy, losses[:3])
    assert feed(policy, losses[3:], middle)[0] == first[0]


def test_a_named_validation_loss_is_read_and_the_loss_is_not() -> None:
    policy = plateau(metric="val_loss", patience=0, window=2)
    state = policy.initial()
    found: list[Multiply] = []
    for n, value in enumerate([2.0, None, 2.0, 2.0, None, 3.0]):
        validation = {"other": 0.0} if value is None else {"val_loss": value}
        observation = Observation(n, 1.0 / (n + 1), validation)
        state, proposed = policy.observe(state, observation, at(1e-3))
        found += cuts(proposed)
    (cut,) = found
    assert cut.reason == (
        "mean of 2 val_loss 2.5: none below 2 * (1 - 0.0001) for 1 report (patience 0)"
    )


def test_a_step_without_a_loss_changes_nothing() -> None:
    state, _ = feed(plateau(), [1.0])
    observation = Observation(1, None, {"val_loss": 5.0})
    assert plateau().observe(state, observation, at(1e-3)) == (state, ())


def test_it_is_quiet_in_the_stable_phase_unless_told_otherwise() -> None:
    always = {"hold", "dip", "stage change"}
    assert parse_policy({"kind": "plateau"}).quiet == {*always, "stable phase"}
    assert parse_policy({"kind": "plateau", "in_stable_phase": True}).quiet == always


@pytest.mark.parametrize(("told", "decided"), [(False, [33, 36]), (True, [13, 16])])
def test_a_run_leaves_the_stable_phase_alone_unless_told_otherwise(
    told: bool, decided: list[int]
) -> None:
    decay = {"style": "wsd", "end": 60, "anneal": 30, "anneal_style": "linear"}
    spec = parse_spec(
        {
            "name": "wsd",
            "total": 60,
            "learning_rate": {"peak": 1.0, "warmup": 10, "decay": decay},
            "policies": [
                {"kind": "plateau", "patience": 2, "in_stable_phase": told, "objective": "max"}
            ],
            "feedback": {"delay": 1},
        }
    )
    run = Run(spec)
    # It improves in the warmup, and then no more.
    for n in range(60):
        run.step(float(min(n, 10)))
    assert [item.decided_at for item in run.decided][:2] == decided


# ---------------------------------------------------------------------------------------------
# State.


def states() -> st.SearchStrategy[PlateauState]:
    counts = st.integers(0, 2**53)
    return st.builds(
        PlateauState,
        best=st.floats(allow_nan=False),
        bad=counts,
        cooldown=counts,
        total=st.floats(allow_nan=False),
        seen=counts,
    )


@given(states())
@example(PlateauState(best=math.inf, bad=0, cooldown=0, total=-0.0, seen=0))
def test_a_state_survives_to_the_bit(state: PlateauState) -> None:
    policy = plateau()
    data = _canonical.to_bytes(policy.encode(state))
    read = policy.decode(_canonical.from_bytes(data))
    assert (read.best.hex(), read.total.hex()) == (state.best.hex(), state.total.hex())
    assert read == state
    assert _canonical.to_bytes(policy.encode(read)) == data


@settings(max_examples=100, deadline=None)
@given(
    torch_configurations(), LOSSES, st.sampled_from(["skip", "count"]), st.integers(1, 3), st.data()
)
def test_a_run_goes_on_from_a_saved_state_as_if_it_had_not_stopped(
    configuration: tuple[dict[str, Any], list[float]],
    losses: list[float],
    nonfinite: str,
    window: int,
    data: st.DataObject,
) -> None:
    config, rates = configuration
    fields = {**config, "nonfinite": nonfinite, "window": window}
    spec = run_spec(fields, rates)
    (policy_spec,) = spec.policies
    policy = build_policy(policy_spec, spec.group_names)
    stop = data.draw(st.integers(0, len(losses)), "stop")
    found: list[Multiply] = []
    found_saved: list[Multiply] = []
    state = saved = policy.initial()
    for index, loss in enumerate(losses):
        if index == stop:
            saved = policy.decode(_canonical.from_bytes(_canonical.to_bytes(policy.encode(saved))))
        observation = Observation(index, loss)
        state, proposed = policy.observe(state, observation, at(*rates))
        found += cuts(proposed)
        saved, proposed = policy.observe(saved, observation, at(*rates))
        found_saved += cuts(proposed)
    assert saved == state
    assert found_saved == found


GOOD: dict[str, Any] = {"best": 1.0, "bad": 1, "cooldown": 0, "total": 0.0, "seen": 0}


BROKEN: list[Any] = [None, "x", [1], {}]
NO_COUNTS: list[Any] = [-1, 1.0, 0.5, "1", True, math.nan]


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: value} for name in GOOD for value in BROKEN),
        *({**GOOD, name: value} for name in ("bad", "cooldown", "seen") for value in NO_COUNTS),
        {**GOOD, "best": 10**400},
        {},
        [],
        None,
        "state",
        3,
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a plateau policy"):
        plateau().decode(damaged)


def test_non_finite_numbers_come_back_from_their_names() -> None:
    state = plateau().decode({**GOOD, "best": "-inf", "total": "nan"})
    assert state.best == -math.inf
    assert math.isnan(state.total)


# ---------------------------------------------------------------------------------------------
# The registry.


def test_every_registered_policy_is_built_from_its_fields() -> None:
    for kind, registered in POLICIES.items():
        spec = parse_policy({"kind": kind})
        assert type(spec) is registered.spec
        policy = build_policy(spec, ("a", "b"))
        assert policy.kind == kind
        state = policy.initial()
        assert policy.decode(policy.encode(state)) == state


@pytest.mark.parametrize(("mode", "waits"), [("act", True), ("advise", False), ("off", False)])
def test_only_a_policy_that_acts_waits_for_losses(mode: str, waits: bool) -> None:
    spec = parse_policy({"kind": "plateau", "mode": mode})
    assert spec.needs_feedback is waits
