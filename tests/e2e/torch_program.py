"""One of two ranks over a gloo process group, which train a small model on LR and WD from a server.

The plan is the JSON in the first argument. Prints one JSON object: what this rank used and saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lrpilot.client as lrpilot

PLAN = json.loads(sys.argv[1])
CHECKPOINT = Path(PLAN["checkpoint"])


def main() -> None:
    rank = PLAN["rank"]
    dist.init_process_group("gloo", init_method=PLAN["rendezvous"], rank=rank, world_size=2)
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        [{"name": "weight", "params": [model.weight]}, {"name": "bias", "params": [model.bias]}]
    )
    checkpoint: dict[str, Any] = {}
    if PLAN["resumes"]:
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    spec = PLAN["spec"]
    used = []
    with lrpilot.connect(PLAN["address"], run=spec["name"], spec=spec) as pilot:
        scheduler = pilot.scheduler(optimizer, state=checkpoint.get("scheduler"))
        while scheduler.progress < PLAN["until"]:
            here = scheduler.progress
            torch.manual_seed(2 * here + rank)
            inputs = torch.randn(8, 4)
            loss = ((ddp(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            groups = optimizer.param_groups
            values = [group["lr"] for group in groups] + [group["weight_decay"] for group in groups]
            used.append([here, (mean / 2).item().hex(), [value.hex() for value in values]])
            scheduler.step(loss=mean / 2)
            if rank == 0 and scheduler.progress == PLAN["save_at"]:
                # Rank 0 alone: no rank waits for another.
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                torch.save(saved, CHECKPOINT)
        attempt = pilot.attempt
    weights = [x.hex() for x in model.weight.flatten().tolist()]
    dist.destroy_process_group()
    sys.stdout.write(json.dumps({"attempt": attempt, "used": used, "weights": weights}))


main()
