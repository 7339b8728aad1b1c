"""What the scheduler for Accelerate takes for one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import lrpilot.client as lrpilot
from lrpilot.client.accelerate import LRScheduler
from lrpilot.client.torch import LRScheduler as TorchLRScheduler

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]


@pytest.fixture
def make_accelerator() -> Iterator[Callable[..., Any]]:
    """Make an Accelerator; what it keeps for the whole process ends with the test."""
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def adamw() -> Any:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.AdamW([parameter], lr=0.5)


def update(accelerator: Any, optimizer: Any, scheduler: Any, *said: dict[str, Any]) -> None:
    """Make one update of as many micro-batches as things said."""
    for item in said:
        with accelerator.accumulate():
            optimizer.step()
            scheduler.step(**item)


@pytest.mark.parametrize(
    ("losses", "mean"),
    [
        ([1.0, 2.0], 1.5),
        ([torch.tensor(1.0), torch.tensor(2.0)], 1.5),
        ([torch.tensor(1.0), 2], 1.5),
        # The sum, 514, is no number of bfloat16.
        ([torch.tensor(x, dtype=torch.bfloat16) for x in (256.0, 258.0)], 257.0),
        ([None, torch.tensor(3.0)], 3.0),
        ([torch.tensor(3.0), None], 3.0),
        ([float("nan"), 1.0], float("nan")),
        ([None, None], None),
    ],
)
def test_the_loss_is_the_mean_over_micro_batches(
    trainer: FakeTrainer,
    connect: Connect,
    make_accelerator: Callable[..., Any],
    losses: list[Any],
    mean: float | None,
) -> None:
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    optimizer = adamw()
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    update(accelerator, optimizer, scheduler, *({"loss": loss} for loss in losses))
    assert scheduler.progress == 1
    # The next update begins anew.
    update(accelerator, optimizer, scheduler, {"loss": 5.0}, {"loss": 7.0})
    trainer.wait(lambda: 1 in trainer.losses)
    reported = trainer.losses[0]
    assert reported == mean or (reported != reported and mean != mean)  # noqa: PLR0124
    assert trainer.losses[1] == 6.0


def test_a_loss_that_is_written_again_counts_as_it_was(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    accelerator, optimizer = make_accelerator(gradient_accumulation_steps=2), adamw()
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    loss = torch.tensor(4.0)
    with accelerator.accumulate():
        scheduler.step(loss=loss)
    loss.fill_(6.0)
    with accelerator.accumulate():
        optimizer.step()
        scheduler.step(loss=loss)
    trainer.wait(lambda: trainer.losses == {0: 5.0})


def test_the_end_of_the_data_completes_an_update(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    accelerator = make_accelerator(gradient_accumulation_steps=4)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    data = torch.utils.data.TensorDataset(torch.arange(6.0))
    loader = torch.utils.data.DataLoader(data)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for (item,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(item[None]).sum())
            optimizer.step()
            scheduler.step(loss=item)
            optimizer.zero_grad()
    assert scheduler.progress == 2
    trainer.wait(lambda: trainer.losses == {0: 1.5, 1: 4.5})


def test_what_goes_with_the_last_micro_batch_is_reported(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    trainer.unit, trainer.delay = "samples", 64
    accelerator, optimizer = make_accelerator(gradient_accumulation_steps=2), adamw()
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    last = {"loss": 1.0, "increment": 16, "grad_norm": 0.5, "batch": 16, "val_losses": {"v": 2.0}}
    update(accelerator, optimizer, scheduler, {"loss": 1.0}, last)
    assert scheduler.progress == 16
    trainer.wait(lambda: trainer.reports)
    report = trainer.reports[0]
    assert (report.gradient_norm, report.batch) == (0.5, 16)
    assert dict(report.validation_losses) == {"v": 2.0}


def test_a_prepared_optimizer_and_a_step_of_its_own_will_do(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    # `step_scheduler_with_optimizer` is about what Accelerate wraps around schedulers.
    accelerator = make_accelerator(step_scheduler_with_optimizer=False)
    inner = adamw()
    optimizer = accelerator.prepare(inner)
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    assert scheduler.optimizer is inner
    assert accelerator.prepare(scheduler) is scheduler
    for at in range(3):
        optimizer.step()
        assert scheduler.get_last_lr() == [trainer.rate(at)]
        scheduler.step(loss=1.0)
    assert scheduler.progress == 3


@pytest.mark.parametrize("fused", [False, True])
def test_updates_that_are_skipped_make_no_move(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any], fused: bool
) -> None:
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scheduler = LRScheduler(connect(), optimizer, accelerator)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    at = []
    # The very first update opens the attempt, skipped or not.
    for factor in (float("inf"), float("inf"), 1.0, 1.0, float("inf"), 1.0):
        loss = model(torch.ones(1, 1)).sum() * factor
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step(loss=loss)
        optimizer.zero_grad()
        at.append(scheduler.progress)
    assert at == [0, 0, 1, 2, 2, 3]
    trainer.wait(lambda: len(trainer.reports) == 6)
    skipped = [report.skipped for report in trainer.reports]
    assert skipped == [True, True, False, False, True, False]


def test_the_scheduler_for_torch_takes_a_prepared_optimizer(
    trainer: FakeTrainer, connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    optimizer = make_accelerator().prepare(adamw())
    scheduler = TorchLRScheduler(connect(), optimizer)
    for at in range(3):
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.step()
        assert scheduler.get_last_lr() == [trainer.rate(at)]
        scheduler.step(loss=1.0)


def test_the_scheduler_for_torch_is_not_to_be_prepared(
    connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    # On several processes what Accelerate wraps around it would make several moves an update.
    accelerator, optimizer = make_accelerator(), adamw()
    scheduler = TorchLRScheduler(connect(), optimizer)
    with pytest.raises(lrpilot.InvalidArgument, match=r"lrpilot\.client\.accelerate\.LRScheduler"):
        accelerator.prepare(optimizer, scheduler)


def test_wrong_arguments_are_refused(
    connect: Connect, make_accelerator: Callable[..., Any]
) -> None:
    pilot, optimizer = connect(), adamw()
    with pytest.raises(lrpilot.InvalidArgument, match=r"^accelerator: got "):
        LRScheduler(pilot, optimizer, None)
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    with pytest.raises(lrpilot.InvalidArgument, match=r"^accelerator: got "):
        LRScheduler(pilot, accelerator, optimizer)
    with pytest.raises(TypeError, match="Linear is not an Optimizer"):
        LRScheduler(pilot, accelerator.prepare(torch.nn.Linear(1, 1)), accelerator)
    scheduler = LRScheduler(pilot, optimizer, accelerator)
    with accelerator.accumulate():
        # Not when the update is complete, but at once.
        with pytest.raises(lrpilot.InvalidArgument, match=r"^epoch: got 3"):
            scheduler.step(3)  # type: ignore[arg-type]
        with pytest.raises(lrpilot.InvalidArgument, match=r"^loss: got 'low'"):
            scheduler.step(loss="low")
