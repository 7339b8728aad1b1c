"""Two ranks over a real process group agree on everything, errors included."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import lrpilot.client as lrpilot
from tests.side_by_side import said_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.conftest import FakeTrainer, Fault

    Refuse = Callable[..., Fault]

PROGRAM = Path(__file__).with_name("ranks_program.py")


@pytest.fixture
def ranks(trainer: FakeTrainer, refuse: Refuse, tmp_path: Path) -> list[dict[str, Any]]:
    """What the two ranks say."""
    trainer.fail("AttachRun", refuse("RunNotFound", "no such", grpc.StatusCode.NOT_FOUND))
    trainer.fail("OpenAttempt", refuse("ResumePointRequired", "give a state"))
    rendezvous = (tmp_path / "rendezvous").as_uri()
    return said_by(
        [[sys.executable, str(PROGRAM), str(n), rendezvous, trainer.address] for n in range(2)]
    )


def test_two_ranks(trainer: FakeTrainer, ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    refusals = {
        "attach refused": ("RunNotFound", "no such"),
        "open refused": ("ResumePointRequired", "give a state"),
        "argument": ("InvalidArgument", "resume_at: got -1"),
        "options": ("ConnectRefused", "the ranks differ in reporter: '0' on rank 0, '1' on rank 1"),
        "spec": ("InvalidArgument", "spec: got 'no/such/file.yaml'"),
        "state": ("InvalidState", "version, run, progress, state missing"),
        "progress": (
            "JoinRefused",
            "the ranks differ in the progress to begin at: 3 on rank 0, 5 on rank 1",
        ),
        "one state": (
            "JoinRefused",
            "the ranks differ in the progress to begin at: 3 on rank 0, None on rank 1",
        ),
    }
    for scene, (name, text) in refusals.items():
        for rank in ranks:
            assert rank[scene][0] == name, scene
            assert text in rank[scene][1], scene
    # The rank at fault raises its own error, the other one names it.
    assert first["argument"][1].endswith("(rank 1)")
    assert not second["argument"][1].endswith("(rank 1)")

    rates = [trainer.rate(at).hex() for at in range(4, 24)]
    assert first["trained"] == [1, 0, 24, rates]
    assert second["trained"] == [1, 1, 24, rates]
    assert first["saved"]["progress"] == 24
    assert first["saved"]["state"] != ""
    assert "saved" not in second

    # One rank speaks for both until the attempt is open; then the declared one reports.
    assert [request.rank for request in trainer.calls["OpenAttempt"]] == [0, 0]
    assert trainer.calls["AttachRun"][-1].spec_document == "name: small\n"
    assert {request.rank for request in trainer.calls["ReportLosses"]} == {1}
    assert trainer.losses == dict.fromkeys(range(4, 24), 3.0)


def test_a_group_of_another_size_than_said_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Distributed:
        @staticmethod
        def is_available() -> bool:
            return True

        is_initialized = is_available

        @staticmethod
        def get_rank() -> int:
            return 0

        @staticmethod
        def get_world_size() -> int:
            return 2

    monkeypatch.setitem(sys.modules, "torch.distributed", Distributed)
    with pytest.raises(lrpilot.ConnectRefused, match="process group has 2, and no key"):
        lrpilot.connect("127.0.0.1:1", run="small", world_size=4)
