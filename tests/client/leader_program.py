"""One of three ranks of a job in leader mode, over a gloo process group; run by test_leader.py.

Prints one JSON object: what became of each scene on this rank.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb

RANK, RENDEZVOUS, ADDRESS = int(sys.argv[1]), sys.argv[2], sys.argv[3]

results: dict[str, Any] = {}

# Who waits for losses that nobody reports says so soon; a slow answer is no outage.
_timing.HOLDER_WAIT_S, _timing.LEADER_PATIENCE_S = 0.1, 60.0


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=0.1)


def refused(call: Callable[[], object]) -> list[str]:
    """Return the error of a call; every rank must come out of it."""
    try:
        call()
    except lrpilot.LrpilotError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def connect(**options: Any) -> lrpilot.Pilot:
    return lrpilot.connect(ADDRESS, run="small", **{"mode": "leader", "reporter": 1, **options})


def main() -> None:
    # Not gloo by name: leader mode makes a group of its own beside it.
    dist.init_process_group("cpu:gloo", init_method=RENDEZVOUS, rank=RANK, world_size=3)
    assert dist.get_backend() != "gloo"
    results["modes"] = refused(lambda: connect(mode="independent" if RANK == 1 else "leader"))

    heard: list[str] = []
    pilot = connect()
    if RANK == 2:
        pilot.on_change(lambda change: heard.append(change.id))
    # Rank 0 may evaluate alone for long before it comes to the next exchange.
    group: Any = pilot._session._passing
    options = group._handle._get_backend(torch.device("cpu")).options
    results["patience"] = options._timeout.total_seconds()
    scheduler = pilot.scheduler(held := optimizer())
    rates = [held.param_groups[0]["lr"].hex()]
    for _ in range(40):
        scheduler.step(loss=1.0 + RANK)
        rates.append(held.param_groups[0]["lr"].hex())
    results["trained"], results["heard"] = rates, heard
    results["by hand"] = pilot.values(80)[0][0].hex()
    results["refused"] = refused(lambda: pilot.values(10_000))
    results["apart"] = refused(lambda: pilot.values(200 + (RANK == 1)))
    dist.barrier()
    pilot.close()

    # Another start of the job takes the run over: rank 0 hears of it, and tells the others.
    pilot = connect()
    scheduler = pilot.scheduler(optimizer())
    dist.barrier()
    if RANK == 0:
        pilot._session.link.stub.OpenAttempt(pb.OpenAttemptRequest(run="small", directive="other"))

    def train() -> None:
        for _ in range(1000):
            scheduler.step(loss=1.0)

    # It stays refused, and no rank waits for another.
    results["superseded"] = [refused(train), refused(scheduler.apply)]

    # What a background thread of rank 0 alone met; it does not leave the others in the exchange.
    pilot = connect(reporter=0)
    scheduler = pilot.scheduler(optimizer())
    if RANK == 0:
        pilot._session.link.fail(lrpilot.LossConflict("staged"))
    results["failed"] = [refused(train), refused(scheduler.apply)]
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(results))


main()
