"""torchtitan's own trainer with lrpilot's schedulers, on the CPU: its loop and checkpoints."""

import math
import sys
from pathlib import Path
from typing import Any

from tests.e2e.harness import Spec
from tests.frameworks.harness import (
    SAVE_AT,
    STEPS,
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


def _spec(name: str) -> Spec:
    return make_spec(name, groups=GROUPS)


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    # The optimizers are loaded after the schedulers, and hold another LR then. Before that,
    # torchtitan lets each of them step once, so that there is a state to load into.
    spec = _spec("one")
    training = train_interrupted(tmp_path, "torchtitan_program", spec, spoils=True)
    check(training, tmp_path, spec)


def test_the_loss_is_that_of_all_ranks_and_micro_batches(tmp_path: Path) -> None:
    spec = _spec("two")
    training = train_interrupted(
        tmp_path, "torchtitan_program", spec, *TWO_RANKS, accumulate=2, async_mode="async"
    )
    check(training, tmp_path, spec)


def test_a_checkpoint_of_other_schedulers_is_resumed_by_its_step(tmp_path: Path) -> None:
    spec = _spec("other")
    training = train_interrupted(tmp_path, "torchtitan_program", spec, starts_at=SAVE_AT)
    check(training, tmp_path, spec)


def test_every_loss_is_reported_however_seldom_torchtitan_logs(tmp_path: Path) -> None:
    spec = _spec("seldom")
    once = train_once(tmp_path, "torchtitan_program", spec, log_freq=10)
    known = {record.progress: record.loss for record in once.records}
    assert list(known) == list(range(STEPS))
    assert list(once.losses) == [0, 9, 19, 29]
    assert once.losses.items() <= {n: loss.hex() for n, loss in known.items()}.items()
    curves = [curve(tmp_path, spec, group=group["name"]) for group in GROUPS]
    assert once.used == {n: [item[n] for item in curves] for n in range(STEPS)}


def test_a_loss_that_ends_the_training_is_reported(tmp_path: Path) -> None:
    once = train_once(
        tmp_path, "torchtitan_program", _spec("nan"), nan_at=5, ends_by="RuntimeError"
    )
    assert "Loss is not finite" in once.log
    assert [record.progress for record in once.records] == list(range(6))
    assert math.isnan(once.records[-1].loss)


def test_a_reporter_without_losses_is_refused(tmp_path: Path) -> None:
    once = train_once(
        tmp_path, "torchtitan_program", _spec("stage"), pipeline=True, ends_by="InvalidArgument"
    )
    assert (
        "lr_scheduler.reporter: got 0; allowed: a rank that has the last stage of the pipeline, "
        "such as 2" in once.log
    )
    assert once.used == {}
