"""What of the stand-in for Megatron-LM's scheduler needs no server: arguments, states, groups."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client.megatron import (
    OptimizerParamScheduler,
    connected,
    reporting,
    spec_from_args,
)
from lrpilot.client.megatron._connection import usual_delay
from lrpilot.client.megatron._reporting import Outcome

ITERATIONS: dict[str, Any] = {
    "train_iters": 500, "train_samples": None, "lr": 6e-5, "min_lr": 6e-6,
    "lr_decay_style": "cosine", "lr_decay_iters": 430, "lr_decay_samples": None,
    "lr_warmup_fraction": None, "lr_warmup_iters": 30, "lr_warmup_samples": 0,
    "lr_warmup_init": 1e-7, "lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None,
    "lr_wsd_decay_style": "exponential", "weight_decay": 0.1, "start_weight_decay": 0.1,
    "end_weight_decay": 0.1, "weight_decay_incr_style": "constant", "global_batch_size": 1536,
    "rampup_batch_size": None, "decoupled_lr": None, "decoupled_min_lr": None,
    "use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": False,
}  # fmt: skip
"""Arguments as Megatron-LM's parser returns them, checked."""

SAMPLES: dict[str, Any] = ITERATIONS | {
    "train_iters": None, "train_samples": 7_000_001, "lr_decay_iters": None,
    "lr_decay_samples": 5_000_003, "lr_warmup_iters": 0, "lr_warmup_samples": 183_105,
}  # fmt: skip

CONFIG: dict[str, Any] = {
    "init_lr": 0.0, "max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 10, "lr_decay_steps": 100,
    "lr_decay_style": "cosine", "start_wd": 0.01, "end_wd": 0.1, "wd_incr_steps": 100,
    "wd_incr_style": "linear", "use_checkpoint_opt_param_scheduler": False,
}  # fmt: skip


def args(base: dict[str, Any], **changed: Any) -> Namespace:
    return Namespace(**(base | changed))


def make(groups: tuple[dict[str, Any], ...] = ({},), **changed: Any) -> OptimizerParamScheduler:
    optimizer = SimpleNamespace(param_groups=[dict(group) for group in groups])
    return connected("127.0.0.1:1", run="small")(optimizer, **(CONFIG | changed))


# Arguments.


def test_iterations_become_samples_of_the_full_batch() -> None:
    given = args(ITERATIONS, lr_decay_style="WSD", lr_wsd_decay_iters=43)
    spec = spec_from_args(given, name="gpt3-175b")
    assert spec == {
        "name": "gpt3-175b",
        "unit": "samples",
        "total": 500 * 1536,
        "learning_rate": {
            "init": 1e-7,
            "peak": 6e-5,
            "min": 6e-6,
            "warmup": 30 * 1536,
            "decay": {
                "style": "wsd",
                "end": 430 * 1536,
                "anneal": 43 * 1536,
                "anneal_style": "exponential",
            },
        },
        "weight_decay": 0.1,
        "groups": [{"name": "main"}, {"name": "no_decay", "weight_decay_multiplier": 0.0}],
        "feedback": {"delay": 32 * 1536},
    }
    # Unlike there, the arguments stay as they are.
    assert given == args(ITERATIONS, lr_decay_style="WSD", lr_wsd_decay_iters=43)


@pytest.mark.parametrize("base", [ITERATIONS, SAMPLES])
def test_a_warmup_fraction_stays_a_float(base: dict[str, Any]) -> None:
    given = args(base, lr_warmup_fraction=0.001, lr_warmup_iters=0, lr_warmup_samples=0)
    rates = spec_from_args(given, name="a")["learning_rate"]
    end = 430 * 1536 if base is ITERATIONS else 5_000_003
    assert rates["warmup"].hex() == (0.001 * end).hex()


def test_samples_are_taken_as_they_are_also_where_iterations_were_derived() -> None:
    spec = spec_from_args(args(SAMPLES, train_iters=4557, rampup_batch_size=[16, 16, 5]), name="a")
    assert spec["total"] == 7_000_001
    assert spec["learning_rate"]["warmup"] == 183_105
    assert spec["learning_rate"]["decay"]["end"] == 5_000_003


