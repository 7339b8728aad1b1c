"""A Trainer of Lightning in this process: what ends badly, and what is added or written late."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch

from lrpilot.client.lightning import LrpilotCallback

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

BATCHES = 6

pytestmark = [
    # Of Lightning: no workers for the data, no folder for logs, and the like.
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def configure_optimizers(self) -> Any:
        trained = [item for item in self.parameters() if item.requires_grad]
        return torch.optim.AdamW(trained, lr=7.0, weight_decay=0.3)

    def training_step(self, x: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = (self.second(self.first(x)) ** 2).mean()
        return loss

    def validation_step(self, x: torch.Tensor, _: int) -> None:
        self.log("val_loss", (self.second(self.first(x)) ** 2).mean())


class Watch(pl.Callback):
    """Sees the LR of each param group at each update."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Any, _: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(
            lambda given, *_: self.rates.append([group["lr"] for group in given.param_groups])
        )


class Fails(pl.Callback):
    """Raises once, at the hook named."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self._error: BaseException | None = error
        setattr(self, hook, self._hook)

    def _hook(self, trainer: Any, *_: Any) -> None:
        error = self._error
        if error is not None and trainer.global_step == 3:
            self._error = None
            raise error


class Thaws(pl.callbacks.BaseFinetuning):
    """Adds a param group at the begin of the first epoch, when the attempt has opened."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 0:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer, lr=3.0)


@pytest.fixture
def make(trainer: FakeTrainer, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make a Trainer with an LrpilotCallback before the callbacks given."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def make(*callbacks: Any, **options: Any) -> Any:
        return pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 1,
                "default_root_dir": tmp_path,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [LrpilotCallback(trainer.address, run="small"), *callbacks],
                **options,
            }
        )

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield make
    # Lightning ignores the first from Ctrl-C on, and puts the pilot's handler of the second back.
    for number, handler in handlers.items():
        signal.signal(number, handler)


def data() -> Any:
    return torch.utils.data.DataLoader(torch.ones(2 * BATCHES, 4), batch_size=2)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_after_an_error_another_fit_goes_on_where_it_was(
    trainer: FakeTrainer, make: Callable[..., Any], hook: str, error: BaseException
) -> None:
    watch, model = Watch(), Model()
    trains = make(watch, Fails(hook, error))
    # Lightning leaves the process after Ctrl-C; a notebook goes on.
    with pytest.raises((ValueError, SystemExit)):
        trains.fit(model, data(), data())
    trainer.wait(lambda: list(trainer.losses) == [0, 1, 2])
    trains.fit(model, data(), data())
    count = len(watch.rates)
    assert watch.rates == [[trainer.rate(at)] for at in range(count)]
    assert count > BATCHES
    # The losses of the sanity check before the second training belong to no step.
    assert [item.progress for item in trainer.reports if item.validation_losses] == [count - 1]
    assert None not in trainer.losses.values()


def test_an_error_between_an_update_and_its_loss_loses_no_step(
    trainer: FakeTrainer, make: Callable[..., Any]
) -> None:
    class Breaks(Model):
        breaks = True

        def optimizer_step(self, *arguments: Any, **named: Any) -> None:
            super().optimizer_step(*arguments, **named)
            if self.trainer.global_step == 3 and self.breaks:
                self.breaks = False
                raise ValueError("stop")

    watch, model = Watch(), Breaks()
    trains = make(watch)
    with pytest.raises(ValueError, match="stop"):
        trains.fit(model, data())
    made = len(watch.rates)
    trains.fit(model, data())
    assert watch.rates == [[trainer.rate(at)] for at in range(len(watch.rates))]
    assert trainer.begin == made


def test_a_param_group_added_before_the_first_step_has_its_values_in_it(
    trainer: FakeTrainer, make: Callable[..., Any]
) -> None:
    watch = Watch()
    make(watch, Thaws()).fit(Model(), data())
    assert watch.rates == [[trainer.rate(at)] * 2 for at in range(BATCHES)]


def test_weight_averaging_writes_no_learning_rate(
    trainer: FakeTrainer, make: Callable[..., Any]
) -> None:
    watch = Watch()
    averages = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    make(watch, averages, max_epochs=3).fit(Model(), data())
    assert watch.rates == [[trainer.rate(at)] for at in range(3 * BATCHES)]


def test_an_update_after_the_last_batch_counts(
    trainer: FakeTrainer, make: Callable[..., Any]
) -> None:
    class Late(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, x: torch.Tensor, _: int) -> torch.Tensor:
            loss = super().training_step(x, _)
            losses.append(loss.item())
            self.manual_backward(loss)
            return loss

        def on_train_epoch_end(self) -> None:
            self.optimizers().step()

    watch, losses = Watch(), list[float]()
    trains = make(watch, max_epochs=3)
    trains.fit(Late(), data())
    assert watch.rates == [[trainer.rate(at)] for at in range(3)]
    trains.fit_loop.max_epochs += 1
    trains.fit(Late(), data())
    assert watch.rates[3:] == [[trainer.rate(3)]]
    trainer.wait(lambda: len(trainer.losses) == 4)
    # Each has the losses of its own batches.
    assert trainer.losses[0] == pytest.approx(sum(losses[:BATCHES]) / BATCHES)
    assert trainer.losses[1] == pytest.approx(sum(losses[BATCHES : 2 * BATCHES]) / BATCHES)


def test_sigterm_ends_the_training_and_what_was_reported_arrives(
    trainer: FakeTrainer, make: Callable[..., Any]
) -> None:
    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    watch = Watch()
    with pytest.raises(SystemExit):
        make(watch, Ends()).fit(Model(), data())
    trainer.wait(lambda: list(trainer.losses) == list(range(len(watch.rates))))
