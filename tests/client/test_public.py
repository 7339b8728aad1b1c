"""What the package offers, and what importing and using it brings along."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import TYPE_CHECKING

import lrpilot.client as lrpilot

if TYPE_CHECKING:
    from tests.client.conftest import FakeTrainer

ALL = """
AdjustmentNotFound AdjustmentRefused AdviceExpired AttemptNotOpen AttemptOpen AttemptSuperseded
BacklogFull BeforeAttempt BelowResumePoint BeyondHorizon BeyondPermit CaptureRefused Change
ClientFailed ConnectRefused Directive DirectiveDeclined GroupMismatch InvalidArgument
InvalidFields InvalidRequest InvalidSpec InvalidState JoinRefused LogForgotten LossConflict
LossUnreadable LossesPending LrpilotError NotHolder NotReporter Pilot PilotClosed PlanChanged
ResumePointRequired RevisionRefused RollbackHandler RunExists RunFinished RunLive RunNotFound
Scheduler ServerError ServerUnavailable SnapshotCost SpecChanged StateMismatch ValuesConflict
ValuesDiffer ValuesPending Violation connect plot
"""


def test_public_names() -> None:
    assert lrpilot.__all__ == ALL.split()
    assert all(hasattr(lrpilot, name) for name in lrpilot.__all__)


def test_signatures() -> None:
    """Scripts of users name these arguments."""
    assert list(inspect.signature(lrpilot.connect).parameters) == [
        "address",
        "run",
        "spec",
        "on_change",
        "reporter",
        "resume_at",
        "key",
        "rank",
        "world_size",
        "mode",
        "outage_timeout_s",
    ]
    assert str(inspect.signature(lrpilot.Pilot.report)) == (
        "(self, n: int, loss: Any, weight: float = 1.0, *, "
        "val_losses: collections.abc.Mapping[str, typing.Any] | None = None, grad_norm: Any = "
        "None, batch: int | None = None, skipped: bool = False) -> None"
    )
    drawn = ["begin", "end", "groups", "log", "timeout_s"]
    assert list(inspect.signature(lrpilot.plot).parameters) == ["address", "run", *drawn]
    assert list(inspect.signature(lrpilot.Pilot.plot).parameters) == ["self", *drawn]
    assert list(inspect.signature(lrpilot.Pilot.scheduler).parameters)[1:] == [
        "optimizer",
        "state",
        "defer",
        "wd_in_graph",
    ]
    assert list(inspect.signature(lrpilot.Scheduler.step).parameters)[1:] == [
        "increment",
        "loss",
        "weight",
        "val_losses",
        "grad_norm",
        "batch",
        "skipped",
    ]


def test_using_it_imports_neither_torch_nor_the_server(trainer: FakeTrainer) -> None:
    program = f"""
import sys
import lrpilot.client as lrpilot

class Optimizer:
    param_groups = [{{"lr": 1.0, "weight_decay": 0.1}}]

with lrpilot.connect({trainer.address!r}, run="small", spec={{"name": "small"}}) as pilot:
    scheduler = pilot.scheduler(Optimizer())
    for _ in range(20):
        scheduler.step(loss=1.0)
    scheduler.state_dict()
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{
    "torch", "numpy", "yaml", "pydantic", "sqlalchemy", "matplotlib"}}))
print([name for name in sys.modules if name.startswith(("lrpilot.core", "lrpilot.server"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n[]\n", 0), done.stderr
    assert trainer.losses == dict.fromkeys(range(20), 1.0)
