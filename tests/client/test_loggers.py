"""LR and WD in use, and why they change, where a training logs already."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

import lrpilot.client as lrpilot
from lrpilot.client.loggers import MlflowLogger, TensorBoardLogger, WandbLogger
from lrpilot.v1 import trainer_pb2 as pb
from tests.e2e.harness import serve, wait_until

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer

    Connect = Callable[..., lrpilot.Pilot]
    MakeOptimizer = Callable[..., FakeOptimizer]

CHANGE = pb.Change(
    id="adj/7",
    progress=3,
    source="policies.0 (plateau)",
    summary="multiply by 0.5",
    reason="no better for 10 reports",
    before=[0.5],
    after=[0.25],
    weight_decay_before=[0.1],
    weight_decay_after=[0.1],
)
TEXT = (
    "progress 3: multiply by 0.5 (policies.0 (plateau)): no better for 10 reports; lr 0.5 -> 0.25"
)


class Written:
    """A writer that keeps what is written, as torch's SummaryWriter takes it."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, int, float]] = []
        self.texts: list[tuple[str, int, str]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, step, value))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, step, text))

    def of(self, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for name, step, value in self.scalars if name == tag]


class Full(Written):
    """A writer that has no room left."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        raise OSError("no space left on device")

    def add_text(self, tag: str, text: str, step: int) -> None:
        raise OSError("no space left on device")


def train(scheduler: Any, updates: int = 6) -> None:
    for _ in range(updates):
        scheduler.step(loss=1.0)


def test_tensorboard_gets_what_each_update_used_and_why_it_changed(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, tmp_path: Path
) -> None:
    trainer.changes = [CHANGE]
    pilot = connect()
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardLogger(pilot, writer)
        train(pilot.scheduler(optimizer))
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, wanted in (("lrpilot/lr", trainer.rate), ("lrpilot/weight_decay", trainer.decay)):
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        assert read == [(at, float(np.float32(wanted(at)))) for at in range(6)]
    (text,) = events.Tensors("lrpilot/change/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (3, TEXT)


def read_wandb(path: Path) -> Iterator[Any]:
    """Read the records of an offline run: a log as LevelDB's, in blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_gets_it_in_the_rows_of_the_training(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    trainer.changes = [CHANGE]
    pilot = connect()
    settings = wandb.Settings(silent=True, disable_git=True, console="off", x_disable_stats=True)
    with wandb.init(mode="offline", dir=tmp_path, project="p", settings=settings) as run:
        WandbLogger(pilot, run)
        scheduler = pilot.scheduler(optimizer)
        for at in range(6):
            scheduler.step(loss=1.0)
            run.log({"loss": float(at)})
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")

    def is_complete() -> bool:
        return any(record.HasField("exit") for record in read_wandb(path))

    # A process of W&B's own writes it.
    wait_until(is_complete, "the run was written")
    rows, summary, axes = [], {}, {}
    for record in read_wandb(path):
        if record.HasField("history"):
            items = record.history.item
            rows.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            )
        if record.HasField("metric"):
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert axes["lrpilot/*"] == "lrpilot/progress"
    # One row a step of the training, none beside.
    assert [row["_step"] for row in rows] == list(range(6))
    assert [row["lrpilot/lr"] for row in rows] == [trainer.rate(at) for at in range(6)]
    assert [row["lrpilot/weight_decay"] for row in rows] == [trainer.decay(at) for at in range(6)]
    assert [row.get("lrpilot/change") for row in rows] == [None, None, TEXT, None, None, None]
    assert summary["lrpilot/changes/adj/7"] == TEXT


