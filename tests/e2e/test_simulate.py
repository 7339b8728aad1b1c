"""`lrpilot simulate` on recorded losses says what a live run does that reports the same ones."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lrpilot.client as lrpilot
from tests.e2e.harness import DEADLINE_S, Runs, Spec, without_ids
from tests.server.conftest import Program

Connect = Callable[..., lrpilot.Pilot]

GROUPS = ("matrices", "embedding")

DELAYS = (1, 5, 32)

LENGTH = 320

POLICIES: dict[str, dict[str, Any]] = {
    "nonfinite": {"mode": "act"},
    "spike": {
        "mode": "act", "window": 16, "least": 8, "persistent": 2, "recovery": 6,
        "hold": 5, "rewarm": 5,
    },
    "divergence": {"mode": "act", "window": 6, "patience": 2, "recovery": 3},
    "warmup-guard": {"window": 4, "patience": 2},
    "plateau": {"window": 5, "patience": 1, "factor": 0.7},
    "greedy": {"factor": 0.9},
    "decay-on-plateau": {"window": 8, "patience": 0, "anneal": 40},
    "slow-convergence": {"after": 10, "least_gain": 100.0},
    "overfit": {"window": 10, "patience": 1},
    "batch-size": {"scale": "linear"},
}  # fmt: skip
"""Fields with which each of them decides something on the losses below."""

LEARNING_RATE = {"init": 1e-5, "peak": 1e-3, "min": 1e-4, "warmup": 60}


def spec_of(kind: str, delay: int) -> Spec:
    """Return a spec with one policy, or with stages and all of them."""
    spec: Spec = {
        "name": f"{kind}-{delay}",
        "total": 500,
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": 500},
        "groups": [
            {"name": GROUPS[0]},
            {"name": GROUPS[1], "peak": 3e-3, "weight_decay_multiplier": 0.5},
        ],
        "learning_rate": LEARNING_RATE,
        "feedback": {"delay": delay, "timeout": "60s"},
        "bounds": {"min_lr": 1e-6, "max_lr": 4e-3},
    }
    if kind != "all":
        return {**spec, "policies": [{"kind": kind, **POLICIES[kind]}]}
    del spec["learning_rate"]
    second = {"init": "current", "peak": 5e-4, "warmup": 20}
    return {
        **spec,
        "stages": [
            {
                "name": "first",
                "when": {"below": {"value": 2.8, "window": 8}},
                "latest": 300,
                "learning_rate": LEARNING_RATE,
            },
            {"name": "second", "learning_rate": second},
        ],
        "policies": [{"kind": kind, **fields} for kind, fields in POLICIES.items()],
        "feedback": {**spec["feedback"], "interval": 10},
    }


@dataclass(frozen=True)
class Row:
    """What was recorded of one step."""

    progress: int
    loss: float | None
    val_loss: float | None = None
    grad_norm: float | None = None
    batch: int | None = None
    weight: float | None = None
    skipped: bool = False


def recorded() -> Iterator[Row]:
    """Yield what a run went through: a bad warmup, NaN, a spike, an end where nothing moves."""
    noise = random.Random("recorded")
    for n in range(LENGTH):
        if 200 <= n < 260 and n % 4:
            # Nothing is reported here.
            continue
        if n % 60 == 44:
            yield Row(n, math.inf, skipped=True)
        loss = 2.0 + 3.0 / (1.0 + n / 30.0) + noise.gauss(0.0, 0.02)
        if 16 <= n < 56:
            loss += (n - 16) / 8.0
        elif n in (80, 150, 151, 152, 153):
            loss = math.nan
        elif n >= 170:
            loss = 3.4 + noise.gauss(0.0, 0.02)
        more: dict[str, Any] = {}
        if n % 10 == 0:
            more["val_loss"] = 3.0 - n / 100 if n < 60 else 2.4 + n / 100
        if n % 3 == 0:
            more["grad_norm"] = math.nan if n == 150 else abs(noise.gauss(1.0, 0.1))
        if n % 20 == 0:
            more |= {"batch": 256 if n < 200 else 512, "weight": 1.0 + n}
        yield Row(n, None if n % 29 == 28 else loss, **more)


def write_csv(path: Path, rows: list[Row]) -> None:
    names = list(Row.__annotations__)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [getattr(row, name) for name in names]
            writer.writerow(["" if value is None else value for value in values])


def simulated(folder: Path, spec: Spec, rows: list[Row], group: str) -> list[dict[str, Any]]:
    """Run the program."""
    (folder / "spec.json").write_text(json.dumps(spec))
    write_csv(folder / "losses.csv", rows)
    arguments = ["spec.json", "--losses", "losses.csv", "--format", "jsonl", "--group", group]
    done = subprocess.run(
        [sys.executable, "-m", "lrpilot.server.cli", "simulate", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def trained(pilot: lrpilot.Pilot, rows: list[Row], group: str) -> list[tuple[str, str]]:
    """Return LR and WD that a group uses at each row, and at the progress after the last."""
    groups: list[dict[str, Any]] = [
        {"name": name, "lr": 1.0, "weight_decay": 1.0} for name in GROUPS
    ]
    used = groups[GROUPS.index(group)]
    scheduler = pilot.scheduler(SimpleNamespace(param_groups=groups))
    trace = []
    for row in rows:
        while scheduler.progress < row.progress:
            scheduler.step()
        trace.append((used["lr"].hex(), used["weight_decay"].hex()))
        scheduler.step(
            loss=row.loss,
            weight=row.weight or 1.0,
            val_losses=None if row.val_loss is None else {"val_loss": row.val_loss},
            grad_norm=row.grad_norm,
            batch=row.batch,
            skipped=row.skipped,
        )
    trace.append((used["lr"].hex(), used["weight_decay"].hex()))
    return trace


def told(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what the program says that was decided, and on which loss."""
    return sorted(
        (
            line["progress"], item["effective"], item["policy"], item["source"],
            item.get("mode", "act"), item["action"], without_ids(item["summary"]), item["reason"],
        )
        for line in lines
        for item in (*line["adjustments"], *line.get("advice", ()))
    )  # fmt: skip