def test_the_end_of_the_decay_defaults_to_that_of_the_training() -> None:
    spec = spec_from_args(args(ITERATIONS, lr_decay_iters=None), name="a")
    assert spec["learning_rate"]["decay"]["end"] == 500 * 1536


def test_what_else_a_spec_has_is_added() -> None:
    policies = [{"kind": "plateau"}]
    spec = spec_from_args(
        args(
            ITERATIONS,
            weight_decay_incr_style="linear",
            start_weight_decay=0.01,
            end_weight_decay=0.2,
            decoupled_lr=5e-5,
            decoupled_min_lr=1e-6,
        ),
        name="a",
        policies=policies,
        feedback={"delay": 7},
        bounds={"max_lr": 1.0},
    )
    assert spec["policies"] == policies
    assert spec["feedback"] == {"delay": 7}
    assert spec["bounds"] == {"max_lr": 1.0}
    ramp = {"start": 0.01, "end": 0.2, "style": "linear", "over": 500 * 1536}
    assert spec["weight_decay"] == ramp
    assert spec["groups"] == [
        {"name": "main"},
        {"name": "own_lr", "peak": 5e-5, "min": 1e-6},
        {"name": "no_decay", "weight_decay_multiplier": 0.0},
    ]


@pytest.mark.parametrize(
    ("base", "changed", "named"),
    [
        (ITERATIONS, {"lr": None}, "lr: got None"),
        (ITERATIONS, {"lr": "6e-5"}, "lr: got '6e-5'"),
        (ITERATIONS, {"min_lr": None}, "min_lr: got None"),
        (ITERATIONS, {"min_lr": 1e-3}, "max_lr: got 6e-05; allowed: at least 0.001"),
        (ITERATIONS, {"train_iters": None}, "train_iters: got None"),
        (ITERATIONS, {"global_batch_size": None}, "global_batch_size: got None"),
        (ITERATIONS, {"lr_decay_samples": 100}, "lr_decay_samples: got 100"),
        (ITERATIONS, {"lr_warmup_samples": 100}, "lr_warmup_samples: got 100"),
        (SAMPLES, {"lr_decay_iters": 100}, "lr_decay_iters: got 100"),
        (SAMPLES, {"lr_warmup_iters": 100}, "lr_warmup_iters: got 100"),
        (SAMPLES, {"lr_wsd_decay_iters": 100}, "lr_wsd_decay_iters: got 100"),
        (ITERATIONS, {"lr_warmup_fraction": 0.1}, "lr_warmup_iters: got 30"),
        (SAMPLES, {"lr_warmup_fraction": 0.1}, "lr_warmup_samples: got 183105"),
        (ITERATIONS, {"lr_warmup_iters": 430}, "lr_warmup_steps: got 660480"),
        (ITERATIONS, {"lr_decay_style": "poly"}, "lr_decay_style: got 'poly'"),
        (ITERATIONS, {"lr_decay_style": "WSD"}, "lr_wsd_decay_iters: got None"),
        (SAMPLES, {"lr_decay_style": "WSD"}, "lr_wsd_decay_samples: got None"),
        (ITERATIONS, {"weight_decay_incr_style": "exp"}, "wd_incr_style: got 'exp'"),
        (ITERATIONS, {"weight_decay": None}, "weight_decay: got None"),
        (ITERATIONS, {"end_weight_decay": 0.2}, "end_weight_decay: got 0.2"),
        (
            ITERATIONS,
            {"weight_decay_incr_style": "cosine", "start_weight_decay": None},
            "start_weight_decay: got None",
        ),
        (ITERATIONS, {"rampup_batch_size": [16, 16, 100]}, "rampup_batch_size: got"),
        (ITERATIONS, {"step_batch_size_schedule": "0:16"}, "step_batch_size_schedule: got '0:16'"),
        (ITERATIONS, {"warmup": 10}, "warmup: got 10"),
        (ITERATIONS, {"head_lr_mult": 0.1}, "head_lr_mult: got 0.1"),
        (ITERATIONS, {"use_mup": True}, "use_mup: got True"),
        (ITERATIONS, {"decoupled_min_lr": 1e-6}, "decoupled_min_lr: got 1e-06"),
        (
            ITERATIONS,
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            "override_opt_param_scheduler: got True",
        ),
    ],
)
def test_an_argument_that_cannot_be_mapped_is_named(
    base: dict[str, Any], changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(lrpilot.InvalidArgument) as refused:
        spec_from_args(args(base, **changed), name="a")
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"max_lr": None}, "max_lr"),
        ({"min_lr": -1e-9}, "min_lr"),
        ({"max_lr": 1e-6}, "max_lr"),
        ({"init_lr": 1.0}, "init_lr"),
        ({"lr_decay_steps": 0}, "lr_decay_steps"),
        ({"lr_warmup_steps": 100}, "lr_warmup_steps"),
        ({"lr_decay_style": "poly"}, "lr_decay_style"),
        ({"lr_decay_style": "WSD"}, "wsd_decay_steps"),
        ({"lr_decay_style": "WSD", "wsd_decay_steps": 9}, "lr_wsd_decay_style"),
        ({"start_wd": -0.1}, "start_wd"),
        ({"end_wd": 0.0}, "end_wd"),
        ({"wd_incr_style": "constant"}, "end_wd"),
        ({"wd_incr_style": "poly"}, "wd_incr_style"),
        ({"end_wd": float("nan")}, "end_wd"),
        (
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            "override_opt_param_scheduler",
        ),
    ],
)
def test_arguments_that_megatron_refuses_are_refused_at_once(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=f"^{named}: got"):
        make(**changed)


