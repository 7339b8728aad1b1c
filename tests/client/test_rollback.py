"""Going back within a process: the new attempt, and what the ready handler restores."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb
from tests.side_by_side import said_by

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]

PROGRAM = Path(__file__).with_name("rollback_program.py")


def asked(name: str, progress: int, before: int) -> pb.Directive:
    return pb.Directive(
        id=name,
        kind=pb.DIRECTIVE_KIND_ROLLBACK,
        progress=progress,
        reason=f"for {name}",
        before=before,
        factor=0.5,
    )


def threads() -> list[str]:
    return sorted(
        thread.name for thread in threading.enumerate() if thread.name.startswith("lrpilot-")
    )


def acknowledged(trainer: FakeTrainer) -> list[tuple[str, int, str]]:
    return [
        (request.directive, request.outcome, request.detail)
        for request in trainer.calls["AcknowledgeDirective"]
    ]


# The pilot's part.


def test_a_new_attempt_opens_and_the_schedulers_go_there(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    trainer.directives = [asked("d1", 12, 7)]
    pilot = connect()
    pilot.on_directive("rollback", lambda directive: pilot.roll_back(directive, 6))
    optimizers = [make_optimizer() for _ in range(2)]
    first, second = (pilot.scheduler(optimizer) for optimizer in optimizers)
    for _ in range(12):
        first.step(loss=1.0)
        second.step()
    assert (first.progress, second.progress, pilot.attempt) == (6, 6, 2)
    assert [optimizer.rates for optimizer in optimizers] == [[trainer.rate(6)]] * 2
    opened = trainer.calls["OpenAttempt"][-1]
    assert (opened.directive, opened.progress, opened.key, opened.state) == ("d1", 6, "", b"")
    # It says by itself that the directive was carried out.
    assert acknowledged(trainer) == []
    # The server still names the directive; it was met already.
    for _ in range(12):
        first.step(loss=2.0)
        second.step()
    assert (first.progress, pilot.attempt) == (18, 2)
    # One of each: those of the old attempt have ended.
    assert threads() == ["lrpilot-lease", "lrpilot-report", "lrpilot-sigterm"]
    pilot.close()
    assert threads() == []
    assert trainer.losses == {at: 1.0 if at < 6 else 2.0 for at in range(18)}
    assert trainer.calls["ReportLosses"][-1].attempt == pb.Attempt(number=2, token=trainer.token(2))


def test_what_the_old_attempt_still_meets_does_not_fail_the_pilot(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.directives = [asked("d1", 5, 3)]
    trainer.move(6)
    pilot = connect()
    old: list[Any] = []

    def handle(directive: lrpilot.Directive) -> None:
        # The lease asks for more, again and again, while the attempt opens.
        trainer.wait_calls("GetValues", len(trainer.calls["GetValues"]) + 1)
        trainer.horizon = None
        old.append(pilot._session.link)
        pilot.roll_back(directive, 2)
        old[0].fail(lrpilot.AttemptSuperseded("another attempt has opened"))

    pilot.on_directive("rollback", handle)
    scheduler = pilot.scheduler(optimizer)
    for _ in range(40):
        scheduler.step(loss=1.0)
    assert scheduler.progress == 37
    assert old[0].closing.is_set()
    pilot.close()


def test_queued_reports_are_delivered_first_and_dropped_when_they_cannot_be(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    fault: type[Fault],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_timing, "ROLL_BACK_FLUSH_S", 0.1)
    trainer.directives = [asked("d1", 4, 3), asked("d2", 6, 3)]
    trainer.move(100)
    pilot = connect()
    pilot.on_directive("rollback", lambda directive: pilot.roll_back(directive, 2))
    scheduler = pilot.scheduler(optimizer)
    for at in range(4):
        scheduler.step(loss=float(at))
    assert trainer.losses == {at: float(at) for at in range(4)}
    trainer.always["ReportLosses"] = fault()
    for _ in range(4):
        scheduler.step(loss=7.0)
    assert (scheduler.progress, pilot.attempt) == (2, 3)
    assert "4 reports of attempt 2 were not delivered before the rollback" in caplog.text
    trainer.always.clear()
    scheduler.step(loss=8.0)
    pilot.close()
    assert trainer.losses == {0: 0.0, 1: 1.0, 2: 8.0, 3: 3.0}


def test_ranks_that_share_a_key_meet_in_the_new_attempt(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    trainer.directives = [asked("d1", 6, 3)]
    trainer.move(100)
    pilots = [connect(rank=rank, world_size=2, key="start-1") for rank in range(2)]
    schedulers = []
    for pilot in pilots:
        pilot.on_directive("rollback", partial(pilot.roll_back, progress=2))
        schedulers.append(pilot.scheduler(make_optimizer()))
    lease: Any = pilots[1]._session._lease
    for _ in range(6):
        schedulers[0].step(loss=1.0)
    assert pilots[0].attempt == 2
    # The other rank hears of it before it meets the directive itself.
    schedulers[1].step()
    lease._renew_at = -1.0
    pilots[1]._session.link.fail(lrpilot.AttemptSuperseded("another attempt has opened"))
    for _ in range(5):
        schedulers[1].step()
    assert (schedulers[1].progress, pilots[1].attempt) == (2, 2)
    assert [request.key for request in trainer.calls["OpenAttempt"]] == [
        "start-1",
        "start-1",
        "start-1/d1",
        "start-1/d1",
    ]
    schedulers[1].step()


def test_without_a_rollback_to_come_a_superseded_rank_ends(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot = connect(rank=1, world_size=2, key="start-1")
    scheduler = pilot.scheduler(optimizer)
    pilot._session.link.fail(lrpilot.AttemptSuperseded("another attempt has opened"))
    with pytest.raises(lrpilot.AttemptSuperseded):
        scheduler.step()


def test_a_refused_rollback_reaches_the_loop(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    trainer.directives = [asked("d1", 2, 1)]
    pilot = connect()
    pilot.on_directive("rollback", lambda directive: pilot.roll_back(directive, 0))
    scheduler = pilot.scheduler(optimizer)
    scheduler.step(loss=1.0)
    trainer.fail("OpenAttempt", refuse("AdjustmentNotFound", "no d1", grpc.StatusCode.NOT_FOUND))
    with pytest.raises(lrpilot.AdjustmentNotFound, match="no d1"):
        scheduler.step(loss=1.0)
    assert acknowledged(trainer) == [
        ("d1", pb.DIRECTIVE_OUTCOME_FAILED, "AdjustmentNotFound: no d1")
    ]
    assert (pilot.attempt, scheduler.progress) == (1, 2)


def test_wrong_rollbacks_are_refused(connect: Connect) -> None:
    pilot = connect()
    wrong: Any = lrpilot.Directive("d1", "stop", 5, "")
    with pytest.raises(lrpilot.AttemptNotOpen):
        pilot.roll_back(wrong, 0)
    pilot.values(0)
    with pytest.raises(lrpilot.InvalidArgument, match="directive: got Directive"):
        pilot.roll_back(wrong, 0)
    wrong = "d1"
    with pytest.raises(lrpilot.InvalidArgument, match="directive: got 'd1'"):
        pilot.roll_back(wrong, 0)
    directive = lrpilot.Directive("d1", "rollback", 5, "")
    for progress in (-1, 6):
        with pytest.raises(lrpilot.InvalidArgument, match=f"progress: got {progress}; .* 0 to 5"):
            pilot.roll_back(directive, progress)


# The ready handler.


class Data:
    """Batches by position, as a sampler with a state has them."""

    def __init__(self) -> None:
        self.position = 0

    def draw(self) -> torch.Tensor:
        self.position += 1
        return torch.full((4, 3), float(self.position)) / 50 + torch.randn(4, 3) / 10

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Training:
    """A small training, and a copy of what it was at each progress."""

    def __init__(self, pilot: lrpilot.Pilot, seed: int = 1, **options: Any) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.data = Data()
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0)
        self.pilot = pilot
        self.scheduler = pilot.scheduler(self.optimizer)
        self.handler = lrpilot.RollbackHandler(
            pilot,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            **{"data": self.data, "every": 4, **options},
        )
        self.seen: list[tuple[int, list[str]]] = []
        self.positions: list[int] = []
        self.losses: list[str] = []

    def bits(self) -> list[str]:
        parameters = [item.detach() for item in self.model.parameters()]
        states = [
            value
            for state in self.optimizer.state_dict()["state"].values()
            for value in state.values()
        ]
        tensors = [*parameters, *states]
        return [number.hex() for item in tensors for number in item.double().flatten().tolist()]

    def step(self) -> None:
        self.seen.append((self.scheduler.progress, self.bits()))
        self.positions.append(self.data.position)
        self.optimizer.zero_grad()
        noise = random.random() + np.random.rand()
        loss = (self.model(self.data.draw()) ** 2).mean() * noise
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item().hex())
        self.scheduler.step(loss=loss)


@pytest.fixture
def training(trainer: FakeTrainer, connect: Connect) -> Callable[..., Training]:
    """Begin a small training on a pilot of its own."""
    trainer.delay = 64
    return lambda **options: Training(connect(), **options)


def test_model_and_optimizer_are_as_they_were_and_the_data_goes_on(
    trainer: FakeTrainer, training: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    trainer.directives = [asked("d1", 14, 9), asked("d2", 20, 12)]
    trained = training()
    for _ in range(30):
        trained.step()
    progresses = [at for at, _ in trained.seen]
    # The snapshots lie at 0, 4, 8, 12; 12 is not from before 9, and forgotten with the rollback.
    # The second time the newest from before 12 is 8 once more.
    assert progresses == [*range(14), *range(8, 20), *range(8, 12)]
    first, second, third = (bits for at, bits in trained.seen if at == 8)
    assert first == second == third
    assert trained.seen[9][1] != trained.seen[15][1]
    assert trained.positions == list(range(30))
    assert trained.optimizer.param_groups[0]["lr"] == trainer.rate(12)
    assert trained.handler.snapshots == (0, 4, 8, 12)
    assert trained.pilot.attempt == 3
    assert "went back from progress 14 to 8 (for d1); the data goes on" in caplog.text


def test_without_skipping_the_same_steps_come_again_to_the_bit(
    trainer: FakeTrainer, training: Callable[..., Training]
) -> None:
    trainer.directives = [asked("d1", 14, 9)]
    trained = training(skip=False)
    for _ in range(20):
        trained.step()
    assert trained.positions == [*range(14), *range(8, 14)]
    assert trained.losses[8:14] == trained.losses[14:20]
    assert [bits for _, bits in trained.seen[8:14]] == [bits for _, bits in trained.seen[14:20]]


def test_files_do_the_same_as_memory_and_are_removed(
    trainer: FakeTrainer, training: Callable[..., Training], tmp_path: Path
) -> None:
    place = tmp_path / "rank-0"
    place.mkdir()
    (place / "progress-99.pt").write_text("of an earlier start")
    (place / "notes.txt").write_text("not ours")
    trainer.directives = [asked("d1", 14, 9)]
    trained = training(where=tmp_path, skip=False, keep=2)
    kept = []
    for _ in range(20):
        trained.step()
        kept.append({path.name for path in place.iterdir()} - {"notes.txt"})
    names = ["progress-0.pt", "progress-4.pt", "progress-8.pt", "progress-12.pt"]
    assert kept[0] == {names[0]}
    assert kept[7] == set(names[:3])
    assert kept[12] == {names[0], *names[2:4]}
    assert kept[13] == {names[0], names[2]}
    assert kept[19] == {names[0], *names[2:4]}
    assert (place / "notes.txt").exists()
    assert trained.losses[8:14] == trained.losses[14:20]
    assert trained.handler.cost.newest_bytes == (place / names[3]).stat().st_size
    held = sum((place / name).stat().st_size for name in kept[19])
    assert trained.handler.cost.held_bytes == held


def test_the_cost_is_said_once_and_on_request(
    training: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lrpilot.client"):
        trained = training(also=[torch.nn.Linear(10, 10)])
        for _ in range(5):
            trained.step()
    (line,) = [text for text in caplog.messages if "a snapshot of rank 0 takes" in text]
    parameters, other = 8 * 4, 110 * 4
    assert f"takes {parameters + other} bytes and 0." in line
    assert line.endswith("one each 4 steps, the first and the last 8 are kept in memory")
    cost = trained.handler.cost
    # AdamW has two moments and a count of steps for each of the two parameters by now.
    assert cost.newest_bytes == 3 * parameters + 2 * 4 + other
    assert (cost.taken, cost.held_bytes) == (2, cost.newest_bytes + parameters + other)
    assert 0 < cost.newest_s < cost.total_s


def test_where_no_snapshot_is_old_enough_training_goes_on(
    trainer: FakeTrainer, training: Callable[..., Training], caplog: pytest.LogCaptureFixture
) -> None:
    trainer.directives = [asked("d1", 14, 0)]
    trained = training(keep=2)
    for _ in range(20):
        trained.step()
    text = (
        "no snapshot lies before progress 0: the oldest is at 0 (one each 4 steps, the first and "
        "the last 2 are kept)"
    )
    assert acknowledged(trainer) == [("d1", pb.DIRECTIVE_OUTCOME_FAILED, text)]
    assert text in caplog.text
    assert (trained.scheduler.progress, trained.pilot.attempt) == (20, 1)


def test_a_training_that_never_took_off_goes_back_to_its_start(
    trainer: FakeTrainer, training: Callable[..., Training]
) -> None:
    trainer.directives = [asked("d1", 30, 3)]
    trained = training(keep=2)
    for _ in range(30):
        trained.step()
    assert (trained.scheduler.progress, trained.handler.snapshots) == (0, (0,))


def test_a_snapshot_where_the_damage_began_is_not_old_enough(
    trainer: FakeTrainer, training: Callable[..., Training]
) -> None:
    trainer.directives = [asked("d1", 10, 8)]
    trained = training()
    for _ in range(10):
        trained.step()
    assert trained.scheduler.progress == 4


def test_a_snapshot_that_cannot_be_read_leaves_everything_as_it_is(
    trainer: FakeTrainer, training: Callable[..., Training], tmp_path: Path
) -> None:
    trainer.directives = [asked("d1", 10, 9)]
    trained = training(where=str(tmp_path))
    for _ in range(9):
        trained.step()
    (tmp_path / "rank-0" / "progress-8.pt").write_bytes(b"damaged")
    trained.step()
    assert (trained.scheduler.progress, trained.pilot.attempt) == (10, 1)
    ((_, outcome, detail),) = acknowledged(trainer)
    assert outcome == pb.DIRECTIVE_OUTCOME_FAILED
    assert detail.startswith("the snapshot at progress 8 cannot be read")


def test_a_deferred_scheduler_has_its_first_snapshot_after_a_step(
    trainer: FakeTrainer, connect: Connect
) -> None:
    pilot = connect()
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = pilot.scheduler(optimizer, defer=True)
    handler = lrpilot.RollbackHandler(
        pilot, model=model, optimizer=optimizer, scheduler=scheduler, every=3
    )
    assert not handler.snapshots
    for _ in range(4):
        optimizer.step()
        scheduler.step(loss=1.0, skipped=True)
        scheduler.step(loss=1.0)
    assert handler.snapshots == (1, 4)


def test_a_second_handler_and_wrong_arguments_are_refused(
    connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot, model = connect(), torch.nn.Linear(1, 1)
    real = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = pilot.scheduler(real)
    right: dict[str, Any] = {"model": model, "optimizer": real, "scheduler": scheduler}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": 3}, r"model: got 3; allowed: an object with state_dict\(\)"),
        ({"optimizer": optimizer}, "optimizer: got"),
        ({"data": iter(())}, "data: got"),
        ({"also": [model, 3]}, r"also\[1\]: got 3"),
        ({"scheduler": real}, "scheduler: got"),
        ({"scheduler": connect(run="other").scheduler(real)}, "scheduler: got"),
        ({"every": 0}, "every: got 0"),
        ({"keep": 0}, "keep: got 0"),
        ({"where": ""}, "where: got ''; allowed: 'memory', or the path"),
        ({"where": 3}, "where: got 3"),
    ]
    for options, message in wrong:
        with pytest.raises(lrpilot.InvalidArgument, match=message):
            lrpilot.RollbackHandler(pilot, **{**right, **options})
    nothing: Any = None
    with pytest.raises(lrpilot.InvalidArgument, match="pilot: got None"):
        lrpilot.RollbackHandler(nothing, **right)
    ranked = connect(rank=0, world_size=2, key="start-1")
    mine = {**right, "scheduler": ranked.scheduler(right["optimizer"])}
    with pytest.raises(lrpilot.InvalidArgument, match="one of 2 ranks without a process group"):
        lrpilot.RollbackHandler(ranked, **mine)
    lrpilot.RollbackHandler(pilot, **right)
    with pytest.raises(lrpilot.InvalidArgument, match="'rollback', which has"):
        lrpilot.RollbackHandler(pilot, **right)


# Ranks.


def test_two_ranks_go_back_together(trainer: FakeTrainer, tmp_path: Path) -> None:
    trainer.delay = 64
    trainer.directives = [asked("d1", 14, 13), asked("d2", 20, 0), asked("d3", 22, 18)]
    rendezvous = (tmp_path / "rendezvous").as_uri()
    said = said_by(
        [[sys.executable, str(PROGRAM), str(n), rendezvous, trainer.address] for n in range(2)]
    )
    for rank in said:
        # At 14 rank 0 has 0, 4, 8, 12 and rank 1 has 0, 8, 12; at 20 none is from before 0;
        # at 22 rank 1 cannot read the one at 16, so that none goes back.
        assert rank["progress"] == [*range(1, 14), *range(12, 25)]
        assert rank["attempt"] == 2
        assert rank["at 12"][0] == rank["at 12"][1]
    assert said[0]["bits"] == said[1]["bits"]
    assert said[0]["data"] == said[1]["data"] == 26
    (opened,) = [request for request in trainer.calls["OpenAttempt"] if request.directive]
    assert (opened.rank, opened.progress, opened.directive) == (0, 12, "d1")
    assert [(name, outcome) for name, outcome, _ in acknowledged(trainer)] == [
        ("d2", pb.DIRECTIVE_OUTCOME_FAILED),
        ("d3", pb.DIRECTIVE_OUTCOME_FAILED),
    ]
    assert acknowledged(trainer)[1][2].endswith("(rank 1)")