def shown(adjustments: list[Any]) -> list[tuple[Any, ...]]:
    """Return the same of what a server shows."""
    found = []
    for item in adjustments:
        kind = item.source.split("(")[1].rstrip(")")
        found.append((
            item.decided_at, item.effective, "stage" if kind == "when" else kind, item.source,
            item.mode, item.action, without_ids(item.summary), item.reason,
        ))  # fmt: skip
    return sorted(found)


@pytest.mark.parametrize(
    ("kind", "delay"),
    [*zip(POLICIES, itertools.cycle(DELAYS), strict=False), *(("all", delay) for delay in DELAYS)],
)
def test_a_live_run_does_what_the_simulator_says(
    shared: Program, connect: Connect, tmp_path: Path, kind: str, delay: int
) -> None:
    spec, rows = spec_of(kind, delay), list(recorded())
    group = GROUPS[delay % 2]
    lines = simulated(tmp_path, spec, rows, group)
    pilot = connect(shared.grpc, spec["name"], spec=spec)
    trace = trained(pilot, rows, group)
    pilot.close()
    assert [line["progress"] for line in lines] == [*(row.progress for row in rows), LENGTH]
    assert [(line["lr"].hex(), line["weight_decay"].hex()) for line in lines] == trace
    with Runs(shared.grpc) as runs:
        run = runs.run(spec["name"])
    assert told(lines) == shown(run.adjustments)
    decided = {policy for _, _, policy, *_ in told(lines)}
    assert decided >= ({*POLICIES, "stage"} if kind == "all" else {kind})
    assert (run.waivers, run.late_losses) == (0, 0)
