"""A Trainer of Hugging Face with LR and WD from a server, that goes back when it is asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

PROGRAM = Path(__file__).with_name("huggingface_program.py")


def train(trainer: FakeTrainer, place: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Return what the training says, and what it logged."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), trainer.address, str(place), kind],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads((place / "said.json").read_text())
    return said, done.stderr


def test_a_trainer_goes_back_and_makes_all_its_steps(trainer: FakeTrainer, tmp_path: Path) -> None:
    trainer.delay = 64
    trainer.directives = [
        pb.Directive(
            id="d1", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=10, reason="a rise", before=7
        )
    ]
    said, log = train(trainer, tmp_path, "stream")
    steps = [*range(10), *range(4, 20)]
    assert said["steps"] == steps
    assert "went back from progress 10 to 4 (a rise); the data goes on" in log
    assert (said["global_step"], said["attempt"]) == (20, 2)
    # The LR of each step is the server's, not that of Trainer's own scheduler.
    assert said["rates"] == [trainer.rate(at).hex() for at in steps]
    # The model is what it was; the data is not.
    assert said["bits"][10] == said["bits"][4]
    assert said["bits"][11] != said["bits"][5]
    # Two micro-batches of two are in each step. Trainer reads a stream anew after `max_steps`.
    assert said["data"] == [1 + 2 * (at % 40) for at in range(2 * len(steps))]
    # Every loss that Trainer logged went out, the first ones of the steps that came again too.
    assert [[report.progress + 1, report.loss] for report in trainer.reports] == said["logged"]
    assert [step for step, _ in said["logged"]] == [at + 1 for at in steps]
    assert all(report.HasField("gradient_norm") for report in trainer.reports)
    kept = dict(said["logged"])
    assert said["train_loss"] == pytest.approx(sum(kept.values()) / 20)


def test_a_dataset_with_a_length_ends_sooner_and_that_is_said(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.delay = 64
    trainer.directives = [
        pb.Directive(
            id="d1", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=10, reason="a rise", before=7
        )
    ]
    said, log = train(trainer, tmp_path, "sized")
    assert said["steps"] == [*range(10), *range(4, 14)]
    assert said["global_step"] == 14
    assert "run small: Trainer ended at step 14 of 20" in log
