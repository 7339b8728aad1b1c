"""One of two ranks of a job, over a gloo process group; run by test_ranks.py.

Prints one JSON object: what became of each scene on this rank.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import lrpilot.client as lrpilot

RANK, RENDEZVOUS, ADDRESS = int(sys.argv[1]), sys.argv[2], sys.argv[3]

results: dict[str, Any] = {}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=0.1)


def refused(scene: str, *, state: Any = None, **options: Any) -> None:
    """Note the error of connecting and opening; both ranks must come out of it."""
    try:
        with lrpilot.connect(ADDRESS, **{"run": "small", **options}) as pilot:
            pilot.scheduler(optimizer(), state)
    except lrpilot.LrpilotError as error:
        results[scene] = [type(error).__name__, str(error)]


def state(progress: int) -> dict[str, Any]:
    return {"version": 1, "run": "small", "progress": progress, "state": ""}


def main() -> None:
    dist.init_process_group("gloo", init_method=RENDEZVOUS, rank=RANK, world_size=2)
    # The server refuses the first call of each method; rank 0 alone makes them.
    refused("attach refused")
    refused("open refused")
    refused("argument", resume_at=-1 if RANK == 1 else None)
    refused("options", reporter=RANK)
    refused("spec", spec="no/such/file.yaml" if RANK == 0 else None)
    refused("state", state={} if RANK == 1 else state(3))
    refused("progress", state=state(3 + 2 * RANK))
    refused("one state", state=state(3) if RANK == 0 else None)

    # The spec is read on rank 0, the losses on rank 1, the state is saved on rank 0.
    spec = "name: small\n" if RANK == 0 else "no/such/file.yaml"
    with lrpilot.connect(ADDRESS, run="small", spec=spec, reporter=1, resume_at=4) as pilot:
        scheduler = pilot.scheduler(held := optimizer(), defer=True)
        rates = []
        for _ in range(20):
            held.step()
            rates.append(held.param_groups[0]["lr"].hex())
            loss = torch.tensor(1.0 + RANK)
            dist.all_reduce(loss)
            scheduler.step(loss=loss if RANK == 1 else torch.zeros(7))
        results["trained"] = [pilot.attempt, pilot.rank, scheduler.progress, rates]
        if RANK == 0:
            results["saved"] = scheduler.state_dict()
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(results))


main()
