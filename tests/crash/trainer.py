"""One rank of a training job, as a process: the real client, and a loss that nobody computed.

Everything that it does follows from its plan. It writes a history, and says on its connection where
it stands: ("at", progress) before each step, then ("ended", name of the error or "", its text).
"""

import faulthandler
import json
import logging
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from tests.crash import process_group
from tests.crash.history import HistoryWriter, recorded_channels
from tests.crash.meddler import Meddling, meddled_channels

STALL_S = 0.05
"""A step that takes longer than its own time by less than this has waited for nobody."""

TIMING = {
    "CALL_S": 2.0,
    "OPEN_CALL_S": 3.0,
    "ANSWER_S": 1.0,
    "BLOCKED_WAIT_S": 1.0,
    "RENEW_WAIT_S": 1.0,
    "SAVE_WAIT_S": 1.0,
    "SAVE_PATIENCE_S": 20.0,
    "BACKOFF_CAP_S": 0.2,
    "RECONNECT_CAP_S": 0.2,
    "LEADER_PATIENCE_S": 0.3,
    "FEEDBACK_PATIENCE_S": 0.5,
    "HOLDER_WAIT_S": 0.3,
    "ACKNOWLEDGE_PATIENCE_S": 1.0,
    "ROLL_BACK_FLUSH_S": 5.0,
    "JOIN_S": 5.0,
}
"""A job that comes back quickly meets more faults; how it comes back is the same."""


@dataclass(frozen=True, kw_only=True)
class TrainerPlan:
    """What one rank of one start of the job does."""

    who: str
    folder: Path
    address: str
    spec: Mapping[str, Any]
    rank: int
    world_size: int
    key: str | None
    """None: the ranks have a process group, or are one."""
    leads: bool
    """Whether in leader mode."""
    reporters: tuple[int, ...]
    salt: str
    """Of the losses: the same one brings the same losses for the same LR."""
    end: int
    """Progress at which the training ends."""
    increment: int
    pause_s: float
    """Mean length of a step."""
    state: Path | None = None
    """A state to resume from."""
    resume_at: int | None = None
    """Progress to resume at where no state is given."""
    save_at: int | None = None
    """First progress at which rank 0 saves the state."""
    save_to: Path | None = None
    shares: bool = False
    """Whether the ranks of the machine share what the server answers."""
    odds: Mapping[str, float] = field(default_factory=dict)
    """How often a step is "skipped", has "no loss", has one that comes "late", has a "validation"
    loss: shares of all steps."""
    meddling: Meddling | None = None

    @property
    def history(self) -> Path:
        """Where it writes its history."""
        return self.folder / f"{self.who}.jsonl"

    @property
    def log(self) -> Path:
        """Where its standard streams go."""
        return self.folder / f"{self.who}.log"


class Optimizer:
    """Param groups, without parameters."""

    def __init__(self, groups: int) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"lr": 1.0, "weight_decay": 1.0} for _ in range(groups)
        ]


def loss_at(progress: int, learning_rate: float, salt: str) -> float:
    """Return a loss that falls slowly, with noise, and more so with a high LR; NaN now and then."""
    noise = random.Random(f"{salt}/{progress}")
    if noise.random() < 0.02:
        return noise.choice([math.nan, math.inf])
    return 2.0 + 1.0 / (1.0 + progress / 20.0) + noise.random() * (0.2 + 10.0 * learning_rate)


def train(plan: TrainerPlan, said: Any, links: process_group.Links) -> None:
    """Be the rank; the target of a process. `links` lead to the other ranks of a process group."""
    with plan.log.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name, number in TIMING.items():
        setattr(_timing, name, number)
    if plan.shares:
        os.environ["LOCAL_WORLD_SIZE"] = str(plan.world_size)
    # A laboratory that finds it stuck asks where.
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if links:
        process_group.join(plan.rank, plan.world_size, links)
    error = ("", "")
    with (
        HistoryWriter(plan.history, plan.who) as history,
        recorded_channels(history),
        meddled_channels(plan.meddling, history),
    ):
        try:
            _train(plan, history, said.send)
        except Exception as met:
            traceback.print_exc()
            error = (type(met).__name__, str(met))
    sys.stdout.flush()
    said.send(("ended", *error))


