"""How a pilot ends: closed, left by an error, at the interpreter's exit, in a forked child."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _pilot, _timing

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("lrpilot-")}


def test_closing_delivers_what_is_queued_and_ends_the_threads(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault]
) -> None:
    trainer.fail("ReportLosses", fault(), times=10)
    pilot = connect()
    pilot.values(0)
    assert threads() == {"lrpilot-lease", "lrpilot-report", "lrpilot-sigterm"}
    for at in range(5):
        pilot.report(at, 1.0)
    pilot.close()
    assert trainer.losses == dict.fromkeys(range(5), 1.0)
    assert threads() == set()
    pilot.close()


def test_a_closed_pilot_refuses_calls(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    pilot.close()
    calls: list[Callable[[], object]] = [
        lambda: pilot.values(0),
        lambda: pilot.report(0, 1.0),
        lambda: pilot.scheduler(optimizer),
        scheduler.step,
        scheduler.apply,
        scheduler.state_dict,
    ]
    for call in calls:
        with pytest.raises(lrpilot.PilotClosed, match="the pilot of run 'small' is closed"):
            call()
    assert scheduler.progress == 0


def test_closing_without_a_server_is_bounded_and_loud(
    trainer: FakeTrainer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_timing, "CLOSE_FLUSH_S", 0.2)
    with connect() as pilot:
        pilot.values(0)
        trainer.stop()
        pilot.report(0, 1.0)
        pilot.report(1, 1.0)
    (record,) = [item for item in caplog.records if item.levelname == "ERROR"]
    assert record.getMessage() == (
        f"run small: 2 reports were NOT delivered to {trainer.address} before the end"
    )
    assert threads() == set()


def test_an_error_in_the_block_is_never_masked(
    trainer: FakeTrainer,
    connect: Connect,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_timing, "ABANDON_FLUSH_S", 0.1)
    trainer.fail("ReportLosses", refuse("NotReporter", "another process reports"))

    def train() -> None:
        with connect() as pilot:
            pilot.values(0)
            pilot.report(0, 1.0)
            reporter = pilot._session._reporter
            assert reporter is not None
            reporter._thread.join(20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert "NotReporter: another process reports" in caplog.text
    assert "1 reports were NOT delivered" in caplog.text
    assert threads() == set()


def test_an_error_in_the_block_still_delivers(trainer: FakeTrainer, connect: Connect) -> None:
    def train() -> None:
        with connect() as pilot:
            pilot.values(0)
            pilot.report(0, 1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert trainer.losses == {0: 1.0}


def test_a_wait_ends_when_another_thread_closes(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.move(8)
    pilot = connect()
    pilot.values(0)
    got: list[BaseException] = []

    def wait() -> None:
        try:
            pilot.values(100)
        except lrpilot.LrpilotError as error:
            got.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    trainer.wait(lambda: any(request.begin == 100 for request in trainer.calls["GetValues"]))
    pilot.close()
    thread.join(20)
    assert [type(error) for error in got] == [lrpilot.PilotClosed]


def test_connecting_that_fails_leaves_nothing(
    trainer: FakeTrainer, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels: list[grpc.Channel] = []
    new = grpc.insecure_channel

    def noted(*args: Any, **options: Any) -> grpc.Channel:
        channels.append(new(*args, **options))
        return channels[-1]

    monkeypatch.setattr(grpc, "insecure_channel", noted)
    trainer.fail("AttachRun", refuse("SpecChanged"))
    before = list(_pilot._open)
    with pytest.raises(lrpilot.SpecChanged):
        lrpilot.connect(trainer.address, run="small")
    assert _pilot._open == before
    (channel,) = channels
    with pytest.raises(ValueError, match="closed channel"):
        channel.unary_unary("/any/Method")(b"", timeout=1)


HEAD = """
import os, sys
import lrpilot.client as lrpilot
from lrpilot.client import _timing
_timing.ABANDON_FLUSH_S = 0.5
pilot = lrpilot.connect({address!r}, run="small")
pilot.values(0)
"""


def program(trainer: FakeTrainer, text: str) -> subprocess.CompletedProcess[str]:
    """Run a program that connects; one that hangs fails the test."""
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(address=trainer.address) + text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_exit_delivers_what_nobody_closed(trainer: FakeTrainer) -> None:
    done = program(trainer, "for at in range(50): pilot.report(at, 1.0)")
    assert (done.returncode, done.stderr) == (0, "")
    assert trainer.losses == dict.fromkeys(range(50), 1.0)


def test_the_exit_without_a_server_is_bounded(trainer: FakeTrainer, fault: type[Fault]) -> None:
    trainer.always["ReportLosses"] = fault()
    done = program(trainer, "pilot.report(0, 1.0)")
    assert done.returncode == 0
    assert "1 reports were NOT delivered" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["os._exit(0)", "sys.exit(0)", "pilot.close(); sys.exit(0)"])
def test_a_forked_child_ends_and_leaves_its_parent_alone(trainer: FakeTrainer, way: str) -> None:
    done = program(
        trainer,
        f"""
pilot.report(0, 1.0)
for _ in range(5):
    child = os.fork()
    if child == 0:
        for call in (lambda: pilot.values(1), lambda: pilot.report(1, 1.0)):
            try:
                call()
            except lrpilot.PilotClosed:
                pass
            else:
                os._exit(3)
        {way}
    assert os.waitpid(child, 0)[1] == 0
pilot.values(1)
pilot.report(1, 2.0)
pilot.close()
print("parent done")
""",
    )
    assert (done.returncode, done.stdout) == (0, "parent done\n"), done.stderr
    assert "NOT delivered" not in done.stderr
    assert trainer.losses == {0: 1.0, 1: 2.0}
