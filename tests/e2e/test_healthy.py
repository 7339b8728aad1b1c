"""A run that goes well gets no change of its LR or WD, nor for one NaN or one corrupted batch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import lrpilot.client as lrpilot
from lrpilot import core
from tests.e2e.harness import ROOT, Runs, Spec
from tests.server.conftest import Program

Connect = Callable[..., lrpilot.Pilot]

POLICIES: list[dict[str, Any]] = [
    {"kind": "nonfinite", "mode": "act"},
    {"kind": "spike", "mode": "act"},
    {"kind": "divergence", "mode": "act"},
    {"kind": "warmup-guard", "mode": "act"},
    # Single losses are noisy, and torch's default reads each of them.
    {"kind": "plateau", "mode": "act", "window": 200},
    {"kind": "decay-on-plateau", "mode": "act"},
    {"kind": "slow-convergence", "mode": "act"},
    {"kind": "overfit", "mode": "act"},
    {"kind": "batch-size", "mode": "act"},
]
"""All of them, as they are by default, save greedy: it is there to move the LR of a healthy run."""

BROKEN = {
    "nothing": (),
    "NaN": (math.nan,),
    "infinity": (math.inf,),
    "a high loss": (14.0,),
    "an absurd loss": (1e6,),
    "a loss of zero": (0.0,),
}

RECORD = ROOT / "tests" / "golden" / "healthy_training.jsonl"
"""What a real training reported; see healthy_training.py."""

STEPS = 1500

LEARNING_RATE: dict[str, Any] = {
    "peak": 3e-3,
    "min": 3e-4,
    "warmup": 75,
    "decay": {"style": "cosine"},
}
"""Its schedule."""

SPEC: Spec = {"weight_decay": 0.1, "policies": POLICIES, "feedback": {"delay": 32}}


def is_change(item: core.Adjustment) -> bool:
    """Return whether a decision does more than say something."""
    return not isinstance(item.change, core.Note)


def broken(losses: Sequence[float], at: int, what: str) -> list[float]:
    """Return the losses with what is broken at a progress."""
    found = BROKEN[what]
    return [*losses[:at], *found, *losses[at + len(found) :]]


def law(total: int, sigma: float) -> Iterator[float]:
    """Yield a power law with noise, as the losses of language models fall."""
    noise = random.Random(f"{total}/{sigma}")
    for n in range(total):
        yield 1.7 + 9.1 * (1.0 + n / 2.0) ** -0.3 + noise.gauss(0.0, sigma)


DECAYS: dict[str, dict[str, Any]] = {
    "cosine": {"style": "cosine"},
    "wsd": {"style": "wsd", "anneal": "20%", "anneal_style": "minus_sqrt"},
    "constant": {"style": "constant"},
}

TOTAL = 2000


@pytest.mark.parametrize(
    ("style", "sigma", "what", "at"),
    [
        *((style, sigma, "nothing", 0) for style in DECAYS for sigma in (0.01, 0.15)),
        # In the warmup, while the loss falls fast, and where it hardly moves any more.
        *(
            ("constant", 0.05, what, at)
            for what in BROKEN
            for at in (40, 400, 1400)
            if what != "nothing"
        ),
    ],
)
def test_a_power_law_with_noise_changes_nothing(
    style: str, sigma: float, what: str, at: int
) -> None:
    rates = {"peak": 1e-3, "min": 1e-4, "warmup": "5%", "decay": DECAYS[style]}
    spec = core.parse_spec({"name": "law", "total": TOTAL, "learning_rate": rates, **SPEC})
    losses = broken(list(law(TOTAL, sigma)), at, what)
    reports = [
        core.Report(
            n,
            loss,
            1.0,
            n + 1,
            validation={"val_loss": 1.8 + 9.1 * (1.0 + n / 2.0) ** -0.3} if n % 100 == 0 else {},
            batch=256,
        )
        for n, loss in enumerate(losses)
    ]
    for step in core.simulate(spec, reports):
        assert [item for item in step.decided if is_change(item)] == []
        assert step.learning_rates == step.base_learning_rates


def recorded() -> list[dict[str, Any]]:
    """Return what the real training reported, step by step."""
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    assert [row["progress"] for row in rows] == list(range(STEPS))
    return rows


@pytest.mark.parametrize("what", BROKEN)
def test_a_live_run_with_the_losses_of_a_real_training_keeps_to_its_schedule(
    shared: Program, connect: Connect, what: str
) -> None:
    spec = {
        "name": f"healthy-{what.replace(' ', '-').lower()}",
        "total": STEPS,
        "learning_rate": LEARNING_RATE,
        **SPEC,
    }
    rows = recorded()
    losses = broken([row["loss"] for row in rows], 700, what)
    groups: list[dict[str, Any]] = [{"lr": 1.0, "weight_decay": 1.0}]
    pilot = connect(shared.grpc, spec["name"], spec=spec)
    scheduler = pilot.scheduler(SimpleNamespace(param_groups=groups))
    base = core.base_schedule(core.parse_spec(spec))
    for row, loss in zip(rows, losses, strict=True):
        ((rate, decay),) = base(row["progress"])
        assert (groups[0]["lr"], groups[0]["weight_decay"]) == (rate, decay)
        scheduler.step(
            loss=loss,
            grad_norm=row["grad_norm"],
            val_losses={"val_loss": row["val_loss"]} if "val_loss" in row else None,
            batch=256,
        )
    pilot.close()
    with Runs(shared.grpc) as runs:
        run = runs.run(spec["name"])
    assert {item.action for item in run.adjustments} <= {"note"}
    assert (run.losses, run.waivers) == (STEPS, 0)
    assert run.nonfinite_losses == (what in {"NaN", "infinity"})