def test_a_group_with_two_values_of_a_constant_weight_decay_is_refused() -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=r"^end_wd of param group 1: got 0\.3"):
        make(({}, {"end_wd": 0.3}), wd_incr_style="constant", start_wd=0.1)


def test_an_optimizer_without_groups_is_refused() -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=r"^optimizer: got"):
        connected("127.0.0.1:1", run="small")(object(), **CONFIG)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"address": "nonsense"}, "address: got 'nonsense'"),
        ({"run": None}, "run: got None"),
        ({"resume_at": 1.5}, "resume_at: got 1.5"),
        ({"resume_at": -1}, "resume_at: got -1"),
        ({"policies": {"kind": "plateau"}}, "policies: got {'kind': 'plateau'}"),
        ({"feedback": "delay"}, "feedback: got 'delay'"),
        ({"bounds": [0.0, 1.0]}, "bounds: got [0.0, 1.0]"),
    ],
)
def test_a_wrong_connection_is_refused_before_a_model_is_built(
    wrong: dict[str, Any], named: str
) -> None:
    right: dict[str, Any] = {"address": "127.0.0.1:1", "run": "small"}
    with pytest.raises(lrpilot.InvalidArgument) as refused:
        connected(**(right | wrong))
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize("name", ["spec", "rank", "world_size"])
def test_connected_takes_nothing_that_megatron_says_itself(name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=rf"connected\(\) .*'{name}'"):
        connected("127.0.0.1:1", run="small", **given)


# Groups.


