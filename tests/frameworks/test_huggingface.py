"""Trainer of Hugging Face: one callback, and the checkpoints are Trainer's own."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.harness import (
    SAVE_AT,
    STEPS,
    Once,
    check,
    curve,
    make_spec,
    train_interrupted,
    train_once,
)

PROGRAM = "huggingface_program"

TORCHRUN = (
    "env",
    "GLOO_SOCKET_IFNAME=lo",
    sys.executable,
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2", "-m"),
)

GROUPS: list[dict[str, Any]] = [
    {"name": "decayed"},
    {"name": "others", "weight_decay_multiplier": 0.0},
]
"""Trainer makes two param groups without names, in this order."""


def history(folder: Path, record: str = "once") -> list[dict[str, Any]]:
    """Return what Trainer logged."""
    entries: list[dict[str, Any]] = json.loads((folder / f"{record}.history").read_text())
    return entries


def reported(once: Once) -> list[tuple[int, str, bool]]:
    """Return progress, loss and whether it was skipped, of each report."""
    return [(item.progress, item.loss.hex(), item.skipped) for item in once.records]


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    spec = make_spec("trainer", groups=GROUPS)
    check(train_interrupted(tmp_path, PROGRAM, spec), tmp_path, spec)
    # What Trainer logs as the LR of a step is the LR that the step used; the checkpoint has the
    # history of the first start.
    logged = {
        entry["step"] - 1: entry["learning_rate"].hex()
        for entry in history(tmp_path / "training", "second")
        if "learning_rate" in entry
    }
    values = curve(tmp_path, spec, group="decayed")
    assert logged == {progress: values[progress][0] for progress in range(STEPS)}


def test_ranks_report_the_mean_of_their_losses(tmp_path: Path) -> None:
    spec = make_spec("trainers", groups=GROUPS)
    check(train_interrupted(tmp_path, PROGRAM, spec, *TORCHRUN), tmp_path, spec)


def test_every_step_has_its_own_loss_and_nan_is_seen(tmp_path: Path) -> None:
    # Trainer logs every tenth step, and keeps NaN from its logs.
    once = train_once(
        tmp_path, PROGRAM, make_spec("nan"), nans=[10], arguments={"logging_steps": 10}
    )
    assert [item.progress for item in once.records] == list(range(STEPS))
    assert {item.progress: item.loss.hex() for item in once.records} == once.losses
    assert [item.progress for item in once.records if math.isnan(item.loss)] == [5]
    assert not any(math.isnan(entry.get("loss", 0.0)) for entry in history(once.folder))
    # The norm of the gradient is told where Trainer logs.
    normed = [item.progress for item in once.records if item.HasField("gradient_norm")]
    assert normed == [9, 19, 29]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_update_does_not_move_the_schedule(tmp_path: Path, optimizer: str) -> None:
    # A fused one, which is Trainer's default, is called, and refuses by itself.
    spec = make_spec("overflow", groups=GROUPS)
    once = train_once(
        tmp_path, PROGRAM, spec, overflows=[9, 10, 30], arguments={"optim": optimizer}
    )
    # Three of Trainer's steps made no update: micro-batches 8 and 9, 10 and 11, 30 and 31.
    assert list(once.used) == list(range(STEPS - 3))
    curves = [curve(tmp_path, spec, group=group["name"]) for group in GROUPS]
    for progress, values in once.used.items():
        assert values == [item[progress] for item in curves]
    skipped = [(item.progress, item.loss) for item in once.records if item.skipped]
    assert skipped == [(4, math.inf), (4, math.inf), (13, math.inf)]
    completed = [item.progress for item in once.records if not item.skipped]
    assert completed == list(range(STEPS - 3))
    assert history(once.folder)[-1]["step"] == STEPS


def test_a_checkpoint_after_a_skipped_update_resumes_where_the_schedule_was(
    tmp_path: Path,
) -> None:
    spec = make_spec("resumed")
    first = train_once(tmp_path, PROGRAM, spec, overflows=[9], arguments={"max_steps": SAVE_AT})
    assert list(first.used) == list(range(SAVE_AT - 1))
    state = saved_progress(first.folder / f"checkpoint-{SAVE_AT}")
    assert state == SAVE_AT - 1


def saved_progress(checkpoint: Path) -> int:
    """Return the progress in the scheduler's part of Trainer's checkpoint."""
    import torch

    state = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    return int(state["progress"])


def test_a_validation_loss_goes_with_the_step_that_was_made(tmp_path: Path) -> None:
    once = train_once(
        tmp_path,
        PROGRAM,
        make_spec("evaluated"),
        arguments={"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8},
    )
    told = {
        entry["step"] - 1: {"eval_loss": entry["eval_loss"]}
        for entry in history(once.folder)
        if "eval_loss" in entry
    }
    # The last one too, which no step follows.
    assert list(told) == [7, 15, 23, 29]
    known = {item.progress: dict(item.validation_losses) for item in once.records}
    assert {progress: losses for progress, losses in known.items() if losses} == told


def test_weight_decay_that_no_group_takes_is_said(tmp_path: Path) -> None:
    once = train_once(
        tmp_path, PROGRAM, make_spec("undecayed"), arguments={"weight_decay": 0.0, "max_steps": 3}
    )
    assert {decay for values in once.used.values() for _, decay in values} == {(0.0).hex()}
    assert "every param group of the Trainer has weight decay 0 of its own" in once.log


@pytest.mark.parametrize("resume_at", [None, 4])
def test_a_checkpoint_from_before_lrpilot_needs_to_be_told_where_it_stands(
    tmp_path: Path, resume_at: int | None
) -> None:
    options = {"warm": 4, "arguments": {"save_steps": 4}, "resume_at": resume_at}
    spec = make_spec("joined", groups=GROUPS)
    if resume_at is None:
        with pytest.raises(AssertionError, match=r"connect\(resume_at=4\)"):
            train_once(tmp_path, PROGRAM, spec, **options)
        return
    once = train_once(tmp_path, PROGRAM, spec, **options)
    values = curve(tmp_path, spec, group="decayed")
    # Watch counts from 0.
    assert [used[0] for used in once.used.values()] == [values[at] for at in range(4, STEPS)]
    assert [item.progress for item in once.records] == list(range(4, STEPS))
