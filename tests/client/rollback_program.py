"""One of two ranks that go back together, over a gloo process group; run by test_rollback.py.

Prints one JSON object: what became of the training on this rank.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lrpilot.client as lrpilot

RANK, RENDEZVOUS, ADDRESS = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def bits(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    momenta = [state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()]
    tensors = [*(item.detach() for item in model.parameters()), *momenta]
    return [number.hex() for item in tensors for number in item.double().flatten().tolist()]


def missing(progress: int) -> Any:
    raise FileNotFoundError(progress)


def main() -> None:
    dist.init_process_group("gloo", init_method=RENDEZVOUS, rank=RANK, world_size=2)
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    said: dict[str, Any] = {"progress": [], "at 12": [], "data": 0}
    with lrpilot.connect(ADDRESS, run="small", spec={"name": "small"}) as pilot:
        scheduler = pilot.scheduler(optimizer)
        handler = lrpilot.RollbackHandler(
            pilot,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            every=4,
            keep=4 - 2 * RANK,
        )
        for _ in range(26):
            said["data"] += 1
            batch = torch.full((4, 3), (said["data"] + RANK) / 50)
            optimizer.zero_grad()
            loss = (model(batch) ** 2).mean()
            loss.backward()
            optimizer.step()
            dist.all_reduce(loss := loss.detach())
            if scheduler.progress == 21 and RANK == 1:
                # What a file that went missing comes to.
                handler._store.get = missing  # type: ignore[method-assign]
            scheduler.step(loss=loss)
            said["progress"].append(scheduler.progress)
            if scheduler.progress == 12:
                said["at 12"].append(bits(model, optimizer))
        said["attempt"] = pilot.attempt
        said["bits"] = bits(model, optimizer)
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(said))


main()
