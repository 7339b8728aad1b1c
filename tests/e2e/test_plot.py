"""The picture of a run that trains on a real server, drawn by the trainer itself."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import lrpilot.client as lrpilot
from tests.server.conftest import Program

SPEC = {
    "name": "drawn",
    "total": 300,
    "learning_rate": {"peak": 1e-3, "warmup": 20, "decay": {"style": "cosine"}},
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
    "policies": [{"kind": "plateau", "patience": 20, "cooldown": 40}],
    "feedback": {"delay": 4},
}


class Optimizer:
    """What a scheduler needs of one."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.1}]


def drawn(figure: Any, panel: str, style: str = "-") -> dict[int, float]:
    """Return what the lines of a panel go through, by progress."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == panel)
    lines = [line for line in axes.lines if line.get_linestyle() == style]
    return {at: value for line in lines for at, value in line.get_xydata().tolist()}


def test_a_job_draws_itself_while_it_trains(shared: Program) -> None:
    stopping, figures, failures = threading.Event(), [], []

    def draw(pilot: lrpilot.Pilot) -> None:
        try:
            while not stopping.is_set():
                figures.append(pilot.plot(timeout_s=60))
        except Exception as error:
            failures.append(error)

    optimizer, rates, decays = Optimizer(), {}, {}
    with lrpilot.connect(shared.grpc, run="drawn", spec=SPEC) as pilot:
        scheduler = pilot.scheduler(optimizer)
        drawing = threading.Thread(target=draw, args=(pilot,))
        drawing.start()
        for step in range(200):
            rates[step] = optimizer.param_groups[0]["lr"]
            decays[step] = optimizer.param_groups[0]["weight_decay"]
            scheduler.step(loss=3.0 / (1 + min(step, 60)))
            if step % 50 == 0:
                # On the training thread, between two steps.
                figures.append(pilot.plot(timeout_s=60))
        stopping.set()
        drawing.join(60)
        assert not drawing.is_alive()
        assert failures == []
        assert len(figures) > 4
    figure = pilot.plot()
    solid = drawn(figure, "learning rate")
    assert {step: solid[step] for step in rates} == rates
    solid = drawn(figure, "weight decay")
    assert {step: solid[step] for step in decays} == decays
    losses = drawn(figure, "loss")
    assert set(range(200)) <= set(losses)
    planned = drawn(figure, "learning rate", "--")
    # The base schedule goes on, with the cuts that the plateau made.
    base = drawn(figure, "learning rate", ":")
    assert max(planned) == 300
    assert planned[250] < base[250]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any("policies.0 (plateau)" in text for text in texts)


def test_a_run_that_is_not_there_and_groups_that_it_has_not(shared: Program) -> None:
    with pytest.raises(lrpilot.RunNotFound, match="no-such-run"):
        lrpilot.plot(shared.grpc, "no-such-run")
    spec = SPEC | {"name": "ungrouped"}
    with lrpilot.connect(shared.grpc, run="ungrouped", spec=spec) as pilot:
        assert pilot.plot().get_suptitle() == "ungrouped: 0 of 300 iterations, created"
        with pytest.raises(lrpilot.InvalidRequest, match="no_decay"):
            pilot.plot(groups=["no_decay"])
        with pytest.raises(lrpilot.InvalidRequest, match="begin"):
            pilot.plot(begin=400)
