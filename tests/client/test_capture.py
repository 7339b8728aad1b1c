"""Tensor values, captured steps: what the optimizer holds, and what is refused.

Tensors of torch's meta device stand for those on a GPU: they can be written to and not be read.
"""

from __future__ import annotations

import copy
import logging
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator

import lrpilot.client as lrpilot
from lrpilot.client import _capture

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]
    MakeOptimizer = Callable[..., FakeOptimizer]
    Capture = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Stand for `torch.cuda.graph`: inside of it, the stream is being captured."""

    @contextmanager
    def capture() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(_capture, "is_capturing", lambda: True)
            yield

    return capture


def on_device(value: float = 1.0) -> Any:
    """Return a tensor that cannot be read."""
    return torch.tensor(value, device="meta")


def single(number: float) -> float:
    """Return a number as float32 holds it, worked out without torch."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    assert isinstance(rounded, float)
    return rounded


def adamw(*groups: dict[str, Any], **options: Any) -> Any:
    """Return a real AdamW with a param group for each, or one."""
    made = [{"params": [torch.nn.Parameter(torch.ones(2))], **group} for group in groups or ({},)]
    return torch.optim.AdamW(made, **options)


# What is held.


def test_a_float32_tensor_holds_the_value_cast_once(trainer: FakeTrainer, connect: Connect) -> None:
    held = torch.tensor(1.0)
    optimizer = adamw(lr=held, fused=True)
    scheduler = connect().scheduler(optimizer)
    for at in range(1, 20):
        scheduler.step(loss=1.0)
        assert optimizer.param_groups[0]["lr"] is held
        assert held.item() == single(trainer.rate(at))
        assert scheduler.applied() == ((single(trainer.rate(at)), trainer.decay(at)),)
    # The two differ: this is what makes it worth telling.
    assert single(trainer.rate(19)) != trainer.rate(19)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_on_a_device_is_written_and_never_read(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer, dtype: torch.dtype
) -> None:
    rate, decay = (torch.tensor(1.0, dtype=dtype, device="meta") for _ in range(2))
    group = {"lr": rate}
    optimizer = make_optimizer(group)
    scheduler = connect().scheduler(optimizer)
    group["weight_decay"] = decay
    optimizer.param_groups.append({"lr": 1.0})
    for at in range(1, 5):
        scheduler.step(loss=1.0)
        expected = torch.tensor(trainer.rate(at), dtype=dtype).item()
        assert scheduler.applied()[0][0] == expected
    assert group == {"lr": rate, "weight_decay": decay}
    assert group["lr"] is rate


def test_what_is_applied_is_what_each_param_group_holds(
    trainer: FakeTrainer, connect: Connect
) -> None:
    optimizer = adamw({"weight_decay": 0.0}, {"weight_decay": 0.3}, {"lr": torch.tensor(1.0)})
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    rate, decay = trainer.rate(1), trainer.decay(1)
    assert scheduler.applied() == ((rate, 0.0), (rate, decay), (single(rate), decay))


