"""A DeepSpeed engine whose LR scheduler is lrpilot's, on the CPU: ZeRO, a pipeline, overflows."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Spec
from tests.frameworks.harness import (
    STEPS,
    Once,
    check,
    curve,
    make_spec,
    train_interrupted,
    train_once,
)

GROUPS: list[dict[str, Any]] = [
    {"name": "weights"},
    {"name": "biases", "weight_decay_multiplier": 0.0},
]

TWO_RANKS = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2", "-m"),
)


def _spec(name: str, **fields: Any) -> Spec:
    return make_spec(name, groups=GROUPS, **fields)


def _check_once(once: Once, tmp_path: Path, spec: Spec, *, increment: int = 1) -> None:
    """Compare what was used with the curve, and the losses of the updates with the server's."""
    curves = [curve(tmp_path, spec, group=group["name"]) for group in GROUPS]
    assert list(once.used) == list(range(0, STEPS, increment)), once.log
    for progress, values in once.used.items():
        assert values == [item[progress] for item in curves], f"at progress {progress}"
    known = {record.progress: record.loss.hex() for record in once.records if not record.skipped}
    assert known == once.losses


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    # ZeRO restores its own LR and WD after the scheduler, and they are not those served.
    spec, config = _spec("zero-1"), {"zero_optimization": {"stage": 1}}
    training = train_interrupted(tmp_path, "deepspeed_program", spec, config=config, spoils=True)
    check(training, tmp_path, spec)


def test_the_loss_is_that_of_all_ranks_and_micro_batches(tmp_path: Path) -> None:
    spec = _spec("zero-2")
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    training = train_interrupted(
        tmp_path, "deepspeed_program", spec, *TWO_RANKS, config=config, accumulate=2
    )
    check(training, tmp_path, spec)


def test_a_pipeline_reports_its_own_loss(tmp_path: Path) -> None:
    spec = _spec("pipeline")
    training = train_interrupted(
        tmp_path, "deepspeed_program", spec, *TWO_RANKS, pipeline=True, accumulate=2
    )
    check(training, tmp_path, spec)


@pytest.mark.parametrize(
    "config",
    [
        {"bf16": {"enabled": True, "check_grad_overflow": True}},
        {"zero_optimization": {"stage": 3}},
    ],
    ids=["bf16", "zero-3"],
)
def test_it_uses_the_curve_in_every_optimizer_of_deepspeed(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    spec = _spec("other")
    once = train_once(tmp_path, "deepspeed_program", spec, config=config)
    _check_once(once, tmp_path, spec)
    # The LR that DeepSpeed logs for an update, counted from 1, is the one that it used.
    logged = re.findall(r"step=([1-9]\d*), skipped=0, lr=\[([^,]+),", once.log)
    used = [(str(n + 1), values[0][0]) for n, values in once.used.items()]
    assert [(step, float(rate).hex()) for step, rate in logged] == used


def test_an_overflow_keeps_the_progress_and_its_loss_is_seen(tmp_path: Path) -> None:
    spec = _spec("overflow")
    bf16 = {"enabled": True, "check_grad_overflow": True}
    config = {"zero_optimization": {"stage": 1}, "bf16": bf16}
    once = train_once(
        tmp_path, "deepspeed_program", spec, config=config, accumulate=2, overflow_at=5
    )
    _check_once(once, tmp_path, spec)
    (skipped,) = [record for record in once.records if record.skipped]
    assert (skipped.progress, skipped.loss) == (5, math.inf)


def test_losses_that_deepspeed_does_not_see_are_taken_by_hand(tmp_path: Path) -> None:
    spec = _spec("by-hand")
    config = {"zero_optimization": {"stage": 2}}
    once = train_once(tmp_path, "deepspeed_program", spec, config=config, torch_backward=True)
    _check_once(once, tmp_path, spec)
    # A validation loss rides in the next report.
    seen = [dict(record.validation_losses) for record in once.records]
    assert seen == [{}] + [{"dev": 1.5}] * (STEPS - 1)


def test_an_update_consumes_what_deepspeed_is_told(tmp_path: Path) -> None:
    spec = _spec("increments")
    once = train_once(tmp_path, "deepspeed_program", spec, lr_kwargs={"increment": 2})
    _check_once(once, tmp_path, spec, increment=2)


def test_the_second_try_of_deepspeed_is_not_taken_for_an_increment(tmp_path: Path) -> None:
    # A TypeError would make it call step(train_batch_size).
    spec = _spec("second-try")
    once = train_once(tmp_path, "deepspeed_program", spec, lr_kwargs={"metrics": 1.0}, refused=True)
    assert "lr_kwargs: got {'metrics': 1.0}; allowed: nothing, or increment" in once.log
    assert once.used == {}


def test_what_another_scheduler_writes_is_written_over(tmp_path: Path) -> None:
    spec = _spec("other-scheduler")
    once = train_once(tmp_path, "deepspeed_program", spec, other=True)
    _check_once(once, tmp_path, spec)
    assert once.log.count("The values served for progress 1 were written back") == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_goes_on_with_another_pilot(tmp_path: Path, stage: int) -> None:
    spec, config = _spec("another"), {"zero_optimization": {"stage": stage}}
    once = train_once(tmp_path, "deepspeed_program", spec, config=config, reconnects=True)
    _check_once(once, tmp_path, spec)
    assert "written back" not in once.log


def test_a_second_optimizer_that_no_scheduler_reaches_is_refused(tmp_path: Path) -> None:
    spec = _spec("offload")
    config = {"zero_optimization": {"stage": 1}}
    once = train_once(
        tmp_path, "deepspeed_program", spec, config=config, half_offloaded=True, refused=True
    )
    assert "allowed: offload_optimizer with ratio 1" in once.log
    assert once.used == {}
