"""A worker of torchrun: trains to a length from the newest checkpoint; run by test_elastic.py.

The plan is the JSON in the first argument. What it used goes line by line into a file of its own.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lrpilot.client as lrpilot
from tests.e2e.training import loss_at

PLAN = json.loads(sys.argv[1])
FOLDER = Path(PLAN["folder"])
ZOMBIE_STEPS = 100


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=PLAN["collective_s"]))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    path = FOLDER / "checkpoint.pt"
    checkpoint: dict[str, Any] = {}
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    # Nobody may replace the checkpoint before everyone has read it.
    dist.barrier()
    spec = PLAN["spec"]
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec) as pilot:
        scheduler = pilot.scheduler(optimizer, state=checkpoint.get("scheduler"))
        place = {"attempt": pilot.attempt, "rank": rank, "size": size, "pid": os.getpid()}
        with (FOLDER / f"used-{os.getpid()}").open("w") as file:
            try:
                train(ddp, optimizer, scheduler, path, file, place)
            except RuntimeError:
                zombies = FOLDER / "zombies"
                if zombies.exists() and os.getpid() in json.loads(zombies.read_text()):
                    haunt(scheduler, optimizer, file, place)
                raise
    dist.destroy_process_group()


def train(
    ddp: Any, optimizer: Any, scheduler: lrpilot.Scheduler, path: Path, file: Any, place: Any
) -> None:
    while scheduler.progress < PLAN["steps"]:
        here = scheduler.progress
        inputs = torch.full((2, 4), here / 100.0)
        optimizer.zero_grad()
        (ddp(inputs) ** 2).mean().backward()
        note(file, place, here, optimizer)
        optimizer.step()
        scheduler.step(loss=loss_at(here))
        if place["rank"] == 0 and scheduler.progress % PLAN["save_every"] == 0:
            saved = {
                "model": ddp.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(saved, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        time.sleep(0.02)
        while scheduler.progress == PLAN["steps"] - 1 and place["size"] < PLAN["most"]:
            # The last step is made by all nodes; torchrun ends this process before.
            time.sleep(0.1)


def note(file: Any, place: Any, progress: int, optimizer: Any) -> None:
    (group,) = optimizer.param_groups
    values = [group["lr"].hex(), group["weight_decay"].hex()]
    file.write(json.dumps({**place, "progress": progress, "values": values}) + "\n")
    file.flush()


def haunt(scheduler: lrpilot.Scheduler, optimizer: Any, file: Any, place: Any) -> None:
    """Go on alone, as a worker whose job has gone on without it might; note how it ends."""
    try:
        for _ in range(ZOMBIE_STEPS):
            note(file, place, scheduler.progress, optimizer)
            scheduler.step(loss=-1.0)
    except lrpilot.LrpilotError as error:
        (FOLDER / f"zombie-{place['pid']}").write_text(type(error).__name__)
        raise


main()
