"""Base schedules against Megatron-LM: golden vectors, the real class, and its traps."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core._errors import InvalidSpec
from lrpilot.core._plan import Plan, Revision
from lrpilot.core._schedules import base_schedule, learning_rate_schedule, weight_decay_schedule
from lrpilot.core._spec import parse_spec

Golden = Callable[[str], list[dict[str, Any]]]

REFUSED_AT = {
    "ctor/min_lr-negative": "learning_rate.min",
    "ctor/decay_steps-zero": "learning_rate.decay.end",
    "ctor/warmup-above-decay": "learning_rate.warmup",
    "ctor/start_wd-negative": "weight_decay.start",
    "ctor/constant-wd-group-with-two-values": "groups.1.weight_decay",
    "ctor/unknown-style-no-warmup": "learning_rate.decay.style",
    "ctor/max_lr-none": "learning_rate.peak",
    "step/unknown-style-after-warmup": "learning_rate.decay.style",
}
"""What Megatron-LM refuses, and the field that we refuse it at, when the spec is read."""

NO_SPEC = {
    # Progress is never negative: the schedule refuses it, not the spec.
    "step/negative-steps-no-warmup",
}


def hexed(values: tuple[tuple[float, float | None], ...]) -> list[tuple[str, str]]:
    return [(lr.hex(), wd.hex()) for lr, wd in values if wd is not None]


def test_golden_schedules(golden: Golden, megatron: Any) -> None:
    rows = golden("megatron_schedules")
    assert len(rows) == 39
    for row in rows:
        config, groups = row["config"], row["groups"]
        reached = sum(increment * times for increment, times in row["increments"])
        total = max(reached, config["lr_decay_steps"], config["wd_incr_steps"])
        spec = parse_spec(megatron.spec(config, groups, total=total))
        base, plan = base_schedule(spec), Plan([Revision(0, 0, spec)], [])
        progress = list(
            itertools.accumulate(
                (step for step, times in row["increments"] for _ in range(times)), initial=0
            )
        )
        assert row["checkpoints"], row["id"]
        for point in row["checkpoints"]:
            n = point["num_steps"]
            assert progress[point["call"]] == n, row["id"]
            wanted = list(zip(point["lr_hex"], point["wd_hex"], strict=True))
            assert hexed(base(n)) == wanted, (row["id"], n)
            lrs, decays = plan.values(n)
            assert decays is not None
            assert hexed(tuple(zip(lrs, decays, strict=True))) == wanted, (row["id"], n)


def test_golden_schedules_by_function(golden: Golden) -> None:
    rows = golden("megatron_schedules")
    for row in rows:
        config = row["config"]
        for index, group in enumerate(row["groups"]):
            learning_rate = learning_rate_schedule(
                init=config["init_lr"],
                peak=group.get("max_lr", config["max_lr"]),
                min=group.get("min_lr", config["min_lr"]),
                warmup=config["lr_warmup_steps"],
                style=config["lr_decay_style"].replace("WSD", "wsd"),
                end=config["lr_decay_steps"],
                anneal=config["wsd_decay_steps"],
                anneal_style=config["lr_wsd_decay_style"],
            )
            weight_decay = weight_decay_schedule(
                start=group.get("start_wd", config["start_wd"]),
                end=group.get("end_wd", config["end_wd"]),
                style=config["wd_incr_style"],
                over=config["wd_incr_steps"],
            )
            for point in row["checkpoints"]:
                n = point["num_steps"]
                multiplied = weight_decay(n) * group.get("wd_mult", 1.0)
                assert float(learning_rate(n)).hex() == point["lr_hex"][index], (row["id"], n)
                assert float(multiplied).hex() == point["wd_hex"][index], (row["id"], n)


def test_golden_errors(golden: Golden, megatron: Any) -> None:
    rows = {row["id"]: row for row in golden("megatron_errors")}
    assert set(rows) == set(REFUSED_AT) | NO_SPEC
    for name, field in REFUSED_AT.items():
        row = rows[name]
        with pytest.raises(InvalidSpec) as refused:
            parse_spec(megatron.spec(row["config"], row["groups"], total=100))
        assert [violation.field for violation in refused.value.violations] == [field], name
    for name in NO_SPEC:
        row = rows[name]
        base = base_schedule(parse_spec(megatron.spec(row["config"], row["groups"], total=100)))
        (step, times), *_ = row["increments"]
        with pytest.raises(ValueError, match="progress must be from 0 on, got -1"):
            base(step * times)


RATES = st.one_of(
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, 6e-5, 6e-6, 2e-4, 1e-5, 1.0]),
    st.floats(0.0, 1e6),
)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, float]]]:
    low, middle, peak = sorted(draw(st.tuples(RATES, RATES, RATES)))
    floor, init = draw(st.sampled_from([(low, middle), (middle, low), (0.0, low), (peak, 0.0)]))
    end = draw(st.one_of(st.integers(1, 300), st.integers(1, 2**45)))
    warmup = draw(
        st.one_of(
            st.just(0),
            st.integers(0, end - 1),
            st.just(end - 1),
            st.floats(0.0, end, exclude_max=True),
            st.floats(0.0, 1.0, exclude_max=True).map(lambda x: x * end).filter(lambda x: x < end),
        )
    )
    style = draw(st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]))
    wsd = style == "WSD"
    decay_style = draw(st.sampled_from(["constant", "linear", "cosine"]))
    start_wd, end_wd = sorted(draw(st.tuples(RATES, RATES)))
    constant = decay_style == "constant"
    config = {
        "init_lr": init,
        "max_lr": peak,
        "min_lr": floor,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": end,
        "lr_decay_style": style,
        "start_wd": end_wd if constant else start_wd,
        "end_wd": end_wd,
        "wd_incr_steps": draw(st.one_of(st.just(end), st.integers(1, 2 * end))),
        "wd_incr_style": decay_style,
        "wsd_decay_steps": draw(st.integers(0, 2 * end)) if wsd else None,
        "lr_wsd_decay_style": (
            draw(st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]))
            if wsd
            else None
        ),
    }
    keys: dict[str, st.SearchStrategy[float]] = {
        "max_lr": RATES,
        "min_lr": RATES,
        "wd_mult": st.one_of(st.sampled_from([0.0, 1.0]), RATES),
    }
    if not constant:
        keys |= {"start_wd": RATES, "end_wd": RATES}  # a group may ramp down
    groups = draw(st.lists(st.fixed_dictionaries({}, optional=keys), min_size=1, max_size=4))
    return config, groups


@settings(max_examples=300, deadline=None)
@given(configurations(), st.data())
def test_any_configuration_has_the_values_of_the_real_class(
    megatron: Any, configuration: tuple[dict[str, Any], list[dict[str, float]]], data: st.DataObject
) -> None:
    config, groups = configuration
    end, over = config["lr_decay_steps"], config["wd_incr_steps"]
    last = 2 * max(end, over)
    total = data.draw(st.one_of(st.just(max(end, over)), st.integers(1, last)), "total")
    begin = end - (config["wsd_decay_steps"] or 0)
    turns = [0, config["lr_warmup_steps"], begin, end, over, total, last]
    near = [int(turn) + shift for turn in turns for shift in (-1, 0, 1)]
    drawn = data.draw(st.lists(st.integers(0, last), max_size=20), "progress")
    points = sorted({n for n in (*near, *drawn) if n >= 0})
    wanted = megatron.values(config, groups, sorted({*points, total}))
    base = base_schedule(parse_spec(megatron.spec(config, groups, total=total)))
    for n in points:
        # Past total, what has ended by then goes on as Megatron-LM does; what has not stays.
        lr_at = n if end <= total else min(n, total)
        wd_at = n if over <= total else min(n, total)
        expected = [(lr, wd) for (lr, _), (_, wd) in zip(wanted[lr_at], wanted[wd_at], strict=True)]
        assert hexed(base(n)) == expected, n


@pytest.mark.parametrize("step", [1, 7, 512])
def test_the_value_depends_on_progress_alone(megatron: Any, step: int) -> None:
    # There, loading a state adds to num_steps; here nothing is added up.
    config = {
        "init_lr": 0.0, "max_lr": 6e-5, "min_lr": 6e-6, "lr_warmup_steps": 1000,
        "lr_decay_steps": 9000, "lr_decay_style": "WSD", "start_wd": 0.01, "end_wd": 0.1,
        "wd_incr_steps": 8000, "wd_incr_style": "cosine", "wsd_decay_steps": 3000,
        "lr_wsd_decay_style": "minus_sqrt",
    }  # fmt: skip
    points = range(0, 10_000, step)
    wanted = megatron.values(config, [{}], points)
    base = base_schedule(parse_spec(megatron.spec(config, [{}], total=10_000)))
    for n in reversed(points):
        assert hexed(base(n)) == wanted[n]
        assert base(n) == base(n)


def spec(learning_rate: dict[str, Any], total: int = 1000, **fields: Any) -> Any:
    return parse_spec({"name": "a", "total": total, "learning_rate": learning_rate, **fields})


def lr_at(learning_rate: dict[str, Any], *points: int, total: int = 1000) -> list[float]:
    base = base_schedule(spec(learning_rate, total))
    return [base(n)[0][0] for n in points]


def test_the_end_of_a_decay_is_a_position_and_not_a_length() -> None:
    rates = {"peak": 1.0, "warmup": 100, "decay": {"style": "linear", "end": 500}}
    assert lr_at(rates, 100, 300, 500, 501, 600) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_inverse_square_root_jumps_to_min_past_its_end() -> None:
    rates = {"peak": 1.0, "min": 0.01, "decay": {"style": "inverse-square-root", "end": 400}}
    assert lr_at(rates, 0, 1, 4, 400, 401) == [1.0, 1.0, 0.5, 0.05, 0.01]


def test_inverse_square_root_uses_the_power_of_a_half() -> None:
    # For this integer pow(n, 0.5) and sqrt(n) differ in the last bit, by the golden vectors.
    rates = {"peak": 0.001, "warmup": 100, "decay": {"style": "inverse-square-root"}}
    wanted = 0.001 * 100**0.5 / 3541**0.5
    assert lr_at(rates, 3541, total=20_000) == [wanted]


def test_a_wsd_plateau_is_rounded_as_there() -> None:
    rates = {
        "peak": 6e-5,
        "min": 6e-6,
        "decay": {"style": "wsd", "anneal": 100, "anneal_style": "linear"},
    }
    assert lr_at(rates, 0, 500, 900) == [5.9999999999999995e-05] * 3


def test_an_anneal_that_begins_inside_warmup_jumps_when_warmup_ends() -> None:
    decay = {"style": "wsd", "anneal": 800, "anneal_style": "linear"}
    before, after = lr_at({"peak": 1.0, "warmup": 600, "decay": decay}, 600, 601)
    assert (before, after) == (1.0, 1.0 - 401 / 800)


@pytest.mark.parametrize("anneal_style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_an_anneal_of_nothing_never_anneals(anneal_style: str) -> None:
    decay = {"style": "wsd", "anneal": 0, "anneal_style": anneal_style}
    assert lr_at({"peak": 1.0, "min": 0.5, "decay": decay}, 0, 1000, 1001) == [1.0, 1.0, 0.5]


def test_an_anneal_longer_than_the_decay_starts_part_way_down() -> None:
    decay = {"style": "wsd", "anneal": 2000, "anneal_style": "linear"}
    assert lr_at({"peak": 1.0, "decay": decay}, 0, 1000) == [0.5, 0.0]


def test_a_constant_uses_neither_min_nor_end() -> None:
    rates = {"peak": 0.3, "min": 0.1, "warmup": 10, "decay": {"style": "constant", "end": 20}}
    assert lr_at(rates, 10, 20, 21, 5000) == [0.3, 0.3, 0.3, 0.3]


def test_the_first_step_runs_at_init_only_with_a_warmup() -> None:
    assert lr_at({"init": 0.1, "peak": 0.4, "warmup": 10}, 0, 10) == [0.1, 0.4]
    assert lr_at({"init": 0.1, "peak": 0.4}, 0) == [0.4]


def test_the_end_of_warmup_may_be_one_bit_off_the_peak() -> None:
    at, past = lr_at({"init": 1e-7, "peak": 2e-4, "warmup": 10}, 10, 11)
    assert at != 2e-4
    assert at == pytest.approx(2e-4, rel=1e-15)
    assert past == 2e-4


def test_a_share_of_warmup_stays_a_float() -> None:
    # 2.5% of 50 is 1.25: no step is equal to it, and it is not rounded to one.
    rates = {"peak": 1.0, "warmup": "2.5%", "decay": {"style": "linear", "end": 50}}
    assert lr_at(rates, 1, 2) == [1 / 1.25, 1.0 - 0.75 / 48.75]


def test_lr_mult_has_no_name_here() -> None:
    # It has had no effect in Megatron-LM since 0.16; a spec that names it is refused.
    with pytest.raises(InvalidSpec, match=r"groups\.0\.lr_mult"):
        spec({"peak": 1.0}, groups=[{"name": "a", "lr_mult": 0.1}])


def test_an_unknown_style_is_refused_before_warmup_ends() -> None:
    with pytest.raises(InvalidSpec, match=r"learning_rate\.decay\.style: got 'poly'"):
        spec({"peak": 1.0, "warmup": 10, "decay": {"style": "poly"}})