def spec_groups(*groups: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    optimizer = SimpleNamespace(param_groups=groups)
    found: list[dict[str, Any]] = spec_from_args(
        args(ITERATIONS, **changed), name="a", optimizer=optimizer
    )["groups"]
    return found


def test_groups_that_are_alike_are_one() -> None:
    own = {"max_lr": 6e-5, "min_lr": 6e-6, "wd_mult": 1.0, "is_expert_parallel": True}
    assert spec_groups({}, own, {**own, "lr_mult": 0.1}) == [{"name": "main"}]


def test_the_order_of_the_param_groups_does_not_matter() -> None:
    groups = [
        {"wd_mult": 0.0},
        {"max_lr": 1e-5},
        {"max_lr": 2e-5},
        {"max_lr": 1e-5, "wd_mult": 0.0},
    ]
    named = [
        {"name": "main"},
        {"name": "own_lr", "peak": 2e-5},
        {"name": "own_lr_2", "peak": 1e-5},
        {"name": "no_decay", "weight_decay_multiplier": 0.0},
        {"name": "own_lr_no_decay", "peak": 1e-5, "weight_decay_multiplier": 0.0},
    ]
    assert spec_groups(*groups) == spec_groups(*reversed(groups)) == named


def test_no_name_goes_into_the_param_groups() -> None:
    scheduler = make(({"wd_mult": 0.0},))
    assert set(scheduler.optimizer.param_groups[0]) == {"wd_mult", "lr", "weight_decay"}


# Before it opens.


def test_the_values_of_the_start_are_there_before_a_server_is_asked() -> None:
    scheduler = make(({}, {"wd_mult": 0.0, "max_lr": 5e-4}), lr_warmup_steps=0)
    held = [(group["lr"], group["weight_decay"]) for group in scheduler.optimizer.param_groups]
    assert held == [(1e-3, 0.01), (5e-4, 0.0)]
    assert [scheduler.get_lr(group) for group in scheduler.optimizer.param_groups] == [1e-3, 5e-4]
    assert scheduler.get_wd(scheduler.optimizer.param_groups[1]) == 0.01
    assert scheduler.num_steps == 0
    # Megatron-LM asks for a state to know what to load.
    assert set(scheduler.state_dict()) == {
        "max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "num_steps",
        "start_wd", "end_wd", "wd_incr_style", "wd_incr_steps",
    }  # fmt: skip
    with pytest.raises(lrpilot.AttemptNotOpen, match=r"load_state_dict\(\), begin\(\)"):
        _ = scheduler.pilot
    with pytest.raises(AttributeError, match="no attribute 'max_wd'"):
        _ = scheduler.max_wd


@pytest.mark.parametrize("increment", [-1, 1.5, True, None])
def test_a_wrong_increment_is_named(increment: Any) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=r"^increment: got"):
        make().step(increment)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (None, "got NoneType"),
        ({}, "max_lr is missing"),
        ({"start_lr": 1e-3, "min_lr": 1e-5}, "lr_warmup_steps is missing"),
    ],
)
def test_a_state_that_is_none_is_refused(state: Any, text: str) -> None:
    with pytest.raises(lrpilot.InvalidState, match=text):
        make().load_state_dict(state)


def test_a_state_whose_parts_stand_apart_is_refused() -> None:
    own = {"version": 1, "run": "small", "progress": 40, "state": ""}
    state = make().state_dict() | {"num_steps": 50, "lrpilot": own}
    with pytest.raises(lrpilot.InvalidState, match=r"num_steps is 50, .*progress 40"):
        make().load_state_dict(state)


def test_growing_batches_with_lengths_in_iterations_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = args(ITERATIONS, rampup_batch_size=[16, 16, 100])
    module = SimpleNamespace(_GLOBAL_ARGS=known)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)
    make()
    assert "batches grow (rampup_batch_size) while warmup and decay" in caplog.text
    caplog.clear()
    module._GLOBAL_ARGS = args(SAMPLES, rampup_batch_size=[16, 16, 100])
    make()
    assert not caplog.text


def test_the_delay_is_in_steps_of_the_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "megatron.core.num_microbatches_calculator"
    for calculator, delay in (
        (SimpleNamespace(global_batch_size=512, current_global_batch_size=16), 32 * 512),
        (SimpleNamespace(current_global_batch_size=16), 32 * 16),
        (None, None),
    ):
        module = SimpleNamespace(_GLOBAL_NUM_MICROBATCHES_CALCULATOR=calculator)
        monkeypatch.setitem(sys.modules, name, module)
        assert usual_delay() == delay


def test_train_steps_of_both_kinds_are_read() -> None:
    losses = {"lm loss": 1.5, "mtp loss": 9.0}
    new = Outcome.of((losses, 0, False, True, 0, 2.5, 0, None))
    old = Outcome.of((losses, 0, 2.5, 0))
    assert (new.loss, new.grad_norm, new.ends) == (1.5, 2.5, True)
    assert (old.loss, old.grad_norm, old.ends) == (1.5, 2.5, False)
    assert Outcome.of(({}, 1, None, 0)).loss is None


def test_a_train_step_without_a_scheduler_is_called_as_it_is() -> None:
    def train_step(iteration: int) -> int:
        """Train."""
        return iteration + 1

    reported = reporting(train_step)
    assert reported(1) == 2
    assert reported.__doc__ == "Train."


def test_importing_it_brings_neither_torch_nor_megatron() -> None:
    script = (
        "import sys, lrpilot.client.megatron\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron')])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.strip() == "[]"
