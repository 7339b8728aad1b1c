"""A rank that knows its place and its start from what a launcher has set alone.

The plan is the JSON in the first argument: `key` is a format of environment variables, as a user
writes it. What was used goes line by line into a file of the rank's own.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lrpilot.client as lrpilot
from tests.e2e.training import Optimizer, loss_at

PLAN: dict[str, Any] = json.loads(sys.argv[1])
FOLDER = Path(PLAN["folder"])


def main() -> None:
    spec = PLAN["spec"]
    key = PLAN["key"].format_map(os.environ)
    checkpoint = FOLDER / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if PLAN["resumes"] else None
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec, key=key) as pilot:
        optimizer = Optimizer()
        scheduler = pilot.scheduler(optimizer, state=state)
        place = {"attempt": pilot.attempt, "rank": pilot.rank, "pid": os.getpid()}
        with (FOLDER / f"used-{os.getpid()}").open("w") as file:
            try:
                while scheduler.progress < PLAN["steps"]:
                    here = scheduler.progress
                    line = {**place, "progress": here, "values": optimizer.values}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    scheduler.step(loss=loss_at(here))
                    if pilot.rank == 0 and scheduler.progress == PLAN["save_at"]:
                        partial = checkpoint.with_suffix(".new")
                        partial.write_text(json.dumps(scheduler.state_dict()))
                        partial.replace(checkpoint)
                    time.sleep(0.01)
            except lrpilot.LrpilotError as error:
                (FOLDER / f"ended-{os.getpid()}").write_text(type(error).__name__)
                raise


main()