def test_without_weight_decay_none_is_applied(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.has_weight_decay = False
    scheduler = connect().scheduler(make_optimizer({"lr": 1.0}, {"lr": 1.0, "weight_decay": 0.5}))
    assert scheduler.applied() == ((trainer.rate(0), None), (trainer.rate(0), 0.5))


def test_before_the_attempt_opens_nothing_is_applied(
    connect: Connect, optimizer: FakeOptimizer
) -> None:
    with pytest.raises(lrpilot.AttemptNotOpen):
        connect().scheduler(optimizer, defer=True).applied()


def test_param_groups_get_tensors_of_their_own(trainer: FakeTrainer, connect: Connect) -> None:
    """torch hands the tensor that it is given to every param group; here they differ."""
    trainer.groups = ["a", "b"]
    held = torch.tensor(1.0)
    optimizer = adamw({"name": "a"}, {"name": "b"}, {"name": "a"}, lr=held, fused=True)
    assert all(group["lr"] is held for group in optimizer.param_groups)
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    rates = [single(trainer.rate(1, group)) for group in (0, 1, 0)]
    assert [group["lr"].item() for group in optimizer.param_groups] == rates
    assert [rate for rate, _ in scheduler.applied()] == rates
    assert optimizer.param_groups[0]["lr"] is held
    assert optimizer.param_groups[2]["lr"] is held


def test_a_tensor_weight_decay_of_0_is_kept(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    kept, other = torch.tensor(0.0), torch.tensor(0.5)
    groups = ({"lr": 1.0, "weight_decay": held} for held in (kept, other))
    optimizer = make_optimizer(*groups)
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    assert (kept.item(), other.item()) == (0.0, single(trainer.decay(1)))
    # What it was stays beside it, and does not follow what is written.
    assert optimizer.param_groups[1]["initial_weight_decay"] == 0.5


# Captured steps.


def test_a_number_as_lr_is_refused_while_the_step_is_captured(
    connect: Connect, make_optimizer: MakeOptimizer, capture: Capture
) -> None:
    for held in (1.0, torch.tensor(1.0)):  # A tensor on the CPU is read in the capture as well.
        optimizer = make_optimizer({"lr": on_device()}, {"lr": held})
        scheduler = connect().scheduler(optimizer)
        with capture(), pytest.raises(lrpilot.CaptureRefused, match=r"param groups \[1\]"):
            optimizer.step()
        # A step that nobody captured is fine.
        optimizer.step()
        scheduler.step(loss=1.0)


def test_a_constant_weight_decay_is_never_refused(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: MakeOptimizer,
    capture: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "decay", lambda at, group: 0.1)
    optimizer = make_optimizer({"lr": on_device(), "weight_decay": 0.1, "capturable": True})
    scheduler = connect().scheduler(optimizer)
    with capture():
        optimizer.step()
    for _ in range(10):
        scheduler.step(loss=1.0)
    assert scheduler.applied()[0][1] == 0.1


@pytest.mark.parametrize("held", [0.1, torch.tensor(0.1)])
def test_another_weight_decay_than_the_captured_one_is_refused(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: MakeOptimizer,
    capture: Capture,
    held: Any,
) -> None:
    lr = on_device()
    optimizer = make_optimizer({"lr": lr, "weight_decay": held}, {"lr": lr})
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)  # not captured yet
    kept = scheduler.applied()[0][1]
    with capture():
        optimizer.step()
    with pytest.raises(lrpilot.CaptureRefused) as caught:
        scheduler.step(loss=1.0)
    text = str(caught.value)
    assert f"#0 keeps {kept!r} in place of {trainer.decay(2)!r}" in text
    for remedy in ("constant", "examples/train_fp8.py", "wd_in_graph='warn'", "out of the graph"):
        assert remedy in text
    # Nothing was written; captured anew, or not at all, it goes on.
    assert float(optimizer.param_groups[0]["weight_decay"]) == kept


def test_where_it_is_to_warn_the_captured_weight_decay_is_told(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: MakeOptimizer,
    capture: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = make_optimizer({"lr": on_device(), "weight_decay": 0.1})
    scheduler = connect().scheduler(optimizer, wd_in_graph="warn")
    with capture():
        optimizer.step()
    with caplog.at_level(logging.WARNING, "lrpilot.client"):
        for at in range(1, 5):
            scheduler.step(loss=1.0)
            assert scheduler.applied()[0][1] == trainer.decay(0)
            # Whoever captures again captures the one in force.
            assert optimizer.decays == [trainer.decay(at)]
        assert len(caplog.messages) == 1
        with capture():
            optimizer.step()
        assert scheduler.applied()[0][1] == trainer.decay(4)
        scheduler.step(loss=1.0)
        assert len(caplog.messages) == 2
    assert scheduler.applied()[0][1] == trainer.decay(4)


def test_a_weight_decay_on_the_device_follows(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer, capture: Capture
) -> None:
    optimizer = make_optimizer({"lr": on_device()})
    scheduler = connect().scheduler(optimizer)
    optimizer.param_groups.append({"lr": on_device(), "weight_decay": torch.tensor(0.1)})
    scheduler.step(loss=1.0)
    optimizer.param_groups[1]["weight_decay"] = on_device()
    with capture():
        optimizer.step()
    for at in range(2, 5):
        scheduler.step(loss=1.0)
        assert scheduler.applied()[1][1] == single(trainer.decay(at))


def test_without_hooks_capturable_groups_count_as_captured(
    trainer: FakeTrainer, connect: Connect
) -> None:
    class Bare:
        def __init__(self, capturable: bool) -> None:
            group = {"lr": on_device(), "weight_decay": 0.1, "capturable": capturable}
            self.param_groups = [group]

    connect().scheduler(Bare(False)).step(loss=1.0)
    scheduler = connect().scheduler(Bare(True))
    with pytest.raises(lrpilot.CaptureRefused, match="#0 keeps"):
        scheduler.step(loss=1.0)


def test_the_capture_is_seen_through_a_wrapper(
    trainer: FakeTrainer, connect: Connect, capture: Capture
) -> None:
    """Accelerate's has the method to add hooks, and no place to keep them."""
    optimizer = adamw(lr=torch.tensor(1.0), fused=True)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    scheduler = connect().scheduler(wrapped, defer=True)
    wrapped.step()
    assert scheduler.progress == 0
    with capture(), pytest.raises(lrpilot.CaptureRefused, match="lr of param groups"):
        wrapped.step()


@pytest.mark.parametrize("choice", ["ignore", None, True])
def test_another_choice_than_refuse_or_warn_is_refused(
    connect: Connect, optimizer: FakeOptimizer, choice: Any
) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match="wd_in_graph: got"):
        connect().scheduler(optimizer, wd_in_graph=choice)


# Copies.


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_neither_pilot_nor_scheduler_can_be_copied(
    connect: Connect, optimizer: FakeOptimizer, take: Callable[[object], object]
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    with pytest.raises(TypeError, match=r"a Pilot cannot be pickled or copied.*pilot\.run"):
        take({"pilot": pilot} if take is not copy.copy else pilot)
    with pytest.raises(TypeError, match=r"a Scheduler cannot be .*scheduler\.state_dict\(\)"):
        take([scheduler] if take is not copy.copy else scheduler)


def test_an_optimizer_with_a_scheduler_can_still_be_copied(connect: Connect) -> None:
    optimizer = adamw()
    connect().scheduler(optimizer)
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert pickle.loads(pickle.dumps(optimizer)).state == {}
