"""What a rank hands back, so that a server which has forgotten some of it notices."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _node
from lrpilot.client._held import Held
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]


def block(begin: int, steps: int, stride: int = 1, groups: int = 1) -> pb.Block:
    rates = [begin + n / 8 for n in range(steps * groups)]
    decays = [-rate for rate in rates]
    return pb.Block(begin=begin, stride=stride, learning_rates=rates, weight_decays=decays)


def digest(*numbers: float) -> bytes:
    return hashlib.sha256(struct.pack(f"<{len(numbers)}d", *numbers)).digest()[:16]


def said(held: Held) -> tuple[int, int, int]:
    message = held.message(0)
    return message.begin, message.stride, message.steps


def test_nothing_is_said_before_anything_came() -> None:
    assert Held(3).message(5) == pb.Held(rank=3, frontier=5)


def test_the_digest_is_over_the_numbers_as_they_travel() -> None:
    held = Held(3)
    held.log, held.offer, held.reported, held.declared = b"log", 9, 7, 6
    held.add(block(8, 2, groups=2), 2)
    numbers = [8.0, 8.125, 8.25, 8.375]
    assert held.message(5) == pb.Held(
        rank=3,
        begin=8,
        stride=1,
        steps=2,
        digest=digest(*numbers, *(-x for x in numbers)),
        frontier=5,
        reported=7,
        declared=6,
        offer=9,
        log=b"log",
    )


def test_the_block_that_reaches_furthest_counts() -> None:
    held = Held(0)
    held.add(block(8, 8), 1)
    held.add(block(4, 4), 1)
    assert (said(held), held.last) == ((8, 1, 8), 15)
    held.add(block(12, 4), 1)
    assert (said(held), held.last) == ((12, 1, 4), 15)
    # Another stride begins anew: what came by the old one came before.
    held.add(block(9, 2, stride=2), 1)
    assert (said(held), held.last) == ((9, 2, 2), 11)


def test_what_is_not_used_any_more_is_not_handed_back() -> None:
    held = Held(0)
    held.add(block(0, 4, stride=3), 1)
    held.drop(10)
    assert said(held) == (0, 3, 4)
    held.drop(4)
    assert said(held) == (0, 3, 2)
    assert held.message(0).digest == digest(0.0, 0.125, -0.0, -0.125)
    held.drop(0)
    assert (said(held), held.last) == ((0, 0, 0), -1)


def test_of_a_long_block_the_last_steps_are_handed_back() -> None:
    held = Held(0)
    held.add(block(0, 300), 1)
    assert said(held) == (172, 1, 128)
    rates = [n / 8 for n in range(172, 300)]
    assert held.message(0).digest == digest(*rates, *(-x for x in rates))


def test_every_request_hands_back_what_came_before_it(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    for _ in range(20):
        scheduler.step(loss=1.0)
    scheduler.state_dict()
    calls = trainer.calls
    assert calls["GetValues"][0].held == pb.Held()
    for request in calls["GetValues"][1:]:
        held = request.held
        steps = range(held.begin, held.begin + held.steps * held.stride, held.stride)
        rates = [trainer.rate(at) for at in steps]
        assert held.digest == digest(*rates, *(trainer.decay(at) for at in steps))
        assert steps[-1] < request.begin
    assert calls["ReportLosses"][-1].held.frontier >= calls["ReportLosses"][-1].reports[0].progress
    assert calls["SaveState"][0].held.frontier == 20
    assert calls["ReportLosses"][0].held.reported == 0
    for before, request in pairwise(calls["ReportLosses"]):
        assert request.held.reported == before.reports[-1].moves_to
    assert calls["SaveState"][0].held.reported == 20


@pytest.mark.parametrize("method", ["GetValues", "ReportLosses"])
def test_a_log_that_has_forgotten_ends_the_training(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse, method: str
) -> None:
    """Whichever thread hears of it; and it stays."""
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    text = "the log of run 'small' has forgotten what it gave"
    trainer.always[method] = refuse("LogForgotten", text, run="small", frontier="3")

    def train() -> None:
        for _ in range(100):
            scheduler.step(loss=1.0)

    with pytest.raises(lrpilot.LogForgotten, match="has forgotten what it gave") as caught:
        train()
    assert caught.value.facts["frontier"] == "3"
    trainer.always.clear()
    for call in (scheduler.step, scheduler.apply, scheduler.state_dict):
        with pytest.raises(lrpilot.LogForgotten):
            call()


def test_a_rank_hands_back_what_its_node_has(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_node, "ROOT", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    pilot = connect(rank=1, world_size=2, key="k")
    pilot.values(0)
    lease: Any = pilot._session._lease
    node = lease._node
    assert lease._link.held().begin == 0
    # Another rank came further meanwhile.
    further = pb.GetValuesResponse(block=trainer.block(range(8, 12)))
    node._publish(pb.GetValuesRequest(begin=8, stride=1), further)
    trainer.move(24)
    asked = pb.GetValuesRequest(run="small", attempt=lease._attempt, begin=20, stride=1, count=1)
    node.get_values(asked, 10.0)
    (request,) = [item for item in trainer.calls["GetValues"] if item.begin == 20]
    assert (request.held.begin, request.held.steps, request.held.rank) == (8, 4, 1)
