"""Losses on a CUDA device: the training thread leaves them there and never waits.

The device is a stand-in. Its streams run when a test says so, the one that could overtake first;
what a real one would make the caller wait for is an error.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _device, _timing

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]


class Stream:
    """Work in the order in which it was asked for, not done yet."""

    def __init__(self, _device: object = None) -> None:
        self.work: deque[Callable[[], bool]] = deque()

    def wait_event(self, event: Event) -> None:
        seen = event.asked
        self.work.append(lambda: event.done >= seen)


class Event:
    """How often it was recorded, and how often the device came there."""

    def __init__(self) -> None:
        self.asked = self.done = 0

    def record(self, stream: Stream) -> None:
        self.asked += 1
        number = self.asked

        def reach() -> bool:
            self.done = number
            return True

        stream.work.append(reach)

    def query(self) -> bool:
        raise AssertionError("an event was asked: that ends a capture of another thread")

    def synchronize(self) -> None:
        raise AssertionError("a wait for the device")


class Gpu:
    """The device, and what torch has of it."""

    type, index = "cuda", 0

    def __init__(self) -> None:
        self.training, self.current = Stream(), Stream()
        self.current = self.training
        self.streams = [self.training]
        self.allocations: list[str] = []
        self.capturing = False
        self.torch = SimpleNamespace(
            float64="float64",
            empty=self.empty,
            inference_mode=lambda _: nullcontext(),
            cuda=SimpleNamespace(
                Stream=self.stream,
                Event=Event,
                stream=self.on,
                current_stream=lambda _: self.current,
                is_initialized=lambda: True,
                is_current_stream_capturing=lambda: self.capturing,
            ),
        )

    def stream(self, _device: object) -> Stream:
        self.streams.insert(0, Stream())
        return self.streams[0]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(self, size: int, *, dtype: str, device: Any, pin_memory: bool = False) -> Any:
        assert dtype == "float64"
        assert pin_memory == (device == "cpu")
        self.allocations.append("pinned" if pin_memory else "device")
        return Pinned(self, size) if pin_memory else [Tensor(self, -1.0) for _ in range(size)]

    def work(self) -> None:
        """Do all that can be done, whatever could overtake first."""
        while any(self._advance(stream) for stream in self.streams):
            pass

    @staticmethod
    def _advance(stream: Stream) -> bool:
        if not stream.work or not stream.work[0]():
            return False
        stream.work.popleft()
        return True

    def put(self, write: Callable[[], None], non_blocking: bool) -> None:
        assert non_blocking, "a wait for the device"
        assert not self.capturing, "this would be part of a graph"

        def done() -> bool:
            write()
            return True

        self.current.work.append(done)


class Tensor:
    """A tensor of one element on the device."""

    shape = (1,)

    def __init__(self, gpu: Gpu, value: float) -> None:
        self.device, self.value = gpu, value

    def numel(self) -> int:
        return 1

    def detach(self) -> Tensor:
        return self

    def reshape(self, shape: tuple[()]) -> Tensor:
        assert shape == ()
        return self

    def copy_(self, other: Tensor, non_blocking: bool = False) -> None:
        self.device.put(lambda: setattr(self, "value", other.value), non_blocking)

    def fill_(self, value: float) -> None:
        """Write it later, as the next step of the training does."""
        self.device.put(lambda: setattr(self, "value", value), True)

    def _wait(self) -> float:
        raise AssertionError("a wait for the device")

    item = __float__ = __bool__ = __int__ = tolist = cpu = _wait


class Pinned:
    """Pinned memory, which the device writes to."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._gpu = gpu
        self._doubles = (ctypes.c_double * size)()

    def data_ptr(self) -> int:
        return ctypes.addressof(self._doubles)

    def __getitem__(self, at: int) -> Any:
        def copy_(other: Tensor, non_blocking: bool = False) -> None:
            self._gpu.put(lambda: self._doubles.__setitem__(at, other.value), non_blocking)

        return SimpleNamespace(copy_=copy_, memory=self)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A device that torch knows as CUDA, four losses to an allocation."""
    made = Gpu()
    monkeypatch.setitem(sys.modules, "torch", made.torch)
    monkeypatch.setattr(_device, "_outboxes", {})
    monkeypatch.setattr(_device, "SLOTS", 4)
    return made


def test_the_training_thread_never_waits_for_a_loss(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, gpu: Gpu
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    loss = Tensor(gpu, 0.0)
    for at in range(3):
        loss.fill_(at + 0.5)
        scheduler.step(loss=loss, grad_norm=None)
    # The next step writes to the tensor before the device came to the copies.
    loss.fill_(math.nan)
    assert trainer.losses == {}
    gpu.work()
    pilot.close()
    assert trainer.losses == {at: at + 0.5 for at in range(3)}


def test_nothing_is_allocated_once_losses_flow(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, gpu: Gpu
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        for at in range(50):
            scheduler.step(loss=Tensor(gpu, float(at)))
            gpu.work()
    assert gpu.allocations == ["pinned", "device"]
    assert trainer.losses == {at: float(at) for at in range(50)}


def test_losses_of_an_outage_do_not_pile_up_on_the_device(
    trainer: FakeTrainer, connect: Connect, gpu: Gpu, fault: type[Fault]
) -> None:
    trainer.always["ReportLosses"] = fault()
    with connect() as pilot:
        pilot.values(0)
        for at in range(50):
            # The thread that delivers holds the first of them, and looks at no other.
            pilot.report(at, Tensor(gpu, float(at)))
            gpu.work()
        assert gpu.allocations == ["pinned", "device"]
        trainer.always.clear()
    assert trainer.losses == {at: float(at) for at in range(50)}


def test_a_device_far_behind_gets_more_room(
    trainer: FakeTrainer, connect: Connect, gpu: Gpu
) -> None:
    with connect() as pilot:
        pilot.values(0)
        for at in range(30):
            pilot.report(at, Tensor(gpu, at / 3))
        gpu.work()
    assert trainer.losses == {at: at / 3 for at in range(30)}
    assert len(gpu.allocations) == 16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
def test_every_number_arrives(
    trainer: FakeTrainer, connect: Connect, gpu: Gpu, value: float
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, Tensor(gpu, value))
        gpu.work()
    arrived = trainer.losses[0]
    assert arrived is not None
    assert arrived.hex() == value.hex()


def test_norms_and_validation_losses_are_left_there_too(
    trainer: FakeTrainer, connect: Connect, gpu: Gpu
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0, grad_norm=Tensor(gpu, 0.5), val_losses={"val": Tensor(gpu, 3.0)})
        gpu.work()
    assert trainer.reports[0].gradient_norm == 0.5
    assert dict(trainer.reports[0].validation_losses) == {"val": 3.0}


def test_a_device_that_never_answers_holds_nothing_up(
    trainer: FakeTrainer,
    connect: Connect,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_timing, "CLOSE_FLUSH_S", 0.1)
    pilot = connect()
    pilot.values(0)
    pilot.report(0, Tensor(gpu, 1.0))
    pilot.close()
    assert "1 reports were NOT delivered" in caplog.text
    # Nobody looks any more for what a device that has failed will never bring.
    assert "lrpilot-report" not in {thread.name for thread in threading.enumerate()}


def test_a_step_inside_of_a_capture_is_refused_and_changes_nothing(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, gpu: Gpu
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    loss = Tensor(gpu, 2.0)
    gpu.capturing = True
    calls: list[Callable[[], object]] = [
        lambda: scheduler.step(loss=loss),
        scheduler.step,
        scheduler.apply,
        lambda: pilot.report(0, loss),
        lambda: pilot.scheduler(optimizer),
    ]
    for call in calls:
        with pytest.raises(lrpilot.CaptureRefused, match=r"after graph\.replay\(\)"):
            call()
    assert scheduler.progress == 0
    gpu.capturing = False
    scheduler.step(loss=loss)
    gpu.work()
    pilot.close()
    assert trainer.losses == {0: 2.0}


def test_a_capture_does_not_disturb_losses_under_way(
    trainer: FakeTrainer, connect: Connect, gpu: Gpu
) -> None:
    """The thread that delivers asks the device nothing, and a query of an event would raise."""
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, Tensor(gpu, 1.0))
        gpu.capturing = True
        gpu.work()
        trainer.wait(lambda: 0 in trainer.losses)
        gpu.capturing = False
    assert trainer.losses == {0: 1.0}