def test_mlflow_gets_it_with_the_progress_as_step(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: MakeOptimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    trainer.changes = [CHANGE]
    trainer.groups = ["Wörter [1]"]
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    try:
        pilot = connect()
        with mlflow.start_run() as run:
            MlflowLogger(pilot, mlflow, every=2)
            train(pilot.scheduler(make_optimizer()))
        client = mlflow.MlflowClient()
        history = client.get_metric_history(run.info.run_id, "lrpilot/lr/W_rter _1_")
        assert [(item.step, item.value) for item in history] == [
            (at, trainer.rate(at)) for at in (0, 2, 4)
        ]
        tags = client.get_run(run.info.run_id).data.tags
        assert tags["lrpilot.change.adj/7"] == TEXT.replace("lr 0", "lr Wörter [1] 0")
    finally:
        mlflow.set_tracking_uri(None)


def test_the_first_values_of_a_deferred_scheduler_are_written(
    trainer: FakeTrainer, connect: Connect
) -> None:
    pilot, written = connect(resume_at=5), Written()
    TensorBoardLogger(pilot, written)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    scheduler = pilot.scheduler(optimizer, defer=True)
    for _ in range(3):
        optimizer.step()
        scheduler.step(loss=1.0)
    assert written.of("lrpilot/lr") == [(at, trainer.rate(at)) for at in (5, 6, 7)]


def test_each_group_has_the_name_that_the_spec_gives_it(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.groups = ["matrices", "no decay"]
    optimizer = make_optimizer(
        {"name": "no decay", "lr": 1.0},
        {"name": "matrices", "lr": 1.0, "weight_decay": 0.5},
        {"name": "matrices", "lr": 1.0, "weight_decay": 0.5},
    )
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    train(pilot.scheduler(optimizer), 1)
    assert sorted(written.scalars) == [
        ("lrpilot/lr/matrices", 0, trainer.rate(0, 0)),
        ("lrpilot/lr/no decay", 0, trainer.rate(0, 1)),
        # That optimizer group has no weight decay.
        ("lrpilot/weight_decay/matrices", 0, trainer.decay(0, 0)),
    ]


@pytest.mark.parametrize("keeps", [0, 1])
def test_a_weight_decay_of_its_own_is_not_taken_for_the_runs(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer, keeps: int
) -> None:
    groups = [{"lr": 1.0, "weight_decay": 0.5}, {"lr": 1.0, "weight_decay": 0.5}]
    groups[keeps]["weight_decay"] = 0.0
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    train(pilot.scheduler(make_optimizer(*groups)), 1)
    assert written.of("lrpilot/weight_decay") == [(0, trainer.decay(0))]


def test_a_tensor_lr_is_written_as_the_step_uses_it(trainer: FakeTrainer, connect: Connect) -> None:
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    train(pilot.scheduler(optimizer), 3)
    wanted = [(at, torch.tensor(trainer.rate(at)).item()) for at in range(3)]
    assert written.of("lrpilot/lr") == wanted
    assert wanted[0][1] != trainer.rate(0)


def test_several_optimizers_are_written_once(
    trainer: FakeTrainer, connect: Connect, make_optimizer: MakeOptimizer
) -> None:
    trainer.groups = ["a", "b"]
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    schedulers = [pilot.scheduler(make_optimizer({"name": name, "lr": 1.0})) for name in "ab"]
    for _ in range(3):
        for scheduler in schedulers:
            scheduler.step(loss=1.0)
    for group, name in enumerate("ab"):
        wanted = [(at, trainer.rate(at, group)) for at in range(3)]
        assert written.of(f"lrpilot/lr/{name}") == wanted


def test_a_skipped_update_is_not_written(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    scheduler = pilot.scheduler(optimizer)
    for skipped in (True, False, True, True, False):
        scheduler.step(loss=1.0, skipped=skipped)
    assert [step for step, _ in written.of("lrpilot/lr")] == [0, 1]


def test_what_comes_again_after_a_rollback_is_written_again(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.directives = [
        pb.Directive(id="d1", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=4, reason="a", before=3)
    ]
    pilot, written = connect(), Written()
    TensorBoardLogger(pilot, written)
    pilot.on_directive("rollback", lambda directive: pilot.roll_back(directive, 3))
    train(pilot.scheduler(optimizer))
    assert [step for step, _ in written.of("lrpilot/lr")] == [0, 1, 2, 3, 3, 4]


def test_rank_0_alone_writes(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.changes = [CHANGE]
    pilot, written = connect(rank=1, world_size=2, key="k", reporter=1), Written()
    TensorBoardLogger(pilot, written)
    train(pilot.scheduler(optimizer))
    assert (written.scalars, written.texts) == ([], [])


def test_a_rank_0_that_reports_nothing_writes(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    pilot, written = connect(rank=0, world_size=2, key="k", reporter=1), Written()
    TensorBoardLogger(pilot, written)
    trainer.move(100)
    train(pilot.scheduler(optimizer), 3)
    assert [step for step, _ in written.of("lrpilot/lr")] == [0, 1, 2]


def test_a_logger_that_fails_is_said_once_and_training_goes_on(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.changes = [CHANGE]
    pilot = connect()
    TensorBoardLogger(pilot, Full())
    scheduler = pilot.scheduler(optimizer)
    with caplog.at_level(logging.WARNING):
        train(scheduler)
    assert scheduler.progress == 6
    failures = [record.getMessage() for record in caplog.records]
    assert failures == [
        "run small: TensorBoardLogger could not write: OSError: no space left on device. "
        "Training goes on, and so do the tries; this is said once"
    ]


def test_wrong_arguments_are_refused(connect: Connect) -> None:
    pilot = connect()
    for make, name in (
        (TensorBoardLogger, "writer"),
        (WandbLogger, "run"),
        (MlflowLogger, "mlflow"),
    ):
        with pytest.raises(lrpilot.InvalidArgument, match=f"^{name}: got .*an object that has "):
            make(pilot, object())
    with pytest.raises(lrpilot.InvalidArgument, match=r"^pilot: got "):
        TensorBoardLogger("pilot", Written())  # type: ignore[arg-type]
    with pytest.raises(lrpilot.InvalidArgument, match=r"^every: got 0"):
        TensorBoardLogger(pilot, Written(), every=0)


def test_nothing_is_imported_for_them() -> None:
    names = ["torch", "tensorboard", "wandb", "mlflow"]
    program = f"import sys, lrpilot.client.loggers; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_reason_of_a_real_policy_is_written(
    tmp_path: Path, make_optimizer: MakeOptimizer
) -> None:
    spec = {
        "name": "reasons",
        "total": 40,
        "learning_rate": {"peak": 0.5, "decay": {"style": "constant"}},
        "groups": [{"name": "a"}, {"name": "b", "peak": 0.25}],
        "policies": [{"kind": "plateau", "patience": 2, "factor": 0.5}],
        "feedback": {"delay": 2},
    }
    server, written = serve(tmp_path), Written()
    optimizer = make_optimizer({"name": "a", "lr": 1.0}, {"name": "b", "lr": 1.0})
    try:
        with lrpilot.connect(server.grpc, run="reasons", spec=spec) as pilot:
            TensorBoardLogger(pilot, written)
            train(pilot.scheduler(optimizer), 8)
    finally:
        server.dispose()
    rates = dict(written.of("lrpilot/lr/a"))
    # The losses of 1, 2 and 3 were no better than that of 0: it acts at 3 + 2.
    assert [rates[at] for at in range(8)] == [0.5] * 5 + [0.25] * 3
    ((tag, step, text),) = written.texts
    assert (tag, step) == ("lrpilot/change", 5)
    assert "policies.0 (plateau)" in text
    assert "lr a 0.5 -> 0.25" in text
    assert "lr b 0.25 -> 0.125" in text
