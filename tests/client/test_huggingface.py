"""A Trainer of Hugging Face with LR and WD from a server, that goes back when it is asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

import lrpilot.client as lrpilot
from lrpilot.client.huggingface import LrpilotCallback, RollbackCallback
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]
    Make = Callable[..., Any]

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


# Within this process.

STEPS = 4


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), at / 4)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.inner(x) ** 2).mean()}


class Watch(TrainerCallback):
    """Sees the LR of each update."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make a Trainer; what its Accelerator keeps for the whole process ends with the test."""

    def make(arguments: dict[str, Any] | None = None, **options: Any) -> Any:
        chosen = TrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "num_train_epochs": 1,
                "per_device_train_batch_size": 1,
                "learning_rate": 77.0,
                "weight_decay": 0.3,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                "remove_unused_columns": False,
                **(arguments or {}),
            }
        )
        if "model_init" not in options:
            options.setdefault("model", Model())
        return Trainer(args=chosen, train_dataset=Data(), **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("remade", [False, True])
def test_another_training_goes_on_with_the_optimizer_that_it_has(
    trainer: FakeTrainer, connect: Connect, make: Make, remade: bool
) -> None:
    # With `model_init` each training has a model and an optimizer of its own.
    trains, watch, met = make(model_init=Model) if remade else make(), Watch(), []
    trainer.directives = [pb.Directive(id="d", kind=pb.DIRECTIVE_KIND_EVALUATE, progress=6)]
    pilot = connect()
    pilot.on_directive("evaluate", lambda directive: met.append(directive.id))
    trains.add_callback(LrpilotCallback(pilot, trains))
    trains.add_callback(watch)
    trains.train()
    assert met == []
    trains.train()
    assert met == ["d"]
    assert watch.rates == [trainer.rate(at) for at in range(2 * STEPS)]
    trainer.wait(lambda: list(trainer.losses) == list(range(2 * STEPS)))
    assert None not in trainer.losses.values()


def test_snapshots_of_one_optimizer_are_not_given_to_another(connect: Connect, make: Make) -> None:
    trains = make(model_init=Model)
    trains.add_callback(RollbackCallback(connect(), trains))
    trains.train()
    with pytest.raises(lrpilot.InvalidArgument, match=r"allowed: one whose optimizer stays"):
        trains.train()


def test_what_is_written_beside_it_is_put_right(
    trainer: FakeTrainer, connect: Connect, make: Make
) -> None:
    class Meddles(TrainerCallback):
        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            optimizer.param_groups[0]["lr"] = 7.0

    used: list[float] = []

    class Sees(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            optimizer.optimizer.register_step_pre_hook(
                lambda given, *_: used.append(given.param_groups[0]["lr"])
            )

    trains = make()
    for callback in (LrpilotCallback(connect(), trains), Meddles(), Sees()):
        trains.add_callback(callback)
    trains.train()
    assert used == [trainer.rate(at) for at in range(STEPS)]


def test_a_scheduler_of_the_user_is_refused(connect: Connect, make: Make) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trains = make(model=model, optimizers=(optimizer, scheduler))
    trains.add_callback(LrpilotCallback(connect(), trains))
    with pytest.raises(lrpilot.InvalidArgument, match=r"^optimizers: got 'StepLR'"):
        trains.train()


def test_a_callback_that_is_not_where_it_belongs_is_refused(connect: Connect, make: Make) -> None:
    pilot, trains = connect(), make()
    callback = LrpilotCallback(pilot, trains)
    with pytest.raises(lrpilot.AttemptNotOpen, match=r"trainer\.add_callback"):
        trains.train()
    # It takes the place of methods, and a second one would see half of what happens.
    with pytest.raises(lrpilot.InvalidArgument, match=r"^trainer: got .* made for before$"):
        LrpilotCallback(pilot, trains)
    other = make()
    other.add_callback(callback)
    with pytest.raises(lrpilot.InvalidArgument, match=r"^trainer: got .* the Trainer that trains$"):
        other.train()
    for arguments in ((trains, pilot), (pilot, None), (pilot, trains.model)):
        with pytest.raises(lrpilot.InvalidArgument):
            LrpilotCallback(*arguments)


def test_a_checkpoint_of_the_model_alone_needs_to_be_told_where_it_stands(
    trainer: FakeTrainer, connect: Connect, make: Make
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 2}
    make(saves).train()
    trains = make({"max_steps": STEPS})
    trains.add_callback(LrpilotCallback(connect(), trains))
    with pytest.raises(lrpilot.InvalidState, match=r"after 2 updates.*connect\(resume_at=2\)"):
        trains.train(resume_from_checkpoint=True)
    trains, watch = make({"max_steps": STEPS}), Watch()
    trains.add_callback(LrpilotCallback(connect(resume_at=2), trains))
    trains.add_callback(watch)
    trains.train(resume_from_checkpoint=True)
    assert watch.rates == [trainer.rate(2), trainer.rate(3)]
