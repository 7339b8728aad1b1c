"""One rank of a job in leader mode, over a gloo process group and without a model.

The plan is the JSON in the first argument. Writes what it used line by line.
"""

import json
import logging
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from tests.e2e.training import Optimizer, loss_at

PLAN = json.loads(sys.argv[1])
RANK: int = PLAN["rank"]
FOLDER = Path(PLAN["folder"])
END_FILE = Path(PLAN["end_file"])
"""Holds the progress to end at; "ask": rank 0 says which. So many steps on, none is past it."""
MARGIN = 32
SAVE_FILE = FOLDER.parent / f"save-{PLAN['key']}"
"""While it exists rank 0 saves the state, once, at the next step."""


def replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text)
    partial.replace(path)


def write(name: str, row: object) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def end(progress: int) -> float:
    """Return the progress to end at; infinite until that is known."""
    if not END_FILE.exists():
        return math.inf
    text = END_FILE.read_text()
    if text == "ask":
        if RANK != 0:
            return math.inf
        text = str(progress + MARGIN * PLAN.get("increment", 1))
        replace(END_FILE, text)
    return int(text)


def where(pilot: lrpilot.Pilot, progress: int) -> list[object]:
    """Return whether rank 0 goes on alone, and up to where it could."""
    lease: Any = pilot._session._lease
    holder = lease._holder
    return [progress, holder._is_alone, holder._offers.reach]


def train(pilot: lrpilot.Pilot) -> None:
    optimizer, pauses = Optimizer(), random.Random(RANK)
    state = json.loads(Path(PLAN["state"]).read_text()) if "state" in PLAN else None
    scheduler = pilot.scheduler(optimizer, state)
    try:
        with (FOLDER / "used").open("a", buffering=1) as used:
            while scheduler.progress < end(scheduler.progress):
                here = scheduler.progress
                used.write(json.dumps([pilot.attempt, here, optimizer.values]) + "\n")
                if RANK == 0:
                    write("where", where(pilot, here))
                time.sleep(pauses.uniform(0.0, PLAN["pause_s"]))
                scheduler.step(PLAN.get("increment", 1), loss=loss_at(here))
                if RANK == 0 and SAVE_FILE.exists():
                    SAVE_FILE.unlink()
                    replace(FOLDER.parent / "state.json", json.dumps(scheduler.state_dict()))
    except lrpilot.LrpilotError as error:
        names = [type(error).__name__]
        # It stays refused, and no rank waits for another.
        for call in (scheduler.step, scheduler.apply):
            try:
                call()
            except lrpilot.LrpilotError as another:
                names.append(type(another).__name__)
        write("outcome", names)
        raise
    dist.barrier()
    write("outcome", [])


for name, number in PLAN["timing"].items():
    setattr(_timing, name, number)
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
dist.init_process_group(
    "gloo", init_method=PLAN["rendezvous"], rank=RANK, world_size=PLAN["world_size"]
)
with lrpilot.connect(
    PLAN["leader_address"] if RANK == 0 else PLAN["address"],
    run=PLAN["spec"]["name"],
    spec=PLAN["spec"],
    mode="leader",
    reporter=PLAN["reporter"],
) as connected:
    connected.on_change(lambda change: write("changes", [change.id, change.progress]))
    train(connected)
dist.destroy_process_group()
