"""What goes out beside a loss: weights, validation losses, norms, batches, skipped updates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

import lrpilot.client as lrpilot
from lrpilot.client import _timing

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]

NAN, INF = math.nan, math.inf


def shown(trainer: FakeTrainer) -> list[tuple[Any, ...]]:
    """Return (progress, try, loss, moves_to, skipped) of every report."""
    return [
        (
            item.progress,
            getattr(item, "try"),
            item.loss if item.HasField("loss") else None,
            item.moves_to,
            item.skipped,
        )
        for item in trainer.reports
    ]


def test_what_a_step_knows_goes_out_with_its_loss(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    batch: Any = np.int64(512)
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step(
            1,
            2.5,
            weight=4096,
            val_losses={"val/c4": torch.tensor(3.5), "books": np.float32(0.5)},
            grad_norm=torch.tensor([1.25]),
            batch=batch,
        )
        scheduler.step(loss=2.0)
    first, second = trainer.reports
    assert (first.progress, first.loss, first.weight, first.moves_to) == (0, 2.5, 4096.0, 1)
    assert dict(first.validation_losses) == {"val/c4": 3.5, "books": 0.5}
    assert (first.gradient_norm, first.batch, first.skipped) == (1.25, 512, False)
    assert (second.loss, second.weight, dict(second.validation_losses)) == (2.0, 1.0, {})
    assert (second.HasField("gradient_norm"), second.batch) == (False, 0)


def test_a_report_by_hand_knows_the_same(trainer: FakeTrainer, connect: Connect) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.5, 2.0, val_losses={"val": 9}, grad_norm=3, batch=64)
    (report,) = trainer.reports
    assert (report.loss, report.weight, report.gradient_norm, report.batch) == (1.5, 2.0, 3.0, 64)
    assert dict(report.validation_losses) == {"val": 9.0}


def test_a_step_without_a_loss_may_know_something(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step()
        scheduler.step(grad_norm=2.0)
        scheduler.step(loss=1.0)
    assert shown(trainer) == [
        (0, 0, None, 1, False),
        (1, 0, None, 2, False),
        (2, 0, 1.0, 3, False),
    ]
    assert trainer.reports[1].gradient_norm == 2.0


def test_numbers_that_are_not_finite_are_data(trainer: FakeTrainer, connect: Connect) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, NAN, val_losses={"a": -INF, "b": NAN}, grad_norm=INF)
        pilot.report(1, INF, grad_norm=NAN)
    first, second = trainer.reports
    assert (str(first.loss), first.gradient_norm) == ("nan", INF)
    assert {name: str(loss) for name, loss in first.validation_losses.items()} == {
        "a": "-inf",
        "b": "nan",
    }
    assert (second.loss, str(second.gradient_norm)) == (INF, "nan")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weight": 0}, "weight: got 0; allowed: a finite number above 0"),
    ({"weight": NAN}, "weight: got nan"),
    ({"val_losses": [1.0]}, r"val_losses: got \[1\.0\]; allowed: a mapping"),
    ({"val_losses": {"": 1.0}}, "val_losses: got ''; allowed: as a name: 1 to 64"),
    ({"val_losses": {"a b": 1.0}}, "val_losses: got 'a b'"),
    ({"val_losses": {"a" * 65: 1.0}}, "val_losses: got 'a"),
    ({"val_losses": {"loss": 1.0}}, "val_losses: got 'loss'; allowed: .* and not 'loss'"),
    ({"val_losses": {3: 1.0}}, "val_losses: got 3"),
    ({"val_losses": {str(at): 1.0 for at in range(65)}}, "got '65 names'; allowed: at most 64"),
    ({"val_losses": {"a": "1"}}, r"val_losses\['a'\]: got '1'; allowed: a number"),
    ({"val_losses": {"a": torch.zeros(2)}}, r"val_losses\['a'\]: got a tensor of shape \(2,\)"),
    ({"grad_norm": -1.0}, r"grad_norm: got -1\.0; allowed: a number from 0 on"),
    ({"grad_norm": -INF}, "grad_norm: got -inf"),
    ({"grad_norm": "1"}, "grad_norm: got '1'"),
    ({"batch": 0}, "batch: got 0; allowed: an integer from 1"),
    ({"batch": 1.5}, r"batch: got 1\.5"),
    ({"skipped": 1}, "skipped: got 1; allowed: True or False"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_is_wrong_is_refused_and_changes_nothing(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    wrong: dict[str, Any],
    message: str,
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    with pytest.raises(lrpilot.InvalidArgument, match=message):
        scheduler.step(loss=1.0, **wrong)
    with pytest.raises(lrpilot.InvalidArgument, match=message):
        pilot.report(0, 1.0, **wrong)
    assert scheduler.progress == 0
    scheduler.step(loss=2.0)
    pilot.close()
    assert shown(trainer) == [(0, 0, 2.0, 1, False)]


def test_off_the_reporter_nothing_is_read_or_sent(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect(rank=1, world_size=2, key="k") as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step(loss=torch.zeros(7), val_losses={"a": "x"}, grad_norm=-1.0)
        scheduler.report_validation("a", "x")
        pilot.report(1, torch.zeros(7), grad_norm="x")
        with pytest.raises(lrpilot.InvalidArgument, match="name: got ''"):
            scheduler.report_validation("", 1.0)
    assert trainer.reports == []


# Skipped updates.


def test_a_skipped_update_comes_again_with_the_same_values(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step(loss=1.0)
        for loss in (INF, NAN):
            optimizer.param_groups[0]["lr"] = 77.0
            scheduler.step(16, loss=loss, grad_norm=INF, skipped=True)
            assert scheduler.progress == 1
            assert optimizer.rates == [trainer.rate(1)]
        scheduler.step(loss=2.0)
        assert scheduler.progress == 2
        scheduler.step(skipped=True)
        scheduler.step()
        scheduler.step(loss=3.0)
    got = [(*item[:2], str(item[2]), *item[3:]) for item in shown(trainer)]
    assert got == [
        (0, 0, "1.0", 1, False),
        (1, 0, "inf", 1, True),
        (1, 1, "nan", 1, True),
        (1, 2, "2.0", 2, False),
        (2, 0, "None", 2, True),
        (2, 1, "None", 3, False),
        (3, 0, "3.0", 4, False),
    ]


def test_schedulers_of_one_rank_speak_of_a_skipped_update_once(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    with connect() as pilot:
        first, second = (pilot.scheduler(make_optimizer()) for _ in range(2))
        first.step(loss=1.0, skipped=True)
        second.step(skipped=True)
        first.step(loss=2.0)
        # This optimizer alone refused: the step is reported as made.
        second.step(skipped=True)
        second.step()
    assert shown(trainer) == [(0, 0, 1.0, 0, True), (0, 1, 2.0, 1, False)]


def test_by_hand_each_call_is_another_try(trainer: FakeTrainer, connect: Connect) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(2, 1.0, skipped=True)
        pilot.report(2, 1.0, skipped=True)
        pilot.report(2, 5.0)
        with pytest.raises(lrpilot.InvalidArgument, match=r"n: got 2; .* not passed yet, 3 on"):
            pilot.report(2, 1.0, skipped=True)
    assert shown(trainer) == [
        (0, 0, None, 2, False),
        (2, 0, 1.0, 2, True),
        (2, 1, 1.0, 2, True),
        (2, 2, 5.0, 3, False),
    ]


def test_a_skipped_update_below_the_resume_point_is_refused(connect: Connect) -> None:
    pilot = connect(resume_at=10)
    pilot.values(10)
    with pytest.raises(lrpilot.BelowResumePoint):
        pilot.report(9, 1.0, skipped=True)


# Validation losses.


def test_a_validation_loss_rides_in_the_next_report_of_a_completed_step(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        scheduler.step(loss=1.0)
        scheduler.report_validation("val", 4.0)
        pilot.report_validation("books", torch.tensor(5.0))
        scheduler.report_validation("val", 4.5)
        scheduler.step(loss=2.0, skipped=True, val_losses={"skipped": 8.0})
        scheduler.step(loss=3.0, val_losses={"books": 6.0})
        scheduler.report_validation("val", 7.0)
        scheduler.step()
    assert [dict(report.validation_losses) for report in trainer.reports] == [
        {},
        {},
        {"val": 4.5, "books": 6.0, "skipped": 8.0},
        {"val": 7.0},
    ]


def test_a_repeated_report_brings_its_validation_loss_once(
    trainer: FakeTrainer, connect: Connect
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0, val_losses={"val": 2.0})
        pilot.report(0, 1.0, val_losses={"val": 2.0})
        pilot.report(1, 1.0)
    assert [dict(report.validation_losses) for report in trainer.reports] == [{"val": 2.0}, {}]


def test_more_names_than_a_report_holds_go_on_with_the_next(
    trainer: FakeTrainer, connect: Connect
) -> None:
    with connect() as pilot:
        pilot.values(0)
        for at in range(70):
            pilot.report_validation(f"val/{at}", float(at))
        pilot.report(0, 1.0)
        pilot.report(1, 1.0)
    first, second = (dict(report.validation_losses) for report in trainer.reports)
    assert (len(first), len(second)) == (64, 6)
    assert first | second == {f"val/{at}": float(at) for at in range(70)}


def test_a_validation_loss_that_no_report_follows_is_spoken_of(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lrpilot.client"), connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0)
        pilot.report_validation("val", 1.0)
    assert "no report came after the validation losses ['val']" in caplog.text


def test_names_do_not_make_a_call_too_large(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "BATCH_BYTES", 4000)
    pilot = connect()
    pilot.values(0)
    trainer.stop()
    names = [f"{at:064d}" for at in range(20)]
    for at in range(10):
        pilot.report(at, 1.0, val_losses=dict.fromkeys(names, float(at)))
    trainer.start()
    pilot.close()
    assert [report.progress for report in trainer.reports] == list(range(10))
    assert all(len(dict(report.validation_losses)) == 20 for report in trainer.reports)
    assert max(len(request.reports) for request in trainer.calls["ReportLosses"]) == 2


# Several reporters.


def test_each_declared_rank_reports_and_the_order_is_kept(
    trainer: FakeTrainer, connect: Connect
) -> None:
    for rank in range(3):
        with connect(reporter=[2, 0], rank=rank, world_size=3, key="k") as pilot:
            pilot.values(0)
            pilot.report(0, float(rank), 10.0 + rank)
    assert [
        (request.rank, request.reporter, list(request.reporters))
        for request in trainer.calls["OpenAttempt"]
    ] == [(0, 2, [2, 0]), (1, 2, [2, 0]), (2, 2, [2, 0])]
    assert [
        (request.rank, request.reports[0].loss, request.reports[0].weight)
        for request in trainer.calls["ReportLosses"]
    ] == [(0, 0.0, 10.0), (2, 2.0, 12.0)]


def test_one_reporter_is_sent_as_before(trainer: FakeTrainer, connect: Connect) -> None:
    for reporter in (1, (1,)):
        connect(reporter=reporter, rank=0, world_size=2, key="k").values(0)
    for request in trainer.calls["OpenAttempt"]:
        assert (request.reporter, list(request.reporters)) == (1, [])


@pytest.mark.parametrize(
    ("reporter", "message"),
    [
        ([], r"reporter: got \[\]; allowed: different ranks from 0 to 3, at least one"),
        ([1, 1], r"reporter: got \[1, 1\]; allowed: different ranks"),
        ([0, 4], "reporter: got 4; allowed: an integer from 0 to 3"),
        ("0", "reporter: got '0'"),
        (4, "reporter: got 4; allowed: an integer from 0 to 3, or a sequence of them"),
    ],
)
def test_wrong_reporters_are_refused(connect: Connect, reporter: Any, message: str) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=message):
        connect(reporter=reporter, rank=0, world_size=4, key="k")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which this process is one; the other is not there."""
    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    destroy_process_group()


def test_a_dtensor_is_taken_where_this_rank_holds_it_whole(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, request: Any
) -> None:
    """Reading a part of one is a collective, and only the reporter would come to it."""
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    mesh = request.getfixturevalue("mesh")  # later than the pilot, which would join its ranks

    def held(placement: Any) -> Any:
        return DTensor.from_local(torch.tensor(1.5), mesh, [placement])

    calls: list[tuple[str, Callable[[Any], None]]] = [
        ("loss", lambda part: scheduler.step(loss=part)),
        ("grad_norm", lambda part: scheduler.step(loss=1.0, grad_norm=part)),
        (r"val_losses\['dev'\]", lambda part: scheduler.step(val_losses={"dev": part})),
        ("loss", lambda part: scheduler.report_validation("dev", part)),
    ]
    for name, call in calls:
        with pytest.raises(lrpilot.InvalidArgument, match=rf"{name}: got a DTensor .*full_tensor"):
            call(held(Partial()))
    assert scheduler.progress == 0
    scheduler.step(loss=held(Replicate()), grad_norm=held(Replicate()))
    pilot.close()
    assert trainer.losses == {0: 1.5}
    assert trainer.reports[0].gradient_norm == 1.5
