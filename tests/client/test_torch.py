"""The scheduler that is one of torch's own."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler as stock

import lrpilot.client as lrpilot
from lrpilot.client.torch import LRScheduler
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]

OVERWRITTEN = "something else has written LR or weight decay of param groups"


def parameter() -> Any:
    made = torch.nn.Parameter(torch.ones(2))
    made.grad = torch.ones(2)
    return made


def adamw(*groups: dict[str, Any], **options: Any) -> Any:
    """Return an optimizer with an LR and a WD of its own."""
    made = [{"params": [parameter()], **group} for group in groups or ({},)]
    return torch.optim.AdamW(made, **{"lr": 0.5, "weight_decay": 0.25, **options})


def watch(optimizer: Any) -> list[list[tuple[float, float]]]:
    """Return a list that gets LR and WD of each param group at each step of an optimizer."""
    used: list[list[tuple[float, float]]] = []

    def note(*_: Any) -> None:
        used.append([(float(g["lr"]), float(g["weight_decay"])) for g in optimizer.param_groups])

    optimizer.register_step_pre_hook(note)
    return used


def test_it_is_a_scheduler_of_torch_and_one_of_ours(trainer: FakeTrainer, connect: Connect) -> None:
    optimizer = adamw()
    scheduler = LRScheduler(connect(), optimizer)
    assert isinstance(scheduler, stock.LRScheduler)
    assert isinstance(scheduler, lrpilot.Scheduler)
    assert scheduler.optimizer is optimizer
    # What torch keeps is the optimizer's own.
    assert scheduler.base_lrs == [0.5]
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert scheduler.get_last_lr() == scheduler.get_lr() == [trainer.rate(0)]
    assert (scheduler.last_epoch, scheduler._step_count) == (0, 1)


def test_each_step_uses_what_was_served_and_torch_warns_of_nothing(
    trainer: FakeTrainer, connect: Connect
) -> None:
    optimizer = adamw()
    scheduler = LRScheduler(connect(), optimizer)
    used = watch(optimizer)
    for at in range(12):
        optimizer.step()
        assert scheduler.get_last_lr() == [trainer.rate(at)]
        scheduler.step(loss=float(at))
        assert (scheduler.progress, scheduler.last_epoch) == (at + 1, at + 1)
        assert scheduler._step_count == at + 2
    assert used == [[(trainer.rate(at), trainer.decay(at))] for at in range(12)]
    trainer.wait(lambda: trainer.losses == {at: float(at) for at in range(12)})


def test_what_goes_with_a_step_is_reported(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.unit, trainer.delay = "samples", 64
    scheduler = LRScheduler(connect(), adamw())
    scheduler.step(
        loss=torch.tensor(2.0),
        increment=32,
        weight=3.0,
        val_losses={"held": 1.5},
        grad_norm=0.5,
        batch=32,
    )
    assert scheduler.progress == 32
    trainer.wait(lambda: trainer.reports)
    report = trainer.reports[0]
    assert (report.loss, report.weight, report.gradient_norm) == (2.0, 3.0, 0.5)
    assert (report.batch, dict(report.validation_losses)) == (32, {"held": 1.5})


def test_a_skipped_update_stays(trainer: FakeTrainer, connect: Connect) -> None:
    scheduler = LRScheduler(connect(), adamw())
    scheduler.step(loss=float("inf"), skipped=True)
    assert (scheduler.progress, scheduler._step_count) == (0, 1)
    assert scheduler.get_last_lr() == [trainer.rate(0)]


@pytest.mark.parametrize("given", [0, 3, 0.5, torch.tensor(0.5)])
def test_nothing_is_taken_by_position(connect: Connect, given: Any) -> None:
    scheduler = LRScheduler(connect(), adamw())
    with pytest.raises(
        lrpilot.InvalidArgument, match=r"epoch: got .*step\(loss=loss\), or step\(increment=count\)"
    ):
        scheduler.step(given)
    assert scheduler.progress == 0


def test_wrong_arguments_are_refused(connect: Connect) -> None:
    pilot, optimizer = connect(), adamw()
    with pytest.raises(lrpilot.InvalidArgument, match=r"^pilot: got "):
        LRScheduler(optimizer, pilot)
    with pytest.raises(TypeError, match="Linear is not an Optimizer"):
        LRScheduler(pilot, torch.nn.Linear(1, 1))
    with pytest.raises(lrpilot.InvalidArgument, match=r"^wd_in_graph: "):
        LRScheduler(pilot, optimizer, wd_in_graph="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize("comes_first", [True, False])
def test_a_sequence_of_schedulers_is_refused(
    trainer: FakeTrainer, connect: Connect, comes_first: bool
) -> None:
    optimizer = adamw()
    ours, warmup = LRScheduler(connect(), optimizer), stock.LinearLR(optimizer, 0.1)
    parts = [ours, warmup] if comes_first else [warmup, ours]
    with pytest.raises(
        lrpilot.InvalidArgument,
        match=r"spec holds the whole schedule, .* no part of a SequentialLR",
    ):
        stock.SequentialLR(optimizer, parts, [3])
    with pytest.raises(
        lrpilot.InvalidArgument,
        match=r"spec holds the whole schedule, .* no part of a SequentialLR",
    ):
        ours._update_lr(0)
    # It goes on as if nobody had tried.
    used = watch(optimizer)
    optimizer.step()
    assert used == [[(trainer.rate(0), trainer.decay(0))]]


@pytest.mark.parametrize("comes_first", [True, False])
def test_in_a_chain_its_values_are_those_used(
    trainer: FakeTrainer,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    comes_first: bool,
) -> None:
    optimizer = adamw()
    ours, other = LRScheduler(connect(), optimizer), stock.ExponentialLR(optimizer, 0.5)
    chain = stock.ChainedScheduler([ours, other] if comes_first else [other, ours])
    used = watch(optimizer)
    for _ in range(5):
        optimizer.step()
        chain.step()
    assert used == [[(trainer.rate(at), trainer.decay(at))] for at in range(5)]
    # The other writes after ours, or before it and in vain.
    assert caplog.text.count(OVERWRITTEN) == comes_first


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_what_something_else_wrote_is_written_over_and_said_once(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture, rate: Any
) -> None:
    optimizer = torch.optim.SGD([parameter()], lr=rate, weight_decay=0.25)
    scheduler = LRScheduler(connect(), optimizer)
    used = watch(optimizer)
    group = optimizer.param_groups[0]
    for at in range(3):
        if isinstance(rate, torch.Tensor):
            group["lr"].fill_(7.0)
        else:
            group["lr"] = 7.0
        group["weight_decay"] = 7.0
        optimizer.step()
        scheduler.step(loss=1.0)
        assert used[-1] == [(trainer.rate(at), trainer.decay(at))]
    assert caplog.text.count(OVERWRITTEN) == 1
    assert f"{OVERWRITTEN} [0]" in caplog.text


def test_an_optimizer_may_load_its_state_afterwards(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = adamw()
    scheduler = LRScheduler(connect(), optimizer)
    used = watch(optimizer)
    optimizer.step()
    scheduler.step(loss=1.0)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    # Nothing differed.
    assert OVERWRITTEN not in caplog.text
    scheduler.step(loss=1.0)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert used == [[(trainer.rate(at), trainer.decay(at))] for at in range(3)]
    assert OVERWRITTEN in caplog.text


def test_a_param_group_added_later_has_its_values_at_once(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.groups = ["a", "b"]
    optimizer = adamw({"name": "b"})
    scheduler = LRScheduler(connect(), optimizer)
    used = watch(optimizer)
    optimizer.add_param_group({"params": [parameter()], "name": "a"})
    optimizer.step()
    a, b = ((trainer.rate(0, group), trainer.decay(0, group)) for group in (0, 1))
    assert used == [[b, a]]
    assert scheduler.get_last_lr() == [b[0], a[0]]
    assert OVERWRITTEN not in caplog.text


def test_a_group_whose_weight_decay_is_0_keeps_it(trainer: FakeTrainer, connect: Connect) -> None:
    optimizer = adamw({}, {"weight_decay": 0.0})
    scheduler = LRScheduler(connect(), optimizer)
    used = watch(optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step(loss=1.0)
    assert used == [
        [(trainer.rate(at), trainer.decay(at)), (trainer.rate(at), 0.0)] for at in range(2)
    ]


def test_several_optimizers_each_have_theirs(trainer: FakeTrainer, connect: Connect) -> None:
    pilot, optimizers = connect(), [adamw(), torch.optim.SGD([parameter()], lr=3.0)]
    schedulers = [LRScheduler(pilot, optimizer) for optimizer in optimizers]
    for at in range(6):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            assert scheduler.get_last_lr() == [trainer.rate(at)]
            scheduler.step(loss=float(at))
    trainer.wait(lambda: len(trainer.reports) == 6)


def test_a_tensor_lr_is_kept_and_handed_out_as_a_copy(
    trainer: FakeTrainer, connect: Connect
) -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter()], lr=rate)
    scheduler = LRScheduler(connect(), optimizer)
    held = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step(loss=1.0)
    assert optimizer.param_groups[0]["lr"] is held
    (last,) = scheduler.get_last_lr()
    assert last.item() == trainer.rate(1)
    last.fill_(9.0)
    assert held.item() == trainer.rate(1)


def test_a_deferred_one_resumes_from_a_checkpoint_of_torch(
    trainer: FakeTrainer, connect: Connect
) -> None:
    scheduler = LRScheduler(connect(), adamw())
    for _ in range(5):
        scheduler.step(loss=1.0)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    optimizer = adamw()
    resumed = LRScheduler(connect(), optimizer, defer=True)
    assert (resumed.last_epoch, resumed.get_last_lr()) == (0, [0.5])
    resumed.load_state_dict(state)
    assert (resumed.last_epoch, resumed.get_last_lr()) == (5, [trainer.rate(5)])
    # A framework may restore what was restored.
    resumed.load_state_dict(state)
    used = watch(optimizer)
    optimizer.step()
    assert used == [[(trainer.rate(5), trainer.decay(5))]]


def test_a_deferred_one_opens_at_the_first_step(trainer: FakeTrainer, connect: Connect) -> None:
    optimizer = adamw()
    scheduler = LRScheduler(connect(), optimizer, defer=True)
    used = watch(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(loss=1.0)
    assert used == [[(trainer.rate(at), trainer.decay(at))] for at in range(3)]


def test_an_optimizer_keeps_no_scheduler_alive(trainer: FakeTrainer, connect: Connect) -> None:
    pilot, optimizer = connect(), adamw()
    before = len(optimizer._optimizer_step_pre_hooks)
    first = LRScheduler(pilot, optimizer)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    del first
    gc.collect()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks - 1 >= before
    second = LRScheduler(pilot, optimizer)
    for at in range(3):
        optimizer.step()
        assert second.get_last_lr() == [trainer.rate(at)]
        second.step(loss=1.0)


def test_a_rollback_moves_it(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.directives = [
        pb.Directive(id="d1", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=6, reason="a", before=4)
    ]
    pilot, model = connect(), torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = LRScheduler(pilot, optimizer)
    lrpilot.RollbackHandler(pilot, model=model, optimizer=optimizer, scheduler=scheduler, every=2)
    used, at = watch(optimizer), []
    for _ in range(8):
        at.append(scheduler.last_epoch)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step(loss=1.0)
    assert at == [0, 1, 2, 3, 4, 5, 2, 3]
    assert used == [[(trainer.rate(n), trainer.decay(n))] for n in at]
    assert OVERWRITTEN not in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_step_is_compiled_no_oftener_than_with_torchs_own(
    trainer: FakeTrainer, connect: Connect
) -> None:
    trainer.has_weight_decay = False

    def train(make: Callable[[Any], Any], **said: Any) -> list[int]:
        torch.compiler.reset()
        optimizer = adamw(lr=torch.tensor(0.5))
        scheduler, graphs, counts = make(optimizer), [], []

        def compile_graph(module: Any, _: Any) -> Any:
            graphs.append(module)
            return module.forward

        def update() -> None:
            optimizer.step()

        step = torch.compile(update, backend=compile_graph)
        for _ in range(4):
            step()
            scheduler.step(**said)
            counts.append(len(graphs))
        return counts

    ours = train(lambda optimizer: LRScheduler(connect(), optimizer), loss=1.0)
    assert ours == train(lambda optimizer: stock.ExponentialLR(optimizer, 0.9))
    assert ours[0] == ours[-1] > 0
