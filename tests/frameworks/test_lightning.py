"""Lightning: one callback, under automatic and manual optimization, on one rank and on two."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.harness import (
    SAVE_AT,
    STEPS,
    check,
    curve,
    make_spec,
    train_interrupted,
    train_once,
)

PROGRAM = "lightning_program"


def known(folder: Path, record: str = "once") -> dict[str, Any]:
    """Return what else the program knows."""
    facts: dict[str, Any] = json.loads((folder / f"{record}.known").read_text())
    return facts


def monitored(folder: Path, record: str) -> list[float]:
    """Return the LR that LearningRateMonitor logged at each step."""
    path = folder / "logs" / record / "metrics.csv"
    with path.open() as file:
        rates = [row["lr-AdamW"] for row in csv.DictReader(file)]
    return [float(rate) for rate in rates if rate]


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    spec = make_spec("automatic")
    training = train_interrupted(tmp_path, PROGRAM, spec)
    check(training, tmp_path, spec)
    # A tensor of single precision is what the monitor logs.
    values = curve(tmp_path, spec)
    wanted = [float.fromhex(values[at][0]) for at in range(SAVE_AT, STEPS)]
    assert monitored(tmp_path / "training", "second") == pytest.approx(wanted, rel=1e-6)


def test_ranks_report_the_mean_of_their_losses_and_of_accumulated_batches(tmp_path: Path) -> None:
    spec = make_spec("ranks")
    trainer = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    check(train_interrupted(tmp_path, PROGRAM, spec, trainer=trainer), tmp_path, spec)


def test_manual_optimization_moves_every_optimizer(tmp_path: Path) -> None:
    spec = make_spec("manual")
    check(train_interrupted(tmp_path, PROGRAM, spec, kind="manual"), tmp_path, spec)
    values = curve(tmp_path, spec)
    wanted = [[at, values[at][0]] for at in range(SAVE_AT, STEPS)]
    assert known(tmp_path / "training", "second")["second"] == wanted


def test_each_update_in_a_batch_is_a_step(tmp_path: Path) -> None:
    spec = make_spec("inner", total=3 * 40)
    once = train_once(tmp_path, PROGRAM, spec, kind="inner")
    values = curve(tmp_path, spec)
    assert once.used == {at: [values[at]] for at in range(3 * STEPS)}
    # The last of three has the loss of the batch; then the second optimizer follows, at its LR.
    last = [3 * at + 2 for at in range(STEPS)]
    assert known(once.folder)["second"] == [[at, values[at][0]] for at in last]
    assert {item.progress: item.loss.hex() for item in once.records if item.HasField("loss")} == {
        at: once.losses[at] for at in last
    }


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_update_does_not_move_the_schedule(tmp_path: Path, fused: bool) -> None:
    spec = make_spec("overflow")
    once = train_once(tmp_path, PROGRAM, spec, infinite=[4, 5, 15], fused=fused)
    values = curve(tmp_path, spec)
    assert once.used == {at: [values[at]] for at in range(STEPS - 3)}
    skipped = [(item.progress, item.loss) for item in once.records if item.skipped]
    assert skipped == [(4, math.inf), (4, math.inf), (13, math.inf)]
    completed = [item.progress for item in once.records if not item.skipped]
    assert completed == list(range(STEPS - 3))
    assert known(once.folder)["global_step"] == STEPS


def test_a_validation_loss_goes_with_the_step_that_was_made(tmp_path: Path) -> None:
    once = train_once(tmp_path, PROGRAM, make_spec("validated"), trainer={"val_check_interval": 10})
    with (once.folder / "logs/once/metrics.csv").open() as file:
        told = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    losses = {item.progress: dict(item.validation_losses) for item in once.records}
    # The last one too, which no step follows; not that of the sanity check.
    with_some = {progress: item for progress, item in losses.items() if item}
    assert list(with_some) == [9, 19, 29]
    assert [item["val_loss"] for item in with_some.values()] == pytest.approx(told, rel=1e-6)


def test_a_checkpoint_after_the_end_and_another_fit_go_on_there(tmp_path: Path) -> None:
    import torch

    spec = make_spec("again", total=80)
    once = train_once(tmp_path, PROGRAM, spec, again=True)
    values = curve(tmp_path, spec)
    assert once.used == {at: [values[at]] for at in range(2 * STEPS)}
    saved = torch.load(once.folder / "end.ckpt", weights_only=False)
    assert saved["callbacks"]["LrpilotCallback"]["progress"] == STEPS


def test_the_other_package_takes_the_same_callback(tmp_path: Path) -> None:
    spec = make_spec("other")
    once = train_once(tmp_path, PROGRAM, spec, package="pytorch_lightning")
    values = curve(tmp_path, spec)
    assert once.used == {at: [values[at]] for at in range(STEPS)}
    assert {item.progress: item.loss.hex() for item in once.records} == once.losses


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("schedules", r"configure_optimizers: got \['StepLR'\]; allowed: no LR schedulers"),
        ("warm", rf"saved without lrpilot, after {SAVE_AT} steps.*resume_at={SAVE_AT}\)"),
    ],
)
def test_what_would_go_wrong_silently_is_refused(tmp_path: Path, option: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        train_once(tmp_path, PROGRAM, make_spec("refused"), **{option: True})
