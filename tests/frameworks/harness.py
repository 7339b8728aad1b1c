"""One training in a framework, interrupted: what every adapter has to hold.

The program of a framework (`<name>_program.py`, see `recorder`) trains a small model. The server is
killed and started anew in the middle, the program is killed after a checkpoint and resumes from
it, and what the optimizer used at each step is compared with `lrpilot curve`, to the bit.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrpilot.v1 import runs_pb2 as pb
from tests.e2e.harness import DEADLINE_S, ROOT, Runs, Spec, serve, wait_until

STEPS, SAVE_AT, PAUSE_AT, DIE_AFTER = 30, 16, 6, 21
"""Updates in all; those before the checkpoint, before the server's restart, before the kill."""

TRAINING_S = 240.0
"""Longest time for one start of a program, imports included."""


def make_spec(name: str, *, increment: int = 1, **fields: Any) -> Spec:
    """Return a spec whose LR and WD differ at every step, and that waits for losses.

    Its policy is one that acts, but on no loss of these trainings: the base schedule holds.
    """
    total = 40 * increment
    return {
        "name": name,
        "total": total,
        "learning_rate": {
            "init": 1e-4,
            "peak": 1e-2,
            "min": 1e-3,
            "warmup": 10 * increment,
            "decay": {"style": "cosine"},
        },
        "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": total},
        "policies": [{"kind": "plateau", "patience": 1_000}],
        "feedback": {"delay": 4 * increment, "timeout": "60s"},
    } | fields


@dataclass
class Training:
    """What came of it."""

    used: list[dict[int, list[tuple[str, str | None]]]] = field(default_factory=list)
    """For each start of the program: progress to (LR, WD) of each param group."""
    losses: list[dict[int, str]] = field(default_factory=list)
    """For each start: progress to the loss that was given."""
    reported: dict[int, dict[int, float | None]] = field(default_factory=dict)
    """Attempt to progress to the loss in the server's log."""
    logs: list[str] = field(default_factory=list)
    """What each start of the program wrote."""


def curve(
    folder: Path, spec: Spec, *, group: str | None = None
) -> dict[int, tuple[str, str | None]]:
    """Return progress to LR and WD, in hexadecimal, as `lrpilot curve` says."""
    path = folder / f"{spec['name']}.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "lrpilot.server.cli", "curve", str(path), "--every", "1"]
    command += ["--format", "jsonl", *(["--group", group] if group else [])]
    said = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    return {line["progress"]: (line["lr"].hex(), _hex(line["weight_decay"])) for line in lines}


def train_interrupted(
    tmp_path: Path, program: str, spec: Spec, *command: str, **options: Any
) -> Training:
    """Train with a restart of the server and one of the trainer, and return what was used.

    `command` starts the program where that takes more than Python, such as torchrun with its
    options; `options` join the plan.
    """
    folder = tmp_path / "training"
    folder.mkdir()
    server = serve(tmp_path / "data")
    training = Training()
    plan = {
        "address": server.grpc,
        "spec": spec,
        "folder": str(folder),
        "steps": STEPS,
        "save_at": SAVE_AT,
        **options,
    }
    try:
        first = {"resumes": False, "record": "first", "pause_at": PAUSE_AT, "die_after": DIE_AFTER}
        process = _start(folder, program, plan | first, command)
        try:
            wait_until_paused(folder, process)
            server.end()
            server = serve(tmp_path / "data", server.grpc)
            (folder / "go-on").touch()
            process.wait(TRAINING_S)
        finally:
            _end(process)
        assert process.returncode != 0, "it was to be killed"
        second = _start(folder, program, plan | {"resumes": True, "record": "second"}, command)
        try:
            second.wait(TRAINING_S)
        finally:
            _end(second)
        training.logs = [(folder / f"{name}.log").read_text() for name in ("first", "second")]
        assert second.returncode == 0, training.logs[1]
        for name in ("first", "second"):
            used, losses = _read(folder / name)
            training.used.append(used)
            training.losses.append(losses)
        with Runs(server.grpc) as runs:
            training.reported = runs.losses(spec["name"])
    finally:
        server.dispose()
    return training


