"""A live server does with the losses what `simulate` says that it would do."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from lrpilot.core import Report, simulate
from lrpilot.server._documents import read_spec
from lrpilot.v1 import trainer_pb2
from tests.server.conftest import Replica

STEPS = 400
DELAY = 7

SPEC: dict[str, Any] = {
    "name": "small",
    "total": 500,
    "learning_rate": {"peak": 1e-3},
    "weight_decay": 0.1,
    "groups": [{"name": "matrices"}, {"name": "no_decay", "weight_decay_multiplier": 0.0}],
    "stages": [
        {
            "name": "first",
            "when": {"plateau": {"window": 10, "patience": 2}},
            "latest": 300,
            "learning_rate": {"peak": 1e-3, "warmup": 40},
        },
        {
            "name": "second",
            "learning_rate": {
                "init": "current",
                "peak": 5e-4,
                "warmup": 20,
                "decay": {"style": "cosine"},
            },
        },
    ],
    "policies": [
        {"kind": "nonfinite", "mode": "act", "streak": 2},
        {"kind": "warmup-guard", "window": 4},
        {"kind": "plateau", "window": 5, "patience": 3, "factor": 0.7},
        {"kind": "greedy", "factor": 0.9, "patience": 6, "mode": "advise"},
        {"kind": "overfit", "patience": 1, "window": 5},
        {"kind": "batch-size"},
    ],
    "feedback": {"delay": DELAY},
}


def recorded(seed: int) -> Iterator[Report]:
    """Return reports of every sort: losses, none, NaN, skipped updates, validation, batches."""
    noise = random.Random(seed)
    for n in range(STEPS):
        loss: float | None = 2.0 + 3.0 / (1 + n / 10) + noise.gauss(0, 0.2)
        if 20 <= n < 36:
            loss = 6.0 + n / 10
        if n in (150, 151, 152, 200):
            loss = math.nan
        if noise.random() < 0.05:
            loss = None
        more: dict[str, Any] = {"gradient_norm": noise.random()} if n % 3 == 0 else {}
        if n % 20 == 0:
            more["validation"] = {"val_loss": 2.0 + n / 100}
        if n % 50 == 0:
            more["batch"] = 256 if n < 100 else 512
        tries = 0
        if noise.random() < 0.05:
            yield Report(n, math.inf, 1.0, n, skipped=True)
            tries = 1
        yield Report(n, loss, 2.0, n + 1, tries=tries, **more)


def message(report: Report) -> trainer_pb2.LossReport:
    """Return a report as a trainer sends it."""
    fields: dict[str, Any] = {} if report.loss is None else {"loss": report.loss}
    if report.gradient_norm is not None:
        fields["gradient_norm"] = report.gradient_norm
    item = trainer_pb2.LossReport(
        progress=report.progress,
        weight=report.weight,
        moves_to=report.moves_to,
        skipped=report.skipped,
        validation_losses=report.validation,
        batch=report.batch or 0,
        **fields,
    )
    # `try` is a word of Python.
    setattr(item, "try", report.tries)
    return item


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_trace_of_a_live_run_is_that_of_the_simulator(server: Replica, seed: int) -> None:
    job = await server.start_job(**SPEC)
    reports = list(recorded(seed))
    used: list[tuple[list[str], list[str]]] = []
    for report in reports:
        block = (await job.values(report.progress, count=1)).block
        used.append(
            ([lr.hex() for lr in block.learning_rates], [wd.hex() for wd in block.weight_decays])
        )
        await job.report(reports=[message(report)])
    steps = list(simulate(read_spec(server.document(**SPEC)), reports))
    assert used == [
        ([lr.hex() for lr in step.learning_rates], [wd.hex() for wd in step.weight_decays or ()])
        for step in steps[:-1]
    ]
    wanted = [item for step in steps for item in step.decided]
    kinds = {item.kind for item in wanted}
    assert {"stage", "plateau", "nonfinite", "warmup-guard", "batch-size", "overfit"} <= kinds
    shown = (await job.shown()).adjustments
    assert [
        (item.decided_at, item.effective, item.source, item.mode, item.summary, item.reason)
        for item in shown
    ] == [
        (item.decided_at, item.effective, item.source, item.mode, item.summary, item.reason)
        for item in wanted
    ]
