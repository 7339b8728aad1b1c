"""Started at ten times the right LR, a training ends as well as a well-tuned one.

examples/rescue.py shows it; here with a smaller model and fewer steps, so that it takes a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrpilot import core
from tests.e2e.harness import ROOT

STEPS = 300


def attempts(training: dict[str, Any]) -> list[list[tuple[int, float, float]]]:
    """Return progress, loss and LR of each step of each attempt."""
    found: dict[int, list[tuple[int, float, float]]] = {}
    rows = (training[name] for name in ("attempt", "progress", "loss", "learning_rate"))
    for attempt, *row in zip(*rows, strict=True):
        found.setdefault(attempt, []).append((row[0], row[1], row[2]))
    return [found[number] for number in sorted(found)]


def is_asked_to_go_back(losses: list[float]) -> bool:
    """Return whether the policies of the example would take these losses back."""
    spec = core.parse_spec(yaml.safe_load((ROOT / "examples/rescue.yaml").read_text()))
    reports = [core.Report(n, loss, 1.0, n + 1) for n, loss in enumerate(losses)]
    decided = [item for step in core.simulate(spec, reports) for item in step.decided]
    return any(isinstance(item.change, core.Direct) for item in decided)


@pytest.mark.timeout(600)
def test_a_training_at_ten_times_the_right_lr_is_rescued(tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, os.fspath(ROOT / "examples/rescue.py"), "--out", os.fspath(out)]
    command += ["--steps", str(STEPS), "--width", "96", "--depth", "3", "--batch", "8"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        env={**kept, "TMPDIR": os.fspath(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trainings = json.loads((out / "rescue.json").read_text())["trainings"]
    tuned, too_high, rescued = (trainings[name] for name in ("tuned", "too-high", "rescued"))

    # The claim.
    assert too_high["validation"] > 1.05 * tuned["validation"]
    assert rescued["validation"] <= 1.05 * tuned["validation"]

    # It was going back that did it, on one and the same model and data.
    (at_right,), (at_high,), (*abandoned, last) = map(attempts, (tuned, too_high, rescued))
    assert len(abandoned) == len(rescued["rollbacks"]) >= 1
    assert abandoned[0] == at_high[: len(abandoned[0])]
    for attempt in (at_right, at_high, last):
        assert [progress for progress, *_ in attempt] == list(range(STEPS))
    for attempt in (*abandoned, last):
        # The weights are those of the start to the bit, and the same batches come again.
        assert attempt[0] == at_right[0]

    # LR: ten times the right one, then less with each rollback.
    peaks = [max(rate for _, _, rate in attempt) for attempt in [*abandoned, last]]
    assert peaks[0] == max(too_high["learning_rate"])
    assert peaks[0] == pytest.approx(10 * max(tuned["learning_rate"]), rel=1e-12)
    assert peaks == sorted(set(peaks), reverse=True)

    # The same policies leave the well-tuned training alone.
    assert is_asked_to_go_back(too_high["loss"])
    assert not is_asked_to_go_back(tuned["loss"])

    assert (out / "rescue.png").read_bytes().startswith(b"\x89PNG")
    assert list(temporary.iterdir()) == []
