"""What happens in the live run: its spec, what the trainers say at each step, what operators do.

The ranks (live_program.py), the driver and the replay (test_live.py) all read it here.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DELAY = 8

SPEC: dict[str, Any] = {
    "total": 600,
    "weight_decay": {"start": 0.05, "end": 0.1, "style": "linear", "over": 600},
    "groups": [
        {"name": "matrices"},
        {"name": "embedding", "peak": 4e-3, "min": 4e-4},
        {"name": "no_decay", "weight_decay_multiplier": 0.0},
    ],
    "stages": [
        {
            "name": "first",
            "when": {"plateau": {"window": 10, "patience": 1, "threshold": 0.01}},
            "earliest": 240,
            "latest": 320,
            "learning_rate": {"init": 1e-5, "peak": 2e-3, "min": 2e-4, "warmup": 40},
            "policies": [
                {"kind": "nonfinite", "mode": "act", "streak": 2, "hold": 12},
                {
                    "kind": "spike",
                    "mode": "act",
                    "window": 16,
                    "least": 8,
                    "persistent": 2,
                    "recovery": 10,
                    "hold": 6,
                    "rewarm": 6,
                },
                {"kind": "warmup-guard", "window": 4, "patience": 2, "limit": 1},
                {"kind": "overfit", "window": 10, "patience": 2},
                {"kind": "batch-size"},
                {"kind": "slow-convergence", "after": 30, "least_gain": 100.0},
            ],
        },
        {
            "name": "second",
            "until": 520,
            "learning_rate": {
                "init": "current",
                "peak": 1e-3,
                "min": 1e-4,
                "warmup": 12,
                "decay": {"style": "cosine", "end": 520},
            },
            "policies": [
                {"kind": "divergence", "mode": "act", "window": 6, "patience": 2},
                {"kind": "plateau", "window": 4, "patience": 1, "factor": 0.7, "cooldown": 8},
                {"kind": "greedy", "factor": 0.9, "cooldown": 12, "min_lr": [1e-5, 2e-5, 1e-5]},
            ],
        },
        {
            "name": "third",
            "learning_rate": {"init": "current", "peak": 5e-4, "min": 5e-5, "warmup": 10},
            "policies": [
                {"kind": "decay-on-plateau", "window": 5, "patience": 1, "anneal": 30},
                {"kind": "plateau", "metric": "val_loss", "patience": 0, "mode": "advise"},
            ],
        },
    ],
    "feedback": {"delay": DELAY, "timeout": "10m", "advice_expires": 80},
    "bounds": {"min_lr": 1e-6, "max_lr": 3e-3},
}

STOPS: Mapping[tuple[int, int], Sequence[tuple[str, Any]]] = {
    (1, 48): [("scale_lr", 0.8)],
    (1, 64): [("undo", "scale_lr"), ("directive", {"kind": "evaluate"})],
    (1, 110): [("approve", "slow-convergence"), ("scale_weight_decay", 1.25)],
    (1, 174): [],  # What is reported here leads to the rollback.
    (2, 196): [("hold", True)],
    (2, 204): [("release", True), ("total", 640)],
    (2, 268): [("set_lr", 4e-4)],
    (2, 300): [("directive", {"kind": "skip", "until": 320})],
    (2, 390): [("begin_decay", {"length": "25%", "style": "cosine"})],
    (2, 410): [("next_stage", True)],
    (2, 520): [("directive", {"kind": "stop"})],
}
"""(attempt, progress) at which the reporter stands, its loss not said yet, to what operators do
meanwhile: the name of the action, and its value."""


def said(attempt: int, n: int) -> Iterator[dict[str, Any]]:
    """Yield what the trainers say at a progress: the arguments of `step`, one set for each try."""
    if attempt == 2 and n in (170, 260):
        yield {"loss": float("inf"), "skipped": True}
    step: dict[str, Any] = {"loss": _loss(attempt, n), "weight": 64.0}
    if n % 7 == 3:
        step["grad_norm"] = 1.0 + n / 100
    if n % 16 == 0:
        step["batch"] = 512 if 80 <= n < 120 else 256
    if n % 10 == 0:
        step["val_losses"] = {"val_loss": 5.0 - n / 50 if n < 80 else 3.0 + n / 100}
    yield step


def _loss(attempt: int, n: int) -> float | None:
    noise = random.Random(f"{n}").uniform(-0.02, 0.02)
    if n % 37 == 36:
        return None
    if attempt == 1 and n >= 130:
        # It never comes back.
        return 9.0 + noise
    if n in (150, 151, 152):
        return float("nan")
    if n < 16:
        return 8.0 - n / 4 + noise
    if n < 36:
        # The warmup is too steep.
        return 4.0 + (n - 16) / 5 + noise
    if n < 240:
        return 2.0 + 200 / (n + 64) + noise
    if n < 284:
        return 3.0 + noise
    if n < 310:
        return 3.0 - (n - 284) / 20 + noise
    if n < 345:
        # Sets out to diverge.
        return 1.7 + (n - 310) / 20 + noise
    if n < 440:
        return 1.8 + noise
    return 1.6 + noise


def goes_back(attempt: int) -> bool:
    """Return whether the ranks follow a request to roll back: the first one, and no more."""
    return attempt == 1


EVALUATED = 2.75
"""Validation loss that the ranks find where they are asked to evaluate."""