@dataclass(frozen=True)
class Once:
    """What came of a training that nothing interrupted."""

    used: dict[int, list[tuple[str, str | None]]]
    """Progress to (LR, WD) of each param group."""
    losses: dict[int, str]
    """Progress to the loss that was given."""
    records: list[pb.LossRecord]
    """What the server's log has of each report, in order."""
    folder: Path
    """Where the program wrote."""
    log: str
    """What the program wrote to its standard streams."""


def train_once(tmp_path: Path, program: str, spec: Spec, *command: str, **options: Any) -> Once:
    """Train without interruption, and return what was used and what the server knows of it.

    `command` and `options` are those of `train_interrupted`.
    """
    folder = tmp_path / "training"
    folder.mkdir()
    server = serve(tmp_path / "data")
    plan = {
        "address": server.grpc,
        "spec": spec,
        "folder": str(folder),
        "steps": STEPS,
        "save_at": SAVE_AT,
        "resumes": False,
        "record": "once",
        **options,
    }
    try:
        process = _start(folder, program, plan, command)
        try:
            process.wait(TRAINING_S)
        finally:
            _end(process)
        log = (folder / "once.log").read_text()
        assert process.returncode == 0, log
        with Runs(server.grpc) as runs:
            records = [item for event in runs.events(spec["name"]) for item in event.losses]
    finally:
        server.dispose()
    return Once(*_read(folder / "once"), records, folder, log)


def check(
    training: Training, tmp_path: Path, spec: Spec, *, increment: int = 1, groups: int = 1
) -> None:
    """Compare what was used with the base schedule, and the losses with the server's.

    Param groups are those of the spec in order, or `groups` alike where it has none.
    """
    names = [group["name"] for group in spec.get("groups", [])]
    curves = [curve(tmp_path, spec, group=name) for name in names]
    curves = curves or [curve(tmp_path, spec)] * groups
    first, second = training.used
    assert list(first) == [step * increment for step in range(DIE_AFTER)], training.logs[0]
    wanted = [step * increment for step in range(SAVE_AT, STEPS)]
    assert list(second) == wanted, training.logs[1]
    for used in (first, second):
        for progress, values in used.items():
            assert values == [item[progress] for item in curves], f"at progress {progress}"
    for attempt, losses in zip((1, 2), training.losses, strict=True):
        known = {
            n: loss.hex() for n, loss in training.reported[attempt].items() if loss is not None
        }
        # What a killed program had just said may not have arrived.
        assert known.items() <= losses.items()
        least = losses if attempt == 2 else {n: x for n, x in losses.items() if n < max(losses) - 4}
        assert least.items() <= known.items(), "a loss was lost"


def wait_until_paused(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait, bounded, until the program says that it waits."""

    def is_paused() -> bool:
        assert process.poll() is None, (folder / "first.log").read_text()
        return (folder / "paused").exists()

    wait_until(is_paused, "the training paused")


def _start(
    folder: Path, program: str, plan: Mapping[str, Any], command: tuple[str, ...]
) -> "subprocess.Popen[bytes]":
    started = command or (sys.executable, "-m")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / f"{plan['record']}.log").open("w") as log:
        return subprocess.Popen(
            [*started, f"tests.frameworks.{program}", json.dumps(plan)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait(DEADLINE_S)


def _read(path: Path) -> tuple[dict[int, list[tuple[str, str | None]]], dict[int, str]]:
    used: dict[int, list[tuple[str, str | None]]] = {}
    losses: dict[int, str] = {}
    for line in _lines(path):
        if "loss" in line:
            losses[line["progress"]] = line["loss"]
        else:
            assert line["progress"] not in used, f"progress {line['progress']} came twice"
            used[line["progress"]] = [(rate, decay) for rate, decay in line["values"]]
    return used, losses


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def _hex(value: float | None) -> str | None:
    return None if value is None else value.hex()
