"""What a training program of these tests writes down, and where it is interrupted.

A program trains a small real model in its framework. Its first argument is the plan, as JSON:

    address     of the server
    spec        the run spec
    steps       how many completed updates there are in all
    folder      where it may write, checkpoints included
    save_at     number of completed updates after which it saves a checkpoint
    resumes     whether it resumes from that checkpoint
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}

WAIT_S = 60.0
"""Every wait ends by then."""


class Recorder:
    """Writes one line for each step that the optimizer makes.

    `used` is called right before the optimizer's step, when the values are those that it uses;
    `lost` once the loss is known. Both may be called on rank 0 alone.
    """

    def __init__(self, plan: dict[str, Any] = PLAN) -> None:
        self._folder = Path(plan["folder"])
        self._pause_at, self._die_after = plan.get("pause_at"), plan.get("die_after")
        self._file = (self._folder / plan["record"]).open("a")
        self._steps = 0

    def used(self, progress: int, optimizer: Any) -> None:
        """Note LR and WD of every param group of an optimizer at a progress."""
        if self._steps == self._pause_at:
            self._pause()
        self._steps += 1
        values = [
            [float(group["lr"]), group.get("weight_decay")] for group in optimizer.param_groups
        ]
        self._write({"progress": progress, "values": [[_hex(x) for x in item] for item in values]})

    def lost(self, progress: int, loss: Any) -> None:
        """Note the loss that was reported for a progress; the process may end here."""
        self._write({"progress": progress, "loss": float(loss).hex()})
        if self._steps == self._die_after:
            os.kill(os.getpid(), 9)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _pause(self) -> None:
        """Wait until the test lets it go on: it restarts the server meanwhile."""
        (self._folder / "paused").touch()
        end_s = time.monotonic() + WAIT_S
        while not (self._folder / "go-on").exists():
            if time.monotonic() > end_s:
                raise TimeoutError("nobody lets the training go on")
            time.sleep(0.01)


def _hex(value: Any) -> str | None:
    return None if value is None else float(value).hex()