def _train(plan: TrainerPlan, history: HistoryWriter, say: Callable[[Any], None]) -> None:
    dice = random.Random(f"{plan.salt}/{plan.who}")
    with lrpilot.connect(
        plan.address,
        run=plan.spec["name"],
        spec=plan.spec,
        on_change="revise",
        key=plan.key,
        rank=plan.rank,
        world_size=plan.world_size,
        reporter=plan.reporters if len(plan.reporters) > 1 else plan.reporters[0],
        mode="leader" if plan.leads else "independent",
        resume_at=plan.resume_at,
        outage_timeout_s=60.0,
    ) as pilot:
        optimizer = Optimizer(len(plan.spec.get("groups", [None])))
        state = None if plan.state is None else json.loads(plan.state.read_text())
        if plan.key is None:
            # Ranks that share a key alone cannot agree on where to go back to.
            pilot.on_directive("rollback", lambda directive: _roll_back(pilot, directive, plan))
        scheduler = pilot.scheduler(optimizer, state)
        late: list[tuple[int, float]] = []
        saved = False
        while (here := scheduler.progress) < plan.end:
            groups = optimizer.param_groups
            rates = [float(group["lr"]) for group in groups]
            attempt = pilot.attempt
            assert attempt is not None
            history.used(
                pilot.run,
                attempt,
                here,
                rates,
                [float(group["weight_decay"]) for group in groups]
                if "weight_decay" in plan.spec
                else None,
            )
            say(("at", here))
            if plan.rank == 0 and not saved and plan.save_at is not None and here >= plan.save_at:
                saved = True
                _save(scheduler, plan)
            time.sleep(dice.uniform(0.5, 1.5) * plan.pause_s)
            # What happens at a step is the same on every rank and at every try.
            chance = random.Random(f"{plan.salt}/{attempt}/{here}")
            loss: float | None = loss_at(here, rates[0], plan.salt)
            begun_s = time.monotonic()
            while chance.random() < plan.odds.get("skipped", 0.0):
                scheduler.step(loss=loss, skipped=True)
            if chance.random() < plan.odds.get("no loss", 0.0):
                loss = None
            elif loss is not None and chance.random() < plan.odds.get("late", 0.0):
                late.append((here, loss))
                loss = None
            validation = chance.random() < plan.odds.get("validation", 0.0)
            scheduler.step(
                plan.increment,
                loss=loss,
                val_losses={"val": chance.random()} if validation else None,
            )
            if pilot.attempt != attempt:
                # A rollback: what was late belongs to the attempt before.
                late.clear()
                saved = False
            if late and scheduler.progress > late[0][0] + 3 * plan.increment:
                pilot.report(*late.pop(0))
            waited_s = time.monotonic() - begun_s
            if waited_s >= STALL_S:
                history.stall(waited_s, scheduler.progress)


def _roll_back(pilot: lrpilot.Pilot, directive: lrpilot.Directive, plan: TrainerPlan) -> None:
    """Go back a little further than asked; what was saved behind that belongs to what is undone."""
    progress = directive.before - directive.before % 10
    try:
        pilot.roll_back(directive, progress)
    except lrpilot.StateMismatch as error:
        # The run began anew from a state behind that.
        raise lrpilot.DirectiveDeclined(str(error)) from error
    assert plan.save_to is not None
    plan.save_to.unlink(missing_ok=True)


def _save(scheduler: Any, plan: TrainerPlan) -> None:
    assert plan.save_to is not None
    partial = plan.save_to.with_suffix(f".{plan.who}")
    partial.write_text(json.dumps(scheduler.state_dict()))
    partial.replace(plan.save_to)
