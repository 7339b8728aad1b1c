"""What a scheduler writes into an optimizer, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import lrpilot.client as lrpilot

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]
    MakeOptimizer = Callable[..., FakeOptimizer]


def test_values_of_each_progress_are_written(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    scheduler = connect().scheduler(optimizer)
    assert scheduler.progress == 0
    for at in range(1, 40):
        assert optimizer.rates == [trainer.rate(at - 1)]
        assert optimizer.decays == [trainer.decay(at - 1)]
        scheduler.step(loss=1.0)
        assert scheduler.progress == at
    assert type(optimizer.rates[0]) is float


def test_an_increment_is_positional_as_megatrons(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.unit, trainer.delay = "samples", 100
    scheduler = connect().scheduler(optimizer)
    increments: list[Any] = [64, 64, 128, np.int64(32)]
    for increment in increments:
        before = scheduler.progress
        scheduler.step(increment, loss=0.5)
        assert scheduler.progress == before + increment
        assert optimizer.rates == [trainer.rate(before + int(increment))]
    assert type(scheduler.progress) is int


@pytest.mark.parametrize(
    ("unit", "increments", "count"),
    [("samples", [1, 1], 1), ("samples", [8, 8], 0), ("iterations", [1, 1], 0)],
)
def test_a_step_of_one_sample_or_token_is_doubted_once(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    caplog: pytest.LogCaptureFixture,
    unit: str,
    increments: list[int],
    count: int,
) -> None:
    trainer.unit, trainer.delay = unit, 100
    scheduler = connect().scheduler(optimizer)
    for increment in increments:
        scheduler.step(increment, loss=0.5)
    assert caplog.text.count("counts samples, and a step was made with increment=1") == count


@pytest.mark.parametrize("increment", [0, -1, 1.0, True, "1", None, torch.tensor(2.5)])
def test_a_wrong_increment_is_refused_and_changes_nothing(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, increment: Any
) -> None:
    scheduler = connect().scheduler(optimizer)
    with pytest.raises(lrpilot.InvalidArgument, match=r"increment: got .*step\(loss=loss\)"):
        scheduler.step(increment, loss=1.0)
    assert scheduler.progress == 0
    assert optimizer.rates == [trainer.rate(0)]


def test_param_groups_are_matched_by_name(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.groups = ["matrices", "no_decay", "embedding"]
    optimizer = make_optimizer(
        {"name": "no_decay", "lr": 1.0, "weight_decay": 0.0},
        {"name": "matrices", "lr": 1.0, "weight_decay": 0.0},
        {"name": "no_decay", "lr": 1.0, "weight_decay": 0.0},
    )
    connect().scheduler(optimizer)
    assert optimizer.rates == [trainer.rate(0, 1), trainer.rate(0, 0), trainer.rate(0, 1)]
    # The spec has groups, so that it alone says what weight decay each has.
    assert optimizer.decays == [trainer.decay(0, 1), trainer.decay(0, 0), trainer.decay(0, 1)]


def test_param_groups_without_names_are_matched_by_position(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.groups = ["matrices", "no_decay"]
    optimizer = make_optimizer({"lr": 1.0}, {"lr": 1.0, "weight_decay": 0.5})
    connect().scheduler(optimizer)
    assert optimizer.rates == [trainer.rate(0, 0), trainer.rate(0, 1)]
    # An optimizer without weight decay is given none.
    assert optimizer.decays == [None, trainer.decay(0, 1)]


@pytest.mark.parametrize(
    "names", [["matrices"], [None], [None] * 3, ["matrices", "other"], ["matrices", None]]
)
def test_other_param_groups_are_refused_with_both_lists(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer, names: list[str | None]
) -> None:
    trainer.groups = ["matrices", "no_decay"]
    groups: list[dict[str, Any]] = [
        {"lr": 1.0, **({} if name is None else {"name": name})} for name in names
    ]
    if names == ["matrices"]:
        # A rank of a pipeline may lack a group.
        connect().scheduler(make_optimizer(*groups))
        return
    with pytest.raises(lrpilot.GroupMismatch) as caught:
        connect().scheduler(make_optimizer(*groups))
    assert "['matrices', 'no_decay']" in str(caught.value)
    for at, name in enumerate(names):
        assert (f"#{at} (no name)" if name is None else name) in str(caught.value)
    assert [group["lr"] for group in groups] == [1.0] * len(groups)


def test_a_param_group_added_later_is_matched_again(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.groups = ["a", "b"]
    optimizer = make_optimizer({"name": "b", "lr": 1.0})
    scheduler = connect().scheduler(optimizer)
    optimizer.param_groups.append({"name": "a", "lr": 1.0})
    scheduler.step(loss=1.0)
    assert optimizer.rates == [trainer.rate(1, 1), trainer.rate(1, 0)]


def test_a_tensor_lr_is_filled_in_place(trainer: FakeTrainer, connect: Connect) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    held = torch.tensor(1.0, dtype=torch.float64)
    optimizer = torch.optim.AdamW([parameter], lr=held, foreach=False)
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == trainer.rate(1)
    assert type(optimizer.param_groups[0]["weight_decay"]) is float


def test_without_weight_decay_in_the_run_the_optimizers_own_stays(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.has_weight_decay = False
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    assert optimizer.decays == [0.01]
    assert optimizer.rates == [trainer.rate(1)]


def test_without_groups_a_weight_decay_of_0_is_kept(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: MakeOptimizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = make_optimizer({"lr": 1.0, "weight_decay": 0.01}, {"lr": 1.0, "weight_decay": 0.0})
    with caplog.at_level(logging.INFO, "lrpilot.client"):
        scheduler = connect().scheduler(optimizer)
    assert any(
        "param groups [1] have weight decay 0 of their own" in line for line in caplog.messages
    )
    scheduler.step(loss=1.0)
    assert optimizer.decays == [trainer.decay(1), 0.0]
    assert optimizer.rates == [trainer.rate(1)] * 2


def test_a_ramp_that_begins_at_0_is_not_taken_for_a_weight_decay_of_0(
    trainer: FakeTrainer, connect: Connect
) -> None:
    """A checkpoint written while the ramp stood at 0 must not switch weight decay off."""

    def new() -> torch.optim.Optimizer:
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], weight_decay=0.3)

    first = new()
    connect().scheduler(first)
    first.param_groups[0]["weight_decay"] = 0.0
    resumed = new()
    resumed.load_state_dict(first.state_dict())
    connect().scheduler(resumed)
    assert resumed.param_groups[0]["weight_decay"] == trainer.decay(0)


def test_what_is_no_optimizer_is_refused(connect: Connect) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match="optimizer: got"):
        connect().scheduler(object())


def test_apply_writes_once_more(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    optimizer.param_groups = [{"lr": 5.0, "weight_decay": 5.0}]
    scheduler.apply()
    assert optimizer.rates == [trainer.rate(1)]
    assert optimizer.decays == [trainer.decay(1)]
    assert scheduler.progress == 1


def test_the_reporters_losses_alone_are_sent_and_read(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    class Unreadable:
        def __float__(self) -> float:
            raise AssertionError

    options: dict[str, Any] = {"key": "k", "world_size": 2, "reporter": 1}
    follower = connect(rank=0, **options).scheduler(make_optimizer())
    with connect(rank=1, **options) as pilot:
        reporter = pilot.scheduler(make_optimizer())
        for at in range(3):
            reporter.step(loss=float(at))
            follower.step(loss=Unreadable())
    assert trainer.losses == {0: 0.0, 1: 1.0, 2: 2.0}
    assert {request.rank for request in trainer.calls["ReportLosses"]} == {1}


def test_a_step_without_a_loss_says_that_there_is_none(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        for at in range(30):
            scheduler.step(loss=float(at) if at % 10 == 0 else None)
    assert trainer.frontier == 30
    assert {at: loss for at, loss in trainer.losses.items() if loss is not None} == {
        0: 0.0,
        10: 10.0,
        20: 20.0,
    }


@pytest.mark.parametrize("trigger", ["load_state_dict", "apply", "optimizer"])
def test_deferred_opening(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, trigger: str
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer, defer=True)
    assert pilot.attempt is None
    assert optimizer.rates == [1.0]
    with pytest.raises(lrpilot.AttemptNotOpen):
        _ = scheduler.progress
    with pytest.raises(lrpilot.AttemptNotOpen):
        scheduler.step(loss=1.0)
    assert trainer.calls["OpenAttempt"] == []
    if trigger == "load_state_dict":
        scheduler.load_state_dict({"version": 1, "run": "small", "progress": 5, "state": ""})
    elif trigger == "apply":
        scheduler.apply()
    else:
        optimizer.step()
    begin = 5 if trigger == "load_state_dict" else 0
    assert scheduler.progress == begin
    assert pilot.attempt == 1
    assert optimizer.rates == [trainer.rate(begin)]
    optimizer.step()
    assert len(trainer.calls["OpenAttempt"]) == 1


def test_a_deferred_attempt_opens_before_the_first_step_of_a_real_optimizer(
    trainer: FakeTrainer, connect: Connect
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=100.0)
    trainer.has_weight_decay = False
    connect().scheduler(optimizer, defer=True)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert parameter.item() == -trainer.rate(0)


def test_a_deferred_attempt_opens_though_others_have_hooks_too(
    trainer: FakeTrainer, connect: Connect
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    scheduler = connect().scheduler(optimizer, defer=True)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(2):
        optimizer.step()
        scheduler.step(loss=1.0)
    assert seen == [trainer.rate(0), trainer.rate(1)]


def test_a_deferred_attempt_opens_where_the_first_update_is_skipped(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    scheduler = connect().scheduler(optimizer, defer=True)
    with pytest.raises(lrpilot.AttemptNotOpen):
        scheduler.step(loss=1.0)
    scheduler.step(loss=float("inf"), skipped=True)
    assert (scheduler.progress, optimizer.rates) == (0, [trainer.rate(0)])
    scheduler.step(loss=1.0)
    assert (scheduler.progress, optimizer.rates) == (1, [trainer.rate(1)])


def test_defer_and_state_exclude_each_other(connect: Connect, optimizer: FakeOptimizer) -> None:
    state = {"version": 1, "run": "small", "progress": 5, "state": ""}
    with pytest.raises(lrpilot.InvalidArgument, match="defer"):
        connect().scheduler(optimizer, state, defer=True)


def test_values_and_reports_by_hand(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.groups = ["a", "b"]
    with connect() as pilot:
        with pytest.raises(lrpilot.AttemptNotOpen):
            pilot.report(0, 1.0)
        for at in range(20):
            assert pilot.values(at) == tuple(
                (trainer.rate(at, group), trainer.decay(at, group)) for group in range(2)
            )
            pilot.report(at, 2.0, weight=3.0)
    assert set(trainer.losses) == set(range(20))
    sent = [report for request in trainer.calls["ReportLosses"] for report in request.reports]
    assert {(report.weight, report.moves_to - report.progress) for report in sent} == {(3.0, 1)}


def test_values_without_weight_decay_have_none(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.has_weight_decay = False
    assert connect().values(0) == ((trainer.rate(0), None),)


@pytest.mark.parametrize("n", [-1, 0.5, True, "0", None, 2**53 + 1])
def test_a_wrong_progress_is_refused(connect: Connect, n: Any) -> None:
    pilot = connect()
    with pytest.raises(lrpilot.InvalidArgument, match="n: got"):
        pilot.values(n)
    with pytest.raises(lrpilot.InvalidArgument, match="n: got"):
        pilot.report(n, 1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_wrong_weight_is_refused(connect: Connect, weight: Any) -> None:
    pilot = connect()
    pilot.values(0)
    with pytest.raises(lrpilot.InvalidArgument, match="weight: got"):
        pilot.report(0, 1.0, weight)


@pytest.mark.parametrize("loss", ["1.0", True, [1.0], object(), torch.zeros(2), 1j])
def test_a_wrong_loss_is_refused(connect: Connect, optimizer: FakeOptimizer, loss: Any) -> None:
    scheduler = connect().scheduler(optimizer)
    with pytest.raises(lrpilot.InvalidArgument, match="loss: got"):
        scheduler.step(loss=loss)
    assert scheduler.progress == 0


def test_a_later_scheduler_begins_where_the_others_stand(
    trainer: FakeTrainer, connect: Connect, make_optimizer: type[FakeOptimizer]
) -> None:
    """As when layers are unfrozen, and the optimizer is made anew."""
    pilot = connect()
    first = pilot.scheduler(make_optimizer())
    first.step(loss=1.0)
    first.step(loss=2.0)
    later = make_optimizer()
    second = pilot.scheduler(later)
    assert (second.progress, later.param_groups[0]["lr"]) == (2, trainer.rate(2))
    # Both may report the one loss of the step.
    first.step(loss=3.0)
    second.step(loss=3.0)
    pilot.close()
    assert trainer.losses == {0: 1.0, 1: 2.0, 2: 3.0}


def test_deferred_schedulers_begin_together(
    trainer: FakeTrainer, connect: Connect, make_optimizer: type[FakeOptimizer]
) -> None:
    """In whichever order two optimizers step, as those of a GAN do."""
    pilot = connect()
    first = pilot.scheduler(make_optimizer(), defer=True)
    second = pilot.scheduler(make_optimizer(), defer=True)
    first.apply()
    for at in range(5):
        first.step(loss=1.0)
        second.apply()
        second.step()
        assert (first.progress, second.progress) == (at + 1, at + 1)
    pilot.close()
    assert trainer.losses == dict.fromkeys(range(5), 1.0)


def test_values_asked_for_by_hand_move_no_scheduler(
    trainer: FakeTrainer, connect: Connect, make_optimizer: type[FakeOptimizer]
) -> None:
    trainer.feedback = False
    pilot = connect()
    pilot.values(5)
    assert pilot.scheduler(make_optimizer()).progress == 0
