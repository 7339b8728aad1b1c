"""One rank of the live run; its plan is the JSON in the first argument, its script live_script.py.

Writes what it used at each step, and what it was asked for and where it met it.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from tests.e2e.live_script import EVALUATED, SPEC, STOPS, goes_back, said

PLAN = json.loads(sys.argv[1])
RANK: int = PLAN["rank"]
FOLDER = Path(PLAN["folder"])
TOGETHER = FOLDER.parent
"""Folder of all ranks, in which they and the driver wait for each other's files."""
DEADLINE_S = 120.0


def write(name: str, row: object) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def wait_for(*names: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not all((TOGETHER / name).exists() for name in names):
        assert time.monotonic() < end_s, f"never: {names}"
        time.sleep(0.002)


class Optimizer:
    """Param groups without parameters."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"name": group["name"], "lr": 1.0, "weight_decay": 1.0} for group in SPEC["groups"]
        ]

    @property
    def values(self) -> list[str]:
        """LR and WD of each group in turn, as `float.hex`."""
        return [
            float(group[key]).hex() for group in self.param_groups for key in ("lr", "weight_decay")
        ]


class Training:
    """The loop, and what it does on directives."""

    def __init__(self, pilot: lrpilot.Pilot) -> None:
        self._pilot = pilot
        self._optimizer = Optimizer()
        self._stopped = False
        pilot.on_directive("rollback", self._roll_back)
        pilot.on_directive("evaluate", self._evaluate)
        pilot.on_directive("skip", self._note)
        pilot.on_directive("stop", self._stop)
        self._scheduler = pilot.scheduler(self._optimizer)

    def run(self) -> None:
        while not self._stopped:
            attempt, here = self._pilot.attempt, self._scheduler.progress
            assert attempt is not None
            if RANK == 0 and (attempt, here) in STOPS:
                wait_for(f"go-{attempt}-{here}")
            for step in said(attempt, here):
                self._use()
                self._scheduler.step(**step)
        self._use()

    def _use(self) -> None:
        row = [self._pilot.attempt, self._scheduler.progress, self._optimizer.values]
        write("used", row)

    def _note(self, directive: lrpilot.Directive) -> None:
        write("met", [self._pilot.attempt, self._scheduler.progress, directive.kind])

    def _roll_back(self, directive: lrpilot.Directive) -> None:
        self._note(directive)
        assert self._pilot.attempt is not None
        if not goes_back(self._pilot.attempt):
            raise lrpilot.DirectiveDeclined("no snapshot is old enough")
        # What a process group would do: no rank opens the attempt before all have come.
        (TOGETHER / f"met-{directive.id}-{RANK}").touch()
        wait_for(*(f"met-{directive.id}-{rank}" for rank in range(PLAN["world_size"])))
        self._pilot.roll_back(directive, directive.before - 2)

    def _evaluate(self, directive: lrpilot.Directive) -> None:
        self._note(directive)
        self._scheduler.report_validation("val_loss", EVALUATED)

    def _stop(self, directive: lrpilot.Directive) -> None:
        self._note(directive)
        self._stopped = True


# A job that comes back quickly is over sooner; how it comes back is the same.
_timing.BACKOFF_CAP_S = 0.2
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
with lrpilot.connect(
    PLAN["address"],
    run=PLAN["spec"]["name"],
    spec=PLAN["spec"],
    key=PLAN["key"],
    rank=RANK,
    world_size=PLAN["world_size"],
) as connected:
    Training(connected).run()
