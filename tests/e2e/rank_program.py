"""One rank of a training job without a model; its plan is the JSON in the first argument.

Writes what it used and what was acknowledged line by line: whoever kills it finds all of it.
"""

import json
import logging
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import grpc

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb
from tests.e2e.training import Optimizer, loss_at

PLAN = json.loads(sys.argv[1])
RANK: int = PLAN["rank"]
FOLDER = Path(PLAN["folder"])
SALT: str = PLAN.get("salt", "")
PAUSE_S: float = PLAN.get("pause_s", 0.0)
"""Bound of the random time that a step takes."""
END_FILE = Path(PLAN["end_file"])
"""Holds the progress to end at; "ask": rank 0 says which. With feedback none is past it yet."""
MARGIN = 64


def write(name: str, row: object) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def watch(stub: Any, method: str) -> None:
    """Note each call without an answer, and each loss that is acknowledged."""
    call = getattr(stub, method)

    def watched(request: Any, timeout: float) -> Any:
        try:
            answer = call(request, timeout=timeout)
        except grpc.RpcError as error:
            write("lost", [method, error.code().name])
            raise
        if isinstance(request, pb.ReportLossesRequest):
            for report, outcome in zip(request.reports, answer.outcomes, strict=True):
                name = pb.ReportOutcome.Name(outcome).removeprefix("REPORT_OUTCOME_")
                loss = report.loss.hex() if report.HasField("loss") else "none"
                write("acknowledged", [report.progress, loss, name])
        return answer

    setattr(stub, method, watched)


def end(progress: int) -> float:
    """Return the progress to end at; infinite until that is known."""
    if not END_FILE.exists():
        return math.inf
    text = END_FILE.read_text()
    if text == "ask":
        if RANK != 0:
            return math.inf
        text = str(max(progress + MARGIN, PLAN.get("end_after", 0)))
        partial = END_FILE.with_suffix(".part")
        partial.write_text(text)
        partial.replace(END_FILE)
    return int(text)


def save(scheduler: lrpilot.Scheduler, name: str) -> None:
    """Write a checkpoint, which appears complete."""
    partial = FOLDER / "state.part"
    partial.write_text(json.dumps(scheduler.state_dict()))
    partial.replace(FOLDER.parent / name)


def train(pilot: lrpilot.Pilot) -> None:
    stub = pilot._session.link.stub
    for method in ("OpenAttempt", "GetValues", "ReportLosses", "SaveState"):
        watch(stub, method)
    optimizer, pauses = Optimizer(), random.Random(f"{SALT}/{RANK}")
    state = json.loads(Path(PLAN["state"]).read_text()) if "state" in PLAN else None
    scheduler = pilot.scheduler(optimizer, state)
    try:
        with (FOLDER / "used").open("a", buffering=1) as used:
            while scheduler.progress < end(scheduler.progress):
                here = scheduler.progress
                used.write(json.dumps([pilot.attempt, here, optimizer.values]) + "\n")
                time.sleep(pauses.uniform(0.0, PAUSE_S))
                scheduler.step(loss=loss_at(here, SALT))
                here = scheduler.progress
                if RANK == 0 and here == PLAN.get("save_at"):
                    save(scheduler, "state.json")
                if RANK == 0 and here in PLAN.get("saves", ()):
                    save(scheduler, f"state-{here}.json")
    except lrpilot.LrpilotError as error:
        names = [type(error).__name__]
        # It stays refused, whatever it tries; nothing opens the run again.
        for call in (scheduler.step, scheduler.apply, scheduler.state_dict):
            try:
                call()
            except lrpilot.LrpilotError as another:
                names.append(type(another).__name__)
        write("outcome", names)
        raise
    write("outcome", [])


# A job that comes back quickly meets more kills; how it comes back is the same.
_timing.BACKOFF_CAP_S = 0.2
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
with lrpilot.connect(
    PLAN["address"],
    run=PLAN["spec"]["name"],
    spec=PLAN["spec"],
    key=PLAN["key"],
    rank=RANK,
    world_size=PLAN["world_size"],
    reporter=PLAN.get("reporter", 0),
) as connected:
    train(connected)
